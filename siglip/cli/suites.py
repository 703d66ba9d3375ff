"""`siglip eval SRC --suite FILE.yaml --out DIR`: many evaluations of one model, one table, one JSON per result.

A result that is there, of the same model and settings, is not computed again. An entry that fails is told in one line, the others
go on, and the exit code says so.
"""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from siglip.atomic import write_atomically
from siglip.cli import BAD_INPUT, describe
from siglip.cli.arguments import parse
from siglip.cli.evaluation import ModelArgs, completed, make_embedder, read_for_texts, settings_of
from siglip.errors import RunFailed, UserError
from siglip.evaluation.embed import Embedder
from siglip.evaluation.results import Result
from siglip.evaluation.suite import run_tasks
from siglip.evaluation.suite_file import Entry, Suite, metric_of, read_suite
from siglip.evaluation.text_cache import caching, digest, digest_params
from siglip.parallel import launch, sharding
from siglip.parallel.collectives import gather_records
from siglip.trees import did_you_mean
from siglip.workdir.metrics import format_value

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteArgs(ModelArgs):
    """Evaluate a model on all data sets of a suite.

    Attributes:
        suite: YAML file, such as those of configs/suites/.
        out: folder for one JSON per result, in CLIP_benchmark's format; what is there already is not computed again.
        root: folder that the paths of the suite's data count from; without it what the suite says.
        only: names of entries; without any, all.
        published: a model of the suite's `sources`; its published values are shown beside.
        tokenizer: SentencePiece model, when SRC does not bring one.
    """

    suite: str
    out: str
    root: str | None = None
    only: tuple[str, ...] = ()
    published: str | None = None
    tokenizer: str | None = None


def suite_command(args: list[str]) -> None:
    """Runs what is missing and prints the table. Raises RunFailed when an entry failed, after all others."""
    options = parse(SuiteArgs, args, prog="siglip eval")
    with launch.joined(options.distributed, describe=describe):
        suite = launch.in_all_or_none(functools.partial(_open, options), bad_input=BAD_INPUT)
        results, failures = _run(suite, options)
        if jax.process_index() == 0:
            print(format_results(suite, results, options.published))
        if failures:
            raise RunFailed(f"{len(failures)} of {len(suite.entries)} entries failed: {', '.join(failures)}")


def _open(options: SuiteArgs) -> Suite:
    """The chosen entries; makes the folder of the results."""
    suite = read_suite(Path(options.suite), root=options.root).only(options.only)
    if options.published is not None and options.published not in suite.sources:
        hint = did_you_mean(options.published, suite.sources) or f"; there are {', '.join(suite.sources) or 'none'}"
        raise UserError(f"{options.suite} has no published values of {options.published!r}{hint}")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    return suite


def _run(suite: Suite, options: SuiteArgs) -> tuple[dict[str, list[Record]], list[str]]:
    """The records of each entry that has some, and the names of those that failed."""
    needed = any(entry.task.EMBEDS_TEXTS for entry in suite.entries)
    params, config, tokenizer = read_for_texts(options.src, options.tokenizer, needed=needed)
    pieces = b"" if tokenizer is None else Path(tokenizer.path).read_bytes()
    length = [] if options.max_patches is None else [f"{options.max_patches} patches"]
    weights = digest([digest_params(params), repr(config), pieces, *length])
    text_tower = digest([digest_params(params.get("txt", {})), repr(config.text), pieces])
    mesh = sharding.make_mesh(sharding.MeshConfig())
    params = jax.device_put(params, NamedSharding(mesh, sharding.P_REPLICATED))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siglip" / "texts"
    settings = {"mesh": mesh, "tokenizer": tokenizer, **settings_of(options)}
    embedder_for = functools.partial(make_embedder, params, config, **settings)
    embedder_for()  # a flag that is wrong for every entry ends the command
    results, failures, prepared = {}, [], []
    names = {entry.task.dataset for entry in suite.entries}
    # All go by what process 0 reads: others may not see its folder, or see a file later.
    own = _read_done(Path(options.out), weights) if jax.process_index() == 0 else None
    done = gather_records([own])[0]
    for entry in suite.entries:  # what is wrong with files is told before the first image is embedded
        name = entry.task.dataset
        if name in done and done[name][0]["suite"]["settings"] == _plain(entry.settings):
            logger.info("%s: done before", name)
            results[name] = done[name]
        elif (ready := _attempt(name, functools.partial(_prepare, entry, embedder_for), failures)) is not None:
            prepared.append((entry, *ready))
    for entry, task, embedder in prepared:
        name, embedder = entry.task.dataset, caching(embedder, cache, text_tower)
        found = _attempt(name, functools.partial(run_tasks, [task], embedder), failures)
        if found is not None:
            results[name] = _write(entry, found, options, weights, others=names - {name})
            logger.info("%s: done", name)
    in_order = [entry.task.dataset for entry in suite.entries]
    return {name: results[name] for name in in_order if name in results}, [n for n in in_order if n in failures]


