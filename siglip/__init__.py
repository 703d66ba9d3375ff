"""SigLIP stage 0 in JAX: pretrain image-text towers with the pairwise sigmoid loss, evaluate them, hand over the encoder.

    model = siglip.load(SRC)          # a run, a checkpoint in it, a big_vision .npz, or a Hugging Face folder
    model.embed_images(images)        # float32 [b, h, w, 3] in [-1, 1] -> float32 [b, e], L2-normalised
    encoder = siglip.load_encoder(SRC, image_size=448)     # the frozen image tower, for a vision-language model
    encoder.tokens(images)            # -> float32 [b, n, d]

Importing this is cheap: jax arrives with the first call.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siglip.encoder import Encoder
    from siglip.image_encoder import ImageEncoder

__version__ = "0.1.0"


def load(
    src: str | Path, image_size: int | tuple[int, int] | None = None, *, patch_size: int | tuple[int, int] | None = None
) -> "Encoder":
    """`siglip.encoder.load`: a ready model from any source; `image_size` in pixels resamples the position embedding."""
    from siglip import encoder

    return encoder.load(src, image_size, patch_size=patch_size)


def load_encoder(src: str | Path, image_size: int | tuple[int, int] | None = None, **options: Any) -> "ImageEncoder":
    """`siglip.image_encoder.load_encoder`: the image tower alone, frozen, as a pytree that goes through jit and grad."""
    from siglip import image_encoder

    return image_encoder.load_encoder(src, image_size, **options)
