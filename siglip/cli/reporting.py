"""`siglip report`: a run on one page, or several beside each other, with other models' numbers; the last evaluation as a table.

What needs the model (scores, images found, mistakes) is computed from the run's newest checkpoint and its evaluation data, and
kept in WORKDIR/findings.json: later reports of the same checkpoint need neither.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_pipelines.curate.closest import read_closest
from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from siglip.atomic import write_atomically
from siglip.cli import BAD_INPUT
from siglip.cli.arguments import parse
from siglip.cli.data_sets import complete
from siglip.cli.evaluation import embedder_of, format_table, settings_of
from siglip.errors import UserError
from siglip.evaluation.embed import EmbeddedImages, Embedder
from siglip.evaluation.findings import (
    FEW_QUERIES,
    QUERIES,
    classified,
    confusion,
    counts_of,
    found_images,
    retrieval_findings,
)
from siglip.evaluation.labels import are_multi_label
from siglip.evaluation.results import dataset_name
from siglip.evaluation.retrieval import Retrieval, mean_of
from siglip.evaluation.zeroshot import ZeroShot
from siglip.training.config import EvalConfig
from siglip.trees import build_dataclass
from siglip.workdir import plots
from siglip.workdir.checkpoint import CHECKPOINTS_DIR
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE, read_config
from siglip.workdir.metrics import read_metrics
from siglip.workdir.report import Run, chances_of, final_results, sizes_of, write_report

logger = logging.getLogger(__name__)

FINDINGS_FILE = "findings.json"
SHOWN_PX = 72
_MAX_LANGUAGES = 3  # rows of one set that are printed
_MAIN_METRIC = "image_retrieval_recall@10"
_VERSION = 5


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write the page of a run, or of several beside each other, and print their last evaluations.

    Attributes:
        workdirs: workdirs of runs.
        baseline: JSON result files of other models, as `siglip eval --out` or CLIP_benchmark writes; more rows of the table.
        out: the page; without it WORKDIR/report.html, or comparison.html here for several runs.
    """

    workdirs: tyro.conf.Positional[tuple[str, ...]]
    baseline: tuple[str, ...] = ()
    out: str | None = None


def report_command(args: list[str]) -> None:
    """Prints the tables and the page's path."""
    options = parse(ReportArgs, args, prog="siglip report")
    workdirs = [Path(workdir) for workdir in options.workdirs]
    if not workdirs:
        raise UserError("name the workdir of a run, or of several: siglip report runs/a runs/b")
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {Path(options.out).parent} of --out does not exist; make it first")
    out = Path(options.out or (workdirs[0] / "report.html" if len(workdirs) == 1 else "comparison.html"))
    baselines = {name: row for path in options.baseline for name, row in _read_baseline(path).items()}
    runs = [_read_run(workdir, name) for workdir, name in zip(workdirs, _names(workdirs), strict=True)]
    path = write_report(out, runs, baselines=baselines)
    for run in runs:
        for task, datasets in final_results(run.lines).items():
            columns = {name for metrics in datasets.values() for name in metrics}
            rows = {name: {k: v for k, v in row.items() if k in columns} for name, row in baselines.items()}
            measured = _without_languages(_with_chance(run, task, datasets))
            print(format_table(measured | {name: row for name, row in rows.items() if row}))
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"report: {path}")


