"""Curation from end to end: shards and thresholds in; DIR/manifest.parquet, funnel.json and report.html out,
and closest.parquet if there are evaluation sets.

    DIR/scan/      one table per shard, kept, so that a run that was killed does not scan it again
    DIR/against/   the same for the evaluation sets
    DIR/scores/    the scores of a model, one table per shard, kept
    DIR/.work-*/   the files of the global stages, written anew by each run and deleted after it

With an engine of many machines DIR is on storage that all of them share: one machine reads what another wrote.

A shard that cannot be read does not cost the work on the others: everything that can be scanned is scanned, then one error
names it. A cut or empty shard is not a failure but a finding.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate import closest, duplicates, image_hashes, leaks, manifest, repeated_captions, scores
from data_pipelines.curate.closest import CLOSEST_FILE
from data_pipelines.curate.config import CurateConfig, in_order
from data_pipelines.curate.engine import Engine
from data_pipelines.curate.layout import Stage, Work, write_layout
from data_pipelines.curate.manifest import MANIFEST_SCHEMA, JoinTask, Limits
from data_pipelines.curate.report import write_report
from data_pipelines.curate.scan import ScanResult, ScanTask, scan_shard
from data_pipelines.curate.scoring import Scoring, embed_protected, embedding_verdicts, score_group
from data_pipelines.curate.shuffle import Shuffle
from data_pipelines.curate.tables import write_table
from data_pipelines.errors import BAD_PATH, RunFailed, UserError
from data_pipelines.lock import hold
from data_pipelines.records import ShardLost
from data_pipelines.sources.files import expand_shards
from data_pipelines.sources.opening import open_source

Progress = Callable[[str, int, int], None]  # (stage, done, of)
_NAMED_FAILURES, _NAME_CHARS = 3, 12
FUNNEL_FILE = "funnel.json"


def curate(
    shards: str | Sequence[str],
    out: Path,
    *,
    config: CurateConfig,
    engine: Engine,
    against: str | Sequence[str] = (),
    scorer: scores.Scorer | None = None,
    concepts: str | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> dict:
    """Curates shards and returns the funnel, as in funnel.json. One run at a time holds `out` (see `lock`).

    Args:
      shards: patterns of the shards to curate.
      against: patterns of evaluation sets; pairs that show one of their images are dropped.
      scorer: a model; `min_score` and `top_share` need one, and leaks are searched with it as well. See `scoring`.
      concepts: a file of concepts, which `concept_cap` needs.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      UserError: a threshold lacks what it needs, no pair can be read, or some shards failed (the others are then scanned).
      RunFailed: another run holds `out`.
    """
    _check_needs(config, scorer, concepts)
    out, concepts = out.absolute(), concepts and os.path.abspath(concepts)  # workers may run in another folder
    names = expand_shards(shards)
    protected = expand_shards(against) if against else []
    with hold(out, fix="give another --out"):
        return _curate(_Run(out, engine, progress), names, protected, config, scorer, concepts)


def _curate(
    run: "_Run",
    names: list[str],
    protected: list[str],
    config: CurateConfig,
    scorer: scores.Scorer | None,
    concepts: str | None,
) -> dict:
    out = run.out
    # The image column that is named may be that of one side alone; of neither, it is a mistake.
    own, theirs = (_have_column(side, config.image_column) for side in (names[:1], protected))
    results = run.scan(names, "scan", config, image_hashes.CROPS, any_column=theirs and not own)
    against_results = run.scan(protected, "against", config, image_hashes.EVAL_CROPS, any_column=own and not theirs)
    for result in against_results:
        if not result.pairs:  # an empty set protects nothing
            raise UserError(f"evaluation {result.problem or f'shard {result.shard!r} is empty'}")
    for left_over in out.glob(f".work-{'?' * _NAME_CHARS}"):  # of runs that were killed
        shutil.rmtree(left_over, ignore_errors=True)
    for left_over in (*out.glob(".*.partial"), *out.glob("*/.*.partial")):
        left_over.unlink(missing_ok=True)
    # A new name each time: workers cache files by name, and tasks of a killed run may still write to its folder.
    work = Work(out / f".work-{uuid.uuid4().hex[:_NAME_CHARS]}", config, scored=scorer is not None)
    work.folder.mkdir(parents=True)
    try:
        if not sum(result.pairs for result in results):
            raise UserError(f"no pair in {len(names)} shards can be read: {results[0].problem}")
        tables = [_table(out, "scan", name) for name in names]
        write_layout(work, names, tables, [result.pairs for result in results])
        verdicts = run.verdicts(work, protected, scorer)
        join = JoinTask(work, verdicts, tuple(protected))
        stats = run.finalize(join, concepts)
        if stats["applied"].get("missing_text") == stats["pairs"]:
            raise UserError(f"no pair has a caption in {', '.join(config.captions)}; name the field with --captions")
        funnel = _funnel(stats, results, against_results, config)
        if protected:
            write_table(out / CLOSEST_FILE, run.closest(join))
        else:
            (out / CLOSEST_FILE).unlink(missing_ok=True)
        write_report(out / "report.html", funnel, stats["examples"], names)
        with new_file(out / FUNNEL_FILE) as partial:
            partial.write_text(json.dumps(funnel, indent=1, ensure_ascii=False) + "\n")
        _write_manifest(join, out / "manifest.parquet")  # last: if it is new, so is the rest
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)
    return funnel


def _have_column(shards: list[str], image: str | None) -> bool:
    """Whether a shard has an image column of that name."""
    for shard in shards if image is not None else ():
        with contextlib.suppress(UserError, ShardLost, OSError):  # scanning it tells what is wrong
            open_source(shard, image=image, fields=())
            return True
    return False


def _check_needs(config: CurateConfig, scorer: scores.Scorer | None, concepts: str | None) -> None:
    """Raises UserError if a threshold lacks what it needs, or if something given is not needed."""
    if config.needs_scores and scorer is None:
        raise UserError("min_score and top_share need a model that scores pairs: name one with --model SRC")
    if config.concept_cap is not None:
        if concepts is None:
            raise UserError("concept_cap needs a list of concepts: name a file with one per line, --concepts FILE")
        scores.read_concepts(concepts)
    elif concepts is not None:
        raise UserError(f"--concepts {concepts} is only used to balance concepts: add e.g. --concept-cap 20000")


class _Run:
    """The stages of one run, with the engine that computes them."""

    def __init__(self, out: Path, engine: Engine, progress: Progress):
        self.out, self.engine, self.progress = out, engine, progress

    def scan(
        self,
        names: list[str],
        kind: str,
        config: CurateConfig,
        crops: tuple[image_hashes.Box, ...],
        *,
        any_column: bool,
    ) -> list[ScanResult]:
        """Scans all shards that need it.

        Raises:
          UserError, RunFailed: the shards that failed, after all others are scanned: of bad input, or of the machine.
          Exception: as it was raised, where it is a fault of the code.
        """
        tasks = [ScanTask(name, _table(self.out, kind, name), config, crops, any_column) for name in names]
        found = dict(self._watched(self.engine.map(scan_shard, tasks), kind, len(tasks)))
        failures = [(task.shard, error) for task, error in found.items() if isinstance(error, Exception)]
        for shard, error in failures:
            if not isinstance(error, UserError | RunFailed | OSError):
                error.add_note(f"while shard {shard!r} was scanned")
                raise error
        if failures:
            machine = any(not isinstance(error, (UserError, *BAD_PATH)) for _, error in failures)
            some = "; ".join(
                f"{shard!r}: {' '.join(str(error).split())}" for shard, error in failures[:_NAMED_FAILURES]
            )
            raise (RunFailed if machine else UserError)(
                f"{len(failures)} of {len(names)} shards failed: {some}; the others are scanned, fix these and run again"
            )
        return [found[task] for task in tasks]

    def verdicts(self, work: Work, protected: list[str], scorer: scores.Scorer | None) -> tuple[Shuffle, ...]:
        """Applies every rule that needs the whole corpus. -> where their verdicts are"""
        stages: list[Stage] = []
        found: list[Shuffle] = []
        if scorer is not None:
            self._score(work, protected, scorer)
            found.append(embedding_verdicts(work))
        if work.config.duplicates != "off":
            stages += duplicates.STAGES
            found += [duplicates.exact_verdicts(work), duplicates.near_verdicts(work)]
        if work.config.max_caption_pictures:
            stages += repeated_captions.STAGES
            found.append(repeated_captions.caption_verdicts(work))
        if protected:
            leaks.build_index(work, [_table(self.out, "against", name) for name in protected])
            stages += leaks.STAGES
            found.append(leaks.hash_verdicts(work))
        for stage in stages:
            self._all(stage.name, stage.compute, stage.tasks(work))
        return tuple(found)

    def finalize(self, join: JoinTask, concepts: str | None) -> dict:
        """Joins the verdicts, applies the alignment rules and returns the counts."""
        groups = range(join.work.groups)
        self._all("join", manifest.join_verdicts, [(join, group) for group in groups])
        limits = Limits(self._score_limits(join), concepts, None)
        if join.work.config.concept_cap is not None:
            tasks = [(join, group, concepts) for group in groups]
            counts = sum(np.load(path) for path in self._all("concepts", manifest.survey_concepts, tasks))
            path = join.work.folder / "concepts.npy"
            np.save(path, counts)
            limits = Limits(limits.scores, concepts, path)
        stats = manifest.new_stats()
        for path in self._all("manifest", manifest.finalize, [(join, group, limits) for group in groups]):
            manifest.add_stats(stats, json.loads(path.read_text()))
        return stats

    def closest(self, join: JoinTask) -> pa.Table:
        """The kept image that is closest to each evaluation image. -> the rows of closest.parquet"""
        for stage in closest.STAGES:
            paths = self._all(stage.name, stage.compute, [(join, n) for _, n in stage.tasks(join.work)])
        return closest.gather(join, paths, [_table(self.out, "against", name) for name in join.protected])

    def _score_limits(self, join: JoinTask) -> dict[str, float]:
        """The score that `top_share` of the pairs of each share group reach."""
        share = join.work.config.top_share
        if share is None:
            return {}
        upper = {
            name: scores.bin_of(histogram, max(1, round(share * int(histogram.sum()))))
            for name, histogram in self._histograms(join, None).items()
        }
        lower = self._histograms(join, {name: place for name, (place, _) in upper.items()})
        keys = {name: (place << 16) | scores.bin_of(lower[name], rank)[0] for name, (place, rank) in upper.items()}
        return {name: scores.unsortable(key) for name, key in keys.items()}

    def _histograms(self, join: JoinTask, bins: dict[str, int] | None) -> dict[str, np.ndarray]:
        total: dict[str, np.ndarray] = {}
        tasks = [(join, group, bins) for group in range(join.work.groups)]
        for part in self._all("shares", manifest.survey_scores, tasks):
            for name, counts in part.items():
                histogram = total.setdefault(name, np.zeros(1 << 16, np.int64))
                for place, count in counts:
                    histogram[place] += count
        return {name: histogram for name, histogram in total.items() if histogram.any()}

    def _score(self, work: Work, protected: list[str], scorer: scores.Scorer) -> None:
        """Embeds the evaluation sets and scores every shard."""
        tables = tuple(_table(self.out, "against", name) for name in protected)
        scoring = Scoring(work, scorer, tuple(protected), tables)
        shards, groups = ([(scoring, number) for number in range(count)] for count in (len(protected), work.groups))
        self._all("against: embedded", embed_protected, shards, with_model=True)
        self._all("scores", score_group, groups, with_model=True)

    def _all(self, stage: str, function: Callable, tasks: list[tuple], *, with_model: bool = False) -> list:
        """Calls a function with each task. -> the results in the order of the tasks; the first failure is raised"""
        compute = self.engine.map_with_model if with_model else self.engine.map
        outcomes = compute(functools.partial(_call, function), [(number, *task) for number, task in enumerate(tasks)])
        indexed = {number: outcome for (number, *_), outcome in self._watched(outcomes, stage, len(tasks))}
        results = [indexed[number] for number in range(len(tasks))]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _watched(self, outcomes: Iterator[tuple], stage: str, of: int) -> Iterator[tuple]:
        for done, outcome in enumerate(outcomes, 1):
            yield outcome
            self.progress(stage, done, of)


def _call(function: Callable, numbered: tuple) -> Any:
    """Calls a function with what follows the number of its task."""
    return function(*numbered[1:])


def _table(out: Path, kind: str, shard: str) -> Path:
    """The file with the scan of a shard; it does not depend on the other shards."""
    digest = hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return out / kind / f"{Path(shard).name}-{digest}.parquet"


def _write_manifest(join: JoinTask, path: Path) -> None:
    with new_file(path) as partial, pq.ParquetWriter(partial, MANIFEST_SCHEMA, compression="zstd") as writer:
        for shard in range(len(join.work.layout.shards)):
            table = pq.read_table(join.final(shard))
            if len(table):
                writer.write_table(table.cast(MANIFEST_SCHEMA))


def _funnel(stats: dict, results: list[ScanResult], protected: list[ScanResult], config: CurateConfig) -> dict:
    """The content of funnel.json; it has scores only with a model."""
    before_after = {"languages": stats["languages"], "sides_px": stats["sides"]}
    if stats["scores"][0]:
        before_after["scores"] = stats["scores"]
    return {
        "pairs": stats["pairs"],
        "kept": stats["kept"],
        "taken": {rule: stats["taken"][rule] for rule in in_order(stats["taken"])},
        "applied": {rule: stats["applied"][rule] for rule in in_order(stats["applied"])},
        **{
            name: [{"shard": scan.shard, "pairs": scan.pairs, "problem": scan.problem} for scan in scans]
            for name, scans in (("shards", results), ("against", protected))
        },
        **{name: dict(zip(("before", "after"), counts, strict=True)) for name, counts in before_after.items()},
        "config": asdict(config),
    }
