"""The embedding that a frozen image tower made of a sample's image, read from disk: no image is decoded.

The stream has the same pairs, captions and substitutes as with images, since an image that is broken is known to be.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipelines.counter_rng import Rng
from data_pipelines.image_embeddings import ImageEmbeddings
from data_pipelines.samples.pairs import BrokenPair, SamplePair


@dataclass(frozen=True)
class StoredEmbedding:
    """zimg: float32 [e]. embeddings: whole, one per source."""

    embeddings: tuple[ImageEmbeddings, ...]
    reads_pixels = False

    @cached_property
    def arrays(self) -> dict:
        return {"zimg": ((self.embeddings[0].width,), np.float32)}

    def make(self, pair: SamplePair, rng: Rng) -> dict[str, np.ndarray]:
        """Raises BrokenPair with the reason why the image has no embedding."""
        del rng
        zimg = self.embeddings[pair.source].get(pair.record)
        if isinstance(zimg, str):
            raise BrokenPair(zimg)
        return {"zimg": zimg}
