"""Pass 1: what one shard holds and what is wrong with each of its pairs, as a table on disk.

A scan is a pure function of (shard, thresholds), and its file carries a digest of both. So a run that was killed goes on
with the shards that are missing, and a shard or a threshold that changed is scanned again.

A shard may be cut, empty, or not a shard at all. That is a finding (`problem`) and not a failure: its whole pairs are used.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines import text_ops
from data_pipelines.curate import captions, image_hashes
from data_pipelines.curate.config import NO_IMAGE, CurateConfig, in_order
from data_pipelines.curate.tables import SCAN_SCHEMA, SLOTS, read_metadata, write_table
from data_pipelines.errors import UserError
from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import files
from data_pipelines.sources.blocks import InOrder
from data_pipelines.sources.opening import open_source, open_with_any_column
from data_pipelines.sources.shards import ShardedSource

_VERSION = 3
# the thresholds that a scan depends on
_SCAN_FIELDS = ("captions", "max_image_pixels", "animated", "min_side_px", "max_aspect", "languages")
_SCAN_FIELDS += ("min_chars", "max_chars", "min_words", "markup", "boilerplate")
_ROWS_PER_GROUP = 1024


@dataclass(frozen=True)
class ScanTask:
    """One shard to scan. out: the Parquet file to write; crops: see `image_hashes`; any_column: config.image_column is used
    where the shard has it, as it may be that of another set."""

    shard: str
    out: Path
    config: CurateConfig
    crops: tuple[image_hashes.Box, ...] = image_hashes.CROPS
    any_column: bool = False


@dataclass(frozen=True)
class ScanResult:
    """problem: what is wrong with the shard as a whole, or None. reused: whether the table was there already."""

    shard: str
    pairs: int
    problem: str | None
    reused: bool


def scan_shard(task: ScanTask) -> ScanResult:
    """Scans a shard into `task.out`, unless a valid scan is there already.

    Raises:
      FileNotFoundError, PermissionError: the shard does not exist or is not readable.
    """
    source, problem = _open(task)
    digest = _digest(task, source)
    found = read_metadata(task.out)
    if found.get("digest") == digest and not int(found.get("unread", 0)):
        return ScanResult(task.shard, int(found["pairs"]), found.get("problem") or None, True)
    pairs = len(source) if source is not None else 0
    batches = list(_batches(source, task)) if source is not None else []
    table = pa.Table.from_batches(batches, SCAN_SCHEMA) if batches else SCAN_SCHEMA.empty_table()
    # The next run scans this shard again if storage failed to deliver some of its pairs.
    unread = sum("unreadable" in reasons for reasons in table["reasons"].to_pylist())
    metadata = {"digest": digest, "pairs": str(pairs), "problem": problem or "", "shard": task.shard}
    metadata["unread"] = str(unread)
    write_table(task.out, table.replace_schema_metadata(metadata))
    return ScanResult(task.shard, pairs, problem, False)


def _open(task: ScanTask) -> tuple[ShardedSource | None, str | None]:
    fields = {field.partition(".")[0] for field in task.config.captions}
    open_shard = open_with_any_column if task.any_column else open_source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `problem` tells what they would
        try:
            source = open_shard(task.shard, image=task.config.image_column, fields=fields, required=False)
        except (UserError, ShardLost) as error:
            return None, str(error)
    return source, "; ".join(source.faults()) or None


def _digest(task: ScanTask, source: ShardedSource | None) -> str:
    """Identifies a shard as it is now and everything that its scan depends on."""
    try:
        stat = files.stat(task.shard)
        version = [stat.size, stat.version]
    except UserError:  # empty, or a folder: `problem` reports it
        version = []
    content = source.fingerprint if source is not None else ""
    inputs = [_VERSION, task.config.digest(_SCAN_FIELDS), task.crops, version, content]
    inputs += [task.config.image_column] if task.config.image_column else []
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _batches(source: ShardedSource, task: ScanTask) -> Iterator[pa.RecordBatch]:
    with_json = any("json" in source.member_extents(index) for index in range(min(len(source), 100)))
    in_order = InOrder(source)
    for start in range(0, len(source), _ROWS_PER_GROUP):
        indexes = range(start, min(start + _ROWS_PER_GROUP, len(source)))
        rows = [_scan_pair(in_order, index, source.member_extents(index), task, with_json) for index in indexes]
        yield pa.RecordBatch.from_pylist(rows, SCAN_SCHEMA)


def _scan_pair(pairs: InOrder, index: int, extents: Mapping, task: ScanTask, with_json: bool) -> dict:
    row: dict = dict.fromkeys(SCAN_SCHEMA.names)
    for slot in SLOTS:
        row[f"{slot}_offset"], row[f"{slot}_bytes"] = extents.get(slot, (-1, 0))
    try:
        pair = pairs[index]
    except OSError:
        return row | {"key": "", "index": index, "caption": "", "language": captions.UNKNOWN, "reasons": ["unreadable"]}
    faults = list(pair.problems)
    if with_json and "json" not in extents:
        faults.append("missing_json")
    caption, language, text_faults = _examine_text(pair, task.config)
    image, image_faults = _examine_image(pair.image, task)
    faults = {*faults, *text_faults, *image_faults}
    row |= {
        "key": pair.key,
        "index": index,
        "caption": caption,
        "language": language,
        "reasons": in_order(faults),
        "sha256": hashlib.sha256(pair.image).hexdigest() if pair.image else None,
    }
    if image is not None:
        row |= {"format": image.format, "width": image.width, "height": image.height}
    if image is not None and image.reason is None:
        row |= {"pixel_hash": image.pixels, "thumbnail": image.thumbnail}
        row["hashes"] = image.hashes.astype("<u8").tobytes()
    return row


def _examine_text(pair: Pair, config: CurateConfig) -> tuple[str, str, list[str]]:
    """The canonical caption, its language, and the rules that apply to it."""
    raw = next(filter(None, (_raw_caption(pair, field) for field in config.captions)), None)
    if raw is None:
        present = any(text_ops.lookup(pair.fields, field) is not None for field in config.captions)
        unread = "invalid_utf8" in pair.problems  # a fault of its own
        return "", captions.UNKNOWN, ["empty_text"] if present else [] if unread else ["missing_text"]
    caption, found = captions.canonical(raw)
    language = captions.identify_language(caption)
    faults = [fault for fault in found if fault != "markup" or config.markup]
    return caption, language, faults + captions.text_faults(caption, language, config)


def _raw_caption(pair: Pair, field: str) -> str | None:
    """The first stored caption in a field that is not only white space, or None."""
    value = text_ops.lookup(pair.fields, field)
    values = value if isinstance(value, list | tuple) else [value]
    return next((text for text in values if isinstance(text, str) and text.strip()), None)


def _examine_image(data: bytes | None, task: ScanTask) -> tuple[image_hashes.ImageInfo | None, list[str]]:
    if data is None:
        return None, ["missing_image"]
    image = image_hashes.examine(data, max_pixels=task.config.max_image_pixels, crops=task.crops)
    if image.reason is not None:
        assert image.reason in NO_IMAGE, image.reason
        return image, [image.reason]
    faults = ["animated"] if image.animated and task.config.animated else []
    short, long = sorted((image.width, image.height))
    if short < task.config.min_side_px:
        faults.append("too_small")
    if task.config.max_aspect and long > task.config.max_aspect * short:
        faults.append("extreme_aspect")
    return image, faults


def hashes_of(column: pa.Array | pa.ChunkedArray, count: int) -> np.ndarray:
    """The perceptual hashes in a column of a scan. column: binary [n] without nulls -> uint64 [n, count]"""
    data = b"".join(column.to_pylist())
    return np.frombuffer(data, "<u8").reshape(-1, count)
