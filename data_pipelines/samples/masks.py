"""The segmentation mask of a sample: a class number for each pixel, an image file in a field of the pair."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from data_pipelines.counter_rng import Rng
from data_pipelines.samples.pairs import BrokenPair, SamplePair
from data_pipelines.text_ops import lookup


@dataclass(frozen=True)
class Mask:
    """mask: uint8 [h, w]. size_px: (h, w), to which it is resized without mixing classes; field: holds a PNG with one channel."""

    size_px: tuple[int, int]
    field: str
    reads_pixels = False

    @cached_property
    def arrays(self) -> dict:
        return {"mask": (self.size_px, np.uint8)}

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
            resized = mask.resize(self.size_px[::-1], Image.Resampling.NEAREST)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, BrokenPair):
                raise
            raise BrokenPair("corrupt_mask") from error
        return {"mask": np.asarray(resized).astype(np.uint8)}
