"""The losses against a float64 double loop, against recorded numbers, and sharded over 1, 2, 3 and 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from siglip.losses import chunked_sigmoid_loss, sigmoid_loss, softmax_loss

# Sums of up to 48^2 float32 terms; measured 1e-7 .. 5e-7 of the largest entry.
RTOL = 2e-6


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


def embeddings(pairs, width, seed):
    z = np.random.default_rng(seed).normal(size=(2, pairs, width))
    return tuple(jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32))


def assert_same(actual, expected, rtol=RTOL):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.float64(a).reshape(np.shape(e)), e, rtol=0, atol=rtol * max(np.max(np.abs(e)), 1e-3)
        )


def mesh_of(devices, names=("data",), shape=None):
    shape = shape or (devices,)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:devices])


value_and_grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))


def recorded(fixtures, case):
    data = np.load(fixtures / "bv_loss.npz")
    return lambda name: jnp.asarray(data[name if name in data else f"case{case}/{name}"])


@pytest.mark.parametrize("case", range(5))
def test_dense_agrees_with_recorded_numbers(fixtures, case):
    get = recorded(fixtures, case)
    value, grads = value_and_grad(sigmoid_loss_scalar)(get("zimg"), get("ztxt"), get("t_param"), get("b"))
    np.testing.assert_allclose(value, get("loss_f64"), rtol=1e-6)
    assert_same(grads, (get("grad_zimg"), get("grad_ztxt"), get("grad_t"), get("grad_b")), rtol=1e-5)


def sigmoid_loss_scalar(zimg, ztxt, t, b):
    return sigmoid_loss(zimg, ztxt, t, b).reshape(())


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("case", range(5))
def test_chunked_agrees_with_recorded_numbers(fixtures, impl, devices, case):
    get = recorded(fixtures, case)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(devices), impl=impl, chunk_size=3)
    value, grads = jax.jit(value_and_grad(loss))(get("zimg"), get("ztxt"), get("t_param"), get("b"))
    np.testing.assert_allclose(value, get("loss_f64"), rtol=1e-6)
    assert_same(grads, (get("grad_zimg"), get("grad_ztxt"), get("grad_t"), get("grad_b")), rtol=1e-5)


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
@pytest.mark.parametrize(("devices", "pairs", "chunk"), [
    (1, 24, None), (1, 23, 5), (2, 24, 12), (2, 26, 5), (3, 24, 8), (3, 21, 2), (8, 48, 6), (8, 48, 4), (8, 8, 1), (8, 40, 64),
])  # fmt: skip
def test_chunked_agrees_with_the_double_loop(impl, devices, pairs, chunk):
    zimg, ztxt = embeddings(pairs, 10, seed=pairs)
    t, b = jnp.float32(2.5), jnp.float32(-3.0)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(devices), impl=impl, chunk_size=chunk)
    value, grads = jax.jit(value_and_grad(loss))(zimg, ztxt, t, b)
    assert_same((value, grads), double_loop(zimg, ztxt, t, b))


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_row_tiles_and_their_remainder(impl, monkeypatch):
    monkeypatch.setattr("siglip.losses.TILE_ROWS", 5)
    zimg, ztxt = embeddings(36, 6, seed=1)
    t, b = jnp.float32(1.0), jnp.float32(-1.0)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(3), impl=impl, chunk_size=7)
    assert_same(jax.jit(value_and_grad(loss))(zimg, ztxt, t, b), double_loop(zimg, ztxt, t, b))


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_a_batch_sharded_over_two_axes(impl):
    zimg, ztxt = embeddings(32, 6, seed=2)
    t, b = jnp.asarray([2.0], jnp.float32), jnp.asarray([-4.0], jnp.float32)
    mesh = mesh_of(8, ("data", "fsdp"), (4, 2))
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh, axis=("data", "fsdp"), impl=impl, chunk_size=3)
    assert_same(jax.jit(value_and_grad(loss))(zimg, ztxt, t, b), double_loop(zimg, ztxt, t[0], b[0]))


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 9), st.integers(1, 12), st.floats(-1, 4), st.floats(-12, 2), st.sampled_from(["all_gather", "ring"])
)
def test_any_block_and_chunk(block, chunk, t, b, impl):
    zimg, ztxt = embeddings(2 * block, 4, seed=block)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(2), impl=impl, chunk_size=chunk)
    t, b = jnp.float32(t), jnp.float32(b)
    assert_same(jax.jit(value_and_grad(loss))(zimg, ztxt, t, b), double_loop(zimg, ztxt, t, b), rtol=5e-6)


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_the_cotangent_scales_all_gradients(impl):
    zimg, ztxt = embeddings(8, 4, seed=3)
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh_of(2), impl=impl)
    args = (zimg, ztxt, jnp.float32(1.0), jnp.float32(-2.0))
    once = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)
    scaled = jax.jit(jax.grad(lambda *a: 3.0 * loss(*a), argnums=(0, 1, 2, 3)))(*args)
    assert_same(scaled, jax.tree.map(lambda g: 3 * np.asarray(g), once))


@pytest.mark.parametrize("impl", ["all_gather", "ring"])
def test_gradients_stay_sharded_and_no_big_tile_is_kept(impl):
    devices, pairs, width = 8, 2048, 32
    mesh = mesh_of(devices)
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    loss = functools.partial(chunked_sigmoid_loss, mesh=mesh, impl=impl, chunk_size=16)
    z = jax.ShapeDtypeStruct((pairs, width), jnp.float32, sharding=sharding)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(value_and_grad(loss)).lower(z, z, scalar, scalar).compile()
    assert [s.spec for s in compiled.output_shardings[1][:2]] == [jax.P("data"), jax.P("data")]
    dense = jax.jit(value_and_grad(sigmoid_loss)).lower(z, z, scalar, scalar).compile()
    ours, theirs = (c.memory_analysis().temp_size_in_bytes for c in (compiled, dense))
    assert ours < theirs / 4, (ours, theirs)


def test_initial_loss_of_orthogonal_embeddings_is_the_papers():
    # softplus(10) + (B - 1) * softplus(-10): logits of -10 but for 0 on the diagonal when every dot product is 0.
    pairs = 64
    zimg, ztxt = jnp.eye(2 * pairs)[:pairs], jnp.eye(2 * pairs)[pairs:]
    expected = np.logaddexp(0, 10) + (pairs - 1) * np.logaddexp(0, -10)
    loss = jax.jit(functools.partial(chunked_sigmoid_loss, mesh=mesh_of(8)))
    loss = loss(zimg, ztxt, jnp.float32(np.log(10)), jnp.float32(-10))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_softmax_loss_agrees_with_a_double_loop():
    zimg, ztxt = embeddings(7, 5, seed=4)
    logits = np.exp(1.5) * np.float64(zimg) @ np.float64(ztxt).T
    expected = -np.mean([
        logits[i, i] - np.logaddexp.reduce(logits[i]) / 2 - np.logaddexp.reduce(logits[:, i]) / 2 for i in range(7)
    ])  # fmt: skip
    np.testing.assert_allclose(softmax_loss(zimg, ztxt, jnp.float32(1.5)), expected, rtol=1e-6)


def test_bad_input_is_named():
    zimg, ztxt = embeddings(9, 4, seed=5)
    with pytest.raises(ValueError, match="9 pairs does not divide over 2"):
        chunked_sigmoid_loss(zimg, ztxt, jnp.float32(0), jnp.float32(0), mesh=mesh_of(2))
    with pytest.raises(ValueError, match="chunk_size=0"):
        chunked_sigmoid_loss(zimg, ztxt, jnp.float32(0), jnp.float32(0), mesh=mesh_of(1), chunk_size=0)
    with pytest.raises(ValueError, match="axis 'model'"):
        chunked_sigmoid_loss(zimg, ztxt, jnp.float32(0), jnp.float32(0), mesh=mesh_of(1), axis="model")
