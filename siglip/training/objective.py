"""What is optimised: the pair loss of all embeddings, and terms that add up over the pairs.

    loss = pair_loss(zimg, ztxt, t, b) + sum over terms of weight * (sum of the term over the pairs) / B

An objective has two halves. `forward` sees some rows of the batch and gives what couples all pairs (their embeddings), what
simply adds up, and metrics. `couple` sees the coupled arrays of the whole batch. accumulation.py differentiates both.

To add a term: a file beside this one with a frozen dataclass that subclasses `Term`, its head, if it has one, in siglip/models,
and its class in the type of `TrainConfig.terms`. If it reads more than images and texts it also needs a field: a file in
data_pipelines/samples and its name in `data_pipelines.loader.default_fields`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.losses import Impl, chunked_sigmoid_loss, softmax_loss
from siglip.models.two_tower import MODEL_PARTS, ModelConfig, init_params, make_model, param_shapes
from siglip.parallel.sharding import BATCH_AXES, ParamLayout

# What a run reports as train/<name>; a term is reported under its name too.
_METRICS = (
    "loss", "pair_loss", "temperature", "bias", "schedule", "grad_norm", "param_norm", "update_norm", "mfu", "pairs_per_s",
)  # fmt: skip

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of all pairs, and how it is spread over the devices.

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
        for name, none in (("micro_batch_size", "for the whole batch"), ("chunk_size", "to have it chosen")):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"loss.{name}={value} must be at least 1, or None {none}")


class TowerOutputs(NamedTuple):
    """What the model gave for some rows of the batch: see `TwoTower`. zimg and ztxt are normalised."""

    zimg: Float[Array, "b e"]
    ztxt: Float[Array, "b e"]
    out: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss that adds up over the pairs, with its own parameters or none: the base of what `TrainConfig.terms` holds.

    Attributes:
        name: of its parameters (`<name>/…`) and metrics (`train/<name>`); a subclass fixes it with a Literal.
        weight: factor in the loss.
        start: the fraction of the run after which the term counts. Before, it is not computed and its parameters keep the
            values they were drawn with; they are in the state from the first step on, so checkpoints have one structure.
    """

    name: str
    weight: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(f"terms: {self.name}.weight={self.weight} must be positive; leave the term out instead")
        if not 0 <= self.start < 1:
            raise UserError(f"terms: {self.name}.start={self.start} is a fraction of the run; use 0 <= start < 1")

    def init(self, model: ModelConfig, key: Array) -> Params:
        """Fresh parameters of the term's own, as a nested dict of float32 arrays."""
        return {}

    def forward(
        self, params: Params, batch: Batch, key: Array, *, towers: TowerOutputs, model: ModelConfig, layout: ParamLayout
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum of the term over these rows, and sums of other metrics over them; all float32.

        Args:
            params: the term's own parameters. Blocks of `siglip.models.layers.Encoder` gather theirs by `layout`.
            batch, towers: some rows of the batch, and what the towers made of them in this forward pass.
            key: for dropout.
            layout: of `params` on the devices.
        """
        raise NotImplementedError


class Parts(NamedTuple):
    """The forward pass of some rows of the batch, all in floating point.

    Attributes:
        coupled: a pytree of arrays [b, …], row i of each belonging to pair i: what `couple` wants of the whole batch.
        separate: the sum over the rows of what adds up, weights included; 0 without terms.
        metrics: sums over the rows.
    """

    coupled: Any
    separate: Float[Array, ""]
    metrics: Metrics


class Objective(NamedTuple):
    """A loss over a batch in two halves: couple(coupled of all rows, params) + separate of all rows / B.

    Attributes:
        forward: (params, some rows of the batch, dropout key, step) -> Parts.
        couple: (the whole batch's coupled arrays, params) -> (loss, metrics).
        start_steps: the step from which on each term's parameters train, by name.
    """

    forward: Callable[[Params, Batch, Array, Int[Array, ""]], Parts]
    couple: Callable[[Any, Params], tuple[Float[Array, ""], Metrics]]
    start_steps: Mapping[str, int] = {}


def make_objective(
    model: ModelConfig,
    loss: LossConfig,
    *,
    layout: ParamLayout,
    terms: Sequence[Term] = (),
    total_steps: int = 0,
) -> Objective:
    """The objective of a training run: the pair loss, and `terms`.

    Args:
        layout: of all parameters, the terms' included.
        total_steps: of the run, for terms that start later.

    Raises:
        UserError: if the model asks for an attention kernel that cannot run on the devices of `layout`.
    """
    assert total_steps > 0 or not any(term.start for term in terms), "a start is a fraction of total_steps"
    module = make_model(model, layout=layout)
    start_steps = {term.name: round(term.start * total_steps) for term in terms}

    def forward(params: Params, batch: Batch, key: Array, step: Int[Array, ""]) -> Parts:
        params = layout.gather_outside_blocks(params)
        towers = TowerOutputs(*module.apply({"params": params}, batch, train=True, rngs={"dropout": key}))
        separate, metrics = jnp.zeros(()), {}
        for term in terms:
            own, draws = params.get(term.name, {}), jax.random.fold_in(key, _number(term.name))
            options = {"towers": towers, "model": model, "layout": layout.within(term.name)}
            compute = functools.partial(term.forward, own, batch, draws, **options)
            total, found = compute() if term.start == 0 else _from_step(start_steps[term.name], step, compute)
            separate += term.weight * total
            metrics |= {term.name: total} | {f"{term.name}/{name}": value for name, value in found.items()}
        return Parts({"zimg": towers.zimg, "ztxt": towers.ztxt}, separate, metrics)

    pair_loss = make_pair_loss(model, loss, layout=layout)

    def couple(coupled: Mapping[str, Array], params: Params) -> tuple[Float[Array, ""], Metrics]:
        value = pair_loss(coupled["zimg"], coupled["ztxt"], params)
        metrics = {"temperature": jnp.exp(params["t"]).reshape(()), "bias": params["b"].reshape(())}
        return value, metrics | ({"pair_loss": value} if terms else {})

    return Objective(forward, couple, start_steps)


def make_pair_loss(
    model: ModelConfig, loss: LossConfig, *, layout: ParamLayout
) -> Callable[[Float[Array, "b e"], Float[Array, "b e"], Params], Float[Array, ""]]:
    """(zimg, ztxt, params) -> the scalar loss of the global batch; t and b are taken from the parameters."""
    low = "bfloat16" in (model.image.dtype, model.text and model.text.dtype)
    dtype = jnp.dtype(("bfloat16" if low else "float32") if loss.dtype == "auto" else loss.dtype)

    def pair_loss(zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], params: Params) -> Float[Array, ""]:
        if loss.kind == "softmax":
            return softmax_loss(zimg, ztxt, params["t"].reshape(()))
        return chunked_sigmoid_loss(
            zimg.astype(dtype), ztxt.astype(dtype), params["t"], params["b"],
            mesh=layout.mesh, axis=BATCH_AXES, chunk_size=loss.chunk_size, impl=loss.impl,
        )  # fmt: skip

    return pair_loss


def init_all_params(model: ModelConfig, terms: Sequence[Term], key: Array) -> dict[str, Any]:
    """Fresh parameters of the model and, beside it, of the terms that have some. A term changes nobody else's draws."""
    return init_params(model, key) | _init_terms(model, terms, key)


def _init_terms(model: ModelConfig, terms: Sequence[Term], key: Array) -> dict[str, Any]:
    own = {term.name: dict(term.init(model, jax.random.fold_in(key, _number(term.name)))) for term in terms}
    return {name: tree for name, tree in own.items() if tree}


def all_param_shapes(model: ModelConfig, terms: Sequence[Term]) -> dict[str, Any]:
    """The tree of `init_all_params` with `jax.ShapeDtypeStruct` leaves; nothing is computed or allocated."""
    return param_shapes(model) | jax.eval_shape(lambda: _init_terms(model, terms, jax.random.key(0)))


def check_terms(terms: Sequence[Term]) -> None:
    """Raises UserError unless every term has a name of its own that can be a sub-tree of the parameters."""
    names = [term.name for term in terms]
    for name in names:
        if name in (*MODEL_PARTS, *_METRICS) or "/" in name or not name or names.count(name) > 1:
            raise UserError(
                f"terms: the name {name!r} is taken, empty or has a slash; names are unique and none of "
                f"{(*MODEL_PARTS, *_METRICS)}"
            )


def _from_step(
    start: int, step: Int[Array, ""], compute: Callable[[], tuple[Float[Array, ""], Metrics]]
) -> tuple[Float[Array, ""], Metrics]:
    """`compute()` from step `start` on; before, zeros, and nothing is computed."""
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))  # noqa: E731
    return lax.cond(step >= start, compute, zeros)


def _number(name: str) -> int:
    return zlib.crc32(name.encode())
