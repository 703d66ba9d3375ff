"""The segmentation mask of a sample: a class number for each pixel, an image file in a field of the pair."""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from data_pipelines.counter_rng import Rng
from data_pipelines.patch_ops import cut_patches
from data_pipelines.samples.pairs import BrokenPair, SamplePair
from data_pipelines.samples.patches import Patches
from data_pipelines.samples.pixels import Pixels
from data_pipelines.text_ops import lookup


@dataclass(frozen=True)
class Mask:
    """mask: uint8 [h, w], resized without mixing classes. With `Patches` [n, p_h p_w], cut as its image is.

    Attributes:
      pixels: how its image becomes the one that the model sees.
      field: holds a PNG with one channel.
    """

    pixels: Pixels | Patches
    field: str

    @property
    def reads_pixels(self) -> bool:
        """The grid of patches is that of the decoded image."""
        return isinstance(self.pixels, Patches)

    @cached_property
    def arrays(self) -> dict:
        if isinstance(self.pixels, Patches):
            return {"mask": ((self.pixels.length, math.prod(self.pixels.patch_px)), np.uint8)}
        return {"mask": (self.pixels.size_px, np.uint8)}

    def make(self, pair: SamplePair, rng: Rng | None) -> dict[str, np.ndarray]:
        data = pair.fields.get(self.field)
        data = (
            data.get("bytes")
            if isinstance(data, Mapping)
            else lookup(pair.fields, self.field)
            if data is None
            else data
        )
        if not isinstance(data, bytes):
            raise BrokenPair("missing_mask")
        try:
            mask = Image.open(io.BytesIO(data))
            if mask.mode not in ("L", "P", "1"):  # a colour is not a class; of 16 bits, classes above 255
                raise BrokenPair("mask_of_several_channels")
            cut = isinstance(self.pixels, Patches)
            size_px = self.pixels.size_of(pair.pixels.shape[:2]) if cut else self.pixels.size_px
            resized = np.asarray(mask.resize(size_px[::-1], Image.Resampling.NEAREST)).astype(np.uint8)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, BrokenPair):
                raise
            raise BrokenPair("corrupt_mask") from error
        return {
            "mask": cut_patches(resized[..., None], self.pixels.patch_px, self.pixels.length)[0] if cut else resized
        }
