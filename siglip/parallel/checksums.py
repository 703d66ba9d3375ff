"""Checksums of arrays where they are: on their devices, however they are laid out there.

Two 32-bit sums of every array, over its bits mixed with their places. Integer sums have no order, so sharding does not matter.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: Mapping[str, Any]) -> dict[str, list[int]]:
    """The two sums of each array, by its name; in every process the same."""
    return {name: np.asarray(leaf).tolist() for name, leaf in {n: _sums(a) for n, a in arrays.items()}.items()}


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    else:
        bits = leaf.astype(jnp.uint32)
    strides = [math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
    places = sum(
        jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        for axis, stride in enumerate(strides)
    )
    mixed = _mix(bits ^ _mix(places + jnp.uint32(1)))
    return jnp.stack([mixed.sum(dtype=jnp.uint32), _mix(mixed + jnp.uint32(0x9E3779B9)).sum(dtype=jnp.uint32)])


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of the input reaches every bit of the output."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
