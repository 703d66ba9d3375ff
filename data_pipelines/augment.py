"""Random crops, flips and colour gains for training.

    side = scale * exp(+-aspect / 2) of the image's side, centre = middle + shift * image's side
    pixel = clip(pixel * exp(brightness) * exp(color[channel]), 0, 255)

The crop costs nothing: `image_ops.resize` reads the box instead of the whole image.
"""

import math
from dataclasses import dataclass

import numpy as np

from data_pipelines.counter_rng import Rng
from data_pipelines.errors import UserError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AugmentConfig:
    """How far training images are varied; the defaults vary nothing.

    Attributes:
      scale: smallest and largest side of the cut-out, relative to the image's (log-uniform); above 1 has a white frame.
      aspect: the cut-out's aspect ratio is stretched by up to exp(+-aspect).
      shift: the cut-out's middle moves by up to this fraction of the image's side, each way; white comes in.
      brightness: all channels are multiplied by up to exp(+-brightness).
      color: each channel is multiplied by up to exp(+-color).
      flip: probability of a mirror image, left and right exchanged; it changes letters, flags and arrows.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    aspect: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    color: float = 0.0
    flip: float = 0.0

    def __post_init__(self):
        low, high = self.scale
        if not 0.05 <= low <= high <= 4:
            raise UserError(f"augment.scale={self.scale} must be (smallest, largest) within 0.05 and 4")
        for name in ("aspect", "shift", "brightness", "color"):
            if not 0 <= getattr(self, name) <= 2:
                raise UserError(f"augment.{name}={getattr(self, name)} must lie within 0 and 2")
        if not 0 <= self.flip <= 1:
            raise UserError(f"augment.flip={self.flip} is a probability, within 0 and 1")


def draw_box(config: AugmentConfig, image_size: tuple[int, int], rng: Rng) -> Box:
    """(left, top, right, bottom) of the cut-out in pixels; it may reach outside the image.

    image_size: (width, height), as Pillow has it.
    """
    width, height = image_size
    low, high = math.log(config.scale[0]), math.log(config.scale[1])
    scale = low + (high - low) * rng.random()
    stretch = _symmetric(config.aspect, rng) / 2
    half_w, half_h = 0.5 * width * math.exp(scale + stretch), 0.5 * height * math.exp(scale - stretch)
    x = width * (0.5 + _symmetric(config.shift, rng))
    y = height * (0.5 + _symmetric(config.shift, rng))
    return x - half_w, y - half_h, x + half_w, y + half_h


def draw_gain(config: AugmentConfig, rng: Rng) -> tuple[float, float, float]:
    """The factors of red, green and blue."""
    brightness = _symmetric(config.brightness, rng)
    red, green, blue = (math.exp(brightness + _symmetric(config.color, rng)) for _ in range(3))
    return red, green, blue


def draw_flip(config: AugmentConfig, rng: Rng) -> bool:
    """Whether to show the mirror image."""
    return config.flip > 0 and rng.random() < config.flip


def apply_flip(image: np.ndarray, flip: bool) -> np.ndarray:
    """The image, or its mirror image. uint8 [h, w, 3] -> uint8 [h, w, 3]"""
    return image[:, ::-1] if flip else image


def apply_gain(image: np.ndarray, gain: tuple[float, float, float]) -> np.ndarray:
    """Multiplies red, green and blue, and clips. uint8 [h, w, 3] -> uint8 [h, w, 3]"""
    if gain == (1.0, 1.0, 1.0):
        return image
    h, w, channels = image.shape
    gains = np.empty((w, channels), np.float32)
    gains[:] = gain
    bright = image.reshape(h, w * channels) * gains.reshape(-1)  # long rows: numpy is slow over an axis of three
    bright += np.float32(0.5)
    shown = np.empty_like(image)
    np.minimum(bright, 255, out=shown.reshape(bright.shape), casting="unsafe")
    return shown


def _symmetric(limit: float, rng: Rng) -> float:
    return limit * (2 * rng.random() - 1)
