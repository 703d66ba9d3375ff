"""The members of a tar, found by walking its headers: ustar, GNU long names, PAX paths and sizes, numbers in base 256.

    header at o, size s  ->  data at o + 512, next header at o + 512 + ceil(s / 512) * 512

tarfile takes 25 us a member, this about 1, so that a thousand shards are read at the speed of the disk. Checksums, the costly
part, are computed for all headers at once in numpy.

The trap: a cut tar reads like one that ends early. An archive is whole only if an end-of-archive block follows its last
member.
"""

from dataclasses import dataclass, field

import numpy as np

from data_pipelines.sources.files import Window

_BLOCK = 512
_END_BLOCK = bytes(_BLOCK)
_REGULAR, _NO_DATA = frozenset(b"0\x007"), frozenset(b"123456")
_MAX_DIGITS = 19  # of a number that fits into 63 bits
_ONES = np.ones(_BLOCK, np.float32)
_OCTAL = 8.0 ** np.arange(5, -1, -1, dtype=np.float32)
_GNU_LONG_NAME, _PAX, _SPARSE = ord("L"), frozenset(b"xX"), ord("S")


class NotATar(ValueError):
    """The first block is not a tar header."""


@dataclass
class Members:
    """The regular files that are whole, in order. cut_name: the file that the end of the archive cuts."""

    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    truncated: bool = True
    cut_name: bytes | None = None


def walk_members(window: Window) -> Members:
    """Finds the members of a tar. Raises NotATar; OSError and ShardLost from reading."""
    members, headers, whole_at = Members(), [], []
    names, offsets, sizes = members.names, members.offsets, members.sizes
    offset, base, data = 0, 0, b""
    override: dict[bytes, bytes] = {}  # what a PAX header or a GNU long name sets for the next member
    while True:
        at = offset - base
        header = data[at : at + _BLOCK]
        if len(header) < _BLOCK:
            base, data = offset, window.fetch(offset)
            header = data[:_BLOCK]
            if len(header) < _BLOCK:
                break
        if header == _END_BLOCK:
            members.truncated = False
            break
        kind = header[156]
        try:
            size = 0 if kind in _NO_DATA else _number(header[124:136])
        except ValueError:
            break
        headers.append(header)
        whole_at.append(len(names))
        start = offset + _BLOCK
        if kind in _REGULAR:
            name = _name(header)
            if override:
                name, size = override.get(b"path") or name, int(override.get(b"size", size))
                override = {}
            if start + size > window.size:
                members.cut_name = name
                break
            names.append(name)
            offsets.append(start)
            sizes.append(size)
        elif start + size > window.size:
            break
        elif kind == _GNU_LONG_NAME or kind in _PAX:
            text = data[start - base : start - base + size]
            if len(text) < size:
                base, data = start, window.fetch(start, size)
                text = data[:size]
            override |= {b"path": text.partition(b"\0")[0]} if kind == _GNU_LONG_NAME else _pax_records(text)
        elif kind == _SPARSE:  # its stored data has holes left out; a map of them may follow the header
            override = {}
            extended = header[482]
            while extended:
                extended = window.fetch(start)[504:505] not in (b"", b"\0")
                start += _BLOCK
        elif kind not in b"gK":
            override = {}
        offset = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    _drop_after_damage(members, headers, whole_at)
    return members


def _drop_after_damage(members: Members, headers: list[bytes], whole_at: list[int]) -> None:
    """Drops the members from a header with a wrong checksum on: their positions were computed from it."""
    if not headers:
        if members.truncated:
            raise NotATar("its first block is not a header")
        return
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    digits = blocks[:, 148:154].astype(np.float32) - ord("0")
    stated = digits @ _OCTAL
    # The checksum is that of the header with eight spaces in its place; float32 holds sums below 2**24 exactly.
    found = blocks.astype(np.float32) @ _ONES - blocks[:, 148:156].astype(np.float32) @ _ONES[:8] + 8 * 32
    odd = np.flatnonzero((stated != found) | (digits < 0).any(1) | (digits > 7).any(1))
    damaged = next((row for row in odd if _number_or(headers[row][148:156], -1) != found[row]), None)
    if damaged is None:
        return
    if damaged == 0:
        raise NotATar("the checksum of its first header is wrong")
    for column in (members.names, members.offsets, members.sizes):
        del column[whole_at[damaged] :]
    members.truncated, members.cut_name = True, None


def _name(header: bytes) -> bytes:
    name = header[: header.find(b"\0", 0, 100)] if not header[99] else header[:100].rstrip(b"\0")
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _number(field_: bytes) -> int:
    """Octal digits, or base 256 when the first bit is set."""
    try:
        return int(field_[:-1], 8)
    except ValueError:
        if field_[0] & 0x80:
            return int.from_bytes(field_[1:], "big")
        return int(field_.partition(b"\0")[0].strip() or b"0", 8)


def _number_or(field_: bytes, otherwise: int) -> int:
    try:
        return int(field_.partition(b"\0")[0].strip(), 8)
    except ValueError:
        return otherwise


def _pax_records(text: bytes) -> dict[bytes, bytes]:
    """The path and size in a list of records "LENGTH KEY=VALUE\\n"."""
    records = {}
    if b"path=" not in text and b"size=" not in text:
        return records
    while text:
        length, space, _ = text.partition(b" ")
        if not space or not length.isdigit() or len(length) > _MAX_DIGITS or not int(length):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) <= _MAX_DIGITS):
            records[key] = value
        text = text[int(length) :]
    return records
