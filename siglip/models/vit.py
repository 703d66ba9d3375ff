"""Vision transformer: square or other patches, learned or fixed positions, five ways to pool, images of one size or of any.

    tokens = LN(blocks(patches @ kernel + bias + position))          (ViT, arXiv:2010.11929)

Pooling happens after the final LayerNorm: "map" attends with a probe, "gap" averages, "tok" takes a class token that
was put first, "0" takes the first patch, "none" leaves the tokens as they are, which is what a vision-language model
consumes. The fixed positions are those of MoCo v3 (arXiv:2104.02057).

The trap: pixels that do not fill a whole patch are dropped at the right and the bottom: 384 px in patches of 14 are
27 x 27 patches, the last 6 px are never seen.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from siglip.array_types import Array, Float, Int, UInt8
from siglip.errors import UserError
from siglip.models.attention import Attention, AttentionFn, attention_fn
from siglip.models.layers import Encoder, MAPHead, Remat, dropout
from siglip.models.naflex import NaflexConfig, Patches, mask_of, resize_positions
from siglip.models.variants import BlockConfig, Variant, check_choices, check_rate, check_size, parse_variant, resolve
from siglip.parallel.sharding import ParamLayout

_DEFAULT_PATCH_PX = 16


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """How images become the pixels that a tower was trained on.

    Attributes:
        mean, std: of red, green and blue, where 0 is black and 1 is white; the tower's input is (pixel - mean) / std.
        resample: the filter that resizes, with antialias.
    """

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        check_choices(self, ("resample",))
        if not all(deviation > 0 for deviation in self.std):
            raise UserError(f"std={self.std} must be positive: pixels are divided by it")

    @property
    def has_default_range(self) -> bool:
        """Whether the tower's input is just the range from -1 to 1."""
        return {*self.mean, *self.std} == {0.5}

    def scaled(self, pixels: Float[Array | np.ndarray, "..."]) -> Float[Array | np.ndarray, "..."]:
        """-1 … 1, of images or of patches with red, green and blue in turn on the last axis -> what the tower was trained on."""
        if self.has_default_range:
            return pixels
        colours = (pixels.reshape(*pixels.shape[:-1], -1, 3) + 1) / 2
        mean, std = (np.array(values, np.float32, ndmin=colours.ndim) for values in (self.mean, self.std))
        return ((colours - mean) / std).reshape(pixels.shape)

    def unscaled(self, pixels: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The inverse of `scaled`."""
        if self.has_default_range:
            return pixels
        colours = pixels.reshape(*pixels.shape[:-1], -1, 3) * np.float64(self.std) + self.mean
        return (2 * colours - 1).astype(np.float32).reshape(pixels.shape)


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image tower. `width`, `depth`, `mlp_dim`, `num_heads` and `patch_size` override what `variant` says.

    Without `final_norm` the tower ends at its last block, as one that was cut at an earlier layer does.
    `image_size` and `patch_size` are (height, width) in pixels. With `naflex` images keep their aspect ratio and come as
    `naflex.Patches`; `image_size` is then the image whose grid the learned positions have, 16 x 16 patches in SigLIP 2. `scan`,
    `unroll`, `remat`, `dtype`, `residual_dtype` and `attention` change memory and speed, not the function: see layers.Encoder,
    and attention.choose_kernel for the kernel that training takes.
    """

    variant: str = "B/16"
    width: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    patch_size: tuple[int, int] | None = None
    image_size: tuple[int, int] = (224, 224)
    pixels: PixelConfig = PixelConfig()
    pool: Literal["map", "gap", "0", "tok", "none"] = "map"
    posemb: Literal["learn", "sincos2d"] = "learn"
    final_norm: bool = True
    scan: bool = False
    unroll: bool | None = None
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    patch_dropout: float = 0.0
    attention: Attention = "auto"
    block: BlockConfig = BlockConfig()
    naflex: NaflexConfig | None = None

    def __post_init__(self) -> None:
        check_choices(self, ("pool", "posemb", "remat", "dtype", "residual_dtype", "attention"))
        check_rate("image.dropout", self.dropout)
        check_rate("image.patch_dropout", self.patch_dropout)
        (ph, pw), (h, w) = self.patch, self.image_size
        if ph < 1 or pw < 1 or h < ph or w < pw:
            raise UserError(f"image_size={self.image_size} holds no patch of {self.patch} px; both are (height, width)")
        check_size(f"image_size={self.image_size}: the number of patches", self.grid[0] * self.grid[1])
        if self.posemb == "sincos2d" and self.spec.width % 4:
            raise UserError(f"posemb='sincos2d' needs a width that divides by 4, got width={self.spec.width}")
        if self.naflex is not None and (self.posemb != "learn" or self.patch_dropout):
            raise UserError(
                f"image.naflex needs posemb='learn' and patch_dropout=0, not {self.posemb!r} and {self.patch_dropout}"
            )

    @property
    def spec(self) -> Variant:
        """The sizes after overrides."""
        overrides = {f: getattr(self, f) for f in ("width", "depth", "mlp_dim", "num_heads")}
        return resolve(parse_variant(self.variant)[0], overrides)

    @property
    def patch(self) -> tuple[int, int]:
        """Patch (height, width) in pixels: `patch_size`, else the variant's, else 16 x 16."""
        side = parse_variant(self.variant)[1] or _DEFAULT_PATCH_PX
        return self.patch_size or (side, side)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    @property
    def kept_patches(self) -> int:
        """Patches that patch dropout leaves in training, at least one; with `naflex` the longest."""
        if self.naflex is not None:
            return self.naflex.max_patches
        return max(1, round(self.grid[0] * self.grid[1] * (1 - self.patch_dropout)))

    @property
    def train_tokens(self) -> int:
        """Tokens that attend to each other in training: the patches that are kept, and a class token."""
        return self.kept_patches + (self.pool == "tok")


def normalize_pixels(images: UInt8[Array | np.ndarray, "..."]) -> Float[Array, "..."]:
    """0 … 255 -> -1 … 1, the range of every published SigLIP checkpoint."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def sincos2d(grid: tuple[int, int], width: int) -> Float[np.ndarray, "1 n d"]:
    """Fixed positions in the order of MoCo v3: [sin x, cos x, sin y, cos y], row by row."""
    y, x = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1)
    omega = 10_000.0 ** -np.linspace(0, 1, width // 4)
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return table[None].astype(np.float32)


def cut_patches(image: Float[Array, "b h w c"], patch: tuple[int, int]) -> Float[Array, "b n p"]:
    """Patches row by row, each as (row, column, channel); what does not fill a patch is dropped."""
    (ph, pw), (b, h, w, channels) = patch, image.shape
    gh, gw = h // ph, w // pw
    patches = image[:, : gh * ph, : gw * pw].reshape(b, gh, ph, gw, pw, channels).swapaxes(2, 3)
    return patches.reshape(b, gh * gw, -1)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, done as one matrix product: the same function, faster on every
    device. Takes patches as `cut_patches` makes them."""

    patch: tuple[int, int]
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: Float[Array, "b n p"]) -> Float[Array, "b n d"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.patch, 3, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        stem = patches.astype(self.dtype) @ kernel.reshape(-1, self.width).astype(self.dtype)
        return stem.astype(jnp.float32) + bias.reshape(1, 1, -1)


class ViT(nn.Module):
    """The image tower, of uint8 pixels or of float32 ones in [-1, 1]: images, or `Patches` where the config has `naflex`.

    Returns the embedding before normalisation (None for pool "none") and everything worth looking at on the way:
    "stem" [b, gh, gw, d] ([b, n, d] of `Patches`; none if patches are dropped), "with_posemb" [b, n, d], "encoded" (the tokens
    after the final LayerNorm, [b, n, d], with the class token first when pool is "tok"), and unless pool is "none"
    "head_input" [b, d] and "pre_logits" [b, d]. Without `config.final_norm` "encoded" is what the last block returns. Of
    `Patches` there is "mask" [b, n] too, True where "encoded" is a token and not padding.
    """

    config: ImageConfig
    out_dim: int | None
    attention: AttentionFn = attention_fn
    layout: ParamLayout | None = None

    @nn.compact
    def __call__(
        self, image: Float[Array, "b h w 3"] | UInt8[Array, "b h w 3"] | Patches, *, train: bool = False
    ) -> tuple[Float[Array, "b e"] | None, dict[str, Array]]:
        config, spec, dtype = self.config, self.config.spec, jnp.dtype(self.config.dtype)
        out, lengths = {}, image.lengths if isinstance(image, Patches) else None
        patches, positions = self._patches_and_positions(image, drop=train and config.patch_dropout > 0)
        x = PatchEmbed(config.patch, spec.width, dtype, name="embedding")(patches)
        if not (train and config.patch_dropout):
            out["stem"] = x if lengths is not None else x.reshape(-1, *config.grid, spec.width)
        x = out["with_posemb"] = x + positions
        rate = config.dropout if train else 0.0
        x = dropout(x, rate)
        if config.pool == "tok":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, spec.width))
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, spec.width)), x], axis=1)
            lengths = None if lengths is None else lengths + 1
        blocks = (spec, config.scan, config.remat, dtype, jnp.dtype(config.residual_dtype), config.unroll)
        encoder = (*blocks, rate, self.attention, self.layout, config.final_norm, config.block)
        x = out["encoded"] = Encoder(*encoder, name="Transformer")(x, lengths)
        mask = None if lengths is None else mask_of(lengths, x.shape[1])
        out |= {} if mask is None else {"mask": mask}
        if config.pool == "none":
            return None, out
        if config.pool == "map":
            x = MAPHead(spec, dtype, name="MAPHead_0")(x, lengths)
        else:
            x = x.mean(axis=1, where=None if mask is None else mask[..., None]) if config.pool == "gap" else x[:, 0]
        out["head_input"] = out["pre_logits"] = x
        if self.out_dim is not None:
            # Never zeros: the gradient of the norm at an embedding of exactly 0 is NaN.
            x = nn.Dense(self.out_dim, kernel_init=nn.initializers.lecun_normal(), name="head")(x)
        return x, out

    def _patches_and_positions(
        self, image: Array | Patches, *, drop: bool
    ) -> tuple[Float[Array, "b n p"], Float[Array, "... n d"]]:
        """Normalised patches and the positions that are added to them; with `drop`, of some patches of each image."""
        config = self.config
        _check_input(image, config)
        pixels = image.patches if isinstance(image, Patches) else image
        pixels = normalize_pixels(pixels) if pixels.dtype == jnp.uint8 else pixels
        pixels = config.pixels.scaled(pixels)
        if isinstance(image, Patches):
            n = pixels.shape[1]
            # Whatever stands after an image's patches, NaN even, goes no further than this.
            patches = jnp.where(mask_of(image.lengths, n)[..., None], pixels, 0)
            return patches, resize_positions(self._positions(), config.grid, jnp.asarray(image.grid), n)
        patches, positions = cut_patches(pixels, config.patch), self._positions()
        if not drop:
            return patches, positions
        keep = self._some_patches(len(patches))
        return jnp.take_along_axis(patches, keep[..., None], axis=1), positions[0][keep]

    def _some_patches(self, images: int) -> Int[Array, "b k"]:
        """Which patches of each image stay: a random choice without repetition."""
        draws = jax.random.uniform(self.make_rng("dropout"), (images, self.config.grid[0] * self.config.grid[1]))
        return jax.lax.top_k(draws, self.config.kept_patches)[1]

    def _positions(self) -> Float[Array, "1 n d"]:
        config, width = self.config, self.config.spec.width
        if config.posemb == "sincos2d":
            return jnp.asarray(sincos2d(config.grid, width))
        shape = (1, config.grid[0] * config.grid[1], width)
        return self.param("pos_embedding", nn.initializers.normal(width**-0.5), shape)


