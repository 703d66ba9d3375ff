"""The pairwise sigmoid loss, dense and sharded in chunks, and CLIP's softmax loss to compare with.

    logits = exp(t) * zimg @ ztxt.T + b,    y_ij = +1 if i == j else -1
    loss   = (1 / B) * sum_ij softplus(-y_ij * logits_ij)           (SigLIP, arXiv 2303.15343, Algorithm 1)

`t` is the *log* temperature. The sum runs over all B^2 pairs but is divided by B: the loss is per positive.

Nothing in that sum couples one logit to another (there is no normaliser over the batch), so the derivative of a tile is
known as soon as the tile is: dloss/dlogit = -y * sigmoid(-y * logit) / B. `chunked_sigmoid_loss` uses this. Its forward
pass walks over tiles and leaves both the loss and all four gradients; its backward pass only scales them. Every tile's
logits are computed once, three matmuls in all, and no tile is kept.

The trap: differentiating through a loop over chunks instead (autodiff of a scan) keeps every tile for the backward pass and
saves no memory at all; and some prints of the paper write "-b": with b = -10 only "+ b" is right.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from siglip.array_types import Array, Float
from siglip.errors import UserError
from siglip.parallel import topology

Impl = Literal["auto", "all_gather", "ring"]


class _TileSize(NamedTuple):
    """Texts per tile of either walk, and the largest tile in elements: beyond it the images are taken in parts.

    On CPU a tile should stay in a core's cache; on TPU its logits in VMEM (128 MiB, float32), with few enough texts that
    the travelling ones stay there too.
    """

    gathered_columns: int
    ring_columns: int
    elements: int


_TILES = {
    "cpu": _TileSize(256, 256, 2**18),
    "gpu": _TileSize(4096, 4096, 2**24),
    "tpu": _TileSize(2048, 512, 2**23),
}
_MIN_ROWS = 128


def sigmoid_loss(
    zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], t: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, ""]:
    """The dense reference: sum over all pairs / batch, with the whole [b, b] logits in memory.

    Args:
        zimg, ztxt: L2-normalised embeddings; row i of one belongs to row i of the other.
        t: log temperature, scalar or shape (1,).
        b: bias, scalar or shape (1,).
    """
    logits = jnp.exp(t).reshape(()) * _matmul(zimg, ztxt.T) + b.reshape(())
    labels = 2 * jnp.eye(zimg.shape[0], dtype=logits.dtype) - 1
    return -jnp.sum(jax.nn.log_sigmoid(labels * logits)) / zimg.shape[0]


def softmax_loss(zimg: Float[Array, "b e"], ztxt: Float[Array, "b e"], t: Float[Array, "..."]) -> Float[Array, ""]:
    """CLIP's loss (arXiv 2103.00020, Figure 3): mean cross-entropy of both directions; there is no bias."""
    logits = jnp.exp(t).reshape(()) * _matmul(zimg, ztxt.T)
    image_to_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    text_to_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -(jnp.mean(image_to_text) + jnp.mean(text_to_image)) / 2


