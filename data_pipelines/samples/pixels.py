"""The image of a sample, resized to the model's size: cropped, coloured and mirrored at random for training."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipelines import image_ops
from data_pipelines.augment import AugmentConfig, apply_flip, apply_gain, draw_box, draw_flip, draw_gain
from data_pipelines.counter_rng import Rng
from data_pipelines.samples.pairs import SamplePair


@dataclass(frozen=True)
class Pixels:
    """image: uint8 [h, w, 3].

    Attributes:
      size_px: (h, w).
      augment: None for none.
      resample: the filter of every resize.
      protocol: without augmentation, see `image_ops.resize_and_crop`.
      exact: see `image_ops.resize`.
    """

    size_px: tuple[int, int]
    augment: AugmentConfig | None = None
    resample: image_ops.Resample = "bilinear"
    protocol: image_ops.Protocol = "squash"
    exact: bool = False
    reads_pixels = True

    @cached_property
    def arrays(self) -> dict:
        return {"image": ((*self.size_px, 3), np.uint8)}

    @property
    def min_decoded_px(self) -> tuple[int, int]:
        """(h, w) of a decoded image of which no cut-out has to be magnified."""
        if self.augment is None:
            return self.size_px
        smallest = self.augment.scale[0] * math.exp(-self.augment.aspect / 2)
        return math.ceil(self.size_px[0] / smallest), math.ceil(self.size_px[1] / smallest)

    def make(self, pair: SamplePair, rng: Rng) -> dict[str, np.ndarray]:
        config = self.augment
        if config is None:
            options = {"resample": self.resample, "exact": self.exact}
            return {"image": image_ops.resize_and_crop(pair.pixels, self.size_px, self.protocol, **options)}
        box = draw_box(config, pair.pixels.shape[1::-1], rng)
        image = image_ops.resize(pair.pixels, self.size_px, box=box, resample=self.resample, exact=self.exact)
        gain, flip = draw_gain(config, rng), draw_flip(config, rng)
        return {"image": apply_flip(apply_gain(image, gain), flip)}
