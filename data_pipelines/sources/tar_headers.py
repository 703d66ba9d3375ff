"""The members of a tar, found by walking its headers: ustar, GNU long names, PAX paths and sizes, links, numbers in base 256.

    header at o, size s  ->  data at o + 512, next header at o + 512 + ceil(s / 512) * 512

tarfile takes 25 us a member, this about 1, so that a thousand shards are read at the speed of the disk. Checksums, the costly
part, are computed for many headers at once in numpy.

The traps: a cut tar reads like one that ends early. An archive is whole only if an end-of-archive block follows its last
member. And a header may say anything: sizes below zero, names of gigabytes.
"""

import itertools
import posixpath
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.sources.files import Window

_BLOCK = 512
_END_BLOCK = bytes(_BLOCK)
_REGULAR, _NO_DATA = frozenset(b"0\x007"), frozenset(b"123456")
_MAX_DIGITS = 19  # of a number that fits into 63 bits
_MAX_TEXT_BYTES = 1 << 24  # of a name, or of PAX records
_MAX_RECORDS, _MIN_RECORD_BYTES = 1000, 5  # "5 a=\n"
_HEADERS_AT_ONCE = 512
_ONES = np.ones(_BLOCK, np.float32)
_OCTAL = 8.0 ** np.arange(5, -1, -1, dtype=np.float32)
_GNU_LONG, _PAX, _SPARSE = {ord("L"): b"path", ord("K"): b"linkpath"}, frozenset(b"xX"), ord("S")
_HARD_LINK, _SYMBOLIC_LINK = ord("1"), ord("2")


class NotATar(ValueError):
    """The first block is not a tar header."""


@dataclass
class Members:
    """The regular files that are whole, in order, and the links to them, which lie where their targets do.

    cut_name: the file that the end of the archive cuts. dangling: links to what is not there.
    """

    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    truncated: bool = True
    cut_name: bytes | None = None
    dangling: list[bytes] = field(default_factory=list)


def walk_members(window: Window) -> Members:
    """Finds the members of a tar. Raises NotATar; OSError and ShardLost from reading."""
    members, headers, whole_at, links = Members(), [], [], {}
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
        if len(headers) == _HEADERS_AT_ONCE:
            if _drop_after_damage(members, headers, whole_at):
                break
            del headers[1:], whole_at[1:]  # the first stays the archive's first
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
        elif kind in _GNU_LONG or kind in _PAX:
            if size > _MAX_TEXT_BYTES:
                break
            text = data[start - base : start - base + size]
            if len(text) < size:
                base, data = start, window.fetch(start, size)
                text = data[:size]
            override |= _pax_records(text) if kind in _PAX else {_GNU_LONG[kind]: text.partition(b"\0")[0]}
        elif kind != ord("g"):
            if kind == _HARD_LINK or kind == _SYMBOLIC_LINK:
                _add_link(members, links, header, override)
            elif kind == _SPARSE and header[482]:  # a map of the holes follows the header
                base, data, start = _after_map(window, base, data, start)
            override = {}
        offset = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    _drop_after_damage(members, headers, whole_at)
    _follow_links(members, links)
    return members


def _add_link(members: Members, links: dict[int, bytes], header: bytes, override: dict[bytes, bytes]) -> None:
    """Adds a member whose place `_follow_links` finds."""
    target = override.get(b"linkpath") or header[157:257].partition(b"\0")[0]
    members.names.append(override.get(b"path") or _name(header))
    links[len(members.offsets)] = _target(members.names[-1], target, header[156])
    members.offsets.append(-1)
    members.sizes.append(0)


def _follow_links(members: Members, links: dict[int, bytes]) -> None:
    """Puts links to where their targets lie, which may come later, and drops those whose targets are not there."""
    if not links:
        return
    place = {posixpath.normpath(name): number for number, name in enumerate(members.names) if number not in links}
    for number, target in links.items():
        if target in place and number < len(members.names):
            found = place[target]
            members.offsets[number], members.sizes[number] = members.offsets[found], members.sizes[found]
    members.dangling = [name for name, offset in zip(members.names, members.offsets, strict=True) if offset < 0]
    there = [offset >= 0 for offset in members.offsets]
    for column in (members.names, members.offsets, members.sizes):
        column[:] = itertools.compress(column, there)


def _target(name: bytes, target: bytes, kind: int) -> bytes:
    """The name of the member that a link is to: a symbolic one counts from its own folder."""
    folder = posixpath.dirname(name) if kind == _SYMBOLIC_LINK else b""
    return posixpath.normpath(posixpath.join(folder, target)) if target else b""


def _after_map(window: Window, base: int, data: bytes, start: int) -> tuple[int, bytes, int]:
    """Where the map of a sparse file ends, after the window it is in: the bytes from `base` on."""
    while True:
        if start - base + _BLOCK > len(data):
            base, data = start, window.fetch(start)
        start += _BLOCK
        if data[start - base - 8 : start - base - 7] in (b"", b"\0"):
            return base, data, start


def _drop_after_damage(members: Members, headers: list[bytes], whole_at: list[int]) -> bool:
    """Whether a checksum is wrong; the members from there on are dropped: their positions were computed from that header."""
    if not headers:
        if members.truncated:
            raise NotATar("its first block is not a header")
        return False
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    digits = blocks[:, 148:154].astype(np.float32) - ord("0")
    stated = digits @ _OCTAL
    # The checksum is that of the header with eight spaces in its place; float32 holds sums below 2**24 exactly.
    found = blocks.astype(np.float32) @ _ONES - blocks[:, 148:156].astype(np.float32) @ _ONES[:8] + 8 * 32
    odd = np.flatnonzero((stated != found) | (digits < 0).any(1) | (digits > 7).any(1))
    damaged = next((row for row in odd if _number_or(headers[row][148:156], -1) != found[row]), None)
    if damaged is None:
        return False
    if damaged == 0:
        raise NotATar("the checksum of its first header is wrong")
    for column in (members.names, members.offsets, members.sizes):
        del column[whole_at[damaged] :]
    members.truncated, members.cut_name = True, None
    return True


def _name(header: bytes) -> bytes:
    name = header[: header.find(b"\0", 0, 100)] if not header[99] else header[:100].rstrip(b"\0")
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _number(field_: bytes) -> int:
    """Octal digits, or base 256 when the first bit is set. Raises ValueError: neither, or below zero."""
    try:
        number = int(field_[:-1], 8)
    except ValueError:
        if field_[0] & 0x80:
            number = -1 if field_[0] == 0xFF else int.from_bytes(field_[1:], "big")
        else:
            number = int(field_.partition(b"\0")[0].strip() or b"0", 8)
    if number < 0:
        raise ValueError(f"{field_!r} is below zero")
    return number


def _number_or(field_: bytes, otherwise: int) -> int:
    try:
        return int(field_.partition(b"\0")[0].strip(), 8)
    except ValueError:
        return otherwise


def _pax_records(text: bytes) -> dict[bytes, bytes]:
    """The paths and the size in a list of records "LENGTH KEY=VALUE\\n"."""
    records, start = {}, 0
    if b"path=" not in text and b"size=" not in text:
        return records
    for _ in range(_MAX_RECORDS):
        space = text.find(b" ", start, start + _MAX_DIGITS + 1)
        length = text[start : max(space, start)]
        if not length.isdigit() or int(length) < _MIN_RECORD_BYTES:
            break
        key, _, value = text[space + 1 : start + int(length) - 1].partition(b"=")
        if key in (b"path", b"linkpath") or (key == b"size" and value.isdigit() and len(value) <= _MAX_DIGITS):
            records[key] = value
        start += int(length)
    return records
