"""The pairwise sigmoid loss, dense and sharded in chunks, and CLIP's softmax loss to compare with.

    logits = exp(t) * zimg @ ztxt.T + b,    y_ij = +1 if i == j else -1
    loss   = (1 / B) * sum_ij softplus(-y_ij * logits_ij)           (SigLIP, arXiv 2303.15343, Algorithm 1)

`t` is the *log* temperature. The sum runs over all B^2 pairs but is divided by B: the loss is per positive.

Nothing in that sum couples one logit to another (there is no normaliser over the batch), so the derivative of a tile is
known as soon as the tile is: dloss/dlogit = -y * sigmoid(-y * logit) / B. `chunked_sigmoid_loss` uses this. Its forward
pass walks over tiles and leaves both the loss and all four gradients; its backward pass only scales them. Every tile's
logits are computed once, three matmuls in all, and no tile outlives its step.

The trap: differentiating through a loop over chunks instead (autodiff of a scan) keeps every tile for the backward pass and
saves no memory at all; and some prints of the paper write "-b": with b = -10 only "+ b" is right.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from siglip.shapes import Array, Float

Impl = Literal["auto", "all_gather", "ring"]

# Columns of one tile: wide enough to fill a matrix unit, narrow enough that a tile of 1024 rows stays in a core's cache.
TILE_COLUMNS = 512
TILE_ROWS = 1024


def sigmoid_loss(
    zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], t: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, ""]:
    """The dense reference: sum over all pairs / batch, with the whole [b, b] logits in memory.

    Args:
        zimg, ztxt: L2-normalised embeddings; row i of one belongs to row i of the other.
        t: log temperature, scalar or shape (1,).
        b: bias, scalar or shape (1,).
    """
    logits = jnp.exp(t) * _matmul(zimg, ztxt.T) + b
    labels = 2 * jnp.eye(zimg.shape[0], dtype=logits.dtype) - 1
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / zimg.shape[0]


def softmax_loss(zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], t: Float[Array, "..."]) -> Float[Array, ""]:
    """CLIP's loss (arXiv 2103.00020, Figure 3): mean cross-entropy of both directions; there is no bias."""
    logits = jnp.exp(t) * _matmul(zimg, ztxt.T)
    image_to_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    text_to_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -(jnp.mean(image_to_text) + jnp.mean(text_to_image)) / 2


