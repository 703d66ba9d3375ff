"""The loss and the image tower compiled for TPUs ahead of time, without one: memory at a million pairs, what overlaps, bytes.

Needs libtpu (`make interop`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from siglip.losses import chunked_sigmoid_loss
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, make_model, param_shapes
from siglip.parallel import sharding
from siglip.planning import ahead_of_time, compile, kernels
from siglip.planning.accelerators import parse_topology

pytest.importorskip("libtpu")
pytestmark = pytest.mark.interop

WIDTH = 768
HBM_GB = 5.08  # a layer of So400m, forward and backward, one chip


@pytest.fixture(autouse=True)
def no_cache():
    """A program from the cache has no schedule to read."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def tpus(topology):
    """As the plan gets them: beside other processes that compile, which libtpu refuses by default."""
    return ahead_of_time.devices_of(parse_topology(topology))


def stats_of(topology, pairs, impl):
    mesh = Mesh(np.asarray(tpus(topology)), ("data",), axis_types=(AxisType.Auto,))
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


def test_attention_of_padded_images_in_tiles():
    """A NaFlex tower, forward and backward: splash attention takes a length per image; 600 patches are not whole tiles."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), tpus("v5e:2x2"))
    image = ImageConfig("S/16", depth=1, dtype="bfloat16", image_size=(256, 256), naflex=NaflexConfig(600, 1024))
    config = ModelConfig(image, None, (None, None))
    model, whole = make_model(config, layout=sharding.ParamLayout(mesh)), NamedSharding(mesh, sharding.P_REPLICATED)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), param_shapes(config))
    rows = NamedSharding(mesh, sharding.P_BATCH)
    patches = jax.ShapeDtypeStruct((2 * mesh.size, 600, 768), jnp.uint8, sharding=rows)
    grid = jax.ShapeDtypeStruct((2 * mesh.size, 2), jnp.int32, sharding=rows)

    def loss(params, patches, grid):
        return jnp.sum(model.apply({"params": params}, {"patches": patches, "grid": grid}, train=True)[0])

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(jax.grad(loss)).lower(params, patches, grid).compile()
    kernels_of = [line for line in program.as_text().splitlines() if "tpu_custom_call" in line and "splash" in line]
    assert len(kernels_of) == 3  # forward, and of the gradients that of the queries and that of keys and values
    assert all("s32[2,8,640]" in line for line in kernels_of), kernels_of


@pytest.mark.slow
def test_a_layer_of_so400m_moves_no_more_bytes_than_it_did():
    """64 images a chip, full remat; what the compiler made of it in November 2026 (jax 0.10.2, libtpu 0.0.52)."""
    layers = 3
    mesh = sharding.make_mesh(sharding.MeshConfig(), tpus("v5e:2x2"))
    image = ImageConfig("So400m/14", depth=layers, dtype="bfloat16", scan=True, remat="full")
    config = ModelConfig(image, None, (None, None))
    model, whole = make_model(config, layout=sharding.ParamLayout(mesh)), NamedSharding(mesh, sharding.P_REPLICATED)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), param_shapes(config))
    rows = NamedSharding(mesh, sharding.P_BATCH)
    images = jax.ShapeDtypeStruct((64 * mesh.size, 224, 224, 3), jnp.uint8, sharding=rows)
    # Tests compute exactly on CPUs; of bfloat16 operands the TPU's attention kernel refuses to.
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        grad = jax.grad(lambda params, image: jnp.sum(model.apply({"params": params}, {"image": image}, train=True)[0]))
        found = kernels.read_kernels(jax.jit(grad).lower(params, images).compile().as_text())
    moved = sum(k.runs * k.bytes for k in found if k.is_in_a_block)
    assert moved / layers / 1e9 <= HBM_GB
