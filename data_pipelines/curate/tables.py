"""The tables that stages hand to each other, and how files come to be: whole, under a temporary name first.

The trap: a name that a killed run left half-written would be taken for a result. Only `os.replace` gives a file its name.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_PLACE = [("offset", pa.int64()), ("bytes", pa.int64())]
SLOTS = ("image", "txt", "json")

# One row a pair. `hashes`: uint64s of the whole picture and its crops; `thumbnail`: a JPEG of 64 x 64.
SCAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int32()),
        *((f"{slot}_{name}", kind) for slot in SLOTS for name, kind in _PLACE),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("language", pa.string()),
        ("sha256", pa.string()),
        ("pixel_hash", pa.binary(16)),
        ("hashes", pa.binary()),
        ("thumbnail", pa.binary()),
        ("reasons", pa.list_(pa.string())),
    ]
)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes the name when the block ends, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_table(path: Path, table: pa.Table) -> None:
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a table on disk; {} when it is not there or cannot be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return {key.decode(): value.decode() for key, value in metadata.items()}
