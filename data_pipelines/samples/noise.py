"""Label noise on purpose: how much a loss suffers from pairs that are wrong (SigLIP, arXiv 2303.15343, section 4.10).

    image       with probability p the image is uniform random pixels
    text        with probability p the caption is a random token sequence of random length
    alignment   a share p of the global batch: its texts go round among its images, none keeps its own

Whether and how a pair is corrupted is a function of (seed, position), so it is the same for any number of processes and
after a resume, and a larger p corrupts the same pairs and more.

The trap: a text that moves comes from another position of the global batch, which may be another process's.
"""

import functools
from dataclasses import dataclass

import numpy as np

from data_pipelines.counter_rng import hash_ints, mix_array
from data_pipelines.errors import UserError

_IMAGE_STREAM, _TEXT_STREAM, _ALIGNMENT_STREAM = 11, 12, 13


@dataclass(frozen=True)
class NoiseConfig:
    """Which share of pairs is corrupted, from 0 to 1; see the module for how."""

    image: float = 0.0
    text: float = 0.0
    alignment: float = 0.0

    def __post_init__(self):
        for name in ("image", "text", "alignment"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.noise.{name}={getattr(self, name)} is a share, within 0 and 1")


def noisy_images(config: NoiseConfig, positions: np.ndarray, *, seed: int) -> np.ndarray:
    """Which positions have an image of noise. positions: int64 [n] -> bool [n]."""
    return _uniform(positions, seed, _IMAGE_STREAM) < config.image


def noisy_texts(config: NoiseConfig, positions: np.ndarray, *, seed: int) -> np.ndarray:
    """Which positions have a caption of noise. positions: int64 [n] -> bool [n]."""
    return _uniform(positions, seed, _TEXT_STREAM) < config.text


@functools.lru_cache(4)
def text_positions(config: NoiseConfig, batch: range, *, seed: int) -> np.ndarray:
    """The position whose caption each position of a global batch shows. batch: its n positions -> int64 [n]."""
    positions = np.arange(batch.start, batch.stop)
    drawn = _uniform(positions, seed, _ALIGNMENT_STREAM)
    moved = np.flatnonzero(drawn < config.alignment)
    # In the order of their draws, which is random, everyone takes the next one's: a round without a fixed point.
    ring = moved[np.argsort(drawn[moved], kind="stable")]
    shown = positions.copy()
    shown[ring] = positions[np.roll(ring, -1)]
    return shown


def random_image(position: int, size_px: tuple[int, int], *, seed: int) -> np.ndarray:
    """uint8 [h, w, 3]."""
    return _generator(position, seed, _IMAGE_STREAM).integers(0, 256, (*size_px, 3), np.uint8)


def random_ids(position: int, length: int, *, vocab_size: int, seed: int) -> np.ndarray:
    """1 to length - 1 random ids. -> int64 [n]"""
    generator = _generator(position, seed, _TEXT_STREAM)
    kept = int(generator.integers(1, max(2, length)))
    return generator.integers(0, vocab_size, min(kept, length - 1))


def _uniform(positions: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """A draw from [0, 1) for each position. int64 [n] -> float64 [n]."""
    mixed = mix_array(mix_array(positions.astype(np.uint64)) ^ np.uint64(hash_ints(seed, stream)))
    return (mixed >> np.uint64(11)) * 2.0**-53


def _generator(position: int, seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=hash_ints(seed, stream, position)))
