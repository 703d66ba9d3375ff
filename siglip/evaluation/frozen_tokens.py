"""Patch tokens of a frozen tower, kept on disk, and heads trained on them.

Each process keeps the tokens of its share of the images in a temporary file, as float16; a head sees batches of all processes.
Tokens are standardised by the training set's mean and std of each channel: what a BatchNorm without parameters converges to when
its input does not change. Those of a NaFlex model are padded, and "grid" says how far they go: see `valid_of`.
"""

import collections
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from siglip.array_types import Array, Float
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, Value
from siglip.parallel import sharding
from siglip.parallel.collectives import gather_records, gather_rows

_BLOCK = 64  # images at a time
_STD_EPS = 1e-6

Params = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]


class FrozenTokens(NamedTuple):
    """This process's share of some images.

    Attributes:
        arrays: "tokens" float16 [n, patches, d], and "mask" uint8 [n, h, w] where it was asked for; in files. Of a NaFlex model
            "grid" int32 [n, 2], patches (down, across), too, and "mask" [n, patches, p_h p_w].
        keys: names of the images.
        values: what the fields asked for hold.
    """

    arrays: dict[str, np.ndarray]
    keys: list[str]
    values: list[list[list[Value]]]


def read_tokens(embedder: Embedder, data: str, fields: Sequence[str] = (), *, mask: str | None = None) -> FrozenTokens:
    """Embeds every decodable image.

    Args:
        mask: field that holds a segmentation mask.

    Raises:
        FileNotFoundError, UserError: shards are missing or damaged, or no image can be used.
    """
    pairs, images = embedder.read(data, fields, **({} if mask is None else {"mask": mask}))
    nothing = {**embedder.no_images, "key": [], "fields": []}
    if mask is not None:
        size = (embedder.max_patches, math.prod(embedder.patch_px)) if embedder.max_patches else embedder.image_size
        nothing["mask"] = np.zeros((0, *size), np.uint8)
    files = collections.defaultdict(tempfile.TemporaryFile)
    shapes: dict[str, tuple] = {}
    batches, keys, values, finite = iter(images), [], [], True
    for _ in range(-(-pairs // (embedder.rows * jax.process_count()))):
        batch = next(batches, nothing)
        tokens = embedder.embed_images(batch, feature="tokens").astype(np.float16)
        finite &= bool(np.isfinite(tokens).all())
        kept = {name: batch[name] for name in ("mask", "grid") if name in batch}
        for name, rows in (kept | {"tokens": tokens}).items():
            files[name].write(rows.tobytes())
            shapes[name] = (rows.dtype, rows.shape[1:])
        keys += batch["key"]
        values += [[embedder.values_of(record, field) for field in fields] for record in batch["fields"]]
    next(batches, None)
    told = gather_records([[len(keys), finite, dict(images.counts)]])
    if not sum(count for count, *_ in told):
        counts = sum((Counter(own) for *_, own in told), Counter())
        raise UserError(f"{data} holds no image that can be used ({dict(counts)}); check the shards")
    if not all(own for _, own, _ in told):
        raise UserError("some tokens are not finite; the model has diverged or its file is damaged")
    arrays = {}
    for name, (dtype, shape) in shapes.items():
        files[name].flush()
        whole = (len(keys), *shape)
        arrays[name] = np.memmap(files[name], dtype, "r", shape=whole) if keys else np.zeros(whole, dtype)
    return FrozenTokens(arrays, keys, values)


def valid_of(arrays: Mapping[str, Any]) -> Any:
    """bool [b, n], False at padding, of a batch with "tokens" and "grid"; None without a "grid": there is no padding then.

    A row of zeros, which fills up a batch, is an image of one patch.
    """
    if "grid" not in arrays:
        return None
    return np.arange(arrays["tokens"].shape[1])[None] < arrays["grid"].clip(1).prod(axis=1)[:, None]


def channel_statistics(arrays: Arrays) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """(mean, std) of each channel over all tokens of all images of all processes."""
    width = arrays["tokens"].shape[-1]
    sums = np.zeros((3, width))
    for start in range(0, len(arrays["tokens"]), _BLOCK):
        some = {name: array[start : start + _BLOCK] for name, array in arrays.items()}
        block, valid = some["tokens"].astype(np.float64), valid_of(some)
        block = block.reshape(-1, width) if valid is None else block[valid]
        sums += np.stack([np.full(width, len(block)), block.sum(axis=0), (block**2).sum(axis=0)])
    count, total, squares = gather_rows(sums[None].astype(np.float32)).astype(np.float64).sum(axis=0)
    mean = total / count
    return mean.astype(np.float32), np.sqrt(np.maximum(squares / count - mean**2, 0) + _STD_EPS).astype(np.float32)


def train_head(
    params: Params,
    loss: Callable[[Params, Mapping[str, Array], Array], Array],
    arrays: Arrays,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine to zero; batches run through orders drawn from the seed.

    Args:
        params: "mean" and "std", where it holds them, are constants: they come back as they are.
        loss: (params, batch, random key) -> mean over the batch; a batch holds rows of `arrays`.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), max(2, steps))
    decayed = {name: name not in ("mean", "std") for name in params}
    optimizer = optax.adamw(schedule, weight_decay=weight_decay, mask=decayed)

    @jax.jit
    def update(params, state, batch, key):
        grads = jax.grad(loss)(params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    count = len(next(iter(arrays.values())))
    if not all(gather_records([count])):
        raise UserError("a process has no training image; use fewer processes, or more images")
    rows = -(-batch_size // mesh.size) * mesh.size // jax.process_count()
    rng, order = np.random.default_rng((seed, jax.process_index())), np.zeros(0, int)
    params = jax.device_put(dict(params), NamedSharding(mesh, sharding.P_REPLICATED))
    state, key = optimizer.init(params), jax.random.key(seed)
    for step in range(steps):
        while len(order) < rows:
            order = np.concatenate([order, rng.permutation(count)])
        chosen, order = np.sort(order[:rows]), order[rows:]
        batch = sharding.put_batch({name: _widened(array[chosen]) for name, array in arrays.items()}, mesh)
        params, state = update(params, state, batch, jax.random.fold_in(key, step))
    return jax.tree.map(np.asarray, params)


def apply_head(
    head: Callable[[Params, Mapping[str, Array]], Any], params: Params, arrays: Arrays
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (rows, `head(params, rows of the arrays)`) of this process's images; one shape is compiled."""
    compiled, count = jax.jit(head), len(arrays["tokens"])
    for start in range(0, count, _BLOCK):
        some = {name: _widened(array[start : start + _BLOCK]) for name, array in arrays.items()}
        rows = slice(start, min(start + _BLOCK, count))
        fill = _BLOCK - (rows.stop - rows.start)
        padded = {name: np.pad(array, [(0, fill), *[(0, 0)] * (array.ndim - 1)]) for name, array in some.items()}
        yield rows, np.asarray(compiled(params, padded))[: rows.stop - rows.start]


def _widened(rows: np.ndarray) -> np.ndarray:
    """What is kept in float16 as float32: not every processor that XLA compiles for has the conversion."""
    return np.asarray(rows, np.float32 if rows.dtype == np.float16 else rows.dtype)


def standardised(params: Params, tokens: Array) -> Float[Array, "b n d"]:
    """float32, by the "mean" and the "std" that `params` hold; no gradient goes to them."""
    mean, std = (jax.lax.stop_gradient(params[name])[None, None] for name in ("mean", "std"))
    return (tokens.astype(jnp.float32) - mean) / std
