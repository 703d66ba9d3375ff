"""What float32 may move a result by: the tolerances of tests that compare float32 with something.

One operation is off by at most UNIT of its result. A sum of n terms is off by at most n UNIT of the sum of their absolute
values, in whatever order a processor adds them (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and so
is a chain of n operations on numbers of one size. Where roundings do not depend on each other they grow with the root of n
(Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019). Vectors of any width and fused multiply-adds
stay within both; a number measured on one processor need not hold on the next.
"""

import math

import numpy as np

from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig

UNIT = 2.0**-24


def rounding(operations: int, magnitude=1.0):
    """What a chain of float32 operations, or a sum of as many terms, may be off by. Two float32 results: twice that."""
    return operations * UNIT * magnitude


def likely_rounding(operations: int, magnitude=1.0):
    """The same for roundings that are independent, as those of a tower are: more than this once in ten million times."""
    return 6 * math.sqrt(operations) * UNIT * magnitude


def towers_apart(config: ModelConfig, expected=1.0, *, passes: int = 1) -> float:
    """What two float32 results of a model's towers may differ by, the largest of whose entries is that of `expected`.

    passes: 1 of an output, 2 of a gradient.
    """
    chain = max(_chain(tower) for tower in (config.image, config.text) if tower)
    return 2 * likely_rounding(passes * chain, np.max(np.abs(expected)))


def _chain(tower: ImageConfig | TextConfig) -> int:
    """The longest chain of float32 operations through a tower."""
    spec, image = tower.spec, isinstance(tower, ImageConfig)
    stem, tokens = (3 * math.prod(tower.patch), math.prod(tower.grid) + 1) if image else (1, tower.length)
    # A block's sums over `width`: two in each of two LayerNorms, query, logits, out, MLP; over tokens: softmax, values.
    block = 8 * spec.width + spec.mlp_dim + 2 * tokens
    return stem + (spec.depth + 1) * block  # + 1: pooling, head and norm
