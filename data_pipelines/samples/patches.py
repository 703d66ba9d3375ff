"""The image of a sample as patches that keep its aspect ratio, see `data_pipelines/patch_ops.py`: what a NaFlex tower takes."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipelines import image_ops
from data_pipelines.augment import AugmentConfig
from data_pipelines.counter_rng import Rng
from data_pipelines.errors import UserError
from data_pipelines.order.lengths import Lengths
from data_pipelines.patch_ops import cut_patches, fit_size
from data_pipelines.samples.pairs import SamplePair
from data_pipelines.samples.pixels import draw_image


@dataclass(frozen=True)
class Patches:
    """patches: uint8 [n, p], zeros after the last; grid: int32 [2], patches down and across.

    Attributes:
      patch_px: (h, w) of a patch.
      length: n, the most patches of an image.
      size_px: (h, w) that all images are resized to whatever their aspect ratio; None keeps it.
      augment, resample, exact: as for `Pixels`; what is drawn does not depend on the length.
      lengths: of each step; None for `length` in all. `square_px` is the `size_px` of steps before they start.
    """

    patch_px: tuple[int, int]
    length: int
    size_px: tuple[int, int] | None = None
    augment: AugmentConfig | None = None
    resample: image_ops.Resample = "bilinear"
    exact: bool = False
    lengths: Lengths | None = None
    square_px: tuple[int, int] | None = None
    reads_pixels = True

    @cached_property
    def arrays(self) -> dict:
        p = math.prod(self.patch_px) * 3
        return {"patches": ((max(self.all_lengths), p), np.uint8), "grid": ((2,), np.int32)}

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """Every n that a batch may have, the longest last."""
        if self.lengths is None:
            return (self.length,)
        square = {self._square_length} if self.lengths.start > 0 else set()
        return tuple(sorted({*self.lengths.patches} | square))

    @property
    def _square_length(self) -> int:
        return math.prod(side // patch for side, patch in zip(self.square_px, self.patch_px, strict=True))

    def at(self, step: int) -> "Patches":
        """The same at the length of a step, counted from 0."""
        if self.lengths is None:
            return self
        length, fixed = self.lengths.at(step), {"lengths": None}
        if length is None:
            return dataclasses.replace(self, length=self._square_length, size_px=self.square_px, **fixed)
        return dataclasses.replace(self, length=length, **fixed)

    def make(self, pair: SamplePair, rng: Rng | None) -> dict[str, np.ndarray]:
        return self.pack(self.draw(pair.pixels, rng))

    def size_of(self, size_px: tuple[float, float]) -> tuple[int, int]:
        """(h, w) of an image, or of what is cut out of one -> (h, w) of what is cut into patches."""
        return self.size_px or fit_size(size_px, self.patch_px, self.length)

    def draw(self, pixels: np.ndarray, rng: Rng | None = None) -> np.ndarray:
        """As `Pixels.draw`; the sides are whole patches."""
        return draw_image(pixels, self.augment, self.size_of, rng, resample=self.resample, exact=self.exact)

    def pack(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """As `Pixels.pack`."""
        patches, grid = cut_patches(image, self.patch_px, self.length)
        return {"patches": patches, "grid": grid}


def check_settings(config: Any, patches: Patches | None) -> None:
    """Raises UserError for settings of a `loader.DataConfig` that do not go with `patches`."""
    if patches is None:
        if config.lengths is not None:
            raise UserError("data.lengths is for NaFlex models; set model.image.naflex, or leave data.lengths out")
        return
    noisy = config.noise is not None and config.noise.image > 0
    wrong = {"jpeg_scaling": config.jpeg_scaling, "noise.image": noisy, "image_embeddings": config.image_embeddings}
    for name, value in wrong.items():
        if value:
            raise UserError(f"data.{name} needs images of one size; leave it out, or train without model.image.naflex")
