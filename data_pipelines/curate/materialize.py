"""The kept pairs as new shards, for those who cannot stream through a manifest: tar or ArrayRecord.

A pair keeps its key, its image file byte for byte, and its fields; its `txt` is the canonical caption. Shard k holds the
kept pairs from k * pairs_per_shard on, in the order of the manifest.

The trap: keys repeat across shards. In a tar a repeated key would melt two pairs into one, so the second gets a number.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from data_pipelines.records import Pair
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.shards import ShardedSource
from data_pipelines.sources.writing import ArrayRecordWriter, TarWriter

PAIRS_PER_SHARD = 10_000


def materialize(
    manifest: Path,
    out: Path,
    kind: Literal["tar", "arrayrecord"],
    *,
    pairs_per_shard: int = PAIRS_PER_SHARD,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> list[Path]:
    """Writes OUT/00000.tar … (or .arrayrecord), all that are there, and returns their paths.

    Raises:
      FileNotFoundError: a shard of the manifest is gone.
      ValueError: a shard of the manifest has changed since.
    """
    kept = int(pq.read_table(manifest, columns=["keep"])["keep"].to_numpy().sum())
    writer = {"tar": TarWriter, "arrayrecord": ArrayRecordWriter}[kind]
    pairs, paths = _kept_pairs(manifest), []
    for first in range(0, kept, pairs_per_shard):
        path = out / f"{len(paths):05d}.{kind}"
        seen: dict[str, int] = {}
        with writer(path) as shard:
            for pair in itertools.islice(pairs, pairs_per_shard):
                seen[pair.key] = repeats = seen.get(pair.key, -1) + 1
                shard.write(dataclasses.replace(pair, key=f"{pair.key}-{repeats}") if repeats else pair)
        paths.append(path)
        progress("materialize", min(first + pairs_per_shard, kept), kept)
    for left_over in set(out.glob(f"[0-9]*.{kind}")) - set(paths):  # of an earlier run that kept more
        left_over.unlink()
    return paths


def _kept_pairs(manifest: Path) -> Iterator[Pair]:
    """In order, each shard open for as long as it is read."""
    shard, source = None, None
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(columns=["key", "shard", "index", "caption", "keep"]):
            for row in batch.to_pylist():
                if not row["keep"]:
                    continue
                if row["shard"] != shard:
                    shard, source = row["shard"], _open(row["shard"])
                pair = source[row["index"]] if row["index"] < len(source) else None
                if pair is None or pair.key != row["key"] or pair.image is None:
                    raise ValueError(
                        f"shard {shard!r} is not the one that {str(manifest)!r} was made from; curate again"
                    )
                yield dataclasses.replace(pair, fields={**pair.fields, "txt": row["caption"]})


def _open(shard: str) -> ShardedSource:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a shard is cut, the funnel has told
        return open_source(shard)