def prior_shift(prior: float, *, batch_size: int) -> float:
    """What to add to a logit where another share of the pairs matches than in training, by Bayes' rule.

        logit(prior) - logit(1 / batch_size)

    A training batch has one match among `batch_size` texts per image, so sigmoid(logit) is the probability at that share.

    Args:
        prior: the share of pairs that match, before looking at them: 1 / n where one of n images is expected to.

    Raises:
        UserError: prior is not between 0 and 1, or the batch has fewer than 2 pairs.
    """
    if not 0 < prior < 1 or batch_size < 2:
        raise UserError(f"prior={prior} must lie between 0 and 1, and batch_size={batch_size} must be at least 2")
    return math.log(prior / (1 - prior)) + math.log(batch_size - 1)


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

    Every device keeps its images. "all_gather" collects `chunk_size` texts of every device at a time, the next ones while
    these are multiplied, and reduce-scatters their gradients back. "ring" sends `chunk_size` texts of every device once
    around all devices, half of them each way, and the sum of their gradients with them. Memory is a function of the
    chunk and of the device's own block, not of b. Products of bfloat16 embeddings are accumulated in float32; those of
    float32 embeddings are float32 throughout, also where the hardware would rather round them.

    Args:
        axis: the mesh axis, or axes, that the batch is sharded over.
        chunk_size: texts of every device on their way at a time; need not divide the block.
        impl: "auto" takes the ring on TPUs whose devices form a ring of neighbours, else the all-gather.

    Raises:
        ValueError: if the batch does not divide over the devices of `axis`, `chunk_size` is below 1, or `impl` is unknown.
    """
    plan = _make_plan(zimg.shape[0], mesh, (axis,) if isinstance(axis, str) else tuple(axis), chunk_size, impl)
    return _sharded_loss(zimg, ztxt, t, b, mesh, plan)


class _Plan(NamedTuple):
    """Everything that is fixed when the loss is traced; `groups` or `next_device` belong to one of the walks."""

    axes: tuple[str, ...]
    devices: int
    chunk: int
    rows: int
    impl: str
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    next_device: tuple[tuple[int, int], ...]


class _Sums(NamedTuple):
    """Running sums over tiles, not yet scaled; dztxt is held by the walks."""

    loss: Float[Array, ""]
    dbias: Float[Array, ""]
    dzimg: Float[Array, "bl e"]


def _make_plan(pairs: int, mesh: Mesh, axes: tuple[str, ...], chunk_size: int | None, impl: str) -> _Plan:
    unknown = [name for name in axes if name not in mesh.shape]
    if unknown:
        raise ValueError(f"axis {unknown[0]!r} is not an axis of the mesh; it has {', '.join(mesh.shape)}")
    count = math.prod(mesh.shape[name] for name in axes)
    if pairs % count:
        raise ValueError(f"batch of {pairs} pairs does not divide over {count} devices; pad or shrink it")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to have it chosen")
    if impl not in ("auto", "all_gather", "ring"):
        raise ValueError(f"impl={impl!r} is none of 'auto', 'all_gather', 'ring'")
    # The devices along `axes`, with every other axis held at its first place: those repeat the same pattern.
    order = [mesh.axis_names.index(name) for name in axes]
    others = [i for i in range(mesh.devices.ndim) if i not in order]
    devices = list(mesh.devices.transpose(order + others).reshape(count, -1)[:, 0])
    impl = _auto_impl(devices) if impl == "auto" else impl
    chunk_size, rows = tile_shape(pairs, count, devices[0].platform, chunk_size=chunk_size, ring=impl == "ring")
    order = topology.ring(devices).order
    steps = tuple(zip(order, (*order[1:], order[0]), strict=True))
    return _Plan(axes, count, chunk_size, rows, impl, topology.axis_groups(devices), steps)


def tile_shape(pairs: int, devices: int, platform: str, *, chunk_size: int | None, ring: bool) -> tuple[int, int]:
    """(texts of every device on their way at a time, images they are multiplied with at a time) of the chunked loss."""
    tile = _TILES.get(platform, _TILES["cpu"])
    if chunk_size is None:
        chunk_size = tile.ring_columns if ring else max(1, tile.gathered_columns // devices)
    chunk_size = min(chunk_size, pairs // devices)
    return chunk_size, max(_MIN_ROWS, tile.elements // (chunk_size if ring else chunk_size * devices))


def _auto_impl(devices: Sequence[topology.Device]) -> str:
    """The ring where all of its traffic was seen to overlap with the products (docs/scaling.md), else the all-gather."""
    neighbours = devices[0].platform == "tpu" and len(devices) > 2 and topology.ring(devices).one_hop
    return "ring" if neighbours else "all_gather"


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
        zero = jnp.zeros((), _sum_dtype(zimg))
        sums = _Sums(zero, zero, jnp.zeros(zimg.shape, zero.dtype))
        sums, dztxt = walk(sums, zimg, ztxt, temperature, bias, plan)
        # logits = temperature * zimg @ ztxt.T + b gives sum(dlogits * (logits - b)) = sum(zimg * dzimg): dt costs no pass.
        scale = temperature / pairs
        dt = scale * jnp.sum(zimg.astype(sums.dzimg.dtype) * sums.dzimg)
        loss, dt, db = lax.psum((sums.loss / pairs, dt, sums.dbias / pairs), plan.axes)
        return (
            loss,
            (scale * sums.dzimg).astype(zimg.dtype),
            (scale * dztxt).astype(ztxt.dtype),
            dt.reshape(t.shape).astype(t.dtype),
            db.reshape(b.shape).astype(b.dtype),
        )

    loss, *grads = per_device(zimg, ztxt, t, b)
    return loss, tuple(grads)


def _all_gather(sums, zimg, ztxt, temperature, bias, plan):
    """Chunk j of every device is gathered, multiplied with the local images, and its gradient reduce-scattered back.

    Inside the loop the gather of the next chunk and the scatter of the last one do not depend on this chunk's products,
    so the compiler may run all three at once.
    """
    owners, me = _gathered_owners(plan), lax.axis_index(plan.axes)
    whole, remainder = divmod(ztxt.shape[0], plan.chunk)

    def gather(start, size: int):
        return _gather(lax.dynamic_slice_in_dim(ztxt, start, size), plan)

    def multiply(sums, gathered, start, size: int):
        column = jnp.arange(size)[None, :]
        positive_row = jnp.where(owners[:, None] == me, start + column, -1).reshape(-1)
        return _add_tile(sums, zimg, gathered, positive_row, temperature, bias, plan)

    def step(carry, j):
        sums, gathered, dlast = carry
        coming = gather((j + 1) * plan.chunk, plan.chunk)
        scattered = _scatter(dlast, plan)
        sums, dgathered = multiply(sums, gathered, j * plan.chunk, plan.chunk)
        return (sums, coming, dgathered), scattered

    gathered = gather(0, plan.chunk)
    done = []
    if whole > 1:
        nothing = jnp.zeros(gathered.shape, _sum_dtype(gathered))
        (sums, gathered, dlast), scattered = lax.scan(step, (sums, gathered, nothing), jnp.arange(whole - 1))
        # Every step hands out its predecessor's gradients; the first had none.
        done = [scattered.reshape(-1, ztxt.shape[1])[plan.chunk :], _scatter(dlast, plan)]
    sums, dgathered = multiply(sums, gathered, (whole - 1) * plan.chunk, plan.chunk)
    done.append(_scatter(dgathered, plan))
    if remainder:
        start = whole * plan.chunk
        sums, dgathered = multiply(sums, gather(start, remainder), start, remainder)
        done.append(_scatter(dgathered, plan))
    return sums, jnp.concatenate(done)


def _gather(rows, plan):
    """[c, e] of every device -> [devices * c, e], one axis of the devices' grid after the other."""
    for groups in plan.groups if plan.devices > 1 else ():
        rows = lax.all_gather(rows, plan.axes, tiled=True, axis_index_groups=groups)
    return rows


