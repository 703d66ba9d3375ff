"""`siglip report`: a run's metrics, its evaluation's pictures and other models' numbers on one page and in one table."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import captions_of
from siglip.cli.arguments import parse
from siglip.cli.evaluation import format_table, tower_of
from siglip.encoder import load
from siglip.errors import UserError
from siglip.training.config import EvalTask, TrainConfig, from_json
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE
from siglip.workdir.metrics import read_metrics
from siglip.workdir.report import Gallery, final_results, write_report

QUERIES = 16  # pictures asked for, each in one language, in turn
SHOWN_PX = 72


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write WORKDIR/report.html and print the last evaluation.

    Attributes:
        workdir: of a run.
        baseline: JSON files of other models in CLIP_benchmark's form, as `siglip eval --out` writes; more rows of the table.
    """

    workdir: tyro.conf.Positional[str]
    baseline: tuple[str, ...] = ()


def report_command(args: list[str]) -> None:
    """Prints the table and the report's path."""
    options = parse(ReportArgs, args, prog="siglip report")
    workdir = Path(options.workdir)
    results = final_results(read_metrics(workdir))
    config = from_json(json.loads((workdir / CONFIG_FILE).read_text()))
    baselines = {name: row for path in options.baseline for name, row in _read_baseline(path).items()}
    retrieval = next((task for task in config.eval.tasks if task.task == "retrieval"), None)
    gallery = None if retrieval is None else _gallery(workdir, config, retrieval)
    path = write_report(workdir, gallery=gallery, baselines=baselines)
    for datasets in results.values():
        columns = {name for metrics in datasets.values() for name in metrics}
        rows = {name: {k: v for k, v in row.items() if k in columns} for name, row in baselines.items()}
        print(format_table(datasets | {name: row for name, row in rows.items() if row}))
    print(f"report: {path}")


def _read_baseline(path: str) -> dict[str, dict[str, float]]:
    try:
        return {f"{r['model']} ({r['dataset']})": r["metrics"] for r in json.loads(Path(path).read_text())}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result file ({error}); `siglip eval … --out FILE.json` writes one") from None


def _gallery(workdir: Path, config: TrainConfig, task: EvalTask) -> Gallery:
    """A few pictures spread over the evaluation set: every other one is asked for in the first language, the rest in turn."""
    tokenizer = workdir / TOKENIZER_FILE
    tower = tower_of(load(str(workdir)), tokenizer=str(tokenizer), batch_size=config.eval.batch_size)
    zimg, _, fields = tower.embed_shards(task.data)
    shown = make_eval_batches(open_source(task.data), batch_size=len(zimg), image_size=(SHOWN_PX, SHOWN_PX))
    queries = []
    for n, i in enumerate(np.linspace(0, len(zimg) - 1, min(QUERIES, len(zimg))).astype(int)):
        first, *others = task.captions
        name = others[n // 2 % len(others)] if others and n % 2 else first
        texts = list(captions_of(fields[i], name))
        if texts:
            queries.append((name.partition("captions.")[2], texts[0], int(i)))
    return Gallery(next(iter(shown))["image"], zimg, queries, tower.embed_texts([text for _, text, _ in queries]))
