"""Matrix products with a bias, and GELU: what the towers' activations are made of, as compilers fuse it best.

    y = x @ kernel + bias;   gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))      (GELU, arXiv:1606.08415)

- A bias is added to a flat axis: it is then part of the matrix product on a GPU, where a bias of [heads, depth] would be
  written out for every token first. Its gradient is a sum over all tokens, taken in float32 whatever the dtype. On a TPU the
  heads stay an axis: of a flat product the compiler copies query, key and value into their layout.
- GELU's backward pass computes tanh again from `x`, which is kept anyway, in place of keeping the tanh as well. Both passes
  compute in float32.

- Of what goes into several products, and of GELU before one, the gradients are written so that XLA for GPUs makes them part of
  the products (`for_three`, `_gelu_product`).

The trap: GELU, the sum with a bias and those two are custom VJPs, so forward-mode derivatives (`jax.jvp`) of the towers do
not exist.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from siglip.array_types import Array, Float

# What `remat` may keep: results of matrix products after their bias, and GELU's output.
PRODUCT, GELU = "product", "gelu"
_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


class Dense(nn.Module):
    """`x @ kernel + bias` in `dtype`, over the last axis of x.

    The parameters have the shapes `inputs` + `features` and `features`, as `nn.DenseGeneral`'s do, and are drawn like those;
    what is multiplied is flat, unless `keep_axes`. With `of_gelu` it is `gelu(x) @ kernel + bias`,
    whose backward pass computes GELU again unless `remat` keeps what is named GELU: then it is to be "kept".
    """

    inputs: tuple[int, ...]
    features: tuple[int, ...]
    dtype: jnp.dtype
    kernel_init: Callable[..., Array] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., Array] = nn.initializers.zeros
    use_bias: bool = True
    keep_axes: bool = False
    of_gelu: Literal["", "again", "kept"] = ""

    def setup(self) -> None:
        flat = math.prod(self.inputs), math.prod(self.features)
        draw = lambda key: self.kernel_init(key, flat).reshape(*self.inputs, *self.features)  # noqa: E731
        self.kernel = self.param("kernel", draw)
        self.bias = self.param("bias", self.bias_init, self.features) if self.use_bias else None

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        inputs, features = self.inputs, self.features
        if not self.keep_axes:
            inputs, features = (math.prod(inputs),), (math.prod(features),)
        x, kernel = x.reshape(*x.shape[:-1], *inputs), self.kernel.reshape(*inputs, *features)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = _gelu_product(x, kernel, self.of_gelu == "kept") if self.of_gelu else jnp.tensordot(x, kernel, len(inputs))
        y = y if self.bias is None else add_bias(y, self.bias.reshape(features), len(features))
        return y.reshape(*y.shape[: -len(features)], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: Float[Array, "*rows_o"], bias: Float[Array, "*o"], axes: int) -> Float[Array, "*rows_o"]:
    """y plus a bias of its last `axes` axes, whose gradient is summed in float32."""
    return y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - axes))


def _add_bias_fwd(y: Array, bias: Array, axes: int) -> tuple[Array, None]:
    return add_bias(y, bias, axes), None


def _add_bias_bwd(axes: int, _: None, grad: Array) -> tuple[Array, Array]:
    widen = lambda x: x.astype(jnp.float32)  # noqa: E731
    if grad.dtype == jnp.bfloat16:
        grad32 = jax.lax.platform_dependent(grad, cuda=_widen_bits, default=widen)
    else:
        grad32 = widen(grad)
    return grad, grad32.sum(range(grad.ndim - axes))


def _widen_bits(x: Array) -> Array:
    # The same numbers as a conversion. But one right after a rounding XLA drops, both together: it then keeps the unrounded
    # values in memory for the sum, where it would sum in the kernel that makes the rounded ones.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << jnp.uint32(16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


@jax.custom_vjp
def for_three(x: Float[Array, "*shape"]) -> tuple[Array, Array, Array]:
    """x for three products. On a GPU its gradient is summed so that each product adds itself to the sum so far (cuBLAS, beta =
    1), where autodiff's order leaves one sum to a kernel of its own: XLA takes a sum's first operand for the product."""
    return x, x, x


def _for_three_bwd(_: None, grads: tuple[Array, Array, Array]) -> tuple[Array]:
    def product_first(a: Array, b: Array, c: Array) -> Array:
        return a + (b + c)

    return (jax.lax.platform_dependent(*grads, cuda=product_first, default=lambda a, b, c: (c + b) + a),)


for_three.defvjp(lambda x: (for_three(x), None), _for_three_bwd)


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation, which the published weights expect."""

    def in_float32(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        return (wide * _cdf(wide)[0]).astype(x.dtype)

    if x.dtype == jnp.float32:
        return in_float32(x)
    # cuBLASLt computes it in float32 within the product before it, if XLA recognises this form, which has no conversions.
    return jax.lax.platform_dependent(x, cuda=jax.nn.gelu, default=in_float32)


def _gelu_fwd(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_bwd(x: Array, grad: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    cdf, tanh = _cdf(wide)
    density = 0.5 * _SLOPE * (1 - tanh * tanh) * (1 + 3 * _CUBIC * wide * wide)
    return ((grad.astype(jnp.float32) * (cdf + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gelu_product(x: Float[Array, "*rows i"], kernel: Float[Array, "i o"], keeps_gelu: bool) -> Float[Array, "*rows o"]:
    return jnp.tensordot(gelu(x), kernel, 1)


def _gelu_product_fwd(x: Array, kernel: Array, keeps_gelu: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    # What remat keeps jax rounds explicitly, and that would stand between the product before and GELU, which a GPU computes
    # within it. So the backward pass has a GELU of its own, of what is kept; without remat they are one.
    kept, active = checkpoint_name(x, PRODUCT), gelu(x)
    again = checkpoint_name(active, GELU) if keeps_gelu else gelu(kept)
    return jnp.tensordot(active, kernel, 1), (kept, again, kernel)


def _gelu_product_bwd(keeps_gelu: bool, residuals: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array]:
    x, active, kernel = residuals
    _, backward = jax.vjp(lambda active, kernel: jnp.tensordot(active, kernel, 1), active, kernel)
    grad_active, grad_kernel = backward(grad)
    return (*_gelu_bwd(x, grad_active), grad_kernel)


_gelu_product.defvjp(_gelu_product_fwd, _gelu_product_bwd)


def _cdf(x: Array) -> tuple[Array, Array]:
    """gelu(x) / x, and the tanh in it."""
    tanh = jnp.tanh(_SLOPE * (x + _CUBIC * x**3))
    return 0.5 * (1 + tanh), tanh
