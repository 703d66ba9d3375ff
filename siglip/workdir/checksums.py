"""Checksums of arrays, the same wherever they are and however they are laid out.

    sum of bits * weight modulo 2^32, where the weight of a number is 1 + _FACTOR * its place, and odd

Integer sums have no order, so sharding does not matter. An odd weight is invertible: no change of one number goes unnoticed.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FACTOR = 2 * 0x9E3779B1 % 2**32
_CHUNK = 1 << 16  # numbers that stay in a processor's cache


def checksums(tree: Any) -> dict[str, int]:
    """Of every array of a tree by its path, such as "params/img/kernel": of numpy here, of jax on their devices."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths_and_leaves}
    on_devices = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    sums = {path: _sum_here(leaf) for path, leaf in leaves.items() if path not in on_devices}
    return sums | {path: int(np.asarray(found)) for path, found in _sums_there(on_devices).items()}


@jax.jit
def _sums_there(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _sum_there(array) for path, array in arrays.items()}


@jax.jit  # within the other, so that a shape is traced once, however many arrays have it
def _sum_there(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    else:
        bits = array.astype(jnp.uint32)
    weight = jnp.uint32(1)
    for axis in range(array.ndim):
        factor = jnp.uint32(_FACTOR * math.prod(array.shape[axis + 1 :]) % 2**32)
        weight += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * factor
    return (bits * weight).sum(dtype=jnp.uint32)


def _sum_here(array: Any) -> int:
    flat, total = np.ravel(array), 0
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        floating = jnp.issubdtype(chunk.dtype, jnp.floating)
        bits = chunk.astype(np.float32).view(np.uint32) if floating else chunk.astype(np.uint32)
        places = np.arange(start, start + len(chunk)).astype(np.uint32)
        total += int((bits * (places * np.uint32(_FACTOR) + np.uint32(1))).sum(dtype=np.uint32))
    return total % 2**32
