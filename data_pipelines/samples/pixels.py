"""The image of a sample, resized to the model's size: cropped, coloured and mirrored at random for training."""

import math
from collections.abc import Callable
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

    def make(self, pair: SamplePair, rng: Rng | None) -> dict[str, np.ndarray]:
        return self.pack(self.draw(pair.pixels, rng))

    def draw(self, pixels: np.ndarray, rng: Rng | None = None) -> np.ndarray:
        """uint8 [h, w, 3] of a decoded image as the model is to see it. rng: None without augmentation."""
        options = {"resample": self.resample, "exact": self.exact}
        if self.augment is None:
            return image_ops.resize_and_crop(pixels, self.size_px, self.protocol, **options)
        return draw_image(pixels, self.augment, lambda _: self.size_px, rng, **options)

    def pack(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """What `draw` gave, as the arrays of a sample."""
        return {"image": image}


def draw_image(
    pixels: np.ndarray,
    config: AugmentConfig | None,
    size_of: Callable[[tuple[float, float]], tuple[int, int]],
    rng: Rng | None,
    *,
    resample: image_ops.Resample,
    exact: bool,
) -> np.ndarray:
    """An image, or a random cut-out of it, resized, and then coloured and mirrored at random. -> uint8 [h, w, 3]

    Args:
      config: None for the whole image as it is.
      size_of: (h, w) of what is cut out -> (h, w) of the result.
    """
    options = {"resample": resample, "exact": exact}
    if config is None:
        return image_ops.resize(pixels, size_of(pixels.shape[:2]), **options)
    box = left, top, right, bottom = draw_box(config, pixels.shape[1::-1], rng)
    image = image_ops.resize(pixels, size_of((bottom - top, right - left)), box=box, **options)
    gain, flip = draw_gain(config, rng), draw_flip(config, rng)
    return apply_flip(apply_gain(image, gain), flip)
