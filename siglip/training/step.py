"""The training state and the pure functions that make, advance and use it.

A batch is {"image": uint8 [b, h, w, 3], "text": int32 [b, l]}; pixels travel to the device as bytes and become
x / 127.5 - 1 there. With a frozen image tower it may hold "zimg", float32 [b, e], in place of the pictures: what the tower
makes of them, normalised, and then the tower does not run (LiT, arXiv:2111.07991). `make_train_step` returns one jitted
function that donates the state it is given.

The trap: the donated state is gone after the call. Keep the returned one, never the argument.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from siglip import trees
from siglip.array_types import Array, Float, UInt8
from siglip.errors import UserError
from siglip.losses import Impl, chunked_sigmoid_loss, softmax_loss
from siglip.models.two_tower import ModelConfig, init_params, make_model
from siglip.parallel import sharding
from siglip.training.accumulation import Batch, Params, make_value_and_grad


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss, and how it is spread over the devices.

    Attributes:
        kind: "sigmoid" is SigLIP's, "softmax" is CLIP's (the baseline; dense, ignores impl, chunk_size, dtype and the bias).
        impl: "all_gather", "ring" or "auto" (siglip.losses.chunked_sigmoid_loss).
        chunk_size: texts per device and step; None has it chosen.
        dtype: of the embeddings in the loss's matrix products, which accumulate in float32; "auto" takes bfloat16 when a
            tower does.
        micro_batch_size: pairs of the global batch that pass through the towers at a time: the same loss and gradients as
            the whole batch at once, for one more forward pass (siglip.training.accumulation). None for the whole batch.
    """

    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    impl: Impl = "auto"
    chunk_size: int | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(
                f"loss.micro_batch_size={self.micro_batch_size} must be at least 1, or None for the whole batch"
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UserError(f"loss.chunk_size={self.chunk_size} must be at least 1, or None to have it chosen")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes: all of it is saved, all of it is restored.

    The same structure also holds its shapes or its shardings, hence the open types.

    Attributes:
        step: int32 scalar, optimizer steps taken.
        params: nested dict of float32 arrays under the published names.
        opt_state: the optax state.
        ema: running average of the parameters, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def eval_params(self) -> Any:
        """What is evaluated and exported: the running average where there is one."""
        return self.params if self.ema is None else self.ema


def normalize_pixels(images: UInt8[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """0 … 255 -> -1 … 1, the range of every published SigLIP checkpoint."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def state_like(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    mesh_config: sharding.MeshConfig,
    ema: bool = False,
) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings; `ema`: with a running average of the parameters.

    Raises:
        ValueError: if the mesh has an fsdp axis that shards nothing.
    """
    shapes = jax.eval_shape(lambda: _fresh_state(model, optimizer, jax.random.key(0), ema=ema))
    params = sharding.param_shardings(shapes.params, mesh, mesh_config)
    replicated = NamedSharding(mesh, sharding.P_REPLICATED)
    opt_state = sharding.like_params(shapes.opt_state, shapes.params, params, mesh)
    layout = TrainState(replicated, params, opt_state, params if ema else None)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    like: TrainState,
    seed: int,
    given: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """A fresh state, born sharded as `like` (from `state_like`) says.

    Args:
        given: parameters by path that are not to be drawn (siglip.training.warm_start.put); they are donated. The
            others are what they would be without any given.
    """
    init = jax.jit(
        lambda given: _fresh_state(model, optimizer, jax.random.key(seed), ema=like.ema is not None, given=given),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like),
        donate_argnums=0,
    )
    return init(dict(given or {}))


def _fresh_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    ema: bool,
    given: Mapping[str, Array] | None = None,
) -> TrainState:
    params = trees.unflatten(trees.flatten(init_params(model, key)) | (given or {}))
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_train_step(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[ArrayLike], jax.Array],
    *,
    mesh: Mesh,
    loss: LossConfig,
    frozen: Params,
    like: TrainState,
    ema: float = 0.0,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """The jitted step: (state, batch) -> (state, metrics). The state is donated.

    Args:
        schedule: step -> factor, only to report it as `train/schedule`.
        frozen: bools like the parameters; True where they do not train (their gradient is never computed).
        like: the state's layout, from `state_like`: the new state keeps it, or the next call would compile again.
        ema: decay of the running average, for a state that has one; shorter at the start: min(ema, (1 + step)/(10 + step)).
        seed: of dropout; the draws of a step are a function of (seed, step), and of the micro-batch where there are some.

    Raises:
        ValueError: if the model asks for an attention kernel that cannot run on the devices of `mesh`.
    """
    placement = sharding.Placement.of(mesh, like.params)
    value_and_grad = make_value_and_grad(
        make_embed(model, placement=placement),
        make_pair_loss(model, mesh=mesh, loss=loss),
        frozen=frozen,
        placement=placement,
        micro_batch_size=loss.micro_batch_size,
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)
        value, grads = value_and_grad(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "train/loss": value,
            "train/t": jnp.exp(state.params["t"]).reshape(()),
            "train/bias": state.params["b"].reshape(()),
            "train/schedule": jnp.asarray(schedule(state.step), jnp.float32),
            "train/grad_norm": optax.tree.norm(grads),
            "train/param_norm": optax.tree.norm(state.params),
            "train/update_norm": optax.tree.norm(updates),
        }
        average = state.ema
        if average is not None:
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, like), None))


def make_embed(
    model: ModelConfig, *, placement: sharding.Placement
) -> Callable[[Params, Batch, Array], tuple[Float[Array, "b e"], Float[Array, "b e"]]]:
    """(params, batch or some rows of it, dropout key) -> (zimg, ztxt), as in training; a batch's own zimg is handed through.

    Raises:
        ValueError: if the model asks for an attention kernel that cannot run on the devices of `placement`.
    """
    module = make_model(model, placement=placement)

    def embed(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        images = None if "zimg" in batch else normalize_pixels(batch["image"])
        variables = {"params": placement.gather_outside_blocks(params)}
        zimg, ztxt, _ = module.apply(variables, images, batch["text"], train=True, rngs={"dropout": key})
        return batch["zimg"] if zimg is None else zimg, ztxt

    return embed


def make_pair_loss(
    model: ModelConfig, *, mesh: Mesh, loss: LossConfig
) -> Callable[[Float[Array, "b e"], Float[Array, "b e"], Params], Float[Array, ""]]:
    """(zimg, ztxt, params) -> the scalar loss of the global batch."""
    low = "bfloat16" in (model.image.dtype, model.text and model.text.dtype)
    dtype = jnp.dtype(("bfloat16" if low else "float32") if loss.dtype == "auto" else loss.dtype)

    def pair_loss(zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], params: Params) -> Float[Array, ""]:
        if loss.kind == "softmax":
            return softmax_loss(zimg, ztxt, params["t"].reshape(()))
        return chunked_sigmoid_loss(
            zimg.astype(dtype), ztxt.astype(dtype), params["t"], params["b"],
            mesh=mesh, axis=sharding.BATCH_AXES, chunk_size=loss.chunk_size, impl=loss.impl,
        )  # fmt: skip

    return pair_loss