def _scatter(rows, plan):
    """The transpose of `_gather`: sums of [devices * c, e] over all devices -> the [c, e] that belong to each."""
    for groups in reversed(plan.groups) if plan.devices > 1 else ():
        rows = lax.psum_scatter(rows, plan.axes, tiled=True, axis_index_groups=groups)
    return rows


def _gathered_owners(plan) -> Array:
    """Which device owns the k-th block of what this device gathers."""
    members = np.arange(plan.devices)[:, None]
    for groups in plan.groups:
        gathered = {device: np.concatenate([members[other] for other in group]) for group in groups for device in group}
        members = np.stack([gathered[device] for device in range(plan.devices)])
    return jnp.asarray(members)[lax.axis_index(plan.axes)]


def _ring(sums, zimg, ztxt, temperature, bias, plan):
    """A chunk of every device's texts goes around all devices, meets their images, and brings its gradients home.

    At each hop the texts travel on, and the gradients follow, while the texts at hand are multiplied. Only the first
    tile, before any hop, has positives in it.
    """

    def trip(sums, start, size: int):
        texts = lax.dynamic_slice_in_dim(ztxt, start, size)

        def hop(carry, _):
            sums, texts, dtexts = carry
            travelling = _send(texts, plan), _send(dtexts, plan)
            sums, dhere = _add_tile(sums, zimg, texts, None, temperature, bias, plan)
            return (sums, travelling[0], travelling[1] + dhere), None

        coming = _send(texts, plan)
        sums, dtexts = _add_tile(sums, zimg, texts, start + jnp.arange(size), temperature, bias, plan)
        if plan.devices > 1:
            (sums, _, dtexts), _ = lax.scan(hop, (sums, coming, dtexts), length=plan.devices - 1)
        return sums, _send(dtexts, plan)

    return _over_chunks(trip, sums, ztxt.shape[0], plan.chunk)