def _check_input(image: Array | Patches, config: ImageConfig) -> None:
    """Raises ValueError unless the images are what a tower of this config takes."""
    if config.naflex is not None:
        p = math.prod(config.patch) * 3
        if not isinstance(image, Patches) or image.patches.ndim != 3 or image.patches.shape[2] != p:
            got = "x".join(map(str, (image.patches if isinstance(image, Patches) else image).shape))
            raise ValueError(f"this tower takes patches bxnx{p} with the grid of each image, not {got} alone")
        if isinstance(n := image.patches.shape[1], int):  # an exported program is for any number
            config.naflex.check_length(n, "patches")
    elif isinstance(image, Patches):
        raise ValueError("this tower takes images of one size, not patches; set model.image.naflex for those")
    elif image.ndim != 4 or image.shape[1:] != (*config.image_size, 3):
        want = "x".join(map(str, ("b", *config.image_size, 3)))
        got = "x".join(map(str, image.shape))
        raise ValueError(f"images are {got} but the model takes {want}; resize them, or load it with image_size=…")


def pool_each(
    config: ImageConfig, out_dim: int | None, params: Any, tokens: Float[Array, "b n d"]
) -> Float[Array, "b m e"]:
    """The pooling and the head of a tower for each patch alone; of one token, attention pooling takes all.

    Args:
        params: of the tower. tokens: its "encoded"; a class token in front is left out, so m may be n - 1.
    """
    tokens = tokens[:, 1:] if config.pool == "tok" else tokens
    x = tokens.reshape(-1, 1, tokens.shape[-1])
    if config.pool == "map":
        x = MAPHead(config.spec, jnp.dtype(config.dtype)).apply({"params": params["MAPHead_0"]}, x)
    if out_dim is not None:
        x = nn.Dense(out_dim).apply({"params": params["head"]}, x)
    return x.reshape(*tokens.shape[:2], -1)
