"""The image tower alone, frozen, as a vision-language model takes it: a pytree that goes through jit, grad and optax.

    encoder = siglip.load_encoder(SRC, image_size=448)
    tokens = encoder.tokens(images)                       # float32 [b, h, w, 3] in [-1, 1] -> [b, n, d]

An `ImageEncoder`'s leaves are its parameters: hand it to a jitted step as an argument, lay its leaves out with
`siglip.parallel.sharding.param_shardings`, and unfreeze it with `encoder.unfrozen()`. PaLI-3 (arXiv:2310.09199) and PaliGemma
(arXiv:2407.07726) read the tokens after the last LayerNorm and before pooling: layer -1. Layers -2, -3, … are what earlier blocks
return, without a LayerNorm, as LLaVA reads them (`hidden_states[-2]` in transformers).

The traps: images are float32 in [-1, 1], resized by the filter in `config.pixels`; other pixels are not noticed on a device, the
tokens are only worse. And an encoder that is closed over instead of passed in becomes a constant of the compiled program: neither
its sharding nor its gradient is then what you asked for.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.typing import ArrayLike

from siglip import trees
from siglip.array_types import Array, Float
from siglip.errors import UserError
from siglip.formats import big_vision, key_maps
from siglip.inputs import check_images, check_patches, describe_inputs
from siglip.model_source import read_model
from siglip.models.attention import Attention, AttentionFn, attention_on
from siglip.models.layers import Remat
from siglip.models.naflex import Patches, Tokens
from siglip.models.two_tower import ImageConfig, ModelConfig
from siglip.models.vit import ViT

PIXEL_RANGE = (-1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What an encoder takes and gives.

    Attributes:
        tokens: n, tokens per image: down * across, and a class token before them where the tower has one. Of a NaFlex tower, as
            many as its longest images have where nothing else is said; `grid` and `image_size` are then those of its positions.
        width: d of the tokens.
        grid: patches (down, across), row by row.
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels.
        pixel_range: what the smallest and the largest pixel value become: 0 -> -1 and 255 -> 1.
        pooled_width: of `pooled`; None where the tower has no pooling, or tokens are read from an earlier layer.
        class_token: whether the first token is a class token, not a patch of the grid.
    """

    tokens: int
    width: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    pixel_range: tuple[float, float]
    pooled_width: int | None
    class_token: bool


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "head_dim", "layer", "frozen"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class ImageEncoder:
    """An image tower with its parameters; make one with `load_encoder`.

    Attributes:
        params: nested dict of float32 arrays under the published names, without the leading "img"; its leaves are the pytree's,
            and may also be gradients, shardings or shapes.
        config: the tower, at the resolution it was loaded for; `depth` counts the blocks up to the layer that is read.
        head_dim: width of the linear head behind the pooling, or None.
        layer: -1 where the source ends, which is after its last LayerNorm, -2 … the output of an earlier block.
        frozen: whether gradients stop here: those of the parameters and the images are zero.
    """

    params: Any
    config: ImageConfig
    head_dim: int | None
    layer: int = -1
    frozen: bool = True

    def __repr__(self) -> str:
        spec, state = self.spec, "frozen" if self.frozen else "unfrozen"
        what = describe_inputs(ModelConfig(self.config, None, (None, None)))
        return f"ImageEncoder({what} -> {spec.tokens} tokens of width {spec.width}, layer {self.layer}, {state})"

    @property
    def spec(self) -> EncoderSpec:
        """Sizes of what goes in and comes out."""
        config, class_token = self.config, self.config.pool == "tok"
        pooled = None if config.pool == "none" or self.layer != -1 else self.head_dim or config.spec.width
        return EncoderSpec(
            tokens=(config.naflex.patches if config.naflex else config.grid[0] * config.grid[1]) + class_token,
            width=config.spec.width,
            grid=config.grid,
            image_size=config.image_size,
            patch_size=config.patch,
            pixel_range=PIXEL_RANGE,
            pooled_width=pooled,
            class_token=class_token,
        )

    def tokens(self, images: ArrayLike | Patches) -> Tokens:
        """float32 [b, h, w, 3] in [-1, 1] -> float32 [b, n, d]. A NaFlex tower takes `Patches` and gives (tokens, mask).

        Raises:
            UserError: the images have another size, integer pixels, or, unless they lie on a device, pixels outside [-1, 1].
        """
        out = self._forward(self._checked(images))[1]
        return (out["encoded"], out["mask"]) if "mask" in out else out["encoded"]

    def pooled(self, images: ArrayLike | Patches) -> Float[Array, "b e"]:
        """float32 [b, h, w, 3] in [-1, 1] -> float32 [b, e], one vector per image, not normalised; divided by its norm it is
        the embedding that texts are compared with.

        Raises:
            UserError: as for `tokens`, or the encoder has no pooling, or reads from an earlier layer.
        """
        if self.spec.pooled_width is None:
            raise UserError(
                f"this encoder (pool={self.config.pool!r}, layer={self.layer}) has no pooled output; use tokens, or load a "
                "tower with a pooling head at layer=-1"
            )
        return self._forward(self._checked(images))[0]

    def unfrozen(self) -> "ImageEncoder":
        """The same encoder, through which gradients flow."""
        return dataclasses.replace(self, frozen=False)

    def save(self, out: str | Path) -> None:
        """Writes the tower as it is now into FILE.npz, under the published names: a SRC again, whichever layer it ends at.

        `load_encoder(out)` then gives the same tokens; what was cut off is not in it, so layer -1 is where it ends.

        Raises:
            UserError: `out` is not FILE.npz in a folder that exists, or the leaves are not the tower's arrays. Nothing is written
                then, and a file that was there stays.
        """
        out = Path(out).expanduser()
        if out.suffix != ".npz" or not out.parent.is_dir():
            raise UserError(f"{str(out)!r}: name a FILE.npz in a folder that exists")
        big_vision.write(out, {"img": self.params}, ModelConfig(self.config, None, (self.head_dim, None)))

    def _checked(self, images: ArrayLike | Patches) -> Array | Patches:
        return (check_images if self.config.naflex is None else check_patches)(images, self.config)

    @jax.jit
    def _forward(self, images: Array | Patches) -> tuple[Array | None, dict[str, Array]]:
        params = self.params
        if self.frozen:
            images, params = jax.lax.stop_gradient((images, params))
        tower = ViT(self.config, self.head_dim, _attention_of(self.config))
        pooled, out = tower.apply({"params": params}, images)
        return pooled, {name: out[name] for name in ("encoded", "mask") if name in out}


