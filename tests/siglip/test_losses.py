"""The losses against a float64 double loop, against recorded numbers, and sharded over 1, 2, 3 and 8 devices."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from siglip import losses
from siglip.errors import UserError
from siglip.losses import chunked_sigmoid_loss, prior_shift, sigmoid_loss, softmax_loss
from siglip.parallel import topology
from siglip.planning import compile
from tests.siglip.rounding import rounding
from tests.siglip.tiny import QUICK


def double_loop(zimg, ztxt, t, b):
    """Loss and gradients pair by pair in float64, straight from Algorithm 1."""
    zimg, ztxt = np.float64(zimg), np.float64(ztxt)
    n, temperature = len(zimg), np.exp(np.float64(t))
    loss, dzimg, dztxt, dt, db = 0.0, np.zeros_like(zimg), np.zeros_like(ztxt), 0.0, 0.0
    for i in range(n):
        for j in range(n):
            dot = zimg[i] @ ztxt[j]
            label = 1.0 if i == j else -1.0
            signed = -label * (temperature * dot + np.float64(b))
            loss += np.logaddexp(0, signed) / n
            dlogit = -label / (1 + np.exp(-signed)) / n
            dzimg[i] += dlogit * temperature * ztxt[j]
            dztxt[j] += dlogit * temperature * zimg[i]
            dt += dlogit * temperature * dot
            db += dlogit
    return loss, (dzimg, dztxt, dt, db)


def float32_bounds(zimg, ztxt, t, b):
    """What float32 may move loss and gradients by: to first order, whatever the order of the sums."""
    zimg, ztxt, temperature = np.float64(zimg), np.float64(ztxt), np.exp(np.float64(t))
    (n, width), signs = zimg.shape, 2 * np.eye(len(zimg)) - 1
    signed = signs * (temperature * zimg @ ztxt.T + b)
    products = temperature * np.abs(zimg) @ np.abs(ztxt).T
    dlogits = 1 / (1 + np.exp(signed)) / n
    # A logit is a sum of `width` products and of b; 4 + |t|: exp(t), the product with it, the sum.
    logits_off = rounding(width + 4 + np.abs(t), products) + rounding(1, np.abs(b))
    # The slope of the sigmoid, and 4: exp, sum, quotient, division by n.
    dlogits_off = dlogits * (1 - n * dlogits) * logits_off + rounding(4, dlogits)
    each, all_pairs = dlogits_off + rounding(n + 4, dlogits), dlogits_off + rounding(n**2 + 4, dlogits)
    loss = (dlogits * logits_off).sum() + rounding(n**2 + 4, np.logaddexp(0, -signed).sum() / n)
    grads = temperature * each @ np.abs(ztxt), temperature * each.T @ np.abs(zimg)
    return loss, (*grads, (all_pairs * products).sum(), all_pairs.sum())


def embeddings(pairs, width, seed):
    z = np.random.default_rng(seed).normal(size=(2, pairs, width))
    return tuple(jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True)))


def assert_close(actual, expected, bounds):
    for a, e, bound in zip(*map(jax.tree.leaves, (actual, expected, bounds)), strict=True):
        off = np.abs(np.float64(a).reshape(np.shape(e)) - np.float64(e))
        assert np.all(off <= np.reshape(bound, np.shape(e))), f"off by up to {np.max(off / bound)} times its rounding"


@pytest.fixture
def float64():
    """The identities hold to float64's rounding: a sum of at most 48^2 terms here, of numbers that differ by 1e3 in size."""
    with jax.enable_x64(True):
        yield


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(np.reshape(a, np.shape(e)), e, rtol=0, atol=1e-12 * max(np.max(np.abs(e)), 1e-3))


def mesh_of(devices, names=("data",), shape=None):
    shape = shape or (devices,)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:devices])


value_and_grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))


def recorded(fixtures, case):
    data = np.load(fixtures / "bv_loss.npz")
    return lambda name: jnp.asarray(data[name if name in data else f"case{case}/{name}"])


def assert_recorded(value, grads, get):
    bounds = float32_bounds(*(np.float64(get(name)) for name in ("zimg", "ztxt")), get("t_param")[0], get("b")[0])
    expected = get("loss_f64"), tuple(get(f"grad_{name}") for name in ("zimg", "ztxt", "t", "b"))
    # Twice: the recorded gradients are float32 too.
    assert_close((value, grads), expected, jax.tree.map(lambda bound: 2 * bound, bounds))


