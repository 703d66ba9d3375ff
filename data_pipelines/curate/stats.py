"""What shards hold, without comparing pairs with each other: formats, languages, sizes, faults."""

import collections
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import Engine
from data_pipelines.curate.manifest import side_label
from data_pipelines.curate.scan import ScanTask, scan_shard
from data_pipelines.errors import UserError
from data_pipelines.sources.files import expand_shards

_MANY_WORDS = 20


def describe(
    shards: str | Sequence[str],
    *,
    captions: Sequence[str] = ("txt",),
    image_column: str | None = None,
    engine: Engine,
    progress: Callable[[str, int, int], None] = lambda stage, done, of: None,
) -> dict:
    """Counts over every pair: {pairs, shards, problems, formats, languages, sides_px, words, faults}.

    captions: the fields to take the caption from; the first that a pair has is used.
    image_column: the column that holds the image; None finds it.

    Raises:
      FileNotFoundError: a pattern matches nothing, or a shard does not exist.
      UserError: no pair can be read.
    """
    names, config = expand_shards(shards), CurateConfig(captions=tuple(captions), image_column=image_column)
    counts = {name: collections.Counter() for name in ("formats", "languages", "sides_px", "words", "faults")}
    pairs, problems = 0, {}
    with tempfile.TemporaryDirectory(prefix="siglip-stats-") as folder:
        tasks = [ScanTask(name, Path(folder) / f"{number}.parquet", config) for number, name in enumerate(names)]
        for done, (task, result) in enumerate(engine.map(scan_shard, tasks), 1):
            progress("scan", done, len(tasks))
            if isinstance(result, Exception):
                raise result
            pairs += result.pairs
            if result.problem:
                problems[task.shard] = result.problem
            _count(counts, task.out)
            task.out.unlink()
    if not pairs:
        raise UserError(f"no pair in {len(names)} shards can be read: {problems[names[0]]}")
    counted = {name: dict(counter) for name, counter in counts.items()}
    return {"pairs": pairs, "shards": len(names), "problems": [problems[n] for n in names if n in problems]} | counted


def _count(counts: dict[str, collections.Counter], path: Path) -> None:
    for row in pq.read_table(path, columns=["format", "width", "height", "caption", "language", "reasons"]).to_pylist():
        counts["formats"][row["format"] or ""] += 1
        counts["languages"][row["language"]] += 1
        counts["words"][str(min(len(row["caption"].split()), _MANY_WORDS))] += 1
        counts["faults"].update(row["reasons"])
        if row["width"]:
            counts["sides_px"][side_label(min(row["width"], row["height"]))] += 1
