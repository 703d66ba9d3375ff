"""The loss compiled for TPU pods ahead of time, without one: memory at a million pairs, and what overlaps.

Needs libtpu (`make interop`), which one process at a time may use.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from siglip.losses import chunked_sigmoid_loss
from siglip.planning import compile

pytest.importorskip("libtpu")
pytestmark = pytest.mark.interop

WIDTH = 768


@pytest.fixture(autouse=True)
def no_cache():
    """A program from the cache has no schedule to read."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def stats_of(topology, pairs, impl):
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    z = jax.ShapeDtypeStruct((pairs, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh, impl=impl)
    return compile.read(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(z, z, scalar, scalar).compile())


def share_in_flight(stats, kind):
    hidden = sum(f.bytes * f.runs for f in stats.in_flight if f.matmuls and f.kind == kind)
    return hidden / stats.collective_bytes[kind]


def test_a_million_pairs_around_a_ring_of_256_chips():
    stats = stats_of("v5e:16x16", 2**20, "ring")
    assert stats.temp_bytes <= 2**20
    assert stats.matmul_flops == 3 * 2 * 2**40 * WIDTH // 256
    # Only the last hop home has no products left to hide under.
    assert share_in_flight(stats, "collective-permute") > 0.99


def test_a_million_pairs_gathered_over_256_chips():
    stats = stats_of("v5e:16x16", 2**20, "all_gather")
    assert stats.temp_bytes <= 2**20
    assert stats.matmul_flops == 3 * 2 * 2**40 * WIDTH // 256
    assert share_in_flight(stats, "all-gather") > 0.99  # but for the first chunk's
    assert stats.collective_bytes.get("all-reduce", 0) < 2**20  # a gather in disguise would show here


def test_memory_per_chip_at_fixed_pairs_per_chip():
    small, large = (stats_of(f"v5e:{n}x{n}", 1024 * n * n, "ring").temp_bytes for n in (4, 8))
    assert large <= small + 2**16, (small, large)


@pytest.mark.parametrize("topology", ["v5p:2x2x4", "v6e:4x4"])
def test_the_ring_overlaps_on_other_generations(topology):
    stats = stats_of(topology, 32768, "ring")
    assert share_in_flight(stats, "collective-permute") > 0.9
