"""What both towers are made of: pre-LayerNorm transformer blocks and the attention-pooling (MAP) head.

    x = x + attention(LN(x));  x = x + mlp(LN(x));  after the last block LN once more          (ViT, arXiv:2010.11929)
    x = x + attention(LN(x)) + mlp(LN(x))  with block.parallel                                 (ViT-22B, arXiv:2302.05442)
    MAP: y = attention(probe, x);  y + mlp(LN(y));  no residual around the attention (scaling ViT, arXiv:2106.04560)

Precision: parameters are float32. Matrix products run in `dtype` (float32 or bfloat16); the residual stream, LayerNorm
and the softmax always stay float32, because at width 1000 and depth 27 their rounding is what bfloat16 loses by.

The trap: the explicit `name=` of every submodule is the key in published checkpoints. Renaming one renames weights.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from siglip.array_types import Array, Float
from siglip.models.attention import AttentionFn, attention_fn
from siglip.models.variants import BlockConfig, Variant
from siglip.parallel.sharding import ParamLayout

Remat = Literal["none", "full", "dots"]

_LAYER_NORM_EPS = 1e-6
_PLAIN = BlockConfig()


class MultiHeadAttention(nn.Module):
    """Attention with biases and the parameter tree of `nn.MultiHeadDotProductAttention`."""

    num_heads: int
    dtype: jnp.dtype
    attention: AttentionFn = attention_fn
    config: BlockConfig = BlockConfig()

    @nn.compact
    def __call__(self, inputs_q: Float[Array, "a q d"], inputs_kv: Float[Array, "b k d"]) -> Float[Array, "b q d"]:
        """`inputs_q` may have a batch of 1, shared by the whole batch: it is then projected only once."""
        width = inputs_kv.shape[-1]
        head_dim = width // self.num_heads

        def project(name: str, x: Array) -> Array:
            dense = nn.DenseGeneral(
                (self.num_heads, head_dim), dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name,
                use_bias=self.config.bias,
            )  # fmt: skip
            return dense(x)

        def normalise(name: str, x: Array) -> Array:
            return _layer_norm(name, self.config)(x).astype(self.dtype) if self.config.qk_norm else x

        query, key, value = project("query", inputs_q), project("key", inputs_kv), project("value", inputs_kv)
        query, key = normalise("query_ln", query), normalise("key_ln", key)
        query = jnp.broadcast_to(query, (key.shape[0], *query.shape[1:]))
        out = nn.DenseGeneral(
            width, axis=(-2, -1), dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="out"
        )
        return out(self.attention(query, key, value))


class MlpBlock(nn.Module):
    """Dense, GELU (tanh approximation, as the published weights expect), Dense."""

    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
        hidden = nn.Dense(self.mlp_dim, dtype=self.dtype, name="Dense_0", **init)(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="Dense_1", **init)(nn.gelu(hidden, approximate=True))


class Block(nn.Module):
    """One transformer block; the residual stream `x` is float32 whatever the `dtype` of the products.

    `dropout` zeroes that share of what each half of the block adds; above 0 it needs a "dropout" rng.
    """

    variant: Variant
    dtype: jnp.dtype
    dropout: float = 0.0
    attention: AttentionFn = attention_fn
    config: BlockConfig = BlockConfig()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        heads, config, name = self.variant.num_heads, self.config, "MultiHeadDotProductAttention_0"
        normal = _layer_norm("LayerNorm_0", config)(x).astype(self.dtype)
        y = MultiHeadAttention(heads, self.dtype, self.attention, config, name=name)(normal, normal)
        x = x + dropout(y.astype(x.dtype), self.dropout)
        y = normal if config.parallel else _layer_norm("LayerNorm_1", config)(x).astype(self.dtype)
        y = MlpBlock(self.variant.mlp_dim, self.dtype, name="MlpBlock_0")(y)
        return x + dropout(y.astype(x.dtype), self.dropout)


def dropout(x: Float[Array, "b n d"], rate: float) -> Float[Array, "b n d"]:
    """Zeroes a share `rate` of the entries and scales up the rest. Call it inside a module; 0 draws nothing."""
    return nn.Dropout(rate, deterministic=rate == 0)(x)


class Encoder(nn.Module):
    """`variant.depth` blocks and, with `final_norm`, a LayerNorm.

    `scan` compiles one block for all of them and stacks their parameters on a leading layer axis under
    `encoderblock`; without it they are `encoderblock_0`, `encoderblock_1`, … `remat` recomputes activations in the
    backward pass: "full" keeps only each block's input, "dots" also the results of its matrix products (more memory,
    less recomputation). With a `layout` that shards the blocks' weights, each block gathers its own where it runs,
    and again in the backward pass, whatever `remat` says: kept from the forward pass, they would be the whole model.
    """

    variant: Variant
    scan: bool
    remat: Remat
    dtype: jnp.dtype
    dropout: float = 0.0
    attention: AttentionFn = attention_fn
    layout: ParamLayout | None = None
    final_norm: bool = True
    config: BlockConfig = BlockConfig()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        layout, path = self.layout, "/".join(self.path)
        sharded = layout is not None and layout.shards(f"{re.escape(path)}/encoderblock.*")

        def body(block: Block, x: Array, _: None) -> tuple[Array, None]:
            # The loop's carry has no sharding of its own: unless told, the compiler may split it some other way.
            x = x if layout is None else layout.batch(x)
            return block(x), None

        def block(name: str) -> Block:
            make: Callable[..., Any] = Block
            if sharded:
                gather = functools.partial(layout.gather_block, prefix=f"{path}/{name}/", dtype=self.dtype)
                make = nn.map_variables(Block, "params", trans_in_fn=_on_params(gather))
            return make(self.variant, self.dtype, self.dropout, self.attention, self.config, name=name)

        if self.remat != "none" or sharded:
            # Inside scan the loop already keeps XLA from undoing the recomputation.
            body = nn.remat(body, policy=_POLICIES[self.remat], prevent_cse=not self.scan)
        if self.scan:
            rngs = {"params": True, "dropout": True}
            loop = nn.scan(body, variable_axes={"params": 0}, split_rngs=rngs, length=self.variant.depth)
            x, _ = loop(block("encoderblock"), x, None)
        else:
            for i in range(self.variant.depth):
                x, _ = body(block(f"encoderblock_{i}"), x, None)
        x = x if layout is None else layout.batch(x)
        return _layer_norm("encoder_norm", self.config)(x) if self.final_norm else x


def _on_params(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda variables: {"params": function(variables["params"])} if "params" in variables else variables


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # The gather is a custom VJP around constraints, by whichever name jax has it at this point. A fused attention kernel is
    # one too: it runs again in the backward pass. jax's policies by `checkpoint_name` cannot say this: they keep the unnamed
    # value just before the name, which is the gathered one. A `jax.checkpoint` around the gather is overruled by this one.
    return primitive.name != "sharding_constraint" and not primitive.name.startswith("custom_vjp_call")


_POLICIES = {
    "none": _all_but_gathered,  # taken under FSDP only
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class MAPHead(nn.Module):
    """Attention pooling with one learned query, the probe."""

    variant: Variant
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        heads = self.variant.num_heads
        y = MultiHeadAttention(heads, self.dtype, name="MultiHeadDotProductAttention_0")(probe, x).astype(x.dtype)
        z = _layer_norm("LayerNorm_0")(y).astype(self.dtype)
        z = MlpBlock(self.variant.mlp_dim, self.dtype, name="MlpBlock_0")(z)
        return (y + z.astype(y.dtype))[:, 0]


def _layer_norm(name: str, config: BlockConfig = _PLAIN) -> nn.LayerNorm | nn.RMSNorm:
    norm = nn.LayerNorm if config.bias else nn.RMSNorm
    return norm(epsilon=_LAYER_NORM_EPS, dtype=jnp.float32, name=name)
