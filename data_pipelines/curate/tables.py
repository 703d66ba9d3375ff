"""The tables that stages pass to each other."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file

SLOTS = ("image", "txt", "json")
EXTENTS = [(f"{slot}_{name}", pa.int64()) for slot in SLOTS for name in ("offset", "bytes")]
CONTENT = [("format", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
CONTENT += [(name, pa.string()) for name in ("caption", "language", "sha256")]

# One row per pair. hashes: uint64s of the whole image and its crops; thumbnail: a JPEG of 64 x 64.
SCAN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int32()),
        *EXTENTS,
        *CONTENT,
        ("pixel_hash", pa.binary(16)),
        ("hashes", pa.binary()),
        ("thumbnail", pa.binary()),
        ("reasons", pa.list_(pa.string())),
    ]
)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table; the file appears whole or not at all."""
    with new_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a table on disk; {} if there is none or it cannot be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return {key.decode(): value.decode() for key, value in metadata.items()}
