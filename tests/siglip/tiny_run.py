"""The smallest run that is a run: a real two-tower model and batches made from nothing but their position."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import P_REPLICATED, make_mesh
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.loop import Program, make_program, train
from siglip.training.optim import OptimConfig
from siglip.training.step import TrainState
from siglip.workdir.metrics import LogConfig

MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=50, length=6),
    out_dim=(None, 32),
)


def tiny_config(workdir: Path, **overrides) -> TrainConfig:
    """Eight steps of sixteen pairs. The tests that change nothing here, on two devices, compile one program together."""
    config = TrainConfig(
        data=DataConfig(sources=(SourceConfig("unused.tar"),), tokenizer="unused.model"),
        model=MODEL,
        total_steps=8,
        batch_size=16,
        workdir=str(workdir),
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        log=LogConfig(every_steps=2, progress=False),
    )
    return dataclasses.replace(config, **overrides)


def no_penalty(params: dict) -> float:
    return 0.0


def toy_program(config: TrainConfig, *, penalty: Callable[[dict], Any] = no_penalty) -> Program:
    """A line from an image's brightness to its caption's first token: the loop at work, compiled in no time."""
    return _toy_program(make_mesh(config.mesh), config.optim.lr, penalty)


@functools.cache
def _toy_program(mesh: Mesh, lr: float, penalty: Callable[[dict], Any]) -> Program:
    everywhere = NamedSharding(mesh, P_REPLICATED)
    adam = optax.adam(lr)

    def init(given):
        params = {"w": jnp.zeros(16), "t": jnp.log(10.0)[None], "b": jnp.full(1, -10.0)}
        return jax.device_put(TrainState(jnp.zeros((), jnp.int32), params, adam.init(params)), everywhere)

    def loss_of(params, batch):
        brightness = batch["image"].astype(jnp.float32).mean((1, 2, 3)) / 255
        # As in the text tower, a token out of range is NaN.
        level = jnp.take(jnp.arange(4000) / 50, batch["text"][:, :1], mode="fill", fill_value=jnp.nan)
        return jnp.mean((brightness[:, None] * params["w"][None] - level) ** 2) + penalty(params)

    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_of)(state.params, batch)
        updates, opt_state = adam.update(grads, state.opt_state)
        metrics = {"train/loss": loss, "train/update_norm": optax.tree.norm(updates)}
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    shapes = jax.eval_shape(init, {})
    abstract_state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), shapes)
    return Program(
        mesh, abstract_state, jax.jit(init, out_shardings=everywhere), jax.jit(step, out_shardings=everywhere)
    )


def drifting_program(config: TrainConfig) -> Program:
    """The model of the config with steps that add a little to all parameters, the first nothing: for the files of a run.

    A real step takes seconds to trace, whatever it computes.
    """
    program = make_program(config)
    where = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)

    @functools.partial(jax.jit, out_shardings=(where, None))
    def step(state, batch):
        params = jax.tree.map(lambda leaf: leaf + 1e-3 * state.step, state.params)
        metrics = {"train/loss": jnp.ones(()), "train/update_norm": jnp.ones(())}
        return dataclasses.replace(state, step=state.step + 1, params=params), metrics

    return program._replace(step=step)


def use_devices(patch: pytest.MonkeyPatch, count: int) -> None:
    """From here on this process has only the first `count` of its devices: fewer compile faster."""
    patch.setattr(jax, "devices", lambda: jax.local_devices()[:count])


class TinyBatches:
    """Batch k is a pure function of k; remembers the keys it handed out."""

    def __init__(self, batch_size: int = 16) -> None:
        self.position, self.batch_size = 0, batch_size
        self.seen: list[str] = []
        self.counts: dict[str, int] = {}

    def __next__(self):
        rng = np.random.default_rng(self.position)
        keys = [f"{self.position}-{i}" for i in range(self.batch_size)]
        self.position += 1
        self.seen += keys
        # Every image is one grey level and its caption spells that level: learnable in a few steps.
        level = rng.integers(0, 50, self.batch_size)
        image = np.broadcast_to((level * 5).astype(np.uint8)[:, None, None, None], (self.batch_size, 16, 16, 3))
        return {
            "image": np.ascontiguousarray(image),
            "text": np.repeat(level[:, None], 6, 1).astype(np.int32),
            "key": keys,
        }

    def state(self):
        return {"position": self.position}

    def progress(self):
        return {"source_0/pairs": self.position * self.batch_size}

    def restore(self, state):
        self.position = state["position"]

    def close(self):
        pass


class StopsAt(TinyBatches):
    """Sends this process a signal while batch `stop_at` is being made."""

    def __init__(self, stop_at: int, signum: int) -> None:
        super().__init__()
        self.stop_at, self.signum = stop_at, signum

    def __next__(self):
        if self.position == self.stop_at - 1:
            os.kill(os.getpid(), self.signum)
        return super().__next__()


def assert_bit_equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def train_toy(config, batches, **kwargs):
    """The loop itself around a program that compiles at once."""
    return train(config, batches, program=toy_program(config), **kwargs)


def with_task(**kwargs):
    """Settings of a run that has one evaluation, whose scores the test hands in."""
    return {"eval": EvalConfig(tasks=(Retrieval("unused.tar", name="toy"),), **kwargs)}


def scored(scores):
    """An `evaluate` that gives these scores, one a call."""
    scores = iter(scores)
    return lambda params, due: {"eval/retrieval/toy/score": next(scores)}
