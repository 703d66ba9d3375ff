"""AdamW, Muon and the ScalingViT Adafactor as one optax chain, with schedules, masks, freezing and learning-rate multipliers.

    p <- p - schedule(step) * (lr * lr_mult * update + weight_decay * wd_mult * p)

This is the convention of the SigLIP paper and of its codebase: the decay is scaled by the schedule (which peaks at 1) but
*not* by the learning rate. The paper's lr 1e-3 with weight_decay 1e-4 is what torch and optax call AdamW with
weight_decay 0.1: divide by lr to convert. Only kernels decay (`.*/kernel`): no bias, LayerNorm, embedding, position
embedding, probe, t or b. A learning-rate multiplier of 0 freezes: no moments are kept and the gradient norm that is
clipped does not see it. Patterns match whole paths, and the first that matches wins.

Adafactor is the variant of "Scaling Vision Transformers" (arXiv 2106.04560): factored second moment without parameter
scaling or update clipping, momentum 0.9 in bfloat16. Its b2 is capped at 0.95, without which large batches diverge
(SigLIP, section 4.2).

Muon (https://kellerjordan.github.io/posts/muon) makes the update of every matrix inside a block orthogonal, and is scaled
to the size of AdamW's updates (arXiv 2502.16982), so that AdamW's lr and weight_decay carry over. Embeddings, heads,
biases, LayerNorms, t and b are AdamW's.

The trap: with scanned blocks and 32 or more of them, stacked biases and LayerNorms are large enough in two dimensions to
be factored *across layers*, which the loop layout never does.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from siglip import trees
from siglip.errors import UserError

# Matrices whose second-largest dimension is below this keep a full second moment.
ADAFACTOR_MIN_DIM = 32
ADAFACTOR_DECAY = 0.8
# The root mean square of AdamW's updates, which Muon's get (arXiv 2502.16982, section 2.2), and the matrices that are Muon's.
MUON_RMS = 0.2
# Up to this size matrices of one shape are stacked; under FSDP larger ones are sharded, and must not be gathered all at once.
_MUON_STACKED_BYTES = 2**20
_MUON_KERNEL = re.compile(r".*/(encoderblock\w*|MAPHead_\d+)/.*/kernel")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and what they apply to.

    Attributes:
        name: "muon" is for the matrices of blocks and pooling heads; all other parameters are AdamW's then.
        lr: peak learning rate.
        weight_decay: fraction of a kernel removed per step at the schedule's peak (not multiplied by lr; see above).
        weight_decay_mults: (pattern, factor) pairs; parameters that no pattern matches do not decay.
        lr_mults: (pattern, factor) pairs; 0 freezes; parameters that no pattern matches keep 1.
        b1: decay of the first moment (of Muon's matrices it is 0.95, with Nesterov's step).
        b2: decay of the second moment (Adafactor: its cap).
        momentum_dtype: storage of the first moment; None takes bfloat16 for adafactor and float32 for the others.
        clip_norm: largest global norm of the gradient; 0 does not clip.
        schedule: shape after the warm-up. "rsqrt" is 1/sqrt(1 + steps/timescale) and ends in a linear cool-down.
        warmup_steps: linear from 0; the first update is exactly zero.
        cooldown_steps, timescale_steps: for "rsqrt" only.
        ema: decay of the running average of the parameters, which is then what is evaluated and exported; 0 for none.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    weight_decay_mults: tuple[tuple[str, float], ...] = ((".*/kernel", 1.0),)
    lr_mults: tuple[tuple[str, float], ...] = ()
    b1: float = 0.9
    b2: float = 0.95
    momentum_dtype: Literal["float32", "bfloat16"] | None = None
    clip_norm: float = 1.0
    schedule: Literal["cosine", "rsqrt", "linear"] = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    timescale_steps: int = 10_000
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "timescale_steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "clip_norm", "warmup_steps", "cooldown_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name}={getattr(self, name)} must not be negative")
        for name in ("b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")


def make_schedule(config: OptimConfig, total_steps: int) -> Callable[[ArrayLike], jax.Array]:
    """step -> factor in [0, 1] on lr and weight decay; 0 at `total_steps`.

    Raises:
        UserError: if warm-up and cool-down are longer than the run, or the warm-up is all of it.
    """
    warmup, cooldown = config.warmup_steps, config.cooldown_steps if config.schedule == "rsqrt" else 0
    if warmup and warmup == total_steps:
        raise UserError(
            f"optim.warmup_steps={warmup} is all of total_steps={total_steps}: the schedule would end before its peak; shorten it"
        )
    if warmup + cooldown > total_steps:
        raise UserError(
            f"optim.warmup_steps={warmup} + cooldown_steps={cooldown} exceed total_steps={total_steps}; shorten them"
        )

    def schedule(step: ArrayLike) -> jax.Array:
        after_warmup = jnp.maximum(step - warmup, 0)
        progress = after_warmup / max(total_steps - warmup, 1)
        if config.schedule == "cosine":
            factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1)))
        elif config.schedule == "linear":
            factor = jnp.maximum(1 - progress, 0)
        else:
            factor = 1 / jnp.sqrt(1 + after_warmup / config.timescale_steps)
        if warmup:
            factor *= jnp.minimum(step / warmup, 1)
        if cooldown:
            factor *= jnp.clip((total_steps - step) / cooldown, 0, 1)
        return factor

    return schedule


def frozen_mask(config: OptimConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """A tree like `params` of bools: True where a learning-rate multiplier of 0 freezes the parameter."""
    return jax.tree.map(
        lambda mult: mult == 0, _multipliers(config.lr_mults, params, default=1.0, what="optim.lr_mults")
    )


def make_optimizer(config: OptimConfig, params: Mapping[str, Any], *, total_steps: int) -> optax.GradientTransformation:
    """The optax chain for these parameters (arrays or ShapeDtypeStructs; only paths and shapes are used).

    Raises:
        UserError: if a pattern matches no parameter, or the schedule does not fit the run.
    """
    schedule = make_schedule(config, total_steps)
    frozen = frozen_mask(config, params)
    if all(jax.tree.leaves(frozen)):
        raise UserError(f"optim.lr_mults={config.lr_mults} freeze every parameter; leave one above 0")
    lr_mults = _multipliers(config.lr_mults, params, default=1.0, what="optim.lr_mults")
    decay_mults = _multipliers(config.weight_decay_mults, params, default=0.0, what="optim.weight_decay_mults")
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    trained = optax.chain(
        *clip,
        {"adamw": _scale_by_adam, "adafactor": _scale_by_adafactor, "muon": _scale_by_muon}[config.name](config),
        _scale_by_tree(config.lr, lr_mults),
        _add_decay(config.weight_decay, decay_mults),
        optax.scale_by_schedule(schedule),
        optax.scale(-1),
    )
    return optax.partition(
        {"trained": trained, "frozen": optax.set_to_zero()},
        jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen),
    )


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=config.momentum_dtype or "float32")


def _scale_by_adafactor(config: OptimConfig) -> optax.GradientTransformation:
    def second_moment_decay(step: ArrayLike, exponent: float) -> jax.Array:
        return jnp.minimum(config.b2, 1.0 - (jnp.asarray(step, jnp.float32) + 1) ** -exponent)

    return optax.chain(
        optax.scale_by_factored_rms(
            factored=True,
            decay_rate=ADAFACTOR_DECAY,
            min_dim_size_to_factor=ADAFACTOR_MIN_DIM,
            epsilon=1e-30,
            decay_rate_fn=second_moment_decay,
        ),
        optax.ema(config.b1, debias=False, accumulator_dtype=config.momentum_dtype or "bfloat16"),
    )


def _scale_by_muon(config: OptimConfig) -> optax.GradientTransformation:
    momentum = optax.contrib.scale_by_muon(
        ns_steps=0,
        mu_dtype=config.momentum_dtype or "float32",
        weight_dimension_numbers=lambda params: _map_trained(lambda path, _: _matrix_of(path), params),
    )
    return optax.partition(
        {"muon": optax.chain(momentum, optax.stateless(_orthogonalize)), "adamw": _scale_by_adam(config)},
        lambda params: _map_trained(lambda path, _: "muon" if _MUON_KERNEL.fullmatch(path) else "adamw", params),
    )


def _matrix_of(path: str) -> optax.contrib.MuonDimensionNumbers:
    """Which axes of a block's kernel are its inputs and outputs, from the end: stacked blocks have one more in front."""
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        return optax.contrib.MuonDimensionNumbers((-3,), (-2, -1))  # [width, heads, size]
    if path.endswith("out/kernel"):
        return optax.contrib.MuonDimensionNumbers((-3, -2), (-1,))  # [heads, size, width]
    return optax.contrib.MuonDimensionNumbers((-2,), (-1,))