def chunked_sigmoid_loss(
    zimg: Float[Array, "b e"],
    ztxt: Float[Array, "b e"],
    t: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
    chunk_size: int | None = None,
    impl: Impl = "auto",
) -> Float[Array, ""]:
    """`sigmoid_loss` of global arrays sharded over `axis`: the same value and gradients, without the [b, b] logits.

    Every device keeps its images. "all_gather" collects `chunk_size` texts of every device at a time and reduce-scatters
    their gradients back at once; "ring" passes the texts, and their gradients with them, from neighbour to neighbour and
    multiplies `chunk_size` columns at a time. Memory is a function of the chunk and of the device's own block, not of b.

    Args:
        axis: the mesh axis, or axes, that the batch is sharded over.
        chunk_size: texts per device and step (all_gather) or columns of a tile (ring); need not divide the block.
        impl: "auto" takes the ring on TPUs whose compiler overlaps its permutes (v5p, v6e), else the all-gather.

    Raises:
        ValueError: if the batch does not divide over the devices of `axis`, `chunk_size` is below 1, or `impl` is unknown.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    unknown = [name for name in axes if name not in mesh.shape]
    if unknown:
        raise ValueError(f"axis {unknown[0]!r} is not an axis of the mesh; it has {', '.join(mesh.shape)}")
    devices = 1
    for name in axes:
        devices *= mesh.shape[name]
    if zimg.shape[0] % devices:
        raise ValueError(f"batch of {zimg.shape[0]} pairs does not divide over {devices} devices; pad or shrink it")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to have it chosen")
    if impl not in ("auto", "all_gather", "ring"):
        raise ValueError(f"impl={impl!r} is none of 'auto', 'all_gather', 'ring'")
    impl = _auto_impl(mesh, devices) if impl == "auto" else impl
    block = zimg.shape[0] // devices
    if chunk_size is None:
        chunk_size = TILE_COLUMNS if impl == "ring" else max(8, TILE_COLUMNS // devices)
    plan = _Plan(axes, devices, min(chunk_size, block), impl)
    return _sharded_loss(zimg, ztxt, t, b, mesh, plan)


class _Plan(NamedTuple):
    axes: tuple[str, ...]
    devices: int
    chunk: int
    impl: str


class _Sums(NamedTuple):
    """Running sums over tiles, not yet divided by the batch; dztxt is held by the implementations."""

    loss: Float[Array, ""]
    dbias: Float[Array, ""]
    dzimg: Float[Array, "bl e"]


def _auto_impl(mesh: Mesh, devices: int) -> str:
    kind = mesh.devices.flat[0].device_kind.lower()
    overlaps_permutes = "v6" in kind or kind in ("tpu v5", "tpu v5p")
    return "ring" if devices > 1 and overlaps_permutes else "all_gather"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sharded_loss(zimg, ztxt, t, b, mesh, plan):
    return _value_and_grads(zimg, ztxt, t, b, mesh, plan)[0]


def _sharded_loss_fwd(zimg, ztxt, t, b, mesh, plan):
    return _value_and_grads(zimg, ztxt, t, b, mesh, plan)


def _sharded_loss_bwd(mesh, plan, grads, cotangent):
    return jax.tree.map(lambda grad: (cotangent * grad).astype(grad.dtype), grads)


_sharded_loss.defvjp(_sharded_loss_fwd, _sharded_loss_bwd)


def _value_and_grads(zimg, ztxt, t, b, mesh, plan):
    """(loss, (dzimg, dztxt, dt, db)) in one pass over the tiles."""
    walk = _ring if plan.impl == "ring" else _all_gather
    sharded, replicated = PartitionSpec(plan.axes), PartitionSpec()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(sharded, sharded, replicated, replicated),
        out_specs=(replicated, sharded, sharded, replicated, replicated),
        # No autodiff happens inside, so the replication checker has nothing to protect.
        check_vma=False,
    )
    def per_device(zimg, ztxt, t, b):
        pairs = zimg.shape[0] * plan.devices
        temperature, bias = jnp.exp(t.reshape(())), b.reshape(())
        sums, dztxt = walk(zimg, ztxt, temperature, bias, plan)
        # logits = temperature * zimg @ ztxt.T + b gives sum(dlogits * (logits - b)) = sum(zimg * dzimg): dt costs no pass.
        dzimg = temperature / pairs * sums.dzimg
        dt = jnp.sum(zimg.astype(jnp.float32) * dzimg)
        loss, dt, db = lax.psum((sums.loss / pairs, dt, sums.dbias / pairs), plan.axes)
        return (
            loss,
            dzimg.astype(zimg.dtype),
            (temperature / pairs * dztxt).astype(ztxt.dtype),
            dt.reshape(t.shape).astype(t.dtype),
            db.reshape(b.shape).astype(b.dtype),
        )

    loss, *grads = per_device(zimg, ztxt, t, b)
    return loss, tuple(grads)


def _all_gather(zimg, ztxt, temperature, bias, plan):
    """Chunk j of every device is gathered, multiplied with the local images, and its gradient reduce-scattered back."""
    me = lax.axis_index(plan.axes)

    def step(sums: _Sums, start, size: int):
        mine = lax.dynamic_slice_in_dim(ztxt, start, size)
        gathered = lax.all_gather(mine, plan.axes, tiled=True) if plan.devices > 1 else mine
        owner, offset = jnp.divmod(jnp.arange(plan.devices * size), size)
        positive_row = jnp.where(owner == me, start + offset, -1)
        sums, dgathered = _tile_rows(sums, zimg, gathered, positive_row, temperature, bias)
        if plan.devices > 1:
            dgathered = lax.psum_scatter(dgathered, plan.axes, tiled=True)
        return sums, dgathered

    return _over_chunks(step, _zero_sums(zimg), ztxt.shape[0], plan.chunk)


def _ring(zimg, ztxt, temperature, bias, plan):
    """The texts travel once around the ring together with the sum of their gradients, and come home complete."""
    me = lax.axis_index(plan.axes)
    to_next = [(i, (i + 1) % plan.devices) for i in range(plan.devices)]

    def block(sums: _Sums, texts, hop):
        is_home = (me - hop) % plan.devices == me

        def step(sums: _Sums, start, size: int):
            columns = lax.dynamic_slice_in_dim(texts, start, size)
            positive_row = jnp.where(is_home, start + jnp.arange(size), -1)
            return _tile_rows(sums, zimg, columns, positive_row, temperature, bias)

        return _over_chunks(step, sums, texts.shape[0], plan.chunk)

    def hop_once(carry, hop):
        sums, texts, dtexts = carry
        # The next texts leave before this block is multiplied, so the compiler may overlap the two.
        arriving = lax.ppermute(texts, plan.axes, to_next)
        sums, dblock = block(sums, texts, hop)
        return (sums, arriving, lax.ppermute(dtexts + dblock, plan.axes, to_next)), None

    start = (_zero_sums(zimg), ztxt, jnp.zeros(ztxt.shape, jnp.float32))
    if plan.devices == 1:
        return block(start[0], ztxt, 0)
    (sums, _, dztxt), _ = lax.scan(hop_once, start, jnp.arange(plan.devices))
    return sums, dztxt


def _over_chunks(step: Callable, sums: tuple, length: int, chunk: int) -> tuple[tuple, Float[Array, "length e"]]:
    """Scans `step(sums, start, size) -> (sums, rows [size, e])` over 0 … length and concatenates the rows.

    A remainder that `chunk` does not divide gets a step of its own.
    """
    whole, remainder = divmod(length, chunk)
    if whole == 0 or (whole == 1 and not remainder):
        return step(sums, 0, length)
    sums, rows = lax.scan(lambda sums, j: step(sums, j * chunk, chunk), sums, jnp.arange(whole))
    rows = rows.reshape(whole * chunk, -1)
    if remainder:
        sums, last = step(sums, whole * chunk, remainder)
        rows = jnp.concatenate([rows, last])
    return sums, rows


def _tile_rows(sums: _Sums, zimg, ztxt, positive_row, temperature, bias):
    """Adds the tile of all local images x `ztxt`, TILE_ROWS images at a time; returns the sums and dztxt."""

    def step(carry, start, size: int):
        loss_sum, dbias_sum, dztxt_sum = carry
        images = lax.dynamic_slice_in_dim(zimg, start, size)
        loss, dbias, dimages, dztxt = _tile(images, ztxt, positive_row - start, temperature, bias)
        return (loss_sum + loss, dbias_sum + dbias, dztxt_sum + dztxt), dimages

    carry = (sums.loss, sums.dbias, jnp.zeros(ztxt.shape, jnp.float32))
    (loss, dbias, dztxt), dzimg = _over_chunks(step, carry, zimg.shape[0], TILE_ROWS)
    return _Sums(loss, dbias, sums.dzimg + dzimg), dztxt


def _tile(zimg, ztxt, positive_row, temperature, bias):
    """One tile's sums: loss, dbias, dzimg and dztxt (the latter two still without the factor temperature / B)."""
    logits = temperature * _matmul(zimg, ztxt.T) + bias
    positive = jnp.arange(zimg.shape[0])[:, None] == positive_row[None, :]
    signed = jnp.where(positive, -logits, logits)
    loss = jnp.sum(jax.nn.softplus(signed))
    # The positive's -1 is inside before any cast to bfloat16: subtracting the diagonal afterwards would cancel badly.
    dlogits = jnp.where(positive, -1.0, 1.0) * jax.nn.sigmoid(signed)
    low = dlogits.astype(zimg.dtype)
    return loss, jnp.sum(dlogits), _matmul(low, ztxt), _matmul(low.T, zimg)


def _zero_sums(zimg) -> _Sums:
    return _Sums(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros(zimg.shape, jnp.float32))


def _matmul(left, right):
    """Multiplies in the operands' dtype and accumulates in float32."""
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)