def test_dense_agrees_with_recorded_numbers(fixtures):
    program = jax.jit(value_and_grad(sigmoid_loss_scalar))
    for case in range(5):
        get = recorded(fixtures, case)
        assert_recorded(*program(get("zimg"), get("ztxt"), get("t_param"), get("b")), get)


def sigmoid_loss_scalar(zimg, ztxt, t, b):
    return sigmoid_loss(zimg, ztxt, t, b).reshape(())


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_chunked_agrees_with_recorded_numbers(fixtures, impl, devices):
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(devices), impl=impl, chunk_size=3)
    program = jax.jit(value_and_grad(loss))
    for case in range(5):
        get = recorded(fixtures, case)
        assert_recorded(*program(get("zimg"), get("ztxt"), get("t_param"), get("b")), get)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("impl", ["all_gather", "ring"])
@pytest.mark.parametrize(("devices", "pairs", "chunk"), [
    (1, 24, None), (1, 23, 5), (2, 26, 5), (3, 21, 2), (8, 48, 6), (8, 48, 4), (8, 8, 1), (8, 40, 64),
])  # fmt: skip
def test_chunked_agrees_with_the_double_loop(impl, devices, pairs, chunk):
    zimg, ztxt = embeddings(pairs, 10, seed=pairs)
    t, b = jnp.asarray(2.5), jnp.asarray(-3.0)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(devices), impl=impl, chunk_size=chunk)
    value, grads = jax.jit(value_and_grad(loss))(zimg, ztxt, t, b)
    assert_same((value, grads), double_loop(zimg, ztxt, t, b))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_row_tiles_and_their_remainder(impl, monkeypatch):
    monkeypatch.setitem(losses._TILES, "cpu", losses._TileSize(256, 256, 5))
    monkeypatch.setattr(losses, "_MIN_ROWS", 5)
    zimg, ztxt = embeddings(36, 6, seed=1)
    t, b = jnp.asarray(1.0), jnp.asarray(-1.0)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(3), impl=impl, chunk_size=7)
    assert_same(jax.jit(value_and_grad(loss))(zimg, ztxt, t, b), double_loop(zimg, ztxt, t, b))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_a_batch_sharded_over_two_axes(impl):
    zimg, ztxt = embeddings(32, 6, seed=2)
    t, b = jnp.asarray([2.0]), jnp.asarray([-4.0])
    mesh = mesh_of(8, ("data", "fsdp"), (4, 2))
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh, axis=("data", "fsdp"), impl=impl, chunk_size=3)
    assert_same(jax.jit(value_and_grad(loss))(zimg, ztxt, t, b), double_loop(zimg, ztxt, t[0], b[0]))


@settings(deadline=None, max_examples=6)
@given(
    st.integers(1, 9), st.integers(1, 12), st.floats(-1, 4), st.floats(-12, 2), st.sampled_from(["all_gather", "ring"])
)
def test_any_block_and_chunk(block, chunk, t, b, impl):
    with jax.enable_x64(True):
        zimg, ztxt = embeddings(2 * block, 4, seed=block)
        loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(2), impl=impl, chunk_size=chunk)
        found = jax.jit(value_and_grad(loss))(zimg, ztxt, jnp.asarray(t), jnp.asarray(b))
        assert_same(found, double_loop(zimg, ztxt, t, b))


def test_gradients_that_cancel():
    """A case in which the terms of the temperature's gradient, 1.6 in all, cancel to 8e-4: float32 keeps the terms' digits."""
    zimg, ztxt = (z.astype(jnp.float32) for z in embeddings(4, 4, seed=2))
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(2), impl="all_gather", chunk_size=1)
    found = jax.jit(value_and_grad(loss))(zimg, ztxt, jnp.float32(0), jnp.float32(0.875))
    assert_close(found, double_loop(zimg, ztxt, 0, 0.875), float32_bounds(zimg, ztxt, 0, 0.875))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_the_cotangent_scales_all_gradients(impl):
    zimg, ztxt = embeddings(8, 4, seed=3)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(2), impl=impl)
    args = (zimg, ztxt, jnp.asarray(1.0), jnp.asarray(-2.0))
    once = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)
    scaled = jax.jit(jax.grad(lambda *a: 3.0 * loss(*a), argnums=(0, 1, 2, 3)))(*args)
    assert_same(scaled, jax.tree.map(lambda g: 3 * np.asarray(g), once))


