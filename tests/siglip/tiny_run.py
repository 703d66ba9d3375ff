"""The smallest run that is a run: a real two-tower model and batches made from nothing but their position."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
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
        # Every picture is one grey level and its caption spells that level: learnable in a few steps.
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
