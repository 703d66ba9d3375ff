"""Gradients of a loss over the whole batch from towers that see a few pairs at a time: exact, not an average of small losses.

    coupled, separate = forward(params, micro-batch j)          micro-batch by micro-batch, keeping nothing but these
    loss, dcoupled    = value_and_grad(couple)(all coupled)     all pairs against all pairs
    loss             += sum_j separate_j / B
    dparams           = sum_j vjp(forward(., micro-batch j))(dcoupled_j, 1 / B)    forward again, now with a backward pass

A contrastive loss couples all pairs, so the gradients of micro-batches' own losses do not add up to its gradient; but given
dcoupled they do (GradCache, arXiv 2101.06983). Memory is that of one micro-batch, the coupled arrays and one float32 copy of
the gradients; the price is one more forward pass.

The traps: dropout must draw the same in both passes, and micro-batch j must be the same rows. Its rows come from every
device's own block, so no pair moves; coupled arrays are put back in the batch's order before the loss pairs them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from siglip.array_types import Array, Float
from siglip.parallel.sharding import P_BATCH, ParamLayout
from siglip.training.objective import Batch, Metrics, Objective, Params, Parts

ValueAndGrad = Callable[[Params, Batch, Array, Array], tuple[Float[Array, ""], Metrics, Params]]


def make_value_and_grad(
    objective: Objective, *, frozen: Params, layout: ParamLayout, micro_batch_size: int | None = None
) -> ValueAndGrad:
    """(params, batch, dropout key, step) -> (loss, metrics, gradients), the gradients sharded like the parameters.

    Args:
        frozen: bools like the parameters; where True the gradient is zero and never computed.
        micro_batch_size: pairs, over all devices, that pass through the towers at a time; None for all. It divides the batch
            and is divided by the devices.
    """

    def split(params: Params) -> tuple[list[Array], Callable[[list[Array]], Params]]:
        """The trained leaves, and what puts them back among the frozen ones."""
        leaves, structure = jax.tree.flatten(params)
        is_frozen = jax.tree.leaves(frozen)

        def join(trained: list[Array], rest: Callable[[Array], Array] = lax.stop_gradient) -> Params:
            queue = iter(trained)
            return structure.unflatten(
                [rest(leaf) if fixed else next(queue) for leaf, fixed in zip(leaves, is_frozen, strict=True)]
            )

        return [leaf for leaf, fixed in zip(leaves, is_frozen, strict=True) if not fixed], join

    def value_and_grad(
        params: Params, batch: Batch, key: Array, step: Array
    ) -> tuple[Float[Array, ""], Metrics, Params]:
        trained, join = split(params)
        pairs = jax.tree.leaves(batch)[0].shape[0]

        def forward(trained: list[Array], rows: Batch, key: Array) -> Parts:
            return objective.forward(join(trained), rows, key, step)

        def loss_of(trained: list[Array], parts: Parts) -> tuple[Float[Array, ""], Metrics]:
            loss, metrics = objective.couple(parts.coupled, join(trained))
            means = {name: total / pairs for name, total in parts.metrics.items()}
            return loss + parts.separate / pairs, metrics | means

        if micro_batch_size is None or micro_batch_size == pairs:
            whole = lambda trained: loss_of(trained, forward(trained, batch, key))  # noqa: E731
            (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(trained)
        else:
            steps = pairs // micro_batch_size
            (loss, metrics), grads = _in_micro_batches(forward, loss_of, trained, batch, key, layout, steps)
        return loss, metrics, layout.like_params(join(grads, rest=jnp.zeros_like))

    return value_and_grad


def _in_micro_batches(
    forward: Callable[[list[Array], Batch, Array], Parts],
    loss_of: Callable[[list[Array], Parts], tuple[Array, Metrics]],
    trained: list[Array],
    batch: Batch,
    key: Array,
    layout: ParamLayout,
    steps: int,
) -> tuple[tuple[Float[Array, ""], Metrics], list[Array]]:
    """The four lines of the module's docstring."""
    rows = lambda tree, j: jax.tree.map(lambda x: _micro_batch(x, j, steps, layout), tree)  # noqa: E731
    numbers = jnp.arange(steps)

    def run(trained: list[Array], j: Array) -> Parts:
        return forward(trained, rows(dict(batch), j), jax.random.fold_in(key, j))

    _, cached = lax.scan(lambda _, j: (None, run(trained, j)), None, numbers)
    coupled = jax.tree.map(lambda x: _in_batch_order(x, layout), cached.coupled)
    sums = jax.tree.map(lambda x: x.sum(axis=0), cached._replace(coupled=None))
    # What the loss itself gives the parameters (t and b; zeros for the towers) is where the sum starts.
    (loss, metrics), (grads, given) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
        trained, sums._replace(coupled=coupled)
    )

    def backward(grads: list[Array], j: Array) -> tuple[list[Array], None]:
        def differentiated(trained: list[Array]) -> tuple[Any, Array]:
            parts = run(trained, j)
            return parts.coupled, parts.separate

        _, vjp = jax.vjp(differentiated, trained)
        return jax.tree.map(jnp.add, grads, vjp((rows(given.coupled, j), given.separate))[0]), None

    grads, _ = lax.scan(backward, grads, numbers)
    return (loss, metrics), grads


def _micro_batch(x: Array, j: Array, steps: int, layout: ParamLayout) -> Array:
    """The j-th part of every device's block of x [b, …].

    A slice, not a scan over x reshaped to [steps, m, …]: TPUs lay images out with the batch innermost, where a reshape of it
    copies all of them, twice.
    """
    blocks = _pin(x.reshape(layout.mesh.size, -1, *x.shape[1:]), P_BATCH, layout)
    size = blocks.shape[1] // steps
    part = lax.dynamic_slice_in_dim(blocks, j * size, size, axis=1)
    return _pin(part.reshape(-1, *x.shape[1:]), P_BATCH, layout)


def _in_batch_order(x: Array, layout: ParamLayout) -> Array:
    """Micro-batches [steps, m, …] back to [b, …]: no row leaves its device."""
    x = x.reshape(x.shape[0], layout.mesh.size, -1, *x.shape[2:]).swapaxes(0, 1)
    return _pin(x.reshape(-1, *x.shape[3:]), P_BATCH, layout)


def _pin(x: Array, spec: PartitionSpec, layout: ParamLayout) -> Array:
    return lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))
