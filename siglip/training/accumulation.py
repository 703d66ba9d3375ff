"""Gradients of a loss over the whole batch from towers that see a few pairs at a time: exact, not an average of small losses.

    z = embed(params, batch)                                    micro-batch by micro-batch, keeping nothing but z
    loss, dz = value_and_grad(pair_loss)(z)                     all pairs against all pairs
    dparams = sum_j vjp(embed(., micro-batch j))(dz_j)          the towers run again, now with a backward pass

A contrastive loss couples all pairs, so the gradients of micro-batches' own losses do not add up to its gradient; but given
dz they do (GradCache, arXiv 2101.06983). Memory is that of one micro-batch, the embeddings and one float32 copy of the
gradients; the price is one more forward pass.

The traps: dropout must draw the same in both passes, and micro-batch j must be the same rows. Its rows come from every
device's own block, so no pair moves; embeddings are put back in the batch's order before the loss pairs them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from siglip.array_types import Array, Float
from siglip.parallel.sharding import P_BATCH, Placement

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Embed = Callable[[Params, Batch, Array], tuple[Float[Array, "b e"], Float[Array, "b e"]]]
PairLoss = Callable[[Float[Array, "b e"], Float[Array, "b e"], Params], Float[Array, ""]]
ValueAndGrad = Callable[[Params, Batch, Array], tuple[Float[Array, ""], Params]]


def make_value_and_grad(
    embed: Embed, pair_loss: PairLoss, *, frozen: Params, placement: Placement, micro_batch_size: int | None = None
) -> ValueAndGrad:
    """(params, batch, dropout key) -> (loss, gradients), the gradients sharded like the parameters.

    Args:
        embed: (params, some rows of the batch, key) -> (zimg, ztxt).
        pair_loss: (zimg, ztxt, params) -> the loss of all pairs; takes t and b from the parameters.
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

    def value_and_grad(params: Params, batch: Batch, key: Array) -> tuple[Float[Array, ""], Params]:
        trained, join = split(params)
        pairs = jax.tree.leaves(batch)[0].shape[0]
        if micro_batch_size is None or micro_batch_size == pairs:

            def loss_of(trained: list[Array]) -> Float[Array, ""]:
                whole = join(trained)
                return pair_loss(*embed(whole, batch, key), whole)

            value, grads = jax.value_and_grad(loss_of)(trained)
        else:
            embed_trained = lambda trained, rows, key: embed(join(trained), rows, key)  # noqa: E731
            loss_trained = lambda zimg, ztxt, trained: pair_loss(zimg, ztxt, join(trained))  # noqa: E731
            value, grads = _in_micro_batches(
                embed_trained, loss_trained, trained, batch, key, placement, pairs // micro_batch_size
            )
        return value, placement.like_params(join(grads, rest=jnp.zeros_like))

    return value_and_grad


def _in_micro_batches(
    embed: Callable[..., tuple[Array, Array]],
    pair_loss: Callable[..., Array],
    trained: list[Array],
    batch: Batch,
    key: Array,
    placement: Placement,
    steps: int,
) -> tuple[Float[Array, ""], list[Array]]:
    """The three lines of the module's docstring."""
    rows = lambda tree, j: jax.tree.map(lambda x: _micro_batch(x, j, steps, placement), tree)  # noqa: E731
    numbers = jnp.arange(steps)

    def forward(_: None, j: Array) -> tuple[None, tuple[Array, Array]]:
        return None, embed(trained, rows(dict(batch), j), jax.random.fold_in(key, j))

    _, cached = lax.scan(forward, None, numbers)
    embeddings = [_in_batch_order(z, placement) for z in cached]
    # What the loss itself gives the parameters (t and b; zeros for the towers) is where the sum starts.
    value, (*dz, grads) = jax.value_and_grad(pair_loss, argnums=(0, 1, 2))(*embeddings, trained)

    def backward(grads: list[Array], j: Array) -> tuple[list[Array], None]:
        _, vjp = jax.vjp(lambda trained: embed(trained, rows(dict(batch), j), jax.random.fold_in(key, j)), trained)
        return jax.tree.map(jnp.add, grads, vjp(rows(tuple(dz), j))[0]), None

    grads, _ = lax.scan(backward, grads, numbers)
    return value, grads


def _micro_batch(x: Array, j: Array, steps: int, placement: Placement) -> Array:
    """The j-th part of every device's block of x [b, …].

    A slice, not a scan over x reshaped to [steps, m, …]: TPUs lay pictures out with the batch innermost, where a reshape of it
    copies all of them, twice.
    """
    blocks = _pin(x.reshape(placement.mesh.size, -1, *x.shape[1:]), P_BATCH, placement)
    size = blocks.shape[1] // steps
    part = lax.dynamic_slice_in_dim(blocks, j * size, size, axis=1)
    return _pin(part.reshape(-1, *x.shape[1:]), P_BATCH, placement)


def _in_batch_order(x: Array, placement: Placement) -> Array:
    """Micro-batches [steps, m, …] back to [b, …]: no row leaves its device."""
    x = x.reshape(x.shape[0], placement.mesh.size, -1, *x.shape[2:]).swapaxes(0, 1)
    return _pin(x.reshape(-1, *x.shape[3:]), P_BATCH, placement)


def _pin(x: Array, spec: PartitionSpec, placement: Placement) -> Array:
    return lax.with_sharding_constraint(x, NamedSharding(placement.mesh, spec))
