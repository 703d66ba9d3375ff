"""What users have, images and strings, as the towers take it: pixels or patches of the model, and token ids of its length."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from siglip.array_types import Array, Float
from siglip.errors import UserError
from siglip.models.naflex import Patches
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.models.vit import cut_patches, normalize_pixels

_MAX_PIXEL = 1 + 1e-3  # what 255 may become in half precision
_EXACT = True  # by Pillow itself: training may take a faster resize that is 1/255 off here and there, consumers do not
Images = Any  # float32 [b, h, w, 3], a list of Pillow's images and uint8 [h, w, 3], or Patches


def to_pixels(
    images: Images, config: ImageConfig, *, max_patches: int | None = None
) -> Float[Array, "b h w 3"] | Patches:
    """What the image tower reads, float32 in [-1, 1]: images at its size, or `Patches` for a NaFlex tower.

    Args:
        images: an array as `check_images` or `_array_to_patches` takes it, `Patches`, or a list of Pillow's images and uint8
            [h, w, 3]. Those of a list are shown as a browser shows them and resized as the data pipeline does it.
        max_patches: of an image, for a NaFlex tower; None for the model's own number.

    Raises:
        UserError: as those, or an entry of a list is not an image, or the tower takes no such length.
    """
    if hasattr(images, "convert"):  # Pillow's, which is not imported for arrays
        raise UserError("images is one image, not a list of images: pass [image]")
    in_list = isinstance(images, list | tuple) and not isinstance(images, Patches)
    if not in_list and not isinstance(images, Patches) and not hasattr(images, "shape"):
        raise UserError(
            f"images is {type(images).__name__}; pass a list of Pillow images, as PIL.Image.open(path) gives them, or float32 "
            "[b, h, w, 3] in [-1, 1]"
        )
    if config.naflex is None:
        if max_patches is not None:
            raise UserError(
                f"max_patches={max_patches}: this tower takes images of {config.image_size} px; it is not NaFlex"
            )
        return _resized(images, config) if in_list else check_images(images, config)
    if isinstance(images, Patches):
        if max_patches is not None:
            raise UserError(
                f"max_patches={max_patches}: Patches are cut already; leave it out, or pass the images themselves"
            )
        return check_patches(images, config)
    length = config.naflex.check_length(config.naflex.patches if max_patches is None else max_patches)
    return _cut(images, config, length) if in_list else _array_to_patches(images, config, length)


def _resized(images: Sequence[Any], config: ImageConfig) -> Float[Array, "b h w 3"]:
    from data_pipelines import image_ops  # it imports Pillow

    options = {"resample": config.pixels.resample, "exact": _EXACT}
    return normalize_pixels(np.stack([image_ops.resize(one, config.image_size, **options) for one in _shown(images)]))


def _cut(images: Sequence[Any], config: ImageConfig, length: int) -> Patches:
    from data_pipelines import image_ops, patch_ops

    made = []
    for one in _shown(images):
        size_px = patch_ops.fit_size(one.shape[:2], config.patch, length)
        resized = image_ops.resize(one, size_px, resample=config.pixels.resample, exact=_EXACT)
        made.append(patch_ops.cut_patches(resized, config.patch, length))
    patches, grids = map(np.stack, zip(*made, strict=True))
    return Patches(normalize_pixels(patches), jnp.asarray(grids))


def _shown(images: Sequence[Any]) -> Iterator[np.ndarray]:
    """uint8 [h, w, 3] of each image of a list. Raises UserError if one of them is not an image."""
    bad = next((f"has an entry that is {type(one).__name__}" for one in images if not _is_raw_image(one)), None)
    if bad is not None or not images:
        raise UserError(
            f"the list of images {bad or 'is empty'}; pass Pillow images, as PIL.Image.open(path) gives them, or uint8 "
            "arrays [h, w, 3] with pixels; float ones in [-1, 1] go in one array [b, h, w, 3]"
        )
    from data_pipelines import image_ops  # it imports Pillow

    return (np.asarray(image_ops.as_shown(one) if hasattr(one, "convert") else one) for one in images)


def _is_raw_image(image: Any) -> bool:
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", None)
    return hasattr(image, "convert") or (dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and 0 not in shape)


def check_images(images: ArrayLike | Patches, config: ImageConfig) -> Float[Array, "b h w 3"]:
    """Raises UserError for images of another size, with integer pixels or, unless they lie on a device, outside [-1, 1]."""
    height, width = config.image_size
    if isinstance(images, Patches):
        raise UserError(f"this tower takes images [b, {height}, {width}, 3], not Patches; it is not NaFlex")
    if not jnp.issubdtype(jnp.result_type(images), jnp.floating):
        raise UserError(
            f"images are {jnp.result_type(images)}; pass float32 in [-1, 1], for 8-bit pixels x / 127.5 - 1, or a list of images"
        )
    if jnp.ndim(images) != 4 or jnp.shape(images)[1:] != (height, width, 3):
        raise UserError(
            f"images have shape {jnp.shape(images)} but the model takes [b, {height}, {width}, 3]; "
            f"resize them, or load the model with image_size=(h, w)"
        )
    if not isinstance(images, jax.Array):  # looking at what is on a device would wait for it
        _check_range(np.asarray(images))
    return jnp.asarray(images, jnp.float32)


def _check_range(pixels: np.ndarray) -> None:
    if not pixels.size:
        return
    low, high = np.min(pixels), np.max(pixels)
    if not (low >= -_MAX_PIXEL and high <= _MAX_PIXEL):
        raise UserError(
            f"pixels lie in [{low:.4g}, {high:.4g}]; pass float32 in [-1, 1]: x / 127.5 - 1 for 8-bit pixels, no other mean "
            "and deviation, clipped where a filter overshoots; or a list of images"
        )


def check_patches(images: ArrayLike | Patches, config: ImageConfig) -> Patches:
    """Raises UserError for what are not patches of the tower's size and float pixels, and for a length or a grid that do not fit;
    unless they lie on a device, for pixels outside [-1, 1], padding apart."""
    if not isinstance(images, Patches):
        raise UserError("this tower is NaFlex: it takes Patches, as siglip.load(SRC).pixels(images) gives them")
    p, shape = math.prod(config.patch) * 3, jnp.shape(images.patches)
    if not jnp.issubdtype(jnp.result_type(images.patches), jnp.floating):
        raise UserError(
            f"patches are {jnp.result_type(images.patches)}; pass float32 in [-1, 1], for 8-bit pixels x / 127.5 - 1"
        )
    if not jnp.issubdtype(jnp.result_type(images.grid), jnp.integer):
        raise UserError(f"grid is {jnp.result_type(images.grid)}; pass int32 [b, 2], patches down and across")
    if len(shape) != 3 or shape[2] != p or jnp.shape(images.grid) != (shape[0], 2):
        raise UserError(
            f"patches have shape {shape} and grid {jnp.shape(images.grid)}, but the model takes [b, n, {p}] and [b, 2]"
        )
    config.naflex.check_length(shape[1], "patches")
    if not isinstance(images.grid, jax.Array):  # looking at what is on a device would wait for it
        bad = next(
            (
                tuple(grid.tolist())
                for grid in np.asarray(images.grid)
                if not 1 <= grid.min() <= grid.prod() <= shape[1]
            ),
            None,
        )
        if bad is not None:
            raise UserError(f"grid {bad} (down, across) does not fit {shape[1]} patches, or has none")
        if not isinstance(images.patches, jax.Array):
            _check_range(images.without_padding().patches)
    return Patches(jnp.asarray(images.patches, jnp.float32), jnp.asarray(images.grid, jnp.int32))


def _array_to_patches(images: ArrayLike, config: ImageConfig, length: int) -> Patches:
    """float32 [b, h, w, 3] in [-1, 1] of whole patches. Raises UserError for sides that hold no whole patches, or too many."""
    (ph, pw), shape = config.patch, jnp.shape(images)
    whole = len(shape) == 4 and shape[3] == 3 and shape[1] % ph == shape[2] % pw == 0
    if not whole or not 1 <= shape[1] * shape[2] // (ph * pw) <= length:
        raise UserError(
            f"images have shape {shape}; a NaFlex model takes a list of images of any size, or [b, h, w, 3] with sides of whole "
            f"patches of {config.patch} px, at most max_patches={length} of them"
        )
    same_size = dataclasses.replace(config, naflex=None, image_size=shape[1:3])
    patches = cut_patches(check_images(images, same_size), config.patch)
    return Patches(patches, jnp.full((shape[0], 2), jnp.array([shape[1] // ph, shape[2] // pw]), jnp.int32))


def check_tokens(tokens: ArrayLike, config: TextConfig) -> None:
    """Raises UserError for what is not int32 [b, l] with ids of the vocabulary."""
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise UserError(f"tokens are {jnp.result_type(tokens)}; pass token ids as int32 [b, {config.length}]")
    if jnp.ndim(tokens) != 2 or jnp.shape(tokens)[1] != config.length:
        raise UserError(f"tokens have shape {jnp.shape(tokens)}; pad or cut them to [b, {config.length}]")
    # Looking at ids that are already on a device would wait for it; there a wrong id becomes NaN instead.
    if not isinstance(tokens, jax.Array):
        ids = np.asarray(tokens)
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise UserError(
                f"token id {bad[0]} is outside the vocabulary of {config.vocab_size}; is it another tokenizer's?"
            )


def tokenizer_of(path: Path, config: TextConfig) -> Any:
    """The SentencePiece tokenizer of a text tower."""
    from data_pipelines.tokenizers import SentencePieceTokenizer  # it imports sentencepiece

    return SentencePieceTokenizer(path, **vars(config.tokens))


def describe_inputs(config: ModelConfig) -> str:
    """What a model takes, in a few words."""
    image = config.image
    text = "" if config.text is None else f", texts of {config.text.length} tokens"
    if image.naflex is not None:
        return f"{image.variant}, images of any size in up to {image.naflex.patches} patches of {image.patch}{text}"
    return f"{image.variant}, {image.image_size[0]} x {image.image_size[1]} px in patches of {image.patch}{text}"
