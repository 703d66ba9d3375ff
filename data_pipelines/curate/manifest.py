"""The manifest: one row per pair, what it is, whether it is kept, and if not, why.

    join       scans and verdicts joined: every rule that applies so far
    survey     what the alignment rules need to know of the remaining pairs: histograms of scores, counts of concepts
    finalize   the alignment rules applied, `keep` and `reason` decided; counts and examples for the report

The trap: a share is taken of what the other rules keep, so it comes last; a tenth of a corpus that is half duplicates would
otherwise be a twentieth.
"""

import collections
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate import scores
from data_pipelines.curate.config import DUPLICATES, LEAKS, REPAIRS, CurateConfig, in_order
from data_pipelines.curate.layout import VERDICT, Work
from data_pipelines.curate.shuffle import Shuffle
from data_pipelines.curate.tables import CONTENT, EXTENTS, write_table

EXAMPLES = 10
_BEFORE_AND_AFTER = ("languages", "sides", "scores")
_SIZE_EDGES = (0, 16, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 1 << 30)

# duplicate_of, leak_of: SHARD#INDEX of the pair whose image it shows, in the corpus and in an evaluation set.
MANIFEST_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("index", pa.int32()),
        *EXTENTS,
        *CONTENT,
        ("pixel_hash", pa.string()),
        ("perceptual_hash", pa.uint64()),
        ("score", pa.float32()),
        ("leak_similarity", pa.float32()),
        ("duplicate_of", pa.string()),
        ("leak_of", pa.string()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
        ("reasons", pa.list_(pa.string())),
    ]
)
_JOINED_SCHEMA = pa.schema(
    [field for field in MANIFEST_SCHEMA if field.name not in ("keep", "reason")] + [("thumbnail", pa.binary())]
)


@dataclass(frozen=True)
class JoinTask:
    """What is joined. verdicts: the rules' verdicts by group; protected: the evaluation shards, for `leak_of`."""

    work: Work
    verdicts: tuple[Shuffle, ...]
    protected: tuple[str, ...]

    def joined(self, shard: int) -> Path:
        return self.work.folder / "joined" / self.work.layout.tables[shard].name

    def final(self, shard: int) -> Path:
        return self.work.folder / "final" / self.work.layout.tables[shard].name


@dataclass(frozen=True)
class Limits:
    """The limits of the alignment rules.

    Attributes:
      scores: the score that the top share of each `share_group` reaches.
      concepts, counts: the file of the concepts, and a file with the count of each, if they are balanced.
    """

    scores: dict[str, float]
    concepts: str | None
    counts: Path | None


def join_verdicts(join: JoinTask, group: int) -> None:
    """Joins the verdicts of one group to its scans."""
    layout = join.work.layout
    verdicts = pa.concat_tables([VERDICT.empty_table(), *(shuffle.read(group) for shuffle in join.verdicts)])
    by_shard: dict[int, list[dict]] = collections.defaultdict(list)
    for verdict in verdicts.to_pylist():
        by_shard[verdict["shard"]].append(verdict)
    for shard in layout.members(group):
        table = pq.read_table(layout.tables[shard]).replace_schema_metadata(None)
        columns = {name: table[name] for name in table.column_names}
        columns |= _joined(table["reasons"].to_pylist(), by_shard[shard], join)
        columns |= _scores(join.work, shard, len(table)) | {"shard": [layout.shards[shard]] * len(table)}
        columns["pixel_hash"] = [None if value is None else value.hex() for value in table["pixel_hash"].to_pylist()]
        hashes = (None if value is None else value[:8] for value in table["hashes"].to_pylist())
        columns["perceptual_hash"] = [value and int.from_bytes(value, "little") for value in hashes]
        write_table(join.joined(shard), pa.table(columns, _JOINED_SCHEMA))


