"""Curation from end to end: shards and thresholds in; DIR/manifest.parquet, funnel.json and report.html out.

    DIR/scan/      one table a shard, kept: what a run that was killed does not do again
    DIR/against/   the same of the evaluation sets
    DIR/scores/    scores of a model, one table a shard, kept
    DIR/.work-*/   the global stages, made anew by each run and deleted after it

With an engine of many machines DIR is on storage that all of them share: what a stage reads, another machine wrote.

The trap: a shard that cannot be read in the middle of a run must not cost the others' work: all that can be scanned is,
then one error names it. Cut and empty shards are no such thing: they are findings.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_pipelines.atomic import new_file
from data_pipelines.curate import duplicates, leaks, manifest, pictures, repeated_captions, scores
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import Engine
from data_pipelines.curate.layout import Work, write_layout
from data_pipelines.curate.manifest import MANIFEST_SCHEMA, Judging, Limits
from data_pipelines.curate.report import write_report
from data_pipelines.curate.scan import ScanResult, ScanTask, scan_shard
from data_pipelines.curate.scoring import Scoring, embed_protected, embedding_leaks, score_group
from data_pipelines.curate.shuffle import Exchange
from data_pipelines.errors import UserError
from data_pipelines.sources.files import expand_shards

Progress = Callable[[str, int, int], None]  # stage, done, of
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
    """Curates and returns the funnel, as in funnel.json.

    Args:
      shards, against: patterns of shards to judge, and of evaluation sets that must not be among them.
      scorer: a model, needed by `min_score` and `top_share`, used for leaks as well when given. See `scoring`.
      concepts: file of concepts, needed by `concept_cap`.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      ValueError: what the thresholds need is missing; no pair is readable; or shards failed, the others are scanned.
    """
    _check_needs(config, scorer, concepts)
    out, concepts = out.absolute(), concepts and os.path.abspath(concepts)  # workers may stand in another folder
    names = expand_shards(shards)
    protected = expand_shards(against) if against else []
    run = _Run(out, engine, progress)
    results = run.scan(names, "scan", config, pictures.CROPS)
    against_results = run.scan(protected, "against", config, pictures.EVAL_CROPS)
    for result in against_results:
        if not result.pairs:  # a set that is not there protects nothing
            raise UserError(f"evaluation {result.problem or f'shard {result.shard!r} is empty'}")
    for left_over in out.glob(f".work-{'?' * _NAME_CHARS}"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    # A new name each time: workers remember files by name, and tasks of a killed run may still write to theirs.
    work = Work(out / f".work-{uuid.uuid4().hex[:_NAME_CHARS]}", config, scored=scorer is not None)
    work.folder.mkdir(parents=True)
    try:
        if not sum(result.pairs for result in results):
            raise UserError(f"no pair in {len(names)} shards can be read: {results[0].problem}")
        tables = [_table(out, "scan", name) for name in names]
        write_layout(work, names, tables, [result.pairs for result in results])
        verdicts = run.verdicts(work, protected, scorer)
        judging = Judging(work, verdicts, tuple(protected))
        stats = run.finish(judging, concepts)
        if stats["applied"].get("missing_text") == stats["pairs"]:
            raise UserError(f"no pair has a caption in {', '.join(config.captions)}; name its field with --captions")
        funnel = _funnel(stats, results, against_results, config)
        write_report(out / "report.html", funnel, stats["examples"], names)
        with new_file(out / FUNNEL_FILE) as partial:
            partial.write_text(json.dumps(funnel, indent=1, ensure_ascii=False) + "\n")
        _write_manifest(judging, out / "manifest.parquet")  # last: where it is new, so is the rest
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)
    return funnel


def _check_needs(config: CurateConfig, scorer: scores.Scorer | None, concepts: str | None) -> None:
    """Raises ValueError where a threshold lacks what it needs, or what is given has no use."""
    if config.needs_scores and scorer is None:
        raise UserError("min_score and top_share need a model that scores pairs: give one with --model SRC")
    if config.concept_cap is not None:
        if concepts is None:
            raise UserError("concept_cap needs a list of concepts: give a file, one a line, with --concepts FILE")
        scores.read_concepts(concepts)
    elif concepts is not None:
        raise UserError(f"--concepts {concepts} is for the balance of concepts: add --concept-cap 20000 or the like")


class _Run:
    """The stages of one run, with who computes and who watches."""

    def __init__(self, out: Path, engine: Engine, progress: Progress):
        self.out, self.engine, self.progress = out, engine, progress

    def scan(
        self, names: list[str], kind: str, config: CurateConfig, crops: tuple[pictures.Box, ...]
    ) -> list[ScanResult]:
        """Scans all shards that need it. Raises ValueError naming those that failed, after all others are done."""
        tasks = [ScanTask(name, _table(self.out, kind, name), config, crops) for name in names]
        found = dict(self._watched(self.engine.map(scan_shard, tasks), kind, len(tasks)))
        failures = [(task.shard, error) for task, error in found.items() if isinstance(error, Exception)]
        if failures:
            some = "; ".join(
                f"{shard!r}: {' '.join(str(error).split())}" for shard, error in failures[:_NAMED_FAILURES]
            )
            raise UserError(
                f"{len(failures)} of {len(names)} shards failed: {some}; the others are scanned, mend these and run again"
            )
        return [found[task] for task in tasks]

    def verdicts(self, work: Work, protected: list[str], scorer: scores.Scorer | None) -> tuple[Exchange, ...]:
        """All stages that need the whole corpus; returns where their verdicts lie."""
        found = []
        if scorer is not None:
            found.append(self._score(work, protected, scorer))
        if work.config.duplicates != "off":
            self._groups("copies: contents", duplicates.scatter_contents, work)
            self._buckets("copies: same", duplicates.judge_contents, work, duplicates.exact_exchange(work))
            self._groups("copies: hashes", duplicates.scatter_windows, work)
            self._buckets("copies: alike", duplicates.meet_in_windows, work, duplicates.windows_exchange(work))
            self._groups("copies: chosen", duplicates.request_thumbnails, work)
            self._groups("copies: thumbnails", duplicates.attach_thumbnails, work)
            self._groups("copies: confirm", duplicates.confirm_candidates, work)
            found += [duplicates.exact_verdicts(work), duplicates.near_verdicts(work)]
        if work.config.max_caption_pictures:
            self._groups("captions", repeated_captions.scatter_captions, work)
            self._buckets(
                "captions: repeated", repeated_captions.judge_captions, work, repeated_captions.captions_exchange(work)
            )
            found.append(repeated_captions.repeat_verdicts(work))
        if protected:
            folder = work.folder / "protected"
            leaks.build_index([_table(self.out, "against", name) for name in protected], folder)
            tasks = [(work, folder, group) for group in range(work.groups)]
            self._all("leaks", leaks.find_leaks, tasks)
            found.append(leaks.hash_leaks(work))
        return tuple(found)

    def finish(self, judging: Judging, concepts: str | None) -> dict:
        """Joins, aligns and counts; returns the counts."""
        work, groups = judging.work, range(judging.work.groups)
        self._all("join", manifest.judge, [(judging, group) for group in groups])
        limits = Limits(self._score_limits(judging), concepts, None)
        if work.config.concept_cap is not None:
            tasks = [(judging, group, concepts) for group in groups]
            counts = sum(np.load(path) for path in self._all("concepts", manifest.survey_concepts, tasks))
            path = work.folder / "concepts.npy"
            np.save(path, counts)
            limits = Limits(limits.scores, concepts, path)
        stats = manifest.new_stats()
        for path in self._all("manifest", manifest.finish, [(judging, group, limits) for group in groups]):
            manifest.add_stats(stats, json.loads(path.read_text()))
        return stats

    def _score_limits(self, judging: Judging) -> dict[str, float]:
        """Of each share group the score that `top_share` of its pairs reach."""
        share = judging.work.config.top_share
        if share is None:
            return {}
        upper = self._histograms(judging, None)
        places = {}
        for name, histogram in upper.items():
            places[name] = scores.bin_of(histogram, max(1, round(share * int(histogram.sum()))))
        lower = self._histograms(judging, {name: place for name, (place, _) in places.items()})
        keys = {name: (place << 16) | scores.bin_of(lower[name], rank)[0] for name, (place, rank) in places.items()}
        return {name: scores.unsortable(key) for name, key in keys.items()}

    def _histograms(self, judging: Judging, bins: dict[str, int] | None) -> dict[str, np.ndarray]:
        total: dict[str, np.ndarray] = {}
        tasks = [(judging, group, bins) for group in range(judging.work.groups)]
        for part in self._all("shares", manifest.survey_scores, tasks):
            for name, counts in part.items():
                histogram = total.setdefault(name, np.zeros(1 << 16, np.int64))
                for place, count in counts:
                    histogram[place] += count
        return {name: histogram for name, histogram in total.items() if histogram.any()}

    def _score(self, work: Work, protected: list[str], scorer: scores.Scorer) -> Exchange:
        """Scores every shard; returns the leaks that the embeddings show."""
        scoring = Scoring(
            work, scorer, tuple(protected), tuple(_table(self.out, "against", name) for name in protected)
        )
        numbers = range(len(protected))
        self._all("against: embedded", embed_protected, [(scoring, number) for number in numbers], with_model=True)
        self._all("scores", score_group, [(scoring, group) for group in range(work.groups)], with_model=True)
        return embedding_leaks(work)

    def _groups(self, stage: str, function: Callable, work: Work) -> None:
        self._all(stage, function, [(work, group) for group in range(work.groups)])

    def _buckets(self, stage: str, function: Callable, work: Work, exchange: Exchange) -> None:
        self._all(stage, function, [(work, bucket) for bucket in range(exchange.buckets)])

    def _all(self, stage: str, function: Callable, tasks: list, *, with_model: bool = False) -> list:
        """The results in the order of the tasks; the first failure is raised."""
        compute = self.engine.map_with_model if with_model else self.engine.map
        outcomes = compute(_Numbered(function), list(enumerate(tasks)))
        indexed = {number: outcome for (number, _), outcome in self._watched(outcomes, stage, len(tasks))}
        results = [indexed[number] for number in range(len(tasks))]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _watched(self, outcomes: Iterator[tuple], stage: str, of: int) -> Iterator[tuple]:
        for done, outcome in enumerate(outcomes, 1):
            yield outcome
            self.progress(stage, done, of)


class _Numbered:
    """Calls a function with the second of (number, task)."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, numbered: tuple):
        return self.function(numbered[1])