def compile_loss(loss, pairs, width, devices, dtype=jnp.float32):
    mesh = mesh_of(devices)
    z = jax.ShapeDtypeStruct((pairs, width), dtype, sharding=jax.NamedSharding(mesh, jax.P("data")))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(value_and_grad(functools.partial(loss, mesh=mesh))).lower(z, z, scalar, scalar).compile(QUICK)


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_gradients_stay_sharded(impl):
    program = compile_loss(functools.partial(chunked_sigmoid_loss, impl=impl, chunk_size=16), 2048, 32, 8)
    assert [s.spec for s in program.output_shardings[1][:2]] == [jax.P("data"), jax.P("data")]


@pytest.mark.parametrize(("impl", "limit"), [("all_gather", 8 * 2**20), ("ring", 18 * 2**20)])
def test_temporaries_of_8192_pairs_on_eight_devices(impl, limit):
    program = compile_loss(functools.partial(chunked_sigmoid_loss, impl=impl), 8192, 768, 8)
    dense = compile_loss(lambda *args, mesh: sigmoid_loss(*args), 8192, 768, 8)
    assert program.memory_analysis().temp_size_in_bytes <= limit < dense.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_memory_knows_neither_the_number_of_devices_nor_the_batch(impl):
    loss = functools.partial(chunked_sigmoid_loss, impl=impl, chunk_size=None if impl == "all_gather" else 64)
    sizes = [compile_loss(loss, 512 * n, 64, n).memory_analysis().temp_size_in_bytes for n in (4, 8)]
    # What may differ is bookkeeping: the owner of every gathered block, a few bytes a device.
    assert max(sizes) <= 1.02 * min(sizes), sizes
    # Twice the pairs on a device: twice its own blocks, not four times the tile.
    twice = compile_loss(loss, 1024 * 8, 64, 8).memory_analysis().temp_size_in_bytes
    assert twice <= 2.02 * sizes[-1], (twice, sizes)


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
@pytest.mark.parametrize(("devices", "chunk"), [(1, 64), (8, 32), (8, None)])
def test_every_tile_is_multiplied_three_times_and_no_more(impl, devices, chunk):
    pairs, width = 1024, 96
    program = compile_loss(functools.partial(chunked_sigmoid_loss, impl=impl, chunk_size=chunk), pairs, width, devices)
    assert compile.read(program).matmul_flops == 3 * 2 * pairs**2 * width // devices
    # One chunk, so no loop over chunks: the compiler's own count, which sees a loop's body once, is then complete.
    if impl == "all_gather":
        whole = functools.partial(chunked_sigmoid_loss, impl=impl, chunk_size=pairs)
        flops = compile_loss(whole, pairs, 768, devices).cost_analysis()["flops"]
        assert flops <= 1.1 * 3 * 2 * pairs**2 * 768 / devices


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_bfloat16_products_move_value_and_gradients_by_their_rounding(impl):
    zimg, ztxt = (z.astype(jnp.float32) for z in embeddings(256, 128, seed=6))
    t, b = jnp.float32(np.log(10.0)), jnp.float32(-10.0)
    loss = jax.jit(value_and_grad(functools.partial(chunked_sigmoid_loss, mesh=mesh_of(8), impl=impl)))
    value, grads = loss(zimg, ztxt, t, b)
    low, low_grads = loss(zimg.astype(jnp.bfloat16), ztxt.astype(jnp.bfloat16), t, b)
    assert low.dtype == jnp.float32 and low_grads[0].dtype == jnp.bfloat16
    # A bfloat16 has 8 bits: each product is off by up to 2^-8, a sum of many by far less; measured 2e-5 and 4e-3.
    np.testing.assert_allclose(low, value, rtol=2e-4)
    for got, want in zip(low_grads[:2], grads[:2], strict=True):
        error = np.linalg.norm(np.float64(got) - np.float64(want)) / np.linalg.norm(np.float64(want))
        assert 1e-4 < error < 8e-3, error  # below: it would not have been bfloat16