def _orthogonalize(updates: Any, _: Any = None) -> Any:
    """Newton-Schulz on every matrix; an orthogonal n x m has a root mean square of 1/sqrt(max(n, m)), and gets MUON_RMS.

    Small matrices of one shape are stacked: one by one, their products are so short that starting them takes the time.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    alike: dict[Any, list[int]] = collections.defaultdict(list)
    for i, (keys, update) in enumerate(leaves):
        alone = i if update.nbytes > _MUON_STACKED_BYTES else None
        alike[_matrix_of(_path(keys)), update.shape, alone].append(i)
    stacks = [jnp.stack([leaves[i][1] for i in group]) for group in alike.values()]
    matrices = [matrix for matrix, _, _ in alike]
    newton_schulz = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=matrices)
    stacks, _ = newton_schulz.update(stacks, newton_schulz.init(stacks))
    orthogonal: dict[int, jax.Array] = {}
    for group, matrix, stack in zip(alike.values(), matrices, stacks, strict=True):
        sides = (math.prod(stack.shape[axis] for axis in axes) for axes in matrix)
        orthogonal |= dict(zip(group, MUON_RMS * math.sqrt(max(sides)) * stack, strict=True))
    return treedef.unflatten([orthogonal[i] for i in range(len(leaves))])


def _scale_by_tree(factor: float, mults: Mapping[str, Any]) -> optax.GradientTransformation:
    flat = trees.flatten(mults)

    def scale(updates: Any, _: Any = None) -> Any:
        return _map_trained(lambda path, update: factor * flat[path] * update, updates)

    return optax.stateless(scale)


def _add_decay(weight_decay: float, mults: Mapping[str, Any]) -> optax.GradientTransformation:
    flat = trees.flatten(mults)

    def add(updates: Any, params: Any) -> Any:
        flat_params = {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
        return _map_trained(
            lambda path, update: update + weight_decay * flat[path] * flat_params[path] if flat[path] else update,
            updates,
        )

    return optax.stateless(add)


def _map_trained(function: Callable[[str, jax.Array], jax.Array], tree: Any) -> Any:
    """Over a tree in which optax has put MaskedNodes, which have no leaves, in place of frozen parameters."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(_path(keys), leaf), tree)


def _path(keys: Any) -> str:
    return "/".join(key.key for key in keys)


def _multipliers(
    rules: tuple[tuple[str, float], ...], params: Mapping[str, Any], *, default: float, what: str
) -> dict[str, Any]:
    paths = trees.flatten(params)
    matches = trees.first_matches([p for p, _ in rules], paths, what=what, optional=(".*/kernel",))
    return trees.unflatten({path: default if i is None else rules[i][1] for path, i in matches.items()})
