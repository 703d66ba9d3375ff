"""The order of one source: every pair once an epoch, each epoch another order, any place by arithmetic alone.

    everywhere      record = permutation[key](place)
    block by block  group, i = divmod(place, W B);  slot, offset = divmod(permutation[key, group](i), B)
                    record = (block[key](group W + slot) B + offset + shift[key]) mod n

The first moves every pair anywhere, so every read is of one pair. The second is for storage that likes long reads: the source
is cut into blocks of B = block_pairs neighbours, W = open_blocks of them are drawn at random and their pairs shuffled
together before the next W are opened. Where the cuts fall is drawn anew in each epoch.

The permutation is a Feistel network over a grid of about sqrt(n) x sqrt(n), walked until it falls below n
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): no table, so a billion pairs are shuffled
globally in no memory and any place is reached at once. It works on arrays of places, at about 1 us a pair.

The trap: with blocks, a batch is as varied as W blocks are. Shards that are sorted by topic want many open blocks.
"""

import math
from dataclasses import dataclass

import numpy as np

from data_pipelines.counter_rng import hash_ints, mix_array
from data_pipelines.errors import UserError

_ROUNDS = 4
_NEXT_ROUND = np.uint64(0xD1342543DE82EF95)
_BLOCK_KEY, _SHIFT_KEY, _GROUP_KEY = (np.uint64(hash_ints(number)) for number in (1, 2, 3))


@dataclass(frozen=True)
class BlockShuffle:
    """A shuffle that keeps reads together.

    Attributes:
      block_pairs: neighbours in storage that are read within the same stretch of the stream.
      open_blocks: blocks that are mixed with each other; the stretch is block_pairs * open_blocks pairs long. What a
        process reads of two stretches should fit into `data.block_bytes`.
    """

    block_pairs: int = 256
    open_blocks: int = 16

    def __post_init__(self):
        for name in ("block_pairs", "open_blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"data.shuffle_blocks.{name}={getattr(self, name)} must be at least 1")


def shuffle(places: np.ndarray, size: int, keys: np.ndarray, *, blocks: BlockShuffle | None) -> np.ndarray:
    """The record at each place of an epoch. places: int64 [n], below `size`; keys: uint64 [n], of the epochs -> int64 [n]."""
    return permute(places, size, keys) if blocks is None else _by_blocks(places, size, keys, blocks)


def block_bounds(
    places: np.ndarray, size: int, keys: np.ndarray, *, blocks: BlockShuffle, cuts: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The block that the record at each place is read with; one that goes round the end of the source is cut there.

    cuts: in how many stretches of neighbours a block is divided, each taken for a block -> int64 [n] each: first record and
    end, and its number among the open_blocks * cuts that are open.
    """
    groups, slots, offsets = _mix(places, size, keys, blocks)
    is_rest = groups * blocks.open_blocks + slots == size // blocks.block_pairs
    pairs = np.where(is_rest, size % blocks.block_pairs, blocks.block_pairs)
    cut = offsets * cuts // blocks.block_pairs
    begin, stop = (-(-number * blocks.block_pairs // cuts) for number in (cut, cut + 1))
    start = _by_blocks(places, size, keys, blocks) - offsets
    return np.maximum(start + begin, 0), np.minimum(start + np.minimum(stop, pairs), size), slots * cuts + cut


def _by_blocks(places: np.ndarray, size: int, keys: np.ndarray, blocks: BlockShuffle) -> np.ndarray:
    groups, slots, offsets = _mix(places, size, keys, blocks)
    slots += groups * blocks.open_blocks
    whole_blocks = size // blocks.block_pairs
    inside = slots < whole_blocks  # The remainder, less than a block, stays last; the shift says which pairs it has.
    if inside.any():
        slots[inside] = permute(slots[inside], whole_blocks, mix_array(keys[inside] ^ _BLOCK_KEY))
    shifts = (mix_array(keys ^ _SHIFT_KEY) % np.uint64(size)).astype(np.int64)
    return (slots * blocks.block_pairs + offsets + shifts) % size


def _mix(places: np.ndarray, size: int, keys: np.ndarray, blocks: BlockShuffle) -> tuple[np.ndarray, ...]:
    """For each place: its group of open blocks, which of them, and the pair in that. -> int64 [n] each"""
    stretch = blocks.block_pairs * blocks.open_blocks
    groups, within = np.divmod(places, stretch)
    group_keys = mix_array((keys ^ _GROUP_KEY) + groups.astype(np.uint64))
    mixed = np.empty_like(within)
    is_last = groups == (size - 1) // stretch
    for mine, pairs in ((~is_last, stretch), (is_last, (size - 1) % stretch + 1)):
        if mine.any():
            mixed[mine] = permute(within[mine], pairs, group_keys[mine])
    return groups, *np.divmod(mixed, blocks.block_pairs)


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
