"""The kept pairs as new shards, for loaders that cannot stream through a manifest: tar or ArrayRecord.

A pair keeps its key, the bytes of its image file, and its fields; its `txt` is the canonical caption. Shard k holds the kept
pairs from k * pairs_per_shard on, in the order of the manifest.

OUT/written.json lists the shards that were written here. If an earlier run wrote more, the surplus is removed; other files
are never touched.

The trap: keys repeat across shards. In a tar a repeated key would merge two pairs into one, so the second gets a number.
"""

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.errors import UserError
from data_pipelines.records import Pair
from data_pipelines.sources import files
from data_pipelines.sources.blocks import InOrder
from data_pipelines.sources.opening import open_with_any_column
from data_pipelines.sources.writing import ArrayRecordWriter, TarWriter

PAIRS_PER_SHARD = 10_000
_LISTING = "written.json"


def materialize(
    manifest: Path,
    out: Path,
    kind: Literal["tar", "arrayrecord"],
    *,
    image: str | None = None,
    pairs_per_shard: int = PAIRS_PER_SHARD,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> list[Path]:
    """Writes OUT/00000.tar … (or .arrayrecord) and returns the paths of all of them. image: as for `open_source`.

    Raises:
      FileNotFoundError: a shard of the manifest does not exist any more.
      UserError: a shard has changed since the manifest was made, or OUT holds files that no earlier run wrote.
    """
    kept, shards = _survey(manifest)
    check_place(out, shards)
    names = [f"{number:05d}.{kind}" for number in range(-(-kept // pairs_per_shard))]
    earlier = _read_listing(out)
    for name in set(names) - earlier:
        if (out / name).exists():
            raise UserError(
                f"{str(out / name)!r} was not written by an earlier run; move it or write to another folder"
            )
    _write_listing(out, earlier | set(names))
    writer = {"tar": TarWriter, "arrayrecord": ArrayRecordWriter}[kind]
    pairs, paths = _kept_pairs(manifest, image), []
    for first in range(0, kept, pairs_per_shard):
        path = out / names[len(paths)]
        seen: dict[str, int] = {}
        with writer(path) as shard:
            for pair in itertools.islice(pairs, pairs_per_shard):
                seen[pair.key] = repeats = seen.get(pair.key, -1) + 1
                shard.write(dataclasses.replace(pair, key=f"{pair.key}-{repeats}") if repeats else pair)
        paths.append(path)
        progress("materialize", min(first + pairs_per_shard, kept), kept)
    for left_over in earlier - set(names):
        (out / left_over).unlink(missing_ok=True)
        (out / f"{left_over}.idx").unlink(missing_ok=True)
    _write_listing(out, set(names))
    return paths


def check_place(out: Path, shards: Iterable[str]) -> None:
    """Raises UserError if new shards would replace files that no earlier run wrote."""
    inside = [shard for shard in shards if not files.is_remote(shard) and Path(shard).resolve().parent == out.resolve()]
    if inside:
        raise UserError(f"new shards go to {str(out)!r}, where {inside[0]!r} lies; write to another folder")
    if out.exists() and not (out / _LISTING).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"new shards go to {str(out)!r}, which holds other files; move them or write to another folder")


def _survey(manifest: Path) -> tuple[int, set[str]]:
    """The number of pairs that a manifest keeps, and its shards."""
    kept, shards = 0, set()
    with pq.ParquetFile(manifest, read_dictionary=["shard"]) as file:
        for batch in file.iter_batches(columns=["shard", "keep"]):
            kept += batch["keep"].true_count
            shards.update(batch["shard"].dictionary.to_pylist())
    return kept, shards


def _read_listing(out: Path) -> set[str]:
    """The shards of an earlier run, which may be removed: so nothing but names of files in OUT."""
    try:
        names = json.loads((out / _LISTING).read_text())
        if isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names):
            return set(names)
    except FileNotFoundError:
        return set()
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{str(out / _LISTING)!r} is damaged; remove the folder {str(out)!r}, its shards are written again")


def _write_listing(out: Path, names: set[str]) -> None:
    with new_file(out / _LISTING) as partial:
        partial.write_text(json.dumps(sorted(names)) + "\n")


def _kept_pairs(manifest: Path, image: str | None) -> Iterator[Pair]:
    """The kept pairs in order; each shard is open for as long as it is read."""
    shard, source = None, None
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(columns=["key", "shard", "index", "caption", "keep"]):
            for row in batch.to_pylist():
                if not row["keep"]:
                    continue
                if row["shard"] != shard:
                    shard, source = row["shard"], _open(row["shard"], image)
                pair = source[row["index"]] if row["index"] < len(source) else None
                if pair is None or pair.key != row["key"] or pair.image is None:
                    raise UserError(
                        f"shard {shard!r} is not the one that {str(manifest)!r} was made from; curate again"
                    )
                yield dataclasses.replace(pair, fields={**pair.fields, "txt": row["caption"]})


def _open(shard: str, image: str | None) -> InOrder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the funnel has reported cut shards
        return InOrder(open_with_any_column(shard, image=image))
