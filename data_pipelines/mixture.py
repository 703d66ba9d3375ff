"""Which pair comes at which place of the endless training stream, by arithmetic alone.

    position -> source        shares of the weights, exact to a pair over any window
    j-th pair of a source     epoch = j // n, record = permutation[seed, source, epoch](j % n)

The permutation is a Feistel network over a grid of about sqrt(n) x sqrt(n), walked until it falls below n
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): no table, so a billion pairs are shuffled
globally in no memory and any place is reached at once. It works on arrays of positions, at about 1 us a pair;
Grain's shuffle and mix do the same for one element at a time, at 50 us each (measured), a third of all the
time that a small picture takes.

The trap: the shares are rounded to 2**-20, so a source with less than a millionth of the weight is an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines import text_ops
from data_pipelines.draws import hash_ints, mix_array

_SHARES = 1 << 20
_ROUNDS = 4
_NEXT_ROUND = np.uint64(0xD1342543DE82EF95)
_SHUFFLE_STREAM = 1


@dataclass(frozen=True)
class SourceConfig:
    """One set of shards in the mixture.

    Attributes:
      shards: path of tar shards; `*`, `{00000..00009}` and `{a,b}` expand.
      weight: its share of the stream, relative to the other sources.
      captions: which texts to train on, (field, probability) each; `data_pipelines/text_ops.py` lists the
        fields.
    """

    shards: str
    weight: float = 1.0
    captions: tuple[tuple[str, float], ...] = (("txt", 1.0),)

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} of shards {self.shards!r} must be positive; leave the source out")
        text_ops.check_spec(self.captions)


@dataclass(frozen=True)
class Mixture:
    """The order of the stream. sizes: pairs in each source; weights: as in `SourceConfig`."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self):
        assert len(self.sizes) == len(self.weights) and min(self.sizes) > 0
        if min(self._shares()) == 0:
            raise ValueError(f"weights={self.weights}: the smallest is under a millionth of all; leave that source out")

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source and the record in it at each position. positions: int64 [n] -> int64 [n], int64 [n]."""
        sources, nth = _interleave(positions, self._shares())
        records = np.empty_like(nth)
        for source, size in enumerate(self.sizes):
            here = sources == source
            if not here.any():
                continue
            epochs, places = np.divmod(nth[here], size)
            keys = mix_array(np.uint64(hash_ints(self.seed, _SHUFFLE_STREAM, source)) + epochs.astype(np.uint64))
            records[here] = permute(places, size, keys)
        return sources, records

    def _shares(self) -> list[int]:
        total = sum(self.weights)
        return [round(weight / total * _SHARES) for weight in self.weights]


def _interleave(positions: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Splits the stream by shares: the source at each position, and how many of that source came before.

    The first source takes ceil(k * share / all) of the first k positions; the others split the rest alike.
    """
    sources = np.zeros_like(positions)
    nth = np.zeros_like(positions)
    unsettled = np.ones(positions.shape, bool)
    before, after, remaining = positions, positions + 1, sum(shares)
    for source, share in enumerate(shares):
        left_before = before * (remaining - share) // remaining
        left_after = after * (remaining - share) // remaining
        mine = unsettled & (left_before == left_after)
        sources[mine] = source
        nth[mine] = (before - left_before)[mine]
        unsettled &= ~mine
        before, after, remaining = left_before, left_after, remaining - share
    return sources, nth


def permute(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 … size - 1 for each key. places: int64 [n]; keys: uint64 [n] -> int64 [n]."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    mapped = _feistel(places.astype(np.uint64), keys, np.uint64(rows), np.uint64(columns))
    while (outside := mapped >= size).any():
        mapped[outside] = _feistel(mapped[outside], keys[outside], np.uint64(rows), np.uint64(columns))
    return mapped.astype(np.int64)


def _feistel(x: np.ndarray, keys: np.ndarray, rows: np.uint64, columns: np.uint64) -> np.ndarray:
    """A permutation of 0 … rows * columns - 1: row and column are shifted by hashes of each other."""
    row, column = np.divmod(x, columns)
    for _ in range(_ROUNDS):
        column = (column + mix_array(keys + row)) % columns
        row = (row + mix_array(~keys + column)) % rows
        keys = keys + _NEXT_ROUND
    return row * columns + column
