"""What users have, images and strings, as the towers take it: pixels at the model's size and token ids of its length."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from siglip.array_types import Array, Float
from siglip.errors import UserError
from siglip.models.two_tower import ImageConfig, TextConfig
from siglip.models.vit import normalize_pixels

_MAX_PIXEL = 1 + 1e-3  # what 255 may become in half precision
Images = Any  # float32 [b, h, w, 3], or a list of Pillow's images and uint8 [h, w, 3]


def to_pixels(images: Images, config: ImageConfig) -> Float[Array, "b h w 3"]:
    """An array as `check_images` takes it, or a list of Pillow's images and uint8 [h, w, 3] -> float32 in [-1, 1].

    Those of a list are shown as a browser shows them and resized as the data pipeline does it.

    Raises:
        UserError: as `check_images`, or an entry of a list is not an image.
    """
    if hasattr(images, "convert"):  # Pillow's, which is not imported for arrays
        raise UserError("images is one image, not a list of images: pass [image]")
    if not isinstance(images, list | tuple):
        return check_images(images, config)
    bad = next((type(one).__name__ for one in images if not _is_raw_image(one)), None if images else "absent")
    if bad is not None:
        raise UserError(
            f"an entry of the list of images is {bad}; pass Pillow images, as PIL.Image.open(path) gives them, or uint8 "
            "arrays [h, w, 3]; float pixels in [-1, 1] go in one array [b, h, w, 3]"
        )
    from data_pipelines import image_ops  # it imports Pillow

    shown = (image_ops.as_shown(one) if hasattr(one, "convert") else np.asarray(one) for one in images)
    resized = [image_ops.resize(one, config.image_size, resample=config.pixels.resample) for one in shown]
    return normalize_pixels(np.stack(resized))


def _is_raw_image(image: Any) -> bool:
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", None)
    return hasattr(image, "convert") or (dtype == np.uint8 and len(shape) == 3 and shape[2] == 3)


def check_images(images: ArrayLike, config: ImageConfig) -> Float[Array, "b h w 3"]:
    """Raises UserError for images of another size, with integer pixels or, unless they lie on a device, outside [-1, 1]."""
    height, width = config.image_size
    if not jnp.issubdtype(jnp.result_type(images), jnp.floating):
        raise UserError(
            f"images are {jnp.result_type(images)}; pass float32 in [-1, 1], for 8-bit pixels x / 127.5 - 1, or a list of images"
        )
    if jnp.ndim(images) != 4 or jnp.shape(images)[1:] != (height, width, 3):
        raise UserError(
            f"images have shape {jnp.shape(images)} but the model takes [b, {height}, {width}, 3]; "
            f"resize them, or load the model with image_size=(h, w)"
        )
    # Looking at pixels that are already on a device would wait for it.
    if not isinstance(images, jax.Array) and np.size(images):
        low, high = np.min(images), np.max(images)
        if not (low >= -_MAX_PIXEL and high <= _MAX_PIXEL):
            raise UserError(
                f"pixels lie in [{low:.4g}, {high:.4g}]; pass float32 in [-1, 1]: x / 127.5 - 1 for 8-bit pixels, no other mean "
                "and deviation, clipped where a filter overshoots; or a list of images"
            )
    return jnp.asarray(images, jnp.float32)


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
