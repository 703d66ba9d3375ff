"""The headers inside a Parquet file, read in Python: where columns lie, and what their pages expand to.

    footer (FileMetaData) -> row groups -> column chunks -> pages (PageHeader),  each a struct of Thrift's compact protocol

pyarrow ends the process on some damaged footers once it is asked about a column chunk, and it takes the memory that a page
header asks for. Numbers of fields: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_MAX_DEPTH = 32
_VALUE_BYTES = 16  # of a value beside its own bytes: two levels, an offset, the number of its entry in the dictionary
_DICTIONARY_PAGE = 2
Wanted = dict[int, "Wanted"]  # the fields of a struct that are kept, and those of the structs in them
_FOOTER: Wanted = {4: {1: {3: {3: {}, 6: {}, 7: {}, 9: {}, 11: {}}}}}  # row groups -> columns -> their metadata
_PAGE_HEADER: Wanted = {1: {}, 2: {}, 3: {}, 5: {1: {}}, 7: {1: {}}, 8: {1: {}}}
# Kinds of values: a number; booleans, which as a field are in the field's head; those of as many bytes.
_NUMBER, _IN_HEAD, _BYTES = 6, (1, 2), {1: 1, 2: 1, 3: 1, 7: 8}
CHUNK = np.dtype([("start", "<i8"), ("end", "<i8"), ("uncompressed_bytes", "<i8")])  # a `Column` in an index


class Damaged(ValueError):
    """Bytes that are not what the format says."""


class Column(NamedTuple):
    """A column of a row group: its bytes in the file are start … end - 1."""

    path: str
    start: int
    end: int
    uncompressed_bytes: int


class Expansion(NamedTuple):
    """What reading a column takes: its values, bytes of the pages, and at most of all values that are in its dictionary."""

    values: int
    nbytes: int
    repeated_bytes: int


def read_columns(footer: bytes, size: int) -> list[list[Column]]:
    """The columns of each row group. size: bytes of the file. Raises Damaged: a column lies outside of it."""
    try:
        fields, _ = _struct(footer, 0, _FOOTER)
        return [[_column(chunk[3], size) for chunk in group[1]] for group in fields.get(4, [])]
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # a field that is missing, or of another type
        raise Damaged("the footer does not describe the columns") from error


def _column(fields: dict, size: int) -> Column:
    path = ".".join(name.decode() for name in fields[3])
    start = min(fields[9], fields.get(11) or fields[9])  # some writers' 0 says that there is no dictionary
    column = Column(path, start, start + fields[7], fields[6])
    if not 0 <= column.start <= column.end <= size or column.uncompressed_bytes < 0:
        raise Damaged("a column lies outside of the file")
    return column


def expansion(data: bytes) -> Expansion:
    """What reading a column chunk takes, given its bytes; only its headers are read. A page that is cut is left out."""
    total = values = dictionary = 0
    for kind, uncompressed, count in _pages(data):
        total += uncompressed
        values += 0 if kind == _DICTIONARY_PAGE else count
        dictionary = max(dictionary, uncompressed if kind == _DICTIONARY_PAGE else 0)
    return Expansion(values, total + values * _VALUE_BYTES, values * dictionary)


def _pages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, bytes when uncompressed, values) of each page."""
    at = 0
    while at < len(data):
        try:
            header, at = _struct(data, at, _PAGE_HEADER)
            kind, uncompressed, compressed = header[1], header[2], header[3]
            count = next((header[field][1] for field in (5, 7, 8) if field in header), 0)
            at += max(0, compressed)
            yield kind, max(0, uncompressed), max(0, count)
        except (Damaged, IndexError, KeyError, TypeError):
            return  # pyarrow tells what is wrong


# Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
# A footer has a million numbers, so a byte costs no call; where the bytes end too early, Python's IndexError says so.


def _struct(data: bytes, at: int, wanted: Wanted, depth: int = 0) -> tuple[dict[int, object], int]:
    """The struct at `at`, {number of a wanted field: value}, and where it ends. Raises Damaged, or IndexError: it is cut."""
    if depth > _MAX_DEPTH:
        raise Damaged("the headers are nested too deep")
    fields, number = {}, 0
    while head := data[at]:
        kind, at = head & 15, at + 1
        if head > 15:
            number += head >> 4
        else:
            number, at = _value(data, at, _NUMBER, {}, depth)
        if number not in wanted:
            if kind not in _IN_HEAD:
                at = at + 1 if 4 <= kind <= 6 and data[at] < 128 else _skip(data, at, kind, depth)
        elif kind in _IN_HEAD:
            fields[number] = kind == 1
        else:
            fields[number], at = _value(data, at, kind, wanted[number], depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, wanted: Wanted, depth: int) -> tuple[object, int]:
    match kind:
        case 4 | 5 | 6:
            value, at = _varint(data, at)
            return value >> 1 ^ -(value & 1), at
        case 8:
            length, at = _varint(data, at)
            if length > len(data) - at:
                raise Damaged(f"a header has a text of {length} bytes")
            return data[at : at + length], at + length
        case 9 | 10:
            return _list(data, at, wanted, depth)
        case 12:
            return _struct(data, at, wanted, depth + 1)
    return None, _skip(data, at, kind, depth)


def _list(data: bytes, at: int, wanted: Wanted, depth: int) -> tuple[list, int]:
    length, kind, at = _list_head(data, at)
    if length > len(data) - at or depth > _MAX_DEPTH:  # an entry takes a byte at least
        raise Damaged(f"a header has a list of {length} entries")
    values = []
    for _ in range(length):
        value, at = _value(data, at, kind, wanted, depth + 1)
        values.append(value)
    return values, at


def _list_head(data: bytes, at: int) -> tuple[int, int, int]:
    """(number of entries, their kind, where they begin)."""
    length, kind = data[at] >> 4, data[at] & 15
    if length < 15:
        return length, kind, at + 1
    length, at = _varint(data, at + 1)
    return length, kind, at


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """Where a value ends that nobody wants."""
    if depth > _MAX_DEPTH:
        raise Damaged("the headers are nested too deep")
    if kind in (4, 5, 6):
        while data[at] > 127:
            at += 1
        return at + 1
    if kind == 8:
        length, at = _varint(data, at)
        return at + length
    if kind == 12:
        while head := data[at]:
            kind = head & 15
            at = at + 1 if head > 15 else _skip(data, at + 1, _NUMBER, depth)
            if kind in _IN_HEAD:
                continue
            if 4 <= kind <= 6 and data[at] < 128:  # a number of one byte, as most are
                at += 1
            elif kind == 8 and data[at] < 128:  # a short text
                at += 1 + data[at]
            else:
                at = _skip(data, at, kind, depth + 1)
        return at + 1
    if kind in (9, 10):
        length, kind, at = _list_head(data, at)
        for _ in range(length):
            at = _skip(data, at, kind, depth + 1)
        return at
    if kind not in _BYTES:
        raise Damaged(f"a header has a field of the unknown type {kind}")
    if at >= len(data):
        raise IndexError
    return at + _BYTES[kind]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of at most 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        if byte < 128:
            return (value | byte << shift) & (1 << 64) - 1, at
        value |= (byte & 0x7F) << shift
    raise Damaged("a header has a number of more than 64 bits")
