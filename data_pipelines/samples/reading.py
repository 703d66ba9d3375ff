"""From a batch number to the pairs that this process reads for that batch, one by one or neighbours together.

    everywhere      process p of P has the positions k B + p, k B + p + P, … of batch k
    block by block  it has those whose pairs lie together in storage; each of its workers reads blocks that no other does

Whatever the number of processes, workers and threads, batch k has the same pairs.
"""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.order.mixture import Mixture, SourceConfig
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.records import Pair, Source
from data_pipelines.samples.pairs import read_pair
from data_pipelines.sources.blocks import Block, BlockCache

_PLANNED_BATCHES = 4


class Place(NamedTuple):
    """A row of a local batch: its position in the stream, its record of a source, and the block that is read with it, if any."""

    row: int
    position: int
    source: int
    record: int
    block: Block | None = None


@dataclass(frozen=True)
class Reader:
    """Reads the pairs of one process, from batch `start` on.

    Attributes:
      sources: what to read.
      mixture: the order.
      batch_pairs: pairs in a global batch.
      process_index, process_count: which slice of each batch.
      start: the batch that is number 0 here.
      block_caches: one per source where these are shuffled by blocks.
    """

    sources: tuple[Source, ...]
    mixture: Mixture
    batch_pairs: int
    process_index: int
    process_count: int
    start: int
    block_caches: tuple[BlockCache, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "_lock", threading.Lock())
        object.__setattr__(self, "_planned", lru_cache(_PLANNED_BATCHES)(self._plan))

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def rows(self) -> int:
        """Pairs in a local batch."""
        return self.batch_pairs // self.process_count

    def places(self, batch: int, part: int, parts: int) -> Sequence[Place]:
        """The places of one of `parts` shares of a local batch; has their blocks read ahead."""
        with self._lock:  # Threads that fill one batch plan it once.
            return self._planned(batch, part, parts)

    def locate(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """The source and the record at some positions of the stream. positions: int64 [n]."""
        return list(zip(*map(np.ndarray.tolist, self.mixture.locate(positions)), strict=True))

    def read(self, place: Place) -> Pair:
        """Raises BrokenPair("unreadable") when storage fails for this pair."""
        kept = None if place.block is None else self.block_caches[place.source]
        return read_pair(self.sources[place.source], place.record, block=place.block, kept=kept)

    def close(self) -> None:
        """Forgets what was read of blocks."""
        for cache in self.block_caches:
            cache.clear()

    def _plan(self, batch: int, part: int, parts: int) -> list[Place]:
        if self.mixture.blocks is not None:
            return self._plan_blocks(batch, part, parts)
        rows = range(part * self.rows // parts, (part + 1) * self.rows // parts)
        first = (self.start + batch) * self.batch_pairs + self.process_index
        positions = first + np.array(rows, np.int64) * self.process_count
        columns = positions, *self.mixture.locate(positions)
        return list(map(Place, rows, *map(np.ndarray.tolist, columns)))

    def _plan_blocks(self, batch: int, part: int, parts: int) -> list[Place]:
        places, counts = self._in_blocks(batch, part, parts)
        for source, cache in enumerate(self.block_caches):
            here = [count for place, count in zip(places, counts, strict=True) if place.source == source]
            cache.advance(min(here, default=0))
        if any(source.is_remote for source in self.sources):
            # What this batch needs is fetched side by side, and then what the stream needs a stretch later.
            stretch = self.mixture.blocks.block_pairs * self.mixture.blocks.open_blocks
            ahead, _ = self._in_blocks(batch + -(-stretch // self.batch_pairs), part, parts)
            for source, block in dict.fromkeys((place.source, place.block) for place in (*places, *ahead)):
                with contextlib.suppress(OSError):  # told when its pairs are read
                    self.sources[source].fetch_ahead(block, self.block_caches[source])
        return places

    def _in_blocks(self, batch: int, part: int, parts: int) -> tuple[list[Place], list[int]]:
        """The places of a share, with their blocks, and at which count of its source each comes."""
        positions = np.arange(self.batch_pairs) + (self.start + batch) * self.batch_pairs
        sources, records = self.mixture.locate(positions)
        by_place = positions[np.lexsort((records, sources))]
        own = by_place[self.process_index * self.rows : (self.process_index + 1) * self.rows]
        made: dict[tuple[int, int, int, int], Block] = {}
        places, counts = [], []
        for row, found in enumerate(self.mixture.locate_blocks(own, readers=parts)):
            if found.reader != part:
                continue
            bounds = found.source, found.first, found.end, found.until
            if bounds not in made:
                made[bounds] = self.sources[found.source].block(found.first, found.end, until=found.until)
            places.append(Place(row, int(own[row]), found.source, found.record, made[bounds]))
            counts.append(found.count)
        return places, counts


def open_reader(config: Any, batch_pairs: int, seed: int, process: tuple[int, int], *, start: int) -> Reader:
    """The reader of a `loader.DataConfig`, for process p of P.

    Raises:
      FileNotFoundError, PermissionError, ValueError, OSError: see `open_config`.
    """
    sources, blocks = tuple(map(open_config, config.sources)), config.shuffle_blocks
    mixture = Mixture(tuple(map(len, sources)), tuple(one.weight for one in config.sources), seed, blocks)
    readers = process[1] * max(1, config.workers)
    caches = _make_block_caches(sources, config.sources, blocks, block_bytes=config.block_bytes, readers=readers)
    return Reader(sources, mixture, batch_pairs, *process, start, caches)


def open_config(config: SourceConfig) -> Source:
    """Raises FileNotFoundError, PermissionError, ValueError, OSError: see `open_source` and `KeptPairs`."""
    # Workers import this module, and start sooner without these.
    from data_pipelines.sources.kept_pairs import KeptPairs
    from data_pipelines.sources.opening import open_source

    parts = (part.strip() for field, _ in config.captions for part in field.split("+"))
    source = open_source(config.shards, image=config.image, fields={part.split(".")[0] for part in parts})
    return source if config.manifest is None else KeptPairs(source, config.manifest)


def _make_block_caches(
    sources: Sequence[Source],
    configs: Sequence[SourceConfig],
    blocks: BlockShuffle | None,
    *,
    block_bytes: int,
    readers: int,
) -> tuple[BlockCache, ...]:
    """One for each source, by its weight; () without blocks. readers: processes that share a stretch."""
    if blocks is None:
        return ()
    total = sum(config.weight for config in configs)
    limits = [int(block_bytes * config.weight / total) for config in configs]
    for source, limit, config in zip(sources, limits, configs, strict=True):
        stretch = min(blocks.block_pairs * blocks.open_blocks, len(source))
        needed = int(stretch * source.pair_bytes) // readers
        if source.is_remote and needed > limit:
            warnings.warn(
                f"{stretch} pairs of {config.shards!r} are mixed at a time, about {needed} bytes in each process, and its share "
                f"of data.block_bytes={block_bytes} is {limit}; pairs that do not fit are fetched one request each; "
                f"raise data.block_bytes or lower data.shuffle_blocks.open_blocks={blocks.open_blocks}",
                stacklevel=4,
            )
    return tuple(map(BlockCache, limits))
