"""The training state and the jitted function that advances it.

A batch is {"image": uint8 [b, h, w, 3], "text": int32 [b, l]}; pixels travel to the device as bytes and become
x / 127.5 - 1 there. With a frozen image tower it may hold "zimg", float32 [b, e], in place of the images: what the tower
makes of them, normalised, and then the tower does not run (LiT, arXiv:2111.07991). What is optimised is in objective.py.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import ArrayLike

from siglip import trees
from siglip.array_types import Array
from siglip.models.two_tower import ModelConfig
from siglip.parallel import sharding
from siglip.training.accumulation import make_value_and_grad
from siglip.training.objective import Batch, Metrics, Objective, Params, Term, all_param_shapes, init_all_params


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


def make_abstract_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    mesh_config: sharding.MeshConfig,
    terms: Sequence[Term] = (),
    ema: bool = False,
) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings; `ema`: with a running average of the parameters.

    Raises:
        ValueError: if the mesh has an fsdp axis that shards nothing.
    """
    return lay_out_state(state_shapes(all_param_shapes(model, terms), optimizer, ema=ema), mesh, mesh_config)


def state_shapes(params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """The state of parameters (ShapeDtypeStructs) as ShapeDtypeStructs, on no devices yet."""
    return jax.eval_shape(lambda params: _state_of(params, optimizer, ema=ema), params)


def lay_out_state(shapes: TrainState, mesh: Mesh | AbstractMesh, mesh_config: sharding.MeshConfig) -> TrainState:
    """The same with their shardings.

    Raises:
        UserError: as `sharding.param_shardings`.
    """
    params = sharding.param_shardings(shapes.params, mesh, mesh_config)
    replicated = NamedSharding(mesh, sharding.P_REPLICATED)
    opt_state = sharding.like_params(shapes.opt_state, shapes.params, params, mesh)
    layout = TrainState(replicated, params, opt_state, None if shapes.ema is None else params)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)


def make_init(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    abstract_state: TrainState,
    seed: int,
    terms: Sequence[Term] = (),
) -> Callable[[Mapping[str, jax.Array]], TrainState]:
    """The jitted start: given -> a fresh state, born sharded as `abstract_state` says.

    given: parameters by path that are not to be drawn (siglip.training.warm_start.put); they are donated. The others are what
    they would be without any given.
    """
    ema = abstract_state.ema is not None
    return jax.jit(
        lambda given: _fresh_state(model, terms, optimizer, jax.random.key(seed), ema=ema, given=given),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_state),
        donate_argnums=0,
    )


def _fresh_state(
    model: ModelConfig,
    terms: Sequence[Term],
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    ema: bool,
    given: Mapping[str, Array],
) -> TrainState:
    params = trees.unflatten(trees.flatten(init_all_params(model, terms, key)) | given)
    return _state_of(params, optimizer, ema=ema)


def _state_of(params: Params, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[ArrayLike], jax.Array],
    *,
    frozen: Params,
    abstract_state: TrainState,
    micro_batch_size: int | None = None,
    ema: float = 0.0,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, batch) -> (state, metrics). The state is donated.

    Args:
        schedule: step -> factor, only to report it as `train/schedule`.
        frozen: bools like the parameters; True where they do not train (their gradient is never computed).
        abstract_state: from `make_abstract_state`: the new state keeps its layout, or the next call would compile again.
        micro_batch_size: pairs that pass through the towers at a time; None for the whole batch.
        ema: decay of the running average, for a state that has one; shorter at the start: min(ema, (1 + step)/(10 + step)).
        seed: of dropout; the draws of a step are a function of (seed, step), and of the micro-batch where there are some.
    """
    layout = sharding.ParamLayout.of(abstract_state.params)
    value_and_grad = make_value_and_grad(objective, frozen=frozen, layout=layout, micro_batch_size=micro_batch_size)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)
        loss, metrics, grads = value_and_grad(state.params, batch, key, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = _hold_until_started(updates, state.step, objective.start_steps)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "loss": loss,
            "schedule": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
            "update_norm": optax.tree.norm(updates),
        }
        average = state.ema
        if average is not None:
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
        new_state = TrainState(state.step + 1, params, opt_state, average)
        return new_state, {f"train/{name}": value for name, value in metrics.items()}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _hold_until_started(updates: Params, step: Array, start_steps: Mapping[str, int]) -> Params:
    """Zeros for the parameters of terms that have not started: they get no gradient, but weight decay would shrink them."""
    waiting = {name: start for name, start in start_steps.items() if start > 0 and name in updates}
    held = {
        name: jax.tree.map(lambda update, start=start: jnp.where(step < start, 0, update), updates[name])
        for name, start in waiting.items()
    }
    return {**updates, **held}
