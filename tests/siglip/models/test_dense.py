"""Products with a bias and GELU, against float64 and against flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from siglip.models.dense import Dense, _widen_bits, for_three, gelu
from siglip.models.layers import PoolingAttention
from siglip.trees import flatten, unflatten
from tests.siglip.rounding import UNIT, rounding

BFLOAT16_UNIT = 2.0**-8


def in_float64(x):
    """GELU and its derivative."""
    x = np.asarray(x, np.float64)
    slope, cubic = np.sqrt(2 / np.pi), 0.044715
    tanh = np.tanh(slope * (x + cubic * x**3))
    return x / 2 * (1 + tanh), (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * slope * (1 + 3 * cubic * x**2)


def value_and_slope(function, x):
    value, vjp = jax.vjp(function, x)
    return value, vjp(jnp.ones_like(x))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_the_equation_rounded_once(dtype):
    x = jnp.concatenate([jnp.linspace(-12, 12, 4001), jnp.geomspace(1e-6, 1e3, 400)]).astype(dtype)
    found = jax.jit(lambda x: value_and_slope(gelu, x))(x)
    # In float32 six operations make tanh's argument, whose relative error tanh at most keeps, its own approximation is off by
    # a few units, and four operations follow. In the derivative twice that error of 1 - tanh^2 is multiplied with up to 1.2, and
    # with |x| (1 + 3 * 0.044715 x^2) sqrt(2 / pi) / 2 as long as tanh is not 1 anyway: it may be a unit less (SSE4.2) up to an
    # argument of 20, from where XLA returns 1; that is x = 7.35. Then one rounding to `dtype`.
    wide = np.abs(np.asarray(x, np.float64))
    slope_size = 1.2 + 0.8 * np.where(wide < 7.4, wide * (1 + 0.134145 * wide**2), 0)
    last = BFLOAT16_UNIT if dtype == "bfloat16" else UNIT
    for y, exact, size in zip(found, in_float64(x), (wide, slope_size), strict=True):
        assert y.dtype == dtype
        # The smallest normal bfloat16 and float32 are alike; below, where processors may flush to zero, nothing is compared.
        atol = rounding(16, size) + last * np.abs(exact) + 2.0**-126
        assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= atol)


def test_gelu_keeps_its_input_alone_for_the_backward_pass():
    x = jnp.linspace(-3, 3, 64)
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(gelu, x)[1]) if getattr(leaf, "size", 0) > 1]
    assert kept == [x.shape]


@pytest.mark.parametrize("how", ["again", "kept"])
def test_a_product_of_gelu_is_gelu_and_then_the_product(how):
    x, weight = (jax.random.normal(jax.random.key(n), (2, 9, width)) for n, width in ((0, 24), (1, 7)))
    plain, fused = (Dense((24,), (7,), jnp.dtype("float32"), of_gelu=of_gelu) for of_gelu in ("", how))
    params = plain.init(jax.random.key(2), x)
    two, one = (
        jax.jit(lambda params, x, apply=apply: jax.vjp(apply, params, x)[1](weight))(params, x)
        for apply in (lambda params, x: plain.apply(params, gelu(x)), fused.apply)
    )
    jax.tree.map(np.testing.assert_array_equal, one, two)
    np.testing.assert_array_equal(fused.apply(params, x), plain.apply(params, gelu(x)))


def test_the_gradient_of_what_goes_three_ways_is_the_sum():
    x, weights = jnp.arange(4.0), jnp.asarray([[1.0], [2.5], [-7.0]])
    grad = jax.grad(lambda x: sum((one * weight).sum() for one, weight in zip(for_three(x), weights, strict=True)))(x)
    np.testing.assert_array_equal(grad, np.full(4, -3.5))


@pytest.mark.parametrize("keep_axes", [False, True])
@pytest.mark.parametrize("inputs, features", [((24,), (3, 5)), ((4, 6), (24,)), ((24,), (7,))])
def test_parameters_and_products_are_those_of_flax(inputs, features, keep_axes):
    x = jax.random.normal(jax.random.key(1), (2, 9, 24))
    ours = Dense(inputs, features, jnp.dtype("float32"), bias_init=nn.initializers.normal(1.0), keep_axes=keep_axes)
    theirs = nn.DenseGeneral(
        features,
        axis=tuple(range(-len(inputs), 0)),
        kernel_init=nn.initializers.xavier_uniform(),
        bias_init=nn.initializers.normal(1.0),
    )
    in_axes = x.reshape(2, 9, *inputs)
    params = ours.init(jax.random.key(0), x)
    if len(features) == 1:  # a normal bias of two axes is drawn flat there
        jax.tree.map(np.testing.assert_array_equal, params, theirs.init(jax.random.key(0), in_axes))
    expected = theirs.apply(params, in_axes).reshape(2, 9, -1)
    np.testing.assert_allclose(ours.apply(params, x), expected, rtol=0, atol=2 * rounding(25, np.abs(expected).max()))


ROWS = 4096
TERMS = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (ROWS, 6)), jnp.bfloat16)
BFLOAT16 = jnp.dtype("bfloat16")


@pytest.mark.parametrize(
    "module, inputs, path",
    [
        (Dense((8,), (6,), BFLOAT16), [(ROWS, 8)], "bias"),
        (PoolingAttention(2, BFLOAT16), [(1, 1, 6), (ROWS, 3, 6)], "value/bias"),
    ],
)
def test_the_gradient_of_a_bias_is_summed_in_float32(module, inputs, path):
    """Sums in bfloat16 were off by percents: 4096 terms of one sign stop growing at 256 of their size."""
    inputs = [jnp.zeros(shape) for shape in inputs]
    params = flatten(module.init(jax.random.key(0), *inputs)["params"])
    if "out/kernel" in params:  # after the bias of the values: one that hands gradients on as they are
        params["out/kernel"] = jnp.eye(6).reshape(2, 3, 6)
    _, vjp = jax.vjp(lambda params: module.apply({"params": unflatten(params)}, *inputs), params)
    found, exact = jax.jit(vjp)(TERMS)[0][path], np.asarray(TERMS, np.float64).sum(axis=0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.reshape(-1), exact, rtol=rounding(ROWS), atol=0)


def test_widening_by_bits_is_a_conversion():
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    np.testing.assert_array_equal(_widen_bits(every), np.asarray(every).astype(np.float32))
