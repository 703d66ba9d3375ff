"""Text transformer: bidirectional, no mask. Pads are attended to, as in the published models.

    tokens = LN(blocks(embedding[ids] + position));  z = pool(tokens) @ kernel + bias    (SigLIP, arXiv:2303.15343)

The trap: pool "last" reads position `length - 1` whatever stands there, mostly a pad. Texts must be padded (or cut) to exactly
`length`, with the pads of training (TokenConfig); there is no mask that would make a shorter batch equal.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.models.attention import Attention, AttentionFn, attention_fn
from siglip.models.dense import Dense
from siglip.models.layers import Encoder, MAPHead, Remat, dropout
from siglip.models.variants import BlockConfig, Variant, check_choices, check_rate, check_size, parse_variant, resolve
from siglip.parallel.sharding import ParamLayout


@dataclasses.dataclass(frozen=True)
class TokenConfig:
    """How texts become the ids that a tower was trained on, beside the tokenizer's pieces. It belongs to the model: other pads,
    even, are other embeddings.

    Attributes:
        pad_id: fills a text up to the tower's length; None is the end token, as SigLIP was trained. SigLIP 2 has 0, `<pad>`.
        end: whether the end token follows the pieces, and is kept when a text is cut.
        lower: "text" is Python's `str.lower`; "character" lower-cases each character alone, as Hugging Face's tokenizers do:
            the two differ in the final sigma. "none" keeps capitals.
        canonical: which texts lose their punctuation and extra white space: all "texts", as Hugging Face's tokenizer of SigLIP
            does it, only the "prompts" of zero-shot classes, as big_vision does it, or "none", as for SigLIP 2 there.
    """

    pad_id: int | None = None
    end: bool = True
    lower: Literal["text", "character", "none"] = "text"
    canonical: Literal["texts", "prompts", "none"] = "prompts"

    def __post_init__(self) -> None:
        check_choices(self, ("lower", "canonical"))


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower. `width`, `depth`, `mlp_dim` and `num_heads` override what `variant` says; `length` is in tokens.

    `dropout` acts in training: on the embedding and on what each half-block adds. `embed_std` is the spread of fresh token
    embeddings, 1/sqrt(width) by default; larger than the positions' it makes the tower start out as a bag of pieces.
    With `embed_bottleneck` the table is that narrow, and one product makes its rows as wide as the tower: for vocabularies of
    250,000 pieces, at a cost of about half a point on ImageNet (the paper's mSigLIP: 96 for a width of 768).
    """

    variant: str = "B"
    width: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    vocab_size: int = 32_000
    length: int = 64
    tokens: TokenConfig = TokenConfig()
    pool: Literal["last", "first", "mean", "max", "map"] = "last"
    scan: bool = False
    unroll: bool | None = None
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    embed_std: float | None = None
    embed_bottleneck: int | None = None
    attention: Attention = "auto"
    block: BlockConfig = BlockConfig()

    def __post_init__(self) -> None:
        check_choices(self, ("pool", "remat", "dtype", "residual_dtype", "attention"))
        check_rate("text.dropout", self.dropout)
        if self.embed_std is not None and not self.embed_std > 0:
            raise UserError(f"text.embed_std={self.embed_std} must be positive, or None for 1/sqrt(width)")
        if parse_variant(self.variant)[1] is not None:
            raise UserError(
                f"variant={self.variant!r}: a text tower has no patches; use {self.variant.split('/')[0]!r}"
            )
        assert self.spec  # raises on sizes that do not fit each other
        bottleneck = () if self.embed_bottleneck is None else (("embed_bottleneck", self.embed_bottleneck),)
        for field, value in (("vocab_size", self.vocab_size), ("length", self.length), *bottleneck):
            check_size(field, value)
        if self.tokens.pad_id is not None and not 0 <= self.tokens.pad_id < self.vocab_size:
            raise UserError(f"tokens.pad_id={self.tokens.pad_id} is not one of the {self.vocab_size} ids of vocab_size")

    @property
    def spec(self) -> Variant:
        """The sizes after overrides."""
        overrides = {f: getattr(self, f) for f in ("width", "depth", "mlp_dim", "num_heads")}
        return resolve(parse_variant(self.variant)[0], overrides)


class TextTransformer(nn.Module):
    """The text tower.

    Returns the embedding before normalisation, and "encoded" [b, l, d] (after the final LayerNorm) and "pre_logits"
    [b, d].
    """

    config: TextConfig
    out_dim: int | None
    attention: AttentionFn = attention_fn
    layout: ParamLayout | None = None

    @nn.compact
    def __call__(self, text: Int[Array, "b l"], *, train: bool = False) -> tuple[Float[Array, "b e"], dict[str, Array]]:
        config, spec, dtype = self.config, self.config.spec, jnp.dtype(self.config.dtype)
        if text.ndim != 2 or text.shape[1] != config.length:
            got = "x".join(map(str, text.shape))
            raise ValueError(f"texts are {got} but the model takes bx{config.length}; pad or cut them to that length")
        normal = nn.initializers.normal(spec.width**-0.5)
        embed_init = normal if config.embed_std is None else nn.initializers.normal(config.embed_std)
        narrow = config.embed_bottleneck or spec.width
        rows = nn.Embed(config.vocab_size, narrow, embedding_init=embed_init, name="Embed_0")
        table = "/".join((*rows.path, "embedding"))
        x = rows(text) if self.layout is None else self.layout.look_up(table, rows, text)
        if config.embed_bottleneck is not None:
            init = {"kernel_init": nn.initializers.lecun_normal(), "use_bias": False}
            widened = Dense((narrow,), (spec.width,), dtype, **init, name="embed_out")(x)
            x = widened.astype(jnp.float32)
        x = x + self.param("pos_embedding", normal, (1, config.length, spec.width))
        rate = config.dropout if train else 0.0
        x = dropout(x, rate)
        out = {}
        blocks = (spec, config.scan, config.remat, dtype, jnp.dtype(config.residual_dtype), config.unroll)
        encoder = (*blocks, rate, self.attention, self.layout)
        x = out["encoded"] = Encoder(*encoder, config=config.block, name="Encoder_0")(x)
        match config.pool:
            case "last":
                x = x[:, -1]
            case "first":
                x = x[:, 0]
            case "mean":
                x = x.mean(axis=1)
            case "max":
                x = x.max(axis=1)
            case "map":
                x = MAPHead(spec, dtype, name="MAPHead_0")(x)
        out["pre_logits"] = x
        if self.out_dim is not None:
            x = nn.Dense(self.out_dim, kernel_init=nn.initializers.lecun_normal(), name="head")(x)
        return x, out
