"""Long reads: neighbours that are wanted soon come in one range, and stay in memory until their stretch of the stream is over.

    block -> stretches of bytes that its pairs lie in, gaps up to GAP_BYTES read along, cut at PIECE_BYTES -> pieces

A piece is fetched once, however many threads want it, and ahead of need while there is room. What has been over for longest
goes first; what is not over stays: a piece that does not fit is not fetched at all, and its pairs are read one by one. So
memory is bounded and no stretch is fetched long twice, whatever the limit.

The trap: a long read that fails must not cost the pairs that one short read would still get. It counts as no room.
"""

import collections
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.records import Pair

PIECE_BYTES = 1 << 24
GAP_BYTES = 1 << 18  # takes less time than a request does
_FETCHERS = 8
_MAX_BLOCK_PAIRS = 1024
_BLOCKS_AHEAD = 2


@dataclass(frozen=True)
class Block:
    """Pairs of a source that will be read about the same time: first … end - 1, or only `rows` of these.

    until: the count of the source from which on none of them is.
    """

    first: int
    end: int
    until: int
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(eq=False)
class _Piece:
    nbytes: int
    until: int
    value: Future = field(default_factory=Future)
    started: bool = False


class BlockCache:
    """Pieces of the blocks of one source that are open, at most limit_bytes of them; goes to worker processes empty."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()  # held for bookkeeping only, never while reading
        self._pieces: dict[Hashable, _Piece] = {}
        self._ahead: collections.deque[tuple[Hashable, _Piece, Callable[[], Any]]] = collections.deque()
        self._used_bytes = self._fetchers = self._now = 0

    def __reduce__(self):
        return BlockCache, (self.limit_bytes,)

    @property
    def used_bytes(self) -> int:
        """What is kept or on its way."""
        return self._used_bytes

    def advance(self, now: int) -> None:
        """Tells which count of the source has been reached: blocks `until` then are over."""
        with self._lock:
            self._now = max(self._now, now)

    def get(self, key: Hashable, fetch: Callable[[], Any], *, nbytes: int, until: int) -> Any | None:
        """What `fetch` gives, kept; None where there is no room for it, or it failed.

        Raises:
          ValueError: as `fetch` does, ShardLost for one.
        """
        with self._lock:
            piece = self._admit(key, nbytes, until)
            if piece is None:
                return None
            mine, piece.started = not piece.started, True
        if mine:
            self._fill(piece, fetch)
        try:
            return piece.value.result()
        except OSError:
            return None

    def fetch_ahead(self, key: Hashable, fetch: Callable[[], Any], *, nbytes: int, until: int) -> None:
        """Has a piece fetched by another thread if there is room for it."""
        with self._lock:
            if key in self._pieces or (piece := self._admit(key, nbytes, until)) is None:
                return
            self._ahead.append((key, piece, fetch))
            if self._fetchers == _FETCHERS:
                return
            self._fetchers += 1
        try:  # daemon: none that the interpreter waits for at its end
            threading.Thread(target=self._fetch_pieces, daemon=True).start()
        except RuntimeError:  # The process may have no more threads: who wants a piece fetches it.
            with self._lock:
                self._fetchers -= 1
                self._ahead.clear()

    def clear(self) -> None:
        """Forgets all; what is on its way comes to nothing."""
        with self._lock:
            self._ahead.clear()
            self._pieces.clear()
            self._used_bytes = self._now = 0

    def _admit(self, key: Hashable, nbytes: int, until: int) -> _Piece | None:
        piece = self._pieces.get(key)
        if piece is not None:
            piece.until = max(piece.until, until)
            return piece
        if until <= self._now or not self._make_room(nbytes):
            return None
        self._pieces[key] = piece = _Piece(nbytes, until)
        self._used_bytes += nbytes
        return piece

    def _make_room(self, nbytes: int) -> bool:
        if self._used_bytes + nbytes <= self.limit_bytes:
            return True
        for key, piece in sorted(self._pieces.items(), key=lambda item: item[1].until):
            if piece.until > self._now:
                return False
            if piece.value.done() or not piece.started:
                del self._pieces[key]
                self._used_bytes -= piece.nbytes
                if self._used_bytes + nbytes <= self.limit_bytes:
                    return True
        return False

    def _fetch_pieces(self) -> None:
        while True:
            with self._lock:
                if not self._ahead:
                    self._fetchers -= 1
                    return
                key, piece, fetch = self._ahead.popleft()
                if piece.started or self._pieces.get(key) is not piece:
                    continue
                piece.started = True
            self._fill(piece, fetch)

    @staticmethod
    def _fill(piece: _Piece, fetch: Callable[[], Any]) -> None:
        try:
            piece.value.set_result(fetch())
        except BaseException as error:  # those who wait for it must not wait for ever
            piece.value.set_exception(error)


class InOrder:
    """The pairs of a source for one who reads them about in order: source[i], its neighbours read along and ahead."""

    def __init__(self, source):
        self._source, self._kept = source, BlockCache((_BLOCKS_AHEAD + 2) * PIECE_BYTES)
        self._block_pairs = max(1, min(_MAX_BLOCK_PAIRS, int(PIECE_BYTES / max(1.0, source.pair_bytes))))
        self._begun = -1

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        """Raises as the source does."""
        number = index // self._block_pairs
        block = self._block(number)
        if number > self._begun:
            self._begun = number
            self._kept.advance(block.first)
            for ahead in map(self._block, range(number, number + 1 + _BLOCKS_AHEAD)):
                if ahead.first < ahead.end:
                    self._source.fetch_ahead(ahead, self._kept)
        return self._source.in_block(index, block, self._kept)

    def _block(self, number: int) -> Block:
        first, end = (min(place * self._block_pairs, len(self._source)) for place in (number, number + 1))
        return Block(first, end, until=end)


def pieces(places: np.ndarray, *, gap_bytes: int = 0, limit_bytes: int = 0) -> np.ndarray:
    """What to read of a file to have all of some places. places: int64 [m, 2], (offset, bytes) -> int64 [k, 2], (start, end)."""
    gap_bytes, limit_bytes = gap_bytes or GAP_BYTES, limit_bytes or PIECE_BYTES
    places = places[np.argsort(places[:, 0], kind="stable")]
    found: list[list[int]] = []
    for offset, size in places.tolist():
        end = offset + size
        if found and offset - found[-1][1] <= gap_bytes and max(end, found[-1][1]) - found[-1][0] <= limit_bytes:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([offset, end])
    return np.array(found, np.int64).reshape(-1, 2)


def piece_of(found: np.ndarray, offset: int, size: int) -> tuple[int, int] | None:
    """The piece that holds these bytes. found: int64 [k, 2], as of `pieces`."""
    number = int(np.searchsorted(found[:, 0], offset, "right")) - 1
    if number < 0 or offset + size > found[number, 1]:
        return None
    start, end = found[number].tolist()
    return start, end