def _send(rows, plan):
    """One hop: the first half of the rows forwards, the second backwards, so that links are used in both directions."""
    if plan.devices == 1:
        return rows
    back = tuple((there, here) for here, there in plan.next_device)
    half = -(-rows.shape[0] // 2)
    parts = [lax.ppermute(rows[:half], plan.axes, plan.next_device)]
    if half < rows.shape[0]:
        parts.append(lax.ppermute(rows[half:], plan.axes, back))
    return jnp.concatenate(parts)


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


def _add_tile(sums: _Sums, zimg, ztxt, positive_row, temperature, bias, plan):
    """Adds the tile of all local images x `ztxt`, `plan.rows` images at a time; returns the sums and dztxt.

    `positive_row[j]` is the image that text j belongs to, outside 0 … bl for another device's; None: all are others'.
    """

    def step(carry, start, size: int):
        loss_sum, dbias_sum, dztxt_sum = carry
        images = lax.dynamic_slice_in_dim(zimg, start, size)
        row = None if positive_row is None else positive_row - start
        loss, dbias, dimages, dztxt = _tile(images, ztxt, row, temperature, bias)
        return (loss_sum + loss, dbias_sum + dbias, dztxt_sum + dztxt), dimages

    carry = (sums.loss, sums.dbias, jnp.zeros(ztxt.shape, _sum_dtype(ztxt)))
    (loss, dbias, dztxt), dzimg = _over_chunks(step, carry, zimg.shape[0], plan.rows)
    return _Sums(loss, dbias, sums.dzimg + dzimg), dztxt


def _tile(zimg, ztxt, positive_row, temperature, bias):
    """One tile's sums: loss, dbias, dzimg and dztxt (the latter two still without the factor temperature / B)."""
    logits = temperature * _matmul(zimg, ztxt.T) + bias
    if positive_row is None:
        loss, dlogits = jnp.sum(jax.nn.softplus(logits)), jax.nn.sigmoid(logits)
    else:
        positive = jnp.arange(zimg.shape[0])[:, None] == positive_row[None, :]
        signed = jnp.where(positive, -logits, logits)
        loss = jnp.sum(jax.nn.softplus(signed))
        # The positive's -1 is inside before any cast to bfloat16: subtracting the diagonal afterwards would cancel badly.
        dlogits = jnp.where(positive, -1.0, 1.0) * jax.nn.sigmoid(signed)
    low = dlogits.astype(zimg.dtype)
    return loss, jnp.sum(dlogits), _matmul(low, ztxt), _matmul(low.T, zimg)


def _matmul(left, right):
    """Multiplies in the operands' dtype and accumulates in float32, or in float64 if that is theirs."""
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.matmul(left, right, precision=precision, preferred_element_type=_sum_dtype(left))


def _sum_dtype(rows) -> jnp.dtype:
    return jnp.promote_types(rows.dtype, jnp.float32)