def _with_chance(run: Run, task: str, datasets: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The same rows, each with what chance gives beside t2i R@10, or beside the first metric whose chance is known."""
    rows: dict[str, dict[str, float]] = {}
    for name, metrics in datasets.items():
        chances, row = chances_of(metrics, sizes_of(run, task, name)), rows.setdefault(name, {})
        beside = _MAIN_METRIC if _MAIN_METRIC in chances else next(iter(chances), None)
        for metric, value in metrics.items():
            row[metric] = value
            if metric == beside:
                row["chance"] = chances[metric]
    if any("chance" in row for row in rows.values()):
        rows = {name: {**row, "chance": row.get("chance", math.nan)} for name, row in rows.items()}
    return rows


def _without_languages(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The same rows, but of a set in many languages only English and the mean of the others; the page has them all."""
    rows = dict(datasets)
    for mean in [name for name in datasets if name.endswith("-mean")]:
        base, english = mean.removesuffix("-mean"), f"{mean.removesuffix('-mean')}-en"
        others = [name for name in datasets if name.rpartition("-")[0] == base and name not in (mean, english)]
        if english in datasets and len(others) > _MAX_LANGUAGES:
            rows = {name: row for name, row in rows.items() if name not in (mean, *others)}
            rows[f"{base}-{len(others)} others"] = mean_of([datasets[name] for name in others])
    return rows


def _names(workdirs: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two have the same."""
    names = [workdir.resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def _read_baseline(path: str) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(Path(path).read_text())
        results = found if isinstance(found, list) else [found]  # a suite writes one in each file
        named = {f"{r['model']} ({r['dataset']})": r["metrics"] for r in results}
        return {name: {k: float(v) for k, v in own.items() if v is not None} for name, own in named.items()}
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a result file ({error!r}); `siglip eval … --out FILE.json` writes one"
        ) from None


def _read_run(workdir: Path, name: str) -> Run:
    lines, config = read_metrics(workdir), read_config(workdir, fields=["eval"])
    settings = build_dataclass(EvalConfig, config["eval"], where=f"{workdir / CONFIG_FILE}: eval")
    findings, notes = _findings(workdir, config, settings) if settings.tasks else ({}, [])
    if findings.get("retrieval"):
        findings["recall"] = _recall(final_results(lines).get("retrieval", {}), findings["retrieval"])
    manifests = _manifests(config.get("data", {}), where=f"{workdir / CONFIG_FILE}: data")
    funnels = {manifest: found for manifest in manifests if (found := _read_funnel(Path(manifest)))}
    return Run(name, lines, config, findings, funnels, notes, _closest(manifests))


def _manifests(data: Any, *, where: str) -> list[str]:
    """Those of a run's sources. Raises UserError: the settings of its data are damaged."""
    match data:
        case {"sources": [*sources]} if all(isinstance(source, Mapping) for source in sources):
            manifests = [source["manifest"] for source in sources if source.get("manifest")]
            if all(isinstance(manifest, str) for manifest in manifests):
                return manifests
        case {} if "sources" not in data:
            return []
    raise UserError(f"{where} has no list of sources with their manifests; restore it from a checkpoint's config/")


def _closest(manifests: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What `Run.closest` is, over the sources that have a manifest."""
    best: dict[tuple[str, int], dict] = {}
    for manifest in manifests:
        for row in read_closest(Path(manifest).parent):
            place = row["eval_shard"], row["eval_index"]
            best[place] = min(row, best.get(place, row), key=lambda row: row["distance"])
    sets: dict[str, list[dict[str, Any]]] = {}
    for row in best.values():
        names = {"evaluation": f"{row['eval_shard']}: {row['eval_key']}", "training": f"{row['shard']}: {row['key']}"}
        images = [plots.data_url(row[name] or b"", "jpeg") for name in ("eval_thumbnail", "thumbnail")]
        found = {"distance": row["distance"], "bits": row["bits"], "images": images} | names
        sets.setdefault(dataset_name(row["eval_shard"]), []).append(found)
    return sets


def _read_funnel(manifest: Path) -> dict[str, Any] | None:
    path = manifest.parent / "funnel.json"
    try:
        funnel = json.loads(path.read_text())
        return funnel if {"pairs", "kept", "applied", "taken"} <= funnel.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _recall(results: Mapping[str, Mapping[str, float]], found: Mapping[str, Any]) -> list[list[Any]]:
    """[language, t2i R@10, its standard error] of each language of one set, the best first but English before all."""
    rows = []
    for language, sizes in found["counts"].items():
        value = results.get(f"{found['dataset']}-{language}", {}).get(_MAIN_METRIC)
        if value is not None:
            rows.append([language, value, float(np.sqrt(value * (1 - value) / sizes["texts"]))])
    return sorted(rows, key=lambda row: (row[0] != "en", -row[1]))


def _findings(workdir: Path, config: Mapping[str, Any], settings: EvalConfig) -> tuple[dict[str, Any], list[str]]:
    """What the newest checkpoint scores, finds and mistakes, from WORKDIR/findings.json or the data; and what is left out."""
    steps = [int(path.name) for path in (workdir / CHECKPOINTS_DIR).glob("*") if path.name.isdigit()]
    made_from = {"version": _VERSION, "step": max(steps, default=None), "tasks": config["eval"]["tasks"]}
    path = workdir / FINDINGS_FILE
    if path.is_file():
        try:
            kept = json.loads(path.read_text())
            if kept["made_from"] == made_from:
                return kept["findings"], []
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged and is made again", path)
    if not steps:
        return {}, ["no checkpoint: scores, images found and mistakes are left out"]
    try:
        findings = _compute(workdir, config, settings)
    except (*BAD_INPUT, OSError) as error:
        return {}, [
            f"scores, images found and mistakes are left out, since the evaluation cannot be repeated here: {error}"
        ]
    write_atomically(path, json.dumps({"made_from": made_from, "findings": findings}))
    return findings, []


def _compute(workdir: Path, config: Mapping[str, Any], settings: EvalConfig) -> dict[str, Any]:
    """Runs the model over every set of retrieval, the first in detail, and of classification."""
    embedder = embedder_of(workdir, tokenizer=str(workdir / TOKENIZER_FILE), **settings_of(settings))
    findings: dict[str, Any] = {"zeroshot": {}}
    tasks = [complete(task) for task in settings.tasks]
    first, *others = [task for task in tasks if isinstance(task, Retrieval)] or [None]
    if first is not None:
        findings |= _of_retrieval(first, embedder, batch_size=config["batch_size"])
    findings["others"] = [_of_another(task, embedder) for task in others]
    for task in tasks:
        if isinstance(task, ZeroShot):
            images = _embedded(task, embedder, (task.label,))
            if are_multi_label(images.values[task.label]):
                continue  # none of the classes is the one that another was mistaken for
            classes, weights, _ = task.class_weights(embedder)
            rows, labels, taken = task.taking_part(images, classes)
            names = [classes.names[number] for number in taken]
            found = images.zimg[rows], weights[taken], labels, names
            examples = classified(*found, temperature=embedder.temperature)
            shown = [int(rows[one["image"]]) for one in examples]
            thumbs = _thumbs(task, sorted(set(shown)), images.index)
            examples = [one | {"image": thumbs[str(row)]} for one, row in zip(examples, shown, strict=True)]
            findings["zeroshot"][task.dataset] = confusion(*found) | {"examples": examples}
    return findings


def _of_retrieval(task: Retrieval, embedder: Embedder, *, batch_size: int) -> dict[str, Any]:
    images = _embedded(task, embedder, task.captions)
    captions = _captions(task, images)
    ztxt = embedder.embed_texts([text for own in next(iter(captions.values())) for text in own])
    scale = {"temperature": embedder.temperature, "bias": embedder.bias, "batch_size": batch_size}
    found = retrieval_findings(images.zimg, captions, ztxt, **scale)
    found["found"] = found_images(images.zimg, captions, embedder.embed_texts, queries=QUERIES)
    shown = _rows_of(found["found"]) | {one[which] for one in found["mistakes"] for which in ("right", "wrong")}
    return {"retrieval": found | {"dataset": task.dataset}, "thumbs": _thumbs(task, sorted(shown), images.index)}


def _embedded(task: Retrieval | ZeroShot, embedder: Embedder, fields: Sequence[str]) -> EmbeddedImages:
    return embedder.with_image_column(task.image_column).embed_shards(task.data, fields)


def _of_another(task: Retrieval, embedder: Embedder) -> dict[str, Any]:
    """Of a retrieval set after the first: its sizes and what queries find."""
    images = _embedded(task, embedder, task.captions)
    captions = _captions(task, images)
    found = found_images(images.zimg, captions, embedder.embed_texts, queries=FEW_QUERIES)
    thumbs = _thumbs(task, sorted(_rows_of(found)), images.index)
    return {"dataset": task.dataset, "counts": counts_of(captions), "found": found, "thumbs": thumbs}


def _rows_of(found: Sequence[Mapping[str, Any]]) -> set[int]:
    return {row for query in found for row in (query["right"], *query["top"])}


def _captions(task: Retrieval, images: EmbeddedImages) -> dict[str, list[list[str]]]:
    """By language, English first: the captions of each image."""
    english = sorted(task.captions, key=lambda field: field.rpartition(".")[2] != "en")
    captions = {field.partition("captions.")[2] or field: task.captions_in(images, field) for field in english}
    return {language: own for language, own in captions.items() if any(own)}


def _thumbs(task: Retrieval | ZeroShot, rows: Sequence[int], index: Sequence[int]) -> dict[str, str]:
    """Only what is shown is decoded again."""
    if not rows:
        return {}
    source = open_source(task.data, image=task.image_column, fields=())
    some = [source[index[row]] for row in rows]
    batches = make_eval_batches(some, batch_size=len(some), image_size=(SHOWN_PX, SHOWN_PX))
    images = next(iter(batches))["image"]
    return {str(row): plots.png(image) for row, image in zip(rows, images, strict=True)}