def load_encoder(
    src: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    patch_size: int | tuple[int, int] | None = None,
    layer: int = -1,
    frozen: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Remat = "none",
    attention: Attention = "xla",
    scan: bool | None = None,
) -> ImageEncoder:
    """The image tower of any source that `siglip.load` reads.

    Args:
        image_size: pixels, one number or (height, width); learned positions are resampled to its grid.
        patch_size: pixels, likewise; the patch kernel is resampled (FlexiViT, arXiv:2212.08013).
        layer: -1 reads after the last LayerNorm, -2 what the second-last block returns, and so on down to -depth.
        frozen: whether gradients stop: those of the parameters and the images are zero then.
        dtype: of the matrix products; parameters, LayerNorms and the tokens stay float32.
        remat: what the backward pass of an unfrozen encoder computes again to save memory: "full" keeps each block's input alone,
            "dots" the results of its matrix products and its attention as well, "dots+gelu" also those of GELU.
        attention: the kernel: "xla" runs anywhere; "cudnn" (GPU, bfloat16) and "splash" (TPU) never store tokens x tokens
            weights; "auto" takes the one that suits the devices.
        scan: True stacks the parameters of all blocks and compiles one block for all, False keeps them one by one; None is as in
            the source.

    Raises:
        FileNotFoundError: there is nothing at `src`.
        UserError: it is not a model, the size holds no patch, the tower has no such layer, or the kernel does not run here.
    """
    params, config, _ = read_model(src, image_size, patch_size=patch_size, only_image=True)
    image, depth = config.image, config.image.spec.depth
    if not -depth <= layer <= -1:
        raise UserError(f"layer={layer}: the tower has {depth} blocks; count them from the end, -1 to -{depth}")
    options = {"dtype": dtype, "remat": remat, "attention": attention, "scan": image.scan if scan is None else scan}
    options |= {"residual_dtype": "float32", "dropout": 0.0, "patch_dropout": 0.0}
    image = dataclasses.replace(image, **options)
    _attention_of(image)  # raises now where it cannot run
    params, head_dim = params["img"], config.out_dim[0]
    if image.scan != config.image.scan:
        change = key_maps.stack_blocks if image.scan else key_maps.unstack_blocks
        params = trees.unflatten(change(trees.flatten(params)))
    if layer != -1:
        params, head_dim = _cut(params, depth + layer + 1), None
        # The class token is part of the sequence: a tower that has one keeps it.
        pool = "tok" if image.pool == "tok" else "none"
        image = dataclasses.replace(image, depth=depth + layer + 1, pool=pool, final_norm=False)
    return ImageEncoder(jax.device_put(params), image, head_dim, layer, frozen)


def _attention_of(config: ImageConfig) -> AttentionFn:
    """The kernel for this process's devices; on several TPUs it needs `jax.set_mesh` with the mesh of siglip.parallel."""
    mesh = jax.sharding.get_abstract_mesh()
    options = {"head_dim": config.spec.width // config.spec.num_heads, "dtype": config.dtype}
    options |= {"mesh": mesh if {"data", "fsdp"} <= {*mesh.axis_names} else None}
    return attention_on(config.attention, device=jax.devices()[0], **options)


def _cut(params: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The parameters that `depth` blocks need, with nothing after them."""
    blocks = params["Transformer"]
    if "encoderblock" in blocks:
        kept = {"encoderblock": jax.tree.map(lambda leaf: leaf[:depth], blocks["encoderblock"])}
    else:
        kept = {f"encoderblock_{n}": blocks[f"encoderblock_{n}"] for n in range(depth)}
    before = ("embedding", "pos_embedding", "cls")
    return {name: params[name] for name in before if name in params} | {"Transformer": kept}
