"""Sizes of transformers by name, as in the published SigLIP checkpoints: "B/16" is width, depth, heads and patch.

The table is that of big_vision's `models/vit.py` and the papers it follows (ViT, arXiv:2010.11929; scaling ViT,
arXiv:2106.04560; So400m, arXiv:2305.13035).
"""

import dataclasses
import typing
from typing import Any

from siglip.errors import UserError
from siglip.trees import did_you_mean


@dataclasses.dataclass(frozen=True)
class Variant:
    """Size of a transformer; `num_heads` divides `width`."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int

    def fields(self, *, patch: int | None = None) -> dict[str, Any]:
        """What a tower's config says of these sizes: the table's name, or "B" and an override of everything."""
        name = next((name for name, known in VARIANTS.items() if known == self), None)
        return {"variant": (name or "B") + (f"/{patch}" if patch else "")} | ({} if name else vars(self))


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How blocks are wired. The defaults are ViT's; all three turned over are ViT-22B's (arXiv:2302.05442, section 2).

    Attributes:
        parallel: attention and MLP read the same normalised input, and both are added to it.
        qk_norm: LayerNorm of every head's queries and keys, without which attention logits explode beyond 8 10^9 parameters.
        bias: of query, key and value; without it LayerNorms have none either, and do not centre.
    """

    parallel: bool = False
    qk_norm: bool = False
    bias: bool = True


MAX_SIZE, _MAX_DEPTH = 1 << 24, 10_000  # beyond any model: what a damaged config says must not fill the memory

VARIANTS: dict[str, Variant] = {
    "mu": Variant(32, 1, 128, 2),
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "M": Variant(512, 12, 2048, 8),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "g": Variant(1408, 40, 6144, 16),
    "g-opt": Variant(1536, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
    "G-opt": Variant(1536, 48, 8192, 16),
    "e": Variant(1792, 56, 15360, 16),
    "22B": Variant(6144, 48, 24576, 48),
}

# What So400m/14 is shaped for: 40 10^9 images of 256 patches, three forward passes each (arXiv:2305.13035, section 4).
SO400M_FLOPS = 3 * 40e9 * 2.186e11
_SO400M_HEAD = 72
_SOVIT_EXPONENTS = {"width": 0.22, "depth": 0.45, "mlp_dim": 0.6}


def sovit(flops: float) -> Variant:
    """The compute-optimal shape of an image tower for `flops`, those of its whole training: So400m at `SO400M_FLOPS`.

        size_k = So400m's size_k * (flops / SO400M_FLOPS)^(s_k / 3),    s = .22 width, .45 depth, .6 MLP

    "Getting ViT in Shape" (arXiv:2305.13035): exponents fitted on JFT-3B with patches of 14 px; parameters grow 2.5 times as
    compute grows 10 times. Width is rounded to 64, the MLP to 16, and heads are as wide as So400m's, 72, or nearly.

    Raises:
        UserError: flops is not positive.
    """
    if not flops > 0:
        raise UserError(f"sovit: flops={flops} must be positive; So400m is the shape for {SO400M_FLOPS:.1e}")
    scale, base = flops / SO400M_FLOPS, VARIANTS["So400m"]
    sizes = {name: getattr(base, name) * scale ** (s / 3) for name, s in _SOVIT_EXPONENTS.items()}
    width = max(64, 64 * round(sizes["width"] / 64))
    head = min((n for n in range(8, width + 1, 8) if width % n == 0), key=lambda n: abs(n - _SO400M_HEAD))
    return Variant(width, max(1, round(sizes["depth"])), max(16, 16 * round(sizes["mlp_dim"] / 16)), width // head)


def parse_variant(name: str) -> tuple[Variant, int | None]:
    """Sizes and patch of a name: "So400m/14" -> (the So400m sizes, 14), "B" -> (the B sizes, None).

    Raises:
        UserError: the size is not in the table, or the patch is not a positive number.
    """
    size, slash, patch = name.partition("/")
    if size not in VARIANTS:
        raise UserError(
            f"variant {name!r}: no size {size!r}{did_you_mean(size, VARIANTS)}; known: {', '.join(VARIANTS)}"
        )
    if not slash:
        return VARIANTS[size], None
    if not patch.isdecimal() or int(patch) < 1:
        raise UserError(f"variant {name!r}: the patch size in pixels follows the slash, as in '{size}/16'")
    return VARIANTS[size], int(patch)


def resolve(base: Variant, overrides: dict[str, int | None]) -> Variant:
    """`base` with every override that is not None.

    Raises:
        UserError: a size is below 1 or absurdly large, or the heads do not divide the width.
    """
    variant = dataclasses.replace(base, **{k: v for k, v in overrides.items() if v is not None})
    for field, value in dataclasses.asdict(variant).items():
        check_size(field, value, most=_MAX_DEPTH if field == "depth" else MAX_SIZE)
    if variant.width % variant.num_heads:
        raise UserError(f"width={variant.width} is not divisible by num_heads={variant.num_heads}; change one of them")
    return variant


def check_size(name: str, value: int, *, most: int = MAX_SIZE) -> None:
    """Raises UserError unless a size of a model is from 1 to `most`."""
    if value < 1:
        raise UserError(f"{name}={value} must be at least 1")
    if value > most:
        raise UserError(f"{name}={value} must be at most {most}")


def check_choices(config: Any, fields: tuple[str, ...]) -> None:
    """Checks the `Literal` fields of a config dataclass, for configs that no command line has checked.

    Raises:
        UserError: a field's value is not one of its choices.
    """
    hints = typing.get_type_hints(type(config))
    for field in fields:
        value, choices = getattr(config, field), typing.get_args(hints[field])
        if value not in choices:
            raise UserError(
                f"{field}={value!r} is not one of {', '.join(map(repr, choices))}{did_you_mean(str(value), choices)}"
            )


def check_rate(name: str, rate: float) -> None:
    """Raises UserError unless `rate` is in [0, 1), as a dropout rate must be."""
    if not 0 <= rate < 1:
        raise UserError(f"{name}={rate} must lie in [0, 1), e.g. 0.1")
