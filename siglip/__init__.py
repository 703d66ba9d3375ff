"""SigLIP stage 0 in JAX: pretrain image-text towers with the pairwise sigmoid loss, evaluate them, hand over the encoder.

    model = siglip.load(SRC)          # a run, a checkpoint in it, a big_vision .npz, or a Hugging Face folder
    model.embed_images(images)        # float32 [b, h, w, 3] in [-1, 1] -> float32 [b, e], L2-normalised

Importing this is cheap: jax arrives with the first call.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from siglip.encoder import Encoder

__version__ = "0.1.0"


def load(src: str, image_size: int | tuple[int, int] | None = None) -> "Encoder":
    """`siglip.encoder.load`: a ready encoder from any source; `image_size` in pixels resamples the position embedding."""
    from siglip.encoder import load as load_encoder

    return load_encoder(src, image_size=image_size)
