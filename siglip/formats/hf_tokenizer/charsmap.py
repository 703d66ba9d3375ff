"""SentencePiece's compiled text normalisation: a map from strings to strings, read from and written to its binary form.

    blob = uint32 n | n bytes of a double array | replacements, each ended by a zero byte

A key's path through the double array starts at unit 0; from a unit at position p, byte c leads to position
p ^ offset(p) ^ c, and a unit with a leaf keeps its value, where in the replacements to look, at p ^ offset(p).
The text is read left to right; at each place the longest key is replaced, a character without a key is kept
(sentencepiece/src/normalizer.cc; the array is that of Darts-clone).

The trap: the same blob means something else to Hugging Face's `Precompiled` normaliser. It looks at grapheme clusters,
takes the shortest key and drops the rest of the cluster. The two agree on texts whose clusters are single characters.
"""

import functools
import struct
from collections.abc import Mapping

import numpy as np

from siglip.errors import UserError

_BLOCK = 256
_LEAF = 1 << 8
_VALUE = 1 << 31
_MAX_KEY_BYTES = 256
_MAX_STEPS = 1 << 22  # nmt_nfkc takes 250 000


@functools.lru_cache(maxsize=4)
def read_charsmap(blob: bytes) -> dict[str, str]:
    """The map in a `precompiled_charsmap`; empty for an empty blob.

    Raises:
        UserError: it is cut short, or not such a table.
    """
    if not blob:
        return {}
    size = int.from_bytes(blob[:4], "little")
    if len(blob) < 4 + size or size % 4 or not size:
        raise UserError(f"the tokenizer's normalisation table has {len(blob)} bytes, not the {size} it declares")
    units, replacements = np.frombuffer(blob, "<u4", size // 4, offset=4), blob[4 + size :]
    try:
        return _walk(units, replacements)
    except (IndexError, ValueError) as error:
        raise UserError(f"the tokenizer's normalisation table is damaged ({error}); fetch it again") from error


def _walk(units: np.ndarray, replacements: bytes) -> dict[str, str]:
    children, units = _children(units), units.tolist()
    found, waiting, steps = {}, [(_offset(units[0]), b"")], 0
    while waiting:
        position, key = waiting.pop()
        steps += 1
        if len(key) > _MAX_KEY_BYTES or steps > _MAX_STEPS:
            raise ValueError("its keys run in circles")
        for place in children.get(position, ()):
            unit, node, longer = units[place], place ^ _offset(units[place]), key + bytes([place ^ position])
            if unit & _LEAF:
                start = units[node] & ~_VALUE
                found[longer.decode()] = replacements[
                    start : replacements.index(0, start, start + _MAX_KEY_BYTES)
                ].decode()
            waiting.append((node, longer))
    return found


def _children(units: np.ndarray) -> dict[int, list[int]]:
    """Position of a node -> positions of its children: the units whose byte leads from the node to their own position."""
    places = np.flatnonzero((units & _VALUE == 0) & (units & 0xFF != 0))
    parents = places ^ (units[places] & 0xFF)
    children = {}
    for parent, place in zip(parents.tolist(), places.tolist(), strict=True):
        children.setdefault(parent, []).append(place)
    return children


def write_charsmap(mapping: Mapping[str, str]) -> bytes:
    """The binary form of a map between strings without zero bytes."""
    starts, replacements = {}, bytearray()
    root: dict = {}
    for key, value in mapping.items():
        if value not in starts:
            starts[value] = len(replacements)
            replacements += value.encode() + b"\0"
        node = root
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = starts[value]
    units = _double_array(root)
    return struct.pack("<I", units.nbytes) + units.tobytes() + bytes(replacements)


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _double_array(root: Mapping) -> np.ndarray:
    """uint32 units of a byte trie whose nodes are dicts: byte -> node, and 0 -> value."""
    units, bases, taken = [], {0}, {0}
    branches, leaves, free = [(root, 0)], [], 1

    def place_node(node: Mapping, place: int, base: int) -> int:
        # A node's children must lie where no other node's do, or their bytes would be found there as well.
        while base in bases or any(base ^ byte in taken for byte in node):
            base += 1
        bases.add(base)
        taken.update(base ^ byte for byte in node)
        units.extend([0] * (max(base ^ byte for byte in node) // _BLOCK * _BLOCK + _BLOCK - len(units)))
        assert base ^ place < 1 << 21, "a map of single characters has far fewer units"
        units[place] |= (base ^ place) << 10
        if 0 in node:
            units[place] |= _LEAF
            units[base] = _VALUE | node[0]
        return base

    while branches:
        node, place = branches.pop()
        base = place_node(node, place, 1)
        for byte, child in node.items():
            if byte:
                units[base ^ byte] = byte
                (leaves if child.keys() == {0} else branches).append((child, base ^ byte))
    for node, place in leaves:
        free = place_node(node, place, free)
    return np.array(units, "<u4")
