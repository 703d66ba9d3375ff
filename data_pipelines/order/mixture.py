"""Which pair comes at which place of the endless training stream, by arithmetic alone.

    position -> source        in proportion to the weights; in any window the counts are off by at most the number of sources
    j-th pair of a source     epoch = j // n, record = order[seed, source, epoch](j % n), see permutation.py

Weights may change on the way: each source then goes on from its own count, so no pair of an epoch is lost or seen twice.
What has to be remembered is one position and one count a source, however often they change.

The trap: the shares are rounded to 2**-20, so a source with less than a millionth of the weight is an error.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipelines import text_ops
from data_pipelines.counter_rng import hash_ints, mix_array
from data_pipelines.errors import UserError
from data_pipelines.order import permutation

_SHARES = 1 << 20
_SHUFFLE_STREAM = 1


@dataclass(frozen=True)
class SourceConfig:
    """One set of shards in the mixture.

    Attributes:
      shards: path of tar shards; `*`, `{00000..00009}` and `{a,b}` expand.
      weight: its share of the stream, relative to the other sources.
      captions: which texts to train on, (field, probability) each; `data_pipelines/text_ops.py` lists the
        fields.
      manifest: a manifest.parquet of `siglip data curate`; only pairs that it keeps are streamed.
      image: the column or feature that holds the image, in formats that have such; None finds it.
    """

    shards: str
    weight: float = 1.0
    captions: tuple[tuple[str, float], ...] = (("txt", 1.0),)
    manifest: str | None = None
    image: str | None = None

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight={self.weight} of shards {self.shards!r} must be positive; leave the source out")
        text_ops.check_spec(self.captions)


class BlockPlace(NamedTuple):
    """A pair of the stream, and the block of neighbours that it is read with.

    Attributes:
      source, record: which pair.
      first, end: the records of its block, first … end - 1.
      until: the block is read no more once its source has given so many pairs.
      reader: which worker reads the block.
      count: pairs of the source that come before this one.
    """

    source: int
    record: int
    first: int
    end: int
    until: int
    reader: int
    count: int


@dataclass(frozen=True)
class Mixture:
    """The order of the stream.

    Attributes:
      sizes: pairs in each source.
      weights: as in `SourceConfig`.
      seed: of all permutations.
      blocks: how a source is shuffled; None moves every pair anywhere.
      since: the position from which on these weights hold.
      counts: pairs of each source before `since`; () for none.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    blocks: permutation.BlockShuffle | None = None
    since: int = 0
    counts: tuple[int, ...] = ()

    def __post_init__(self):
        assert len(self.sizes) == len(self.weights) and min(self.sizes) > 0
        assert len(self.counts) in (0, len(self.sizes))
        if min(self._shares()) == 0:
            raise UserError(f"weights={self.weights}: the smallest is under a millionth of all; leave that source out")

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source and the record in it at each position, from `since` on. positions: int64 [n] -> int64 [n], int64 [n]."""
        sources, nth = self._counts(positions)
        records = np.empty_like(nth)
        for source, size in enumerate(self.sizes):
            here = sources == source
            if here.any():
                places, keys = self._places(source, nth[here])
                records[here] = permutation.shuffle(places, size, keys, blocks=self.blocks)
        return sources, records

    def locate_blocks(self, positions: np.ndarray, *, readers: int = 1) -> list["BlockPlace"]:
        """The same, with the blocks that the records are read in. Only for a shuffle by blocks.

        readers: among how many the blocks are dealt out, equal shares each; where these are not many enough, they are cut.
        """
        sources, nth = self._counts(positions)
        columns = np.empty((len(positions), 5), np.int64)
        cuts = readers // math.gcd(readers, self.blocks.open_blocks)
        stretch = self.blocks.block_pairs * self.blocks.open_blocks
        for source, size in enumerate(self.sizes):
            here = sources == source
            if not here.any():
                continue
            places, keys = self._places(source, nth[here])
            records = permutation.shuffle(places, size, keys, blocks=self.blocks)
            first, end, number = permutation.block_bounds(places, size, keys, blocks=self.blocks, cuts=cuts)
            over = np.minimum((places // stretch + 1) * stretch, size) - places + nth[here]
            columns[here] = np.stack([records, first, end, over, number % readers], axis=1)
        return [BlockPlace(*row) for row in zip(sources.tolist(), *columns.T.tolist(), nth.tolist(), strict=True)]

    def _counts(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each position, and how many of its pairs came before."""
        sources, nth = _interleave(positions - self.since, self._shares())
        return sources, nth + np.asarray(self.counts, np.int64)[sources] if self.counts else nth

    def _places(self, source: int, nth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place in its epoch of each pair of a source, and the key of the epoch."""
        epochs, places = np.divmod(nth, self.sizes[source])
        return places, mix_array(np.uint64(hash_ints(self.seed, _SHUFFLE_STREAM, source)) + epochs.astype(np.uint64))

    def counts_before(self, position: int) -> tuple[int, ...]:
        """Pairs of each source in the stream before a position, from `since` on."""
        shares, left, counts = self._shares(), position - self.since, []
        remaining = sum(shares)
        for source, share in enumerate(shares):
            rest = left * (remaining - share) // remaining
            counts.append(left - rest + (self.counts[source] if self.counts else 0))
            left, remaining = rest, remaining - share
        return tuple(counts)

    def reweighted(self, weights: Sequence[float], *, position: int) -> "Mixture":
        """The same stream up to a position; from there on with other weights, every source where it is."""
        counts = self.counts_before(position)
        return dataclasses.replace(self, weights=tuple(weights), since=position, counts=counts)

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
