"""A list of image files with their captions: CSV, TSV (a header names the columns) or JSONL (one object per line).

    image,caption
    cats/1.jpg,"a cat, asleep"

Paths are relative to the list's folder, or absolute, or URLs. One pass finds the offsets of the rows, which are kept as an
index, so memory does not grow with the list.

The traps: a quoted caption may hold line ends, so a row is not a line; the csv module finds where each one ends. A row with
more values than columns has a comma without quotes: nobody can tell which part is the caption, so none is taken.
"""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from data_pipelines.errors import UserError
from data_pipelines.records import Pair
from data_pipelines.sources import files, index_file
from data_pipelines.sources.annotations import IMAGE_COLUMNS, join
from data_pipelines.sources.columns import parse_object, repeated_name
from data_pipelines.sources.files import Window
from data_pipelines.sources.index_file import Contents
from data_pipelines.sources.remote import FileStat
from data_pipelines.sources.shards import ColumnSource, join_offsets

_BOM, _UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_MAX_LINE_BYTES = 1 << 24
_LOOKED_AT_ROWS = 100


class ListSource(ColumnSource):
    """The rows of lists, in their order. Arguments and errors: see `ColumnSource`.

    A pair whose image file does not exist has no image and the problem "missing_image"; one whose row has more values than
    columns has neither image nor fields, and the problem "invalid_csv".
    """

    kind = "list"

    @staticmethod
    def build(shard: str, stat: FileStat) -> Contents:
        """The index of a list. Raises UserError: it has no rows, or is not a list."""
        offsets, sizes, columns = _scan_json(shard, stat) if _is_json(shard) else _scan_csv(shard, stat)
        if not offsets:
            raise UserError(f"list {shard!r} has no rows; leave it out")
        rows = join_offsets(offsets, sizes)
        image = next((name for name in IMAGE_COLUMNS if name in columns), None)
        notes = {"columns": columns, "image": image}
        return Contents(len(rows), {"rows": rows}, notes, index_file.digest(stat, rows, repr(columns).encode()))

    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes]) -> Pair:
        path, column = self.paths[shard], self._images[shard]
        offset, size = self._tables(shard)["rows"][row].item()
        line = read(offset, size)
        if _is_json(path):
            fields, problems = parse_object(line.removeprefix(_BOM))
        else:
            fields, problems = _parse_csv(path, line, self.notes(shard)["columns"])
        named = fields.pop(column, None)
        key = fields.pop("key", None) or named or f"{os.path.basename(path)}/{row}"
        image = None
        if isinstance(named, str) and named:
            image, missing = read_image(join(path, named))
            problems += missing
        return Pair(str(key), image, fields, tuple(problems))


def read_columns(path: str) -> list[str]:
    """The columns in the first line of a list; of JSONL the fields of its first row. Raises as `files.stat`, or UserError."""
    stat = files.stat(path)
    if _is_json(path):
        return _scan_json(path, stat, stop=True)[2]
    return _header(path, _rows(path, _decoded(path, _lines(path, stat))))


def _is_json(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def _rows(path: str, lines: Iterable[str]):
    csv.field_size_limit(_MAX_LINE_BYTES)  # a setting of the process
    return csv.reader(lines, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)


def _lines(shard: str, stat: FileStat) -> Iterator[tuple[int, bytes]]:
    """Every line with its offset."""
    window, offset, base, rest = Window(shard, stat.size), 0, 0, b""
    while offset < stat.size:
        block = window.fetch(offset)
        offset += len(block)
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > _MAX_LINE_BYTES:
            raise UserError(f"list {shard!r} has a line of more than {_MAX_LINE_BYTES} bytes; is it a list?")
        for line in lines:
            yield base, line + b"\n"
            base += len(line) + 1
    if rest:
        yield base, rest


def _decoded(shard: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[str]:
    for offset, line in lines:
        if offset == 0 and line.startswith(_UTF_16):
            raise UserError(f"list {shard!r} is in UTF-16; save it as UTF-8")
        yield (line.removeprefix(_BOM) if offset == 0 else line).decode("utf-8", "replace")


def _header(shard: str, reader) -> list[str]:
    """The columns that the first row of a CSV file names. Raises UserError: it is not CSV, or names one twice."""
    try:
        columns = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise _not_csv(shard, reader, error) from error
    if twice := repeated_name(columns):
        raise UserError(f"list {shard!r} has two columns called {twice!r}; rename one of them")
    return columns


def _not_csv(shard: str, reader, error: csv.Error) -> UserError:
    return UserError(f"list {shard!r} is not CSV at line {reader.line_num} ({error}); fix that line")


def _scan_csv(shard: str, stat: FileStat) -> tuple[list[int], list[int], list[str]]:
    offsets, sizes, long, end = [], [], [], 0

    def counted() -> Iterator[tuple[int, bytes]]:
        nonlocal end
        for offset, line in _lines(shard, stat):
            end = offset + len(line)
            yield offset, line

    reader = _rows(shard, _decoded(shard, counted()))
    columns = _header(shard, reader)
    start = end
    try:
        for row in reader:
            if row:
                offsets.append(start)
                sizes.append(end - start)
            if any(row[len(columns) :]):
                long.append(reader.line_num)
            start = end
    except csv.Error as error:
        raise _not_csv(shard, reader, error) from error
    if len(long) * 2 > len(offsets):
        raise UserError(
            f"list {shard!r} has {len(columns)} columns and more values in {len(long)} of {len(offsets)} rows, the first at line "
            f"{long[0]}; put texts with commas in double quotes, or separate columns with tabs in a file called .tsv"
        )
    return offsets, sizes, columns


def _scan_json(shard: str, stat: FileStat, *, stop: bool = False) -> tuple[list[int], list[int], list[str]]:
    """stop: at the first row whose fields are known."""
    offsets, sizes, columns = [], [], None
    for offset, line in _lines(shard, stat):
        if not line.strip():
            continue
        if columns is None and len(offsets) < _LOOKED_AT_ROWS:
            fields, problems = parse_object(line.removeprefix(_BOM))
            columns = None if "invalid_json" in problems else sorted(fields)
        offsets.append(offset)
        sizes.append(len(line))
        if stop and columns is not None:
            break
    if offsets and columns is None:
        raise UserError(f"list {shard!r} does not begin with a JSON object; write one per line")
    return offsets, sizes, columns or []


def _parse_csv(path: str, line: bytes, columns: Sequence[str]) -> tuple[dict, list[str]]:
    problems = []
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", "replace")
        problems.append("invalid_utf8")
    values = next(_rows(path, io.StringIO(text, newline="")), [])
    if any(values[len(columns) :]):
        return {}, [*problems, "invalid_csv"]
    fields = dict(zip(columns, values, strict=False))
    return {name: value for name, value in fields.items() if not problems or "\ufffd" not in value}, problems


def read_image(path: str) -> tuple[bytes | None, tuple[str, ...]]:
    """An image file, and the problem "missing_image" where there is none.

    Raises:
      OSError: the storage fails, or it is not a path.
    """
    try:
        return files.read_whole(path), ()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None, ("missing_image",)
    except ValueError as error:  # not a path: a NUL, an unknown protocol
        raise OSError(f"{path!r} does not name an image: {error}") from error
