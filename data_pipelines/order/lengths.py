"""How many patches the images of a step have: a function of (seed, step, where they start), the same in every process.

    N_s = one of `patches`, drawn with `weights`;  before `start` of the run: images of one size

The pairs of a step do not depend on it.
"""

import itertools
import math
from dataclasses import dataclass

from data_pipelines.counter_rng import Draws
from data_pipelines.errors import UserError

_LENGTH_STREAM = 21


@dataclass(frozen=True)
class LengthConfig:
    """The lengths that a NaFlex run trains at; the defaults are SigLIP 2's.

    Attributes:
      patches: the most patches of an image, one number per step.
      weights: how often each comes, relative to the others; () for equally often.
      start: the fraction of the run from which on images keep their aspect ratio; before, all have the size
        model.image.image_size. Like the learning rate it goes by the run's whole length: a resume with more total_steps moves it.
    """

    patches: tuple[int, ...] = (128, 256, 576, 784, 1024)
    weights: tuple[float, ...] = ()
    start: float = 0.0

    def __post_init__(self):
        if not self.patches or min(self.patches) < 1 or len(set(self.patches)) < len(self.patches):
            raise UserError(f"data.lengths.patches={self.patches} must be different numbers, each at least 1")
        positive = all(weight > 0 for weight in self.weights) and math.isfinite(sum(self.weights))
        if self.weights and (len(self.weights) != len(self.patches) or not positive):
            raise UserError(f"data.lengths.weights={self.weights} must be {len(self.patches)} positive numbers, or ()")
        if not 0 <= self.start < 1:
            raise UserError(f"data.lengths.start={self.start} is a fraction of the run; use 0 <= start < 1")

    def start_step(self, total_steps: int) -> int:
        """How many steps of a run come before `start`."""
        return round(self.start * total_steps)


@dataclass(frozen=True)
class Lengths:
    """`LengthConfig` of one run. start: the first step whose images keep their aspect ratio."""

    patches: tuple[int, ...]
    weights: tuple[float, ...]
    start: int
    seed: int

    @classmethod
    def of(cls, config: LengthConfig, *, total_steps: int, seed: int) -> "Lengths":
        weights = config.weights or (1.0,) * len(config.patches)
        return cls(config.patches, weights, config.start_step(total_steps), seed)

    def at(self, step: int) -> int | None:
        """The length of a step, counted from 0; None before `start`."""
        if step < self.start:
            return None
        bounds = list(itertools.accumulate(self.weights))
        at = Draws(self.seed, _LENGTH_STREAM, step).random() * bounds[-1]
        return next(n for n, bound in zip(self.patches, bounds, strict=True) if at < bound)