def _joined(reasons: list[list[str]], verdicts: list[dict], join: JoinTask) -> dict[str, list]:
    """The columns that verdicts change. Of several better duplicates the best is named."""
    rules = [set(faults) for faults in reasons]
    best: dict[int, tuple] = {}
    leak_of: list[str | None] = [None] * len(rules)
    for verdict in verdicts:
        index = verdict["index"]
        rules[index].add(verdict["rule"])
        if verdict["rule"] in LEAKS:
            leak_of[index] = leak_of[index] or f"{join.protected[verdict['of_shard']]}#{verdict['of_index']}"
        elif verdict["rule"] in DUPLICATES:
            better = (-verdict["of_rank"], verdict["of_shard"], verdict["of_index"])
            best[index] = min(best.get(index, better), better)
    duplicate_of: list[str | None] = [None] * len(rules)
    for index, (_, of_shard, of_index) in best.items():
        duplicate_of[index] = f"{join.work.layout.shards[of_shard]}#{of_index}"
    return {"reasons": [in_order(found) for found in rules], "duplicate_of": duplicate_of, "leak_of": leak_of}


def survey_scores(join: JoinTask, group: int, bins: dict[str, int] | None) -> dict[str, list[tuple[int, int]]]:
    """Histograms of the scores of one group's remaining pairs, by `share_group`, as (bin, count).

    They are upper histograms if bins is None, else lower ones within the bin of each share group.
    """
    config = join.work.config
    histograms: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for shard in join.work.layout.members(group):
        table = pq.read_table(join.joined(shard), columns=["score", "language", "reasons"])
        left = np.array([_reason(faults) is None for faults in table["reasons"].to_pylist()], bool)
        score = table["score"].to_numpy()
        share_of = np.array([share_group(language, config) for language in table["language"].to_pylist()], object)
        left &= ~np.isnan(score)
        for name in sorted(set(share_of[left])):
            some = score[left & (share_of == name)]
            histogram = scores.upper_histogram(some) if bins is None else scores.lower_histogram(some, bins[name])
            for place in np.flatnonzero(histogram).tolist():
                histograms[name][place] += int(histogram[place])
    return {name: sorted(histogram.items()) for name, histogram in histograms.items()}


def survey_concepts(join: JoinTask, group: int, path: str) -> Path:
    """Counts the concepts in the captions of one group's remaining pairs. -> a file with int64 [concepts]"""
    concepts, longest = scores.read_concepts(path)
    counts = np.zeros(len(concepts), np.int64)
    for shard in join.work.layout.members(group):
        table = pq.read_table(join.joined(shard), columns=["caption", "reasons"]).to_pydict()
        for caption, faults in zip(table["caption"], table["reasons"], strict=True):
            if _reason(faults) is None:
                counts[scores.match_concepts(caption, concepts, longest)] += 1
    out = join.work.folder / "concepts" / f"{group:06d}.npy"
    with new_file(out) as partial, partial.open("wb") as file:
        np.save(file, counts)
    return out


def finalize(join: JoinTask, group: int, limits: Limits) -> Path:
    """Decides on the pairs of one group. -> a JSON file with the counts and the examples"""
    stats = new_stats()
    for shard in join.work.layout.members(group):
        table = pq.read_table(join.joined(shard))
        rows = table.select(["caption", "language", "score", "sha256", "reasons"]).to_pylist()
        reasons = [_with_alignment(row, join.work, limits) for row in rows]
        decided = [_reason(faults) for faults in reasons]
        table = table.drop_columns(["reasons"])
        table = table.append_column("reasons", pa.array(reasons, pa.list_(pa.string())))
        table = table.append_column("reason", pa.array(decided, pa.string()))
        table = table.append_column("keep", pa.array([reason is None for reason in decided]))
        _count(stats, shard, table)
        write_table(join.final(shard), table.select(MANIFEST_SCHEMA.names))
    out = join.work.folder / "stats" / f"{group:06d}.json"
    with new_file(out) as partial:
        partial.write_text(json.dumps(stats))
    return out


