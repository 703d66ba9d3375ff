"""`siglip report`: a run's metrics, images that queries find, and other models' numbers on one page and in one table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from siglip.cli.arguments import parse
from siglip.cli.data_sets import complete
from siglip.cli.evaluation import embedder_of, format_table, settings_of
from siglip.errors import UserError
from siglip.evaluation.retrieval import Retrieval
from siglip.training.config import EvalConfig
from siglip.trees import build_dataclass
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE, read_config
from siglip.workdir.metrics import read_metrics
from siglip.workdir.report import Gallery, final_results, write_report

QUERIES = 16
SHOWN_PX = 72


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write WORKDIR/report.html and print the last evaluation.

    Attributes:
        workdir: workdir of a run.
        baseline: JSON result files of other models, as `siglip eval --out` or CLIP_benchmark writes; more rows of the table.
    """

    workdir: tyro.conf.Positional[str]
    baseline: tuple[str, ...] = ()


def report_command(args: list[str]) -> None:
    """Prints the table and the report's path."""
    options = parse(ReportArgs, args, prog="siglip report")
    workdir = Path(options.workdir)
    results = final_results(read_metrics(workdir))
    settings = build_dataclass(
        EvalConfig, read_config(workdir, fields=["eval"])["eval"], where=f"{workdir / CONFIG_FILE}: eval"
    )
    baselines = {name: row for path in options.baseline for name, row in _read_baseline(path).items()}
    retrieval = next((task for task in settings.tasks if isinstance(task, Retrieval)), None)
    gallery = None if retrieval is None else _gallery(workdir, settings, retrieval)
    path = write_report(workdir, gallery=gallery, baselines=baselines)
    for datasets in results.values():
        columns = {name for metrics in datasets.values() for name in metrics}
        rows = {name: {k: v for k, v in row.items() if k in columns} for name, row in baselines.items()}
        print(format_table(datasets | {name: row for name, row in rows.items() if row}))
    print(f"report: {path}")


def _read_baseline(path: str) -> dict[str, dict[str, float]]:
    try:
        results = json.loads(Path(path).read_text())
        return {f"{r['model']} ({r['dataset']})": {k: float(v) for k, v in r["metrics"].items()} for r in results}
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a result file ({error!r}); `siglip eval … --out FILE.json` writes one"
        ) from None


def _gallery(workdir: Path, settings: EvalConfig, task: Retrieval) -> Gallery:
    """A few queries spread over the evaluation set: every other one in the first language, the rest in the others in turn."""
    task = complete(task)
    embedder = embedder_of(workdir, tokenizer=str(workdir / TOKENIZER_FILE), **settings_of(settings))
    found = embedder.embed_shards(task.data, task.captions)
    captions = {field: task.captions_in(found, field) for field in task.captions}
    count = len(found.zimg)
    queries = []
    for n, row in enumerate(np.linspace(0, count - 1, min(QUERIES, count)).astype(int).tolist()):
        first, *others = task.captions
        field = others[n // 2 % len(others)] if others and n % 2 else first
        if texts := captions[field][row]:
            queries.append((field.partition("captions.")[2], texts[0], row))

    def shown(rows: Sequence[int]) -> np.ndarray:
        source, size = open_source(task.data, fields=()), (SHOWN_PX, SHOWN_PX)
        some = [source[found.index[row]] for row in rows]
        return next(iter(make_eval_batches(some, batch_size=max(1, len(some)), image_size=size)))["image"]

    return Gallery(shown, found.zimg, queries, embedder.embed_texts([text for _, text, _ in queries]))
