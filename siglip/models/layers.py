"""What both towers are made of: pre-LayerNorm transformer blocks and the attention-pooling (MAP) head.

    x = x + attention(LN(x));  x = x + mlp(LN(x));  after the last block LN once more          (ViT, arXiv:2010.11929)
    x = x + attention(LN(x)) + mlp(LN(x))  with block.parallel                                 (ViT-22B, arXiv:2302.05442)
    MAP: y = attention(probe, x);  y + mlp(LN(y));  no residual around the attention (scaling ViT, arXiv:2106.04560)

Precision: parameters are float32. Matrix products run in `dtype` (float32 or bfloat16); LayerNorm and the softmax always
stay float32, and so does the residual stream unless `residual_dtype` says otherwise, because at width 1000 and depth 27 its
rounding is what bfloat16 loses by.

The trap: the explicit `name=` of every submodule is the key in published checkpoints. Renaming one renames weights.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from siglip.array_types import Array, Float, Int
from siglip.models.attention import SAVED, AttentionFn, attention_fn, is_fused_forward, mask_keys
from siglip.models.dense import GELU, PRODUCT, Dense, add_bias, for_three
from siglip.models.variants import BlockConfig, Variant
from siglip.parallel.sharding import ParamLayout

Remat = Literal["none", "dots+gelu", "dots", "full"]

_LAYER_NORM_EPS = 1e-6
_PLAIN = BlockConfig()


class MultiHeadAttention(nn.Module):
    """Self-attention with biases and the parameter tree of `nn.MultiHeadDotProductAttention`."""

    num_heads: int
    dtype: jnp.dtype
    attention: AttentionFn = attention_fn
    config: BlockConfig = BlockConfig()
    keep_axes: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], lengths: Int[Array, " b"] | None = None) -> Float[Array, "b n d"]:
        (b, n, width), heads = x.shape, self.num_heads
        axes = {"keep_axes": self.keep_axes}

        def project(name: str, x: Array) -> Array:
            bias = {"use_bias": self.config.bias}
            y = Dense((width,), (heads, width // heads), self.dtype, **bias, **axes, name=name)(x)
            return checkpoint_name(y, PRODUCT).reshape(b, n, heads, -1)

        def normalise(name: str, x: Array) -> Array:
            return _layer_norm(name, self.config)(x).astype(self.dtype) if self.config.qk_norm else x

        x, x_key, x_value = for_three(x)
        query = normalise("query_ln", project("query", x))
        key, value = normalise("key_ln", project("key", x_key)), project("value", x_value)
        y = self.attention(query, key, value, lengths=lengths)
        y = Dense((heads, width // heads), (width,), self.dtype, **axes, name="out")(y.reshape(b, n, width))
        return checkpoint_name(y, PRODUCT)


class PoolingAttention(nn.Module):
    """Attention of one query, shared by the whole batch, with the parameter tree of `MultiHeadAttention`.

    A head's logits are x @ (Wk @ q), and its output is (weights @ x) @ Wv: keys and values of the tokens are never computed,
    width / heads times fewer operations. The key's bias adds the same to every logit, which the softmax does not see.
    """

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, probe: Float[Array, "1 1 d"], x: Float[Array, "b n d"], lengths: Int[Array, " b"] | None = None
    ) -> Float[Array, "b d"]:
        (b, _, width), heads = x.shape, self.num_heads
        into = functools.partial(Dense, (width,), (heads, width // heads))
        key, value = into(self.dtype, name="key"), into(self.dtype, name="value")
        # The query and what it makes of the keys' kernel are one row each: exact, and cheap.
        with jax.default_matmul_precision("highest"):
            query = into(jnp.dtype("float32"), name="query")(probe).reshape(heads, -1) * (width // heads) ** -0.5
            probes = jnp.einsum("dhk,hk->hd", key.kernel, query)
        x, probes = x.astype(self.dtype), probes.astype(self.dtype)
        logits = jnp.einsum("bnd,hd->bhn", x, probes, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(mask_keys(logits, lengths), axis=-1).astype(self.dtype)
        pooled = jnp.einsum("bhn,bnd->bhd", weights, x)
        y = add_bias(jnp.einsum("bhd,dhk->bhk", pooled, value.kernel.astype(self.dtype)), value.bias, 2)
        return Dense((heads, width // heads), (width,), self.dtype, name="out")(y.reshape(b, width))


class MlpBlock(nn.Module):
    """Dense, GELU, Dense."""

    mlp_dim: int
    dtype: jnp.dtype
    keeps_gelu: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        width, bias_init = x.shape[-1], nn.initializers.normal(1e-6)
        hidden = Dense((width,), (self.mlp_dim,), self.dtype, bias_init=bias_init, name="Dense_0")(x)
        options = {"bias_init": bias_init, "of_gelu": "kept" if self.keeps_gelu else "again"}
        return Dense((self.mlp_dim,), (width,), self.dtype, **options, name="Dense_1")(hidden)


class Block(nn.Module):
    """One transformer block; the residual stream `x` has a dtype of its own, whatever the `dtype` of the products.

    `dropout` zeroes that share of what each half of the block adds; above 0 it needs a "dropout" rng.
    """

    variant: Variant
    dtype: jnp.dtype
    dropout: float = 0.0
    attention: AttentionFn = attention_fn
    config: BlockConfig = BlockConfig()
    keep_axes: bool = False
    keeps_gelu: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], lengths: Int[Array, " b"] | None = None) -> Float[Array, "b n d"]:
        heads, config, name = self.variant.num_heads, self.config, "MultiHeadDotProductAttention_0"
        normal = _layer_norm("LayerNorm_0", config)(x).astype(self.dtype)
        y = MultiHeadAttention(heads, self.dtype, self.attention, config, self.keep_axes, name=name)(normal, lengths)
        x = x + dropout(y.astype(x.dtype), self.dropout)
        y = normal if config.parallel else _layer_norm("LayerNorm_1", config)(x).astype(self.dtype)
        y = MlpBlock(self.variant.mlp_dim, self.dtype, self.keeps_gelu, name="MlpBlock_0")(y)
        return x + dropout(y.astype(x.dtype), self.dropout)


def dropout(x: Float[Array, "b n d"], rate: float) -> Float[Array, "b n d"]:
    """Zeroes a share `rate` of the entries and scales up the rest. Call it inside a module; 0 draws nothing."""
    return nn.Dropout(rate, deterministic=rate == 0)(x)


class Encoder(nn.Module):
    """`variant.depth` blocks and, with `final_norm`, a LayerNorm. Returns float32.

    `scan` stacks the parameters of all blocks on a leading layer axis under `encoderblock`; without it they are
    `encoderblock_0`, `encoderblock_1`, … A scan is a loop over one compiled block, unless `unroll` has it compiled block by
    block; None unrolls on a GPU, where a loop copies everything it saves, unless `remat` shall save memory on several of them
    (docs/scaling.md).

    With `lengths` no token looks beyond its image's own; what becomes of the tokens there is undefined.

    `remat` recomputes activations in the backward pass: "full" keeps only each block's input, "dots" also the results of its
    matrix products and of the attention, "dots+gelu" also those of GELU (more memory, less recomputation), "none" everything.
    With a `layout` that shards the blocks' weights, each block gathers its own where it runs, and again in the backward pass,
    whatever `remat` says: kept from the forward pass, they would be the whole model. "none" then also runs sums with a
    bias and a fused attention again: its policy cannot tell them from a gather.
    """

    variant: Variant
    scan: bool
    remat: Remat
    dtype: jnp.dtype
    residual_dtype: jnp.dtype = jnp.dtype("float32")
    unroll: bool | None = None
    dropout: float = 0.0
    attention: AttentionFn = attention_fn
    layout: ParamLayout | None = None
    final_norm: bool = True
    config: BlockConfig = BlockConfig()

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], lengths: Int[Array, " b"] | None = None) -> Float[Array, "b n d"]:
        layout, path = self.layout, "/".join(self.path)
        sharded = layout is not None and layout.shards(f"{re.escape(path)}/encoderblock.*")
        on_gpu = layout is not None and layout.platform == "gpu"
        # On several GPUs XLA puts the products of weight gradients off: it keeps what unrolled blocks computed again.
        better = on_gpu and (self.remat == "none" or layout.mesh.size == 1)
        unrolled = not self.scan or (better if self.unroll is None else self.unroll)

        def body(block: Block, x: Array, lengths: Array | None) -> tuple[Array, None]:
            # The loop's carry has no sharding of its own: unless told, the compiler may split it some other way.
            x = x if layout is None else layout.batch(x)
            # Without a loop XLA for GPUs puts the batch innermost, and transposes around every product.
            x = layout.in_order(x) if on_gpu else x
            return block(x, lengths), None

        def block(name: str) -> Block:
            make: Callable[..., Any] = Block
            if sharded:
                gather = functools.partial(layout.gather_block, prefix=f"{path}/{name}/", dtype=self.dtype)
                make = nn.map_variables(Block, "params", trans_in_fn=_on_params(gather))
            # See dense.py.
            options = {"keep_axes": layout is not None and layout.platform == "tpu"}
            options |= {"keeps_gelu": self.remat in ("none", "dots+gelu")}
            return make(self.variant, self.dtype, self.dropout, self.attention, self.config, **options, name=name)

        if self.remat != "none" or sharded:
            # Inside a loop nothing can undo the recomputation.
            body = nn.remat(body, policy=_POLICIES[self.remat], prevent_cse=unrolled)
        x = x.astype(self.residual_dtype)
        if self.scan:
            options = {"length": self.variant.depth, "unroll": self.variant.depth if unrolled else 1}
            rngs = {"params": True, "dropout": True}
            loop = nn.scan(body, variable_axes={"params": 0}, split_rngs=rngs, in_axes=nn.broadcast, **options)
            x, _ = loop(block("encoderblock"), x, lengths)
        else:
            for i in range(self.variant.depth):
                x, _ = body(block(f"encoderblock_{i}"), x, lengths)
        x = x if layout is None else layout.batch(x)
        return _layer_norm("encoder_norm", self.config)(x) if self.final_norm else x.astype(jnp.float32)


def _on_params(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda variables: {"params": function(variables["params"])} if "params" in variables else variables


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # The gather is a custom VJP around constraints, by whichever name jax has it at this point. Sums with a bias and a
    # fused attention kernel are custom VJPs, too, and a policy sees no more of them than that: they run again in the backward
    # pass, from the products before them, which are kept. jax's policies by `checkpoint_name` cannot say this: they keep the
    # unnamed value just before the name, which is the gathered one. A `jax.checkpoint` around the gather is overruled by this
    # one. A reshape costs nothing, and a gathered kernel that is made flat by one would be kept.
    return primitive.name not in ("sharding_constraint", "reshape") and not primitive.name.startswith("custom_vjp_call")


def _keep(*names: str) -> Callable[..., bool]:
    """The policy that keeps values by their `checkpoint_name`, and what a fused attention kernel gives its backward pass."""
    named = jax.checkpoint_policies.save_only_these_names(*names, SAVED)
    return lambda primitive, *args, **kwargs: is_fused_forward(primitive) or named(primitive, *args, **kwargs)


_POLICIES = {
    "none": _all_but_gathered,  # taken under FSDP only
    "dots+gelu": _keep(PRODUCT, GELU),
    "dots": _keep(PRODUCT),
    "full": None,
}


class MAPHead(nn.Module):
    """Attention pooling with one learned query, the probe."""

    variant: Variant
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], lengths: Int[Array, " b"] | None = None) -> Float[Array, "b d"]:
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        heads = self.variant.num_heads
        y = PoolingAttention(heads, self.dtype, name="MultiHeadDotProductAttention_0")(probe, x, lengths)
        y = y.astype(x.dtype)
        z = _layer_norm("LayerNorm_0")(y).astype(self.dtype)
        z = MlpBlock(self.variant.mlp_dim, self.dtype, name="MlpBlock_0")(z)
        return y + z.astype(y.dtype)


def _layer_norm(name: str, config: BlockConfig = _PLAIN) -> Callable[[Array], Array]:
    make = nn.LayerNorm if config.bias else nn.RMSNorm
    norm = make(epsilon=_LAYER_NORM_EPS, dtype=jnp.float32, name=name)
    return lambda x: norm(x.astype(jnp.float32))
