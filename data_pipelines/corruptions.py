"""Images made worse on the fly, by ImageNet-C's recipes and severities (Hendrycks and Dietterich, arXiv:1903.12261).

Those of the 19 that numpy and Pillow can make. As there, they apply to uint8 at the size that the model sees; the severities are
meant for 224 pixels, so that a blur of some radius is worse on a smaller image.
"""

import hashlib
import io
from typing import Literal, get_args

import numpy as np
from PIL import Image

Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "gaussian_blur", "zoom_blur",
    "brightness", "contrast", "jpeg_compression", "pixelate",
]  # fmt: skip
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3, 4, 5)

_STRENGTH: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
    "defocus_blur": (3, 4, 6, 8, 10),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "jpeg_compression": (25, 18, 15, 10, 7),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "zoom_blur": (1, 2, 3, 4, 5),  # rows of _ZOOMS
}
# The end of the factors from 1, and their step.
_ZOOMS = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))


def corrupt(image: np.ndarray, name: Corruption, severity: int, *, key: str) -> np.ndarray:
    """uint8 [h, w, 3] -> the same shape; the noise is drawn from the key, so that it is the same in every run."""
    strength = _STRENGTH[name][severity - 1]
    if name in ("jpeg_compression", "pixelate"):
        return _by_pillow(image, name, strength)
    seed = hashlib.blake2b(f"{name} {severity} {key}".encode(), digest_size=8).digest()
    x = _changed(image / 255, name, strength, np.random.default_rng(int.from_bytes(seed, "little")))
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)  # cut off, not rounded, as theirs


def _changed(x: np.ndarray, name: str, strength: float, rng: np.random.Generator) -> np.ndarray:
    """float64 [h, w, 3] in [0, 1]; not yet clipped."""
    if name == "gaussian_noise":
        return x + rng.normal(0, strength, x.shape)
    if name == "speckle_noise":
        return x + x * rng.normal(0, strength, x.shape)
    if name == "shot_noise":
        return rng.poisson(x * strength) / strength
    if name == "impulse_noise":
        draws = rng.random(x.shape)
        return np.where(draws < strength, np.round(draws / strength), x)  # half of them black, half white
    if name == "brightness":
        value = x.max(axis=2, keepdims=True)
        brighter = np.minimum(value + strength, 1)
        return np.where(
            value > 0, x * brighter / np.where(value > 0, value, 1), brighter
        )  # the same hue and saturation
    if name == "contrast":
        mean = x.mean(axis=(0, 1), keepdims=True)
        return (x - mean) * strength + mean
    if name == "gaussian_blur":
        kernel = _gaussian(strength, int(4 * strength + 0.5))
        return _filter(_filter(x, kernel[:, None], "edge"), kernel[None], "edge")
    if name == "zoom_blur":
        factors = np.arange(1, *_ZOOMS[int(strength) - 1])
        return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)
    return _filter(x, _disk(int(strength)), "reflect")


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of an image, as large as the image: linear between pixels, with the corner pixels at the corners."""
    for axis in (0, 1):
        side = x.shape[axis]
        inner = int(np.ceil(side / factor))
        outer = round(inner * factor)
        place = np.linspace(0, inner - 1, outer)[(outer - side) // 2 :][:side]
        below, above = ((side - inner) // 2 + rounded(place).astype(int) for rounded in (np.floor, np.ceil))
        share = (place % 1).reshape(-1, *[1] * (2 - axis))
        x = x.take(below, axis) * (1 - share) + x.take(above, axis) * share
    return x


def _gaussian(sigma: float, radius: int) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def _disk(radius: int) -> np.ndarray:
    """A disk with a soft edge, as theirs: small ones lie in 17 x 17 pixels."""
    reach = max(8, radius)
    down, across = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (down**2 + across**2 <= radius**2).astype(float)
    edge = _gaussian(0.1 if radius == 3 else 0.5, 1 if radius <= 8 else 2)
    return _filter(_filter((disk / disk.sum())[..., None], edge[:, None], "reflect"), edge[None], "reflect")[..., 0]


def _filter(x: np.ndarray, kernel: np.ndarray, border: Literal["edge", "reflect"]) -> np.ndarray:
    """[h, w, c] filtered with a symmetric kernel of odd sides."""
    (height, width), (down, across) = x.shape[:2], kernel.shape
    padded = np.pad(x, [(down // 2,) * 2, (across // 2,) * 2, (0, 0)], mode=border)
    out = np.zeros_like(x)
    for i, j in np.argwhere(kernel):
        out += kernel[i, j] * padded[i : i + height, j : j + width]
    return out


def _by_pillow(image: np.ndarray, name: str, strength: float) -> np.ndarray:
    pillow = Image.fromarray(image)
    if name == "jpeg_compression":
        file = io.BytesIO()
        pillow.save(file, "JPEG", quality=int(strength))
        return np.asarray(Image.open(file))
    small = tuple(max(1, int(side * strength)) for side in pillow.size)
    return np.asarray(pillow.resize(small, Image.Resampling.BOX).resize(pillow.size, Image.Resampling.BOX))