def test_auto_gathers_on_the_host_and_walks_a_ring_of_tpu_neighbours():
    tpu = [types.SimpleNamespace(platform="tpu", coords=(x, y, 0)) for x in range(4) for y in range(4)]
    assert losses._auto_impl(tpu) == "ring"
    assert losses._auto_impl(tpu[:2]) == "all_gather"
    assert losses._auto_impl(tpu[:8:2]) == "all_gather"  # no neighbours
    assert losses._auto_impl([types.SimpleNamespace(platform="gpu")] * 8) == "all_gather"
    assert losses._auto_impl(jax.devices()) == "all_gather"


@pytest.mark.usefixtures("float64")
def test_a_grid_of_devices_is_gathered_axis_by_axis_in_the_order_it_scatters(monkeypatch):
    grid = [types.SimpleNamespace(coords=(x, y, z)) for x in range(2) for y in range(2) for z in range(2)]
    monkeypatch.setattr(
        topology, "_grid", lambda devices, grid_of=topology._grid: grid_of([grid[d.id] for d in devices])
    )
    assert len(topology.axis_groups(jax.devices())) == 3 and topology.ring(jax.devices()).order != tuple(range(8))
    zimg, ztxt = embeddings(48, 6, seed=9)
    t, b = jnp.asarray(1.5), jnp.asarray(-2.0)
    for impl in ("all_gather", "ring"):
        loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(8), impl=impl, chunk_size=4)
        assert_same(jax.jit(value_and_grad(loss))(zimg, ztxt, t, b), double_loop(zimg, ztxt, t, b))


def test_initial_loss_of_orthogonal_embeddings_is_the_papers():
    # softplus(10) + (B - 1) * softplus(-10): logits of -10 but for 0 on the diagonal when every dot product is 0.
    pairs = 64
    zimg, ztxt = jnp.eye(2 * pairs)[:pairs], jnp.eye(2 * pairs)[pairs:]
    expected = np.logaddexp(0, 10) + (pairs - 1) * np.logaddexp(0, -10)
    loss = jax.jit(functools.partial(chunked_sigmoid_loss, mesh=mesh_of(8)))
    loss = loss(zimg, ztxt, jnp.float32(np.log(10)), jnp.float32(-10))
    # The sum's order is the processor's: 64^2 terms, and four operations on each.
    np.testing.assert_allclose(loss, expected, rtol=rounding(pairs**2 + 4))


@pytest.mark.usefixtures("float64")
def test_softmax_loss_agrees_with_a_double_loop():
    zimg, ztxt = embeddings(7, 5, seed=4)
    logits = np.exp(1.5) * np.float64(zimg) @ np.float64(ztxt).T
    expected = -np.mean([
        logits[i, i] - np.logaddexp.reduce(logits[i]) / 2 - np.logaddexp.reduce(logits[:, i]) / 2 for i in range(7)
    ])  # fmt: skip
    np.testing.assert_allclose(softmax_loss(zimg, ztxt, jnp.asarray(1.5)), expected, rtol=1e-14)


def test_bad_input_is_named():
    zimg, ztxt = embeddings(9, 4, seed=5)
    with pytest.raises(ValueError, match="9 pairs does not divide over 2"):
        chunked_sigmoid_loss(zimg, ztxt, jnp.float32(0), jnp.float32(0), mesh=mesh_of(2))
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_sigmoid_loss(zimg, ztxt, jnp.float32(0), jnp.float32(0), mesh=mesh_of(1), chunk_size=0)
    with pytest.raises(ValueError, match="axis 'model'"):
        chunked_sigmoid_loss(zimg, ztxt, jnp.float32(0), jnp.float32(0), mesh=mesh_of(1), axis="model")


def test_a_prior_moves_the_probability_as_bayes_rule_does():
    """Scores of matches and of others, drawn as many as a batch has: the share of matches at a score is the shifted sigmoid."""
    match, other = 0.03, 0.0004  # densities of a score among matches and among the others
    for batch_size, prior in ((64, 1 / 64), (64, 0.3), (32768, 1e-3)):
        trained = 1 / batch_size
        logit = math.log(trained * match / ((1 - trained) * other))
        expected = prior * match / (prior * match + (1 - prior) * other)
        shifted = 1 / (1 + math.exp(-(logit + prior_shift(prior, batch_size=batch_size))))
        assert shifted == pytest.approx(expected, rel=1e-12)
    for wrong in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            prior_shift(wrong, batch_size=64)