def share_group(language: str, config: CurateConfig) -> str:
    """The name of the pairs that a top share is taken of: those of a language, or all."""
    return language if config.share_per == "language" else "all"


def new_stats() -> dict:
    """Empty counts by name, and examples by rule: [draw, shard, index, caption, thumbnail in hex]."""
    stats = {"pairs": 0, "kept": 0, "taken": collections.Counter(), "applied": collections.Counter(), "examples": {}}
    return stats | {name: [collections.Counter(), collections.Counter()] for name in _BEFORE_AND_AFTER}


def add_stats(total: dict, part: dict) -> None:
    """Adds a part to the total; the result does not depend on the order of additions."""
    for name in ("pairs", "kept"):
        total[name] += part[name]
    for name in ("taken", "applied"):
        total[name].update(part[name])
    for name in _BEFORE_AND_AFTER:
        for counts, more in zip(total[name], part[name], strict=True):
            counts.update(more)
    for rule, examples in part["examples"].items():
        total["examples"][rule] = sorted(total["examples"].get(rule, []) + examples)[:EXAMPLES]


def side_label(side_px: int) -> str:
    """The lower edge, in pixels, of the size class that a side falls into."""
    edge = next(edge for edge in reversed(_SIZE_EDGES) if side_px >= edge)
    return str(edge)


def _reason(faults: list[str]) -> str | None:
    """The first rule that drops a pair."""
    return next((rule for rule in faults if rule not in REPAIRS), None)


def _with_alignment(row: dict, work: Work, limits: Limits) -> list[str]:
    found, config = list(row["reasons"]), work.config
    score = row["score"]
    if config.needs_scores and score is not None and not np.isnan(score):
        minimum = limits.scores.get(share_group(row["language"], config), -1.0)
        if score < (minimum if config.min_score is None else max(minimum, config.min_score)):
            found.append("low_score")
    if limits.counts is not None and _reason(row["reasons"]) is None:
        concepts, longest = scores.read_concepts(limits.concepts)
        matched = scores.match_concepts(row["caption"], concepts, longest)
        draw = scores.uniform_of(row["sha256"] or "", row["caption"])
        if not scores.keep_in_balance(matched, _read_counts(limits.counts), config.concept_cap, draw):
            found.append("crowded_concept")
    return in_order(found)


def _count(stats: dict, shard: int, table: pa.Table) -> None:
    names = ("index", "caption", "language", "width", "height", "score", "keep", "reason", "reasons", "thumbnail")
    drawn: dict[str, list] = collections.defaultdict(list)
    for row in table.select(names).to_pylist():
        stats["pairs"] += 1
        stats["kept"] += row["keep"]
        for rule in row["reasons"]:
            stats["applied"][rule] += 1
            draw = scores.uniform_of(rule, str(shard), str(row["index"]))
            thumbnail = row["thumbnail"].hex() if row["thumbnail"] else ""
            drawn[rule].append([draw, shard, row["index"], row["caption"][:200], thumbnail])
        if row["reason"]:
            stats["taken"][row["reason"]] += 1
        side = side_label(min(row["width"], row["height"])) if row["width"] else None
        score = None if row["score"] is None or np.isnan(row["score"]) else scores.score_label(row["score"])
        for name, value in zip(_BEFORE_AND_AFTER, (row["language"], side, score), strict=True):
            for counts in stats[name] if row["keep"] else stats[name][:1]:
                if value is not None:
                    counts[value] += 1
    for rule, examples in drawn.items():
        stats["examples"][rule] = sorted(stats["examples"].get(rule, []) + examples)[:EXAMPLES]


def _scores(work: Work, shard: int, count: int) -> dict:
    if not work.scored:
        return {"score": [None] * count, "leak_similarity": [None] * count}
    table = pq.read_table(scores.scores_path(work, shard))
    return {"score": table["score"], "leak_similarity": table["similarity"]}


@functools.lru_cache(1)
def _read_counts(path: Path) -> np.ndarray:
    return np.load(path)
