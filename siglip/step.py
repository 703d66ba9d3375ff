"""The training state and the pure functions that make, advance and use it.

A batch is {"image": uint8 [b, h, w, 3], "text": int32 [b, l]}; pixels travel to the device as bytes and become
x / 127.5 - 1 there. `make_train_step` returns one jitted function that donates the state it is given.

The trap: the donated state is gone after the call. Keep the returned one, never the argument.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from siglip import sharding
from siglip.losses import Impl, chunked_sigmoid_loss, softmax_loss
from siglip.models.two_tower import ModelConfig, init_params, make_model
from siglip.shapes import Array, Float, Int, UInt8

Batch = Mapping[str, Array]
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss, and how it is spread over the devices.

    Attributes:
        kind: "sigmoid" is SigLIP's, "softmax" is CLIP's (the baseline; dense, ignores the other fields and the bias).
        impl: "all_gather", "ring" or "auto" (siglip.losses.chunked_sigmoid_loss).
        chunk_size: texts per device and step; None has it chosen.
    """

    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    impl: Impl = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"loss.chunk_size={self.chunk_size} must be at least 1, or None to have it chosen")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes: all of it is saved, all of it is restored.

    The same structure also holds its shapes or its shardings, hence the open types.

    Attributes:
        step: int32 scalar, optimizer steps taken.
        params: nested dict of float32 arrays under the published names.
        opt_state: the optax state.
    """

    step: Any
    params: Any
    opt_state: Any


def normalize_pixels(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """0 … 255 -> -1 … 1, the range of every published SigLIP checkpoint."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    mesh_config: sharding.MeshConfig,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """A fresh state, born sharded as it will be used.

    Args:
        params: start from these instead of random ones (host or device arrays under the same names).
    """

    def init() -> TrainState:
        fresh = init_params(model, jax.random.key(seed)) if params is None else jax.tree.map(jnp.asarray, params)
        return TrainState(jnp.zeros((), jnp.int32), fresh, optimizer.init(fresh))

    return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init), mesh=mesh, mesh_config=mesh_config))()


def state_shardings(state: TrainState, *, mesh: Mesh, mesh_config: sharding.MeshConfig) -> TrainState:
    """A TrainState of NamedShardings for a TrainState of arrays or shapes."""
    params = sharding.param_shardings(state.params, mesh, mesh_config)
    replicated = NamedSharding(mesh, sharding.P_REPLICATED)
    return TrainState(replicated, params, sharding.like_params(state.opt_state, state.params, params, mesh))


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    *,
    mesh: Mesh,
    loss: LossConfig,
    frozen: Params,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The jitted step: (state, batch) -> (state, metrics). The state is donated.

    Args:
        schedule: step -> factor, only to report it as `train/schedule`.
        frozen: bools like the parameters; True where they do not train (their gradient is never computed).
    """
    apply_loss = make_loss_fn(model, mesh=mesh, loss=loss)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        def loss_of(params: Params) -> Float[Array, ""]:
            params = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)
            return apply_loss(params, batch)

        value, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "train/loss": value,
            "train/t": jnp.exp(state.params["t"]).reshape(()),
            "train/bias": state.params["b"].reshape(()),
            "train/schedule": jnp.asarray(schedule(state.step), jnp.float32),
            "train/grad_norm": optax.global_norm(grads),
            "train/param_norm": optax.global_norm(state.params),
            "train/update_norm": optax.global_norm(updates),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_loss_fn(model: ModelConfig, *, mesh: Mesh, loss: LossConfig) -> Callable[[Params, Batch], Float[Array, ""]]:
    """(params, batch) -> the scalar loss of the global batch."""
    module = make_model(model)

    def loss_fn(params: Params, batch: Batch) -> Float[Array, ""]:
        zimg, ztxt, _ = module.apply({"params": params}, normalize_pixels(batch["image"]), batch["text"])
        if loss.kind == "softmax":
            return softmax_loss(zimg, ztxt, params["t"].reshape(()))
        return chunked_sigmoid_loss(
            zimg, ztxt, params["t"], params["b"],
            mesh=mesh, axis=sharding.BATCH_AXES, chunk_size=loss.chunk_size, impl=loss.impl,
        )  # fmt: skip

    return loss_fn


class EmbedFns(NamedTuple):
    """Jitted forward passes of one tower each; leading axes are free, a new one compiles once."""

    images: Callable[[Params, UInt8[Array, "b h w 3"]], Float[Array, "b e"]]
    texts: Callable[[Params, Int[Array, "b l"]], Float[Array, "b e"]]


def make_embed_fns(model: ModelConfig) -> EmbedFns:
    """uint8 pictures or token ids -> L2-normalised embeddings."""
    module = make_model(model)
    return EmbedFns(
        images=jax.jit(lambda params, images: module.apply({"params": params}, normalize_pixels(images), None)[0]),
        texts=jax.jit(lambda params, texts: module.apply({"params": params}, None, texts)[1]),
    )