def _table(out: Path, kind: str, shard: str) -> Path:
    """Where the scan of a shard lies, whatever other shards there are."""
    digest = hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return out / kind / f"{Path(shard).name}-{digest}.parquet"


def _write_manifest(judging: Judging, path: Path) -> None:
    with new_file(path) as partial, pq.ParquetWriter(partial, MANIFEST_SCHEMA, compression="zstd") as writer:
        for shard in range(len(judging.work.layout.shards)):
            table = pq.read_table(judging.finished(shard))
            if len(table):
                writer.write_table(table.cast(MANIFEST_SCHEMA))


def _funnel(stats: dict, results: list[ScanResult], protected: list[ScanResult], config: CurateConfig) -> dict:
    """What funnel.json says; scores only with a model."""
    before_after = {"languages": stats["languages"], "sides_px": stats["sides"]}
    if stats["scores"][0]:
        before_after["scores"] = stats["scores"]
    return {
        "pairs": stats["pairs"],
        "kept": stats["kept"],
        "taken": {rule: stats["taken"][rule] for rule in manifest.in_order(stats["taken"])},
        "applied": {rule: stats["applied"][rule] for rule in manifest.in_order(stats["applied"])},
        "shards": [{"shard": result.shard, "pairs": result.pairs, "problem": result.problem} for result in results],
        "against": [{"shard": result.shard, "pairs": result.pairs, "problem": result.problem} for result in protected],
        **{name: dict(zip(("before", "after"), counts, strict=True)) for name, counts in before_after.items()},
        "config": asdict(config),
    }
