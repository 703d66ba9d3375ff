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
    fields, _ = _struct(footer, 0)
    try:
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
            header, at = _struct(data, at)
            kind, uncompressed, compressed = header[1], header[2], header[3]
            count = next((header[field][1] for field in (5, 7, 8) if field in header), 0)
            at += max(0, compressed)
            yield kind, max(0, uncompressed), max(0, count)
        except (Damaged, IndexError, KeyError, TypeError):
            return  # pyarrow tells what is wrong


# Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, object], int]:
    """The struct at `at`, {number of the field: value}, and where it ends. Raises Damaged."""
    if depth > _MAX_DEPTH:
        raise Damaged("the headers are nested too deep")
    fields, number = {}, 0
    while True:
        head, at = _byte(data, at)
        if not head:
            return fields, at
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, at = _signed(data, at)
        if kind in (1, 2):  # a boolean is in its head
            fields[number] = kind == 1
        else:
            fields[number], at = _value(data, at, kind, depth)


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[object, int]:
    match kind:
        case 1 | 2 | 3:
            return _byte(data, at)
        case 4 | 5 | 6:
            return _signed(data, at)
        case 7:
            return _bytes(data, at, 8)
        case 8:
            length, at = _varint(data, at)
            return _bytes(data, at, length)
        case 9 | 10:
            return _list(data, at, depth)
        case 12:
            return _struct(data, at, depth + 1)
    raise Damaged(f"a header has a field of the unknown type {kind}")


def _list(data: bytes, at: int, depth: int) -> tuple[list, int]:
    head, at = _byte(data, at)
    length, kind = head >> 4, head & 15
    if length == 15:
        length, at = _varint(data, at)
    if length > len(data) - at or depth > _MAX_DEPTH:  # an entry takes a byte at least
        raise Damaged(f"a header has a list of {length} entries")
    values = []
    for _ in range(length):
        value, at = _value(data, at, kind, depth + 1)
        values.append(value)
    return values, at


def _bytes(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    if length > len(data) - at:
        raise Damaged(f"a header has a text of {length} bytes")
    return data[at : at + length], at + length


def _byte(data: bytes, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise Damaged("a header is cut")
    return data[at], at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number of at most 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        byte, at = _byte(data, at)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise Damaged("a header has a number of more than 64 bits")


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at