def _prepare(entry: Entry, embedder_for: Callable[..., Embedder]) -> tuple[Any, Embedder]:
    """The entry's task with what its data tell, after its check, and its embedder, in all processes or none."""

    def prepare():
        embedder = embedder_for(pixels=entry.pixels)
        return completed(dataclasses.replace(entry.task, name=entry.task.dataset)), embedder

    return launch.in_all_or_none(prepare, bad_input=BAD_INPUT)


def _attempt(name: str, call: functools.partial, failures: list[str]) -> Any:
    """What `call` returns; None, and the name added to `failures`, where it raises."""
    try:
        return call()
    except Exception as error:  # a bug's traceback is printed by `describe`
        failures.append(name)
        logger.error("%s failed: %s", name, describe(error)[1])
        return None


def _write(
    entry: Entry, found: Sequence[Result], options: SuiteArgs, weights: str, *, others: Collection[str]
) -> list[Record]:
    """One file per result; each says of how many it is one, so that an entry that was cut off is not taken for done.

    others: names of the other entries, whose files these must not be.
    """
    records = []
    for number, result in enumerate(found):
        about = {"entry": entry.task.dataset, "number": number, "results": len(found), "weights": weights}
        record = result.to_clip_benchmark(options.src) | {"suite": about | {"settings": _plain(entry.settings)}}
        records.append(record)
        if jax.process_index() == 0:
            unique = len(found) == len({r.dataset for r in found}) and result.dataset not in others
            name = result.dataset if unique else f"{result.dataset}-{number}"
            content = json.dumps(record, indent=2, ensure_ascii=False)
            write_atomically(Path(options.out) / f"{name}.json", content + "\n")
    return records


def _read_done(out: Path, weights: str) -> dict[str, list[Record]]:
    """The records of entries that are there in full, of the same weights. Other files are left alone."""
    found: dict[str, dict[int, Record]] = {}
    for path in sorted(out.glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            about = record["suite"]
            if about["weights"] == weights and isinstance(record["metrics"], dict):
                found.setdefault(about["entry"], {})[about["number"]] = record
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    whole = {name: [own[n] for n in sorted(own)] for name, own in found.items()}
    return {name: own for name, own in whole.items() if len(own) == own[0]["suite"]["results"]}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return json.loads(json.dumps(settings, default=str))


def format_results(suite: Suite, results: Mapping[str, Sequence[Record]], model: str | None) -> str:
    """The table of a suite: a row for each metric of interest; of several languages their mean, where there is one."""
    rows, mains = [], []
    for entry in suite.entries:
        published = entry.published.get(model or "", {})
        records = results.get(entry.task.dataset, [])
        shown = [record for record in records if record["language"] == "mean"] or records
        if not records:
            rows.append((entry.task.dataset, "failed", None, None))
        for record in shown:
            values = {name: metric_of(record["metrics"], name) for name in entry.metrics}
            values = {name: value for name, value in values.items() if value is not None} or record["metrics"]
            rows += [(record["dataset"], name, value, published.get(name)) for name, value in values.items()]
        if shown and entry.metrics:
            mains.append((metric_of(shown[-1]["metrics"], entry.metrics[0]), published.get(entry.metrics[0])))
    if suite.average and mains:
        known = [value for _, value in mains if value is not None]
        theirs = sum(known) / len(known) if len(known) == len(mains) else None
        values = [value for value, _ in mains if value is not None]
        mean = sum(values) / len(values) if values else None
        rows.append(("mean", f"of {len(values)} of {len(suite.entries)} sets", mean, theirs))
    lines = _align(rows, model)
    return "\n".join(lines + ([f"published: {model}, {suite.sources[model]}"] if model else []))


def _align(rows: Sequence[tuple[str, str, float | None, float | None]], model: str | None) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
    lines = []
    for dataset, metric, value, published in rows:
        line = f"{dataset:{widths[0]}}  {metric:{widths[1]}}  {format_value(value, rank='rank' in metric):>7}"
        if model:
            line += f"  {format_value(published):>9}"
            line += f"  {value - published:+.3f}" if None not in (value, published) else ""
        lines.append(line)
    head = f"{'':{widths[0]}}  {'':{widths[1]}}  {'value':>7}" + ("  published" if model else "")
    return [head, *lines]
