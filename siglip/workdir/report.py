"""report.html: a run, or several beside each other, in one self-contained page.

Everything is inlined (plots and thumbnails as data URLs), so the file can be mailed, and a phone shows it without a network.

Captions, file names and settings are other people's text: every string is escaped before it becomes HTML.
"""

import html
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siglip.atomic import write_atomically
from siglip.workdir import plots
from siglip.workdir.metrics import CHANCE, error_of, format_value, short_name

CURVES = (
    ("train/loss", "Loss"),
    ("train/temperature", "Temperature exp(t)"),
    ("train/bias", "Bias b"),
    ("train/grad_norm", "Gradient norm"),
    ("train/schedule", "Schedule"),
    ("train/pairs_per_s", "Pairs per second"),
    ("train/data_wait", "Share of time waiting for data"),
    ("train/mfu", "Model FLOP utilisation"),
)
ENGLISH = ("en", "eng")


class Run(NamedTuple):
    """What the report shows of a run.

    Attributes:
        lines: of metrics.jsonl. config: config.json. findings: what `siglip report` has computed with the model, or {}:
            "retrieval" (siglip/evaluation/findings.py), "thumbs" of its images {row: data URL}, "others": [{"dataset",
            "counts", "found", "thumbs"}] of further retrieval sets, "zeroshot" {data set: confusion}.
        funnels: {manifest: funnel.json of its curation}. notes: what is left out, and why.
        closest: {evaluation set: of each of its images the closest training image: "distance", "bits", and for those to show
            "evaluation" and "training", what they are, and "images", data URLs of the two}.
    """

    name: str
    lines: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    findings: Mapping[str, Any] = {}
    funnels: Mapping[str, Mapping[str, Any]] = {}
    notes: Sequence[str] = ()
    closest: Mapping[str, Sequence[Mapping[str, Any]]] = {}


def write_report(
    path: Path, runs: Sequence[Run], *, baselines: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """Writes the page of one run, or of several side by side, and returns its path.

    Args:
        baselines: rows of other models for the tables, {name: {metric: value}}.
    """
    sections = _one(runs[0], baselines or {}) if len(runs) == 1 else _several(runs, baselines or {})
    title = html.escape(" · ".join(run.name for run in runs))
    style = importlib.resources.files("siglip.workdir").joinpath("report.css").read_text()
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{style}</style><body>{''.join(sections)}</body></html>\n"
    )
    write_atomically(path, page)
    return path


def final_results(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {data set: {metric: value}}} of the last evaluation of each; English first."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("eval/"):
                _, task, dataset, metric = name.split("/", 3)
                results.setdefault(task, {}).setdefault(dataset, {})[metric] = value
    return {
        task: dict(sorted(sets.items(), key=lambda item: not _is_english(item[0]))) for task, sets in results.items()
    }


def _is_english(dataset: str) -> bool:
    return dataset.rpartition("-")[2] in ENGLISH


def _one(run: Run, baselines: Mapping[str, Mapping[str, float]]) -> list[str]:
    from siglip.workdir.report_closest import closest_section
    from siglip.workdir.report_findings import findings_sections

    notes = "".join(f"<p class='muted'>{html.escape(note)}</p>" for note in run.notes)
    return [
        _head(run), notes, _what(run.config), _results([run], baselines), _curves([run]), *findings_sections(run.findings),
        _substituted(run.lines), *map(_funnel, run.funnels, run.funnels.values()), closest_section(run.closest),
        _config(run.config),
    ]  # fmt: skip


def _several(runs: Sequence[Run], baselines: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = "".join(f"<li>{html.escape(run.name)}: {_summary(run)}</li>" for run in runs)
    return [f"<h1>{len(runs)} runs</h1><ul>{rows}</ul>", _differences(runs), _results(runs, baselines), _curves(runs)]


def _head(run: Run) -> str:
    return f"<h1>{html.escape(run.name)}</h1><p class='muted'>{_summary(run)}</p>"


def _summary(run: Run) -> str:
    trained = [line for line in run.lines if "train/loss" in line]
    if not trained:
        return "no training step logged yet"
    last = trained[-1]
    rates, waits = (
        [v for line in trained if (v := line.get(f"train/{name}")) is not None] for name in ("pairs_per_s", "data_wait")
    )
    rate = f"{np.median(rates):.0f} pairs/s (median) · " if rates else ""
    wait = f"{np.median(waits):.1%} of the time waiting for data · " if waits else ""
    broken = sum(v or 0 for k, v in last.items() if k.startswith("train/substituted/"))
    return f"{last['step']} steps · loss {format_value(last['train/loss'])} · {rate}{wait}{broken:.0f} broken pairs replaced"


def _what(config: Mapping[str, Any]) -> str:
    """What was run on what, from config.json; "" for a config that is not a run's."""
    try:
        model, data, optim = config["model"], config["data"], config["optim"]
        image, text = model["image"], model["text"]
        size = " x ".join(map(str, image["image_size"]))
        sources = (f"{source['shards']} (weight {source['weight']:g})" for source in data["sources"])
        steps = f"{config['total_steps']} steps of {config['batch_size']} pairs, {config['loss']['kind']} loss"
        rows = {
            "images": f"{_tower(image)}, {size} px, pooled by {image['pool']}",
            "texts": f"{_tower(text)}, {text['length']} tokens of {text['vocab_size']}" if text else "none",
            "data": "; ".join(sources),
            "training": f"{steps}, seed {config['seed']}",
            "optimiser": ", ".join(
                f"{name} {value:g}" if isinstance(value := optim[name], float) else f"{name} {value}"
                for name in ("name", "lr", "weight_decay", "schedule", "warmup_steps")
            ),
        }
    except (KeyError, TypeError, ValueError):
        return ""
    cells = "".join(f"<tr><td>{name}</td><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<h2>What was run</h2><table class='settings'>{cells}</table>"


def _tower(config: Mapping[str, Any]) -> str:
    """Its variant, with what overrides it; where all is overridden, that alone."""
    sizes = {name: config[name] for name in ("width", "depth", "mlp_dim", "num_heads", "patch_size") if name in config}
    changed = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    if None not in sizes.values():
        return changed
    return f"{config['variant']} with {changed}" if changed else config["variant"]


def _results(runs: Sequence[Run], baselines: Mapping[str, Mapping[str, float]]) -> str:
    parts, every = [], [final_results(run.lines) for run in runs]
    for task in dict.fromkeys(task for results in every for task in results):
        datasets = dict.fromkeys(name for results in every for name in results.get(task, {}))
        measures = dict.fromkeys(m for results in every for row in results.get(task, {}).values() for m in row)
        errors = {error_of(m) for m in measures} & {*measures}
        columns = [m for m in measures if m not in errors and not m.endswith(CHANCE)]
        rows, sizes, measured = [], {}, {}
        for n, dataset in enumerate(datasets):
            for run, results in zip(runs, every, strict=True):
                if dataset in results.get(task, {}):
                    name = dataset if len(runs) == 1 else f"{dataset} · {run.name}"
                    own, metrics = sizes_of(run, task, dataset), results[task][dataset]
                    sizes[dataset] = sizes.get(dataset) or own
                    measured.setdefault(dataset, {}).update(metrics)
                    rows.append(_row(name, metrics, columns, "first" * (n == 0), own))
        rows += [_row(name, row, columns, "baseline", {}) for name, row in chance_rows(measured, sizes).items()]
        rows += [_row(name, row, columns, "baseline", {}) for name, row in baselines.items() if set(columns) & {*row}]
        head = "".join(f"<th>{html.escape(short_name(c))}</th>" for c in columns)
        told = (
            " ± 1 standard error, of queries drawn at random (for a mean over languages, at most); training again with another "
            "seed adds to it."
            if any(sizes.values()) or errors
            else ""
        )
        parts.append(
            f"<h2>{html.escape(task)}</h2><div class='scroll'><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
            f"<p class='muted'>{told}</p>"
        )
    return "".join(parts)


def sizes_of(run: Run, task: str, dataset: str) -> Mapping[str, int]:
    """Numbers of queries and candidates where they are known: {"images", "described", "texts"} or {"images", "classes"}."""
    if task == "zeroshot":
        return run.findings.get("zeroshot", {}).get(dataset, {})
    known = [run.findings.get("retrieval"), *run.findings.get("others", ())] if task == "retrieval" else []
    for found in filter(None, known):
        name, counts = found["dataset"], found["counts"]
        named = {f"{name}-{language}": own for language, own in counts.items()}
        # A mean over languages is of the same images: its error is at most that of one language with its value (Jensen).
        named[f"{name}-mean"] = min(counts.values(), key=lambda own: own["described"], default={})
        if len(counts) == 1:
            named[name] = next(iter(counts.values()))
        if dataset in named:
            return named[dataset]
    return {}


def _queries(metric: str, sizes: Mapping[str, int]) -> int:
    if "classes" in sizes:
        return sizes["images"] if metric in ("acc1", "acc5") else 0
    kind = "described" if metric.startswith("text_") else "texts"
    return sizes.get(kind, 0) if "recall@" in metric else 0


def _chance(metric: str, sizes: Mapping[str, int]) -> float | None:
    """What a model that knows nothing gets: a hit needs one of the `right` among k of the candidates drawn at random."""
    if "classes" in sizes:
        hits = {"acc1": 1, "acc5": 5, "mean_per_class_recall": 1}.get(metric)
        return None if hits is None else hits / sizes["classes"]
    if not sizes or not metric.startswith(("text_retrieval", "image_retrieval")):
        return None
    candidates, right = sizes["images"], 1.0
    if metric.startswith("text_"):
        candidates, right = sizes["texts"], sizes["texts"] / max(1, sizes["described"])
    if "recall@" in metric:
        draws = range(min(int(metric.rpartition("@")[2]), candidates))
        return 1 - math.prod(max(0.0, (candidates - right - n) / (candidates - n)) for n in draws)
    return (candidates + 1) / 2 if "rank" in metric and right == 1 else None


def chances_of(metrics: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """What random scores get in each metric where that is known: the evaluation tells it, or `sizes_of` do."""
    chances = {metric: metrics.get(f"{metric}{CHANCE}", _chance(metric, sizes)) for metric in metrics}
    return {metric: chance for metric, chance in chances.items() if chance is not None}


def chance_rows(
    results: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, float]]:
    """What random scores get: one row if it is the same for all data sets of a task, else one for each.

    Languages of one set share a row, which has what is the same for all of them.

    Args:
        results: {data set: {metric: value}}. sizes: `sizes_of` each.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for name, metrics in results.items():
        base = name.rpartition("-")[0]
        if not name.endswith("-mean"):
            own = chances_of(metrics, sizes[name])
            found.setdefault(base if f"{base}-mean" in results else name, []).append(own)
    rows = {
        base: {m: chance for m, chance in first.items() if all(own.get(m) == chance for own in more)}
        for base, (first, *more) in found.items()
    }
    known = [row for row in rows.values() if row]
    if known and all(row == known[0] for row in rows.values()):
        return {"chance": known[0]}
    return {f"chance: {base}": row for base, row in rows.items() if row}


def _row(name: str, metrics: Mapping[str, float], columns: Sequence[str], css: str, sizes: Mapping[str, int]) -> str:
    cells = []
    for c in columns:
        value, error, queries = metrics.get(c), metrics.get(error_of(c)), _queries(c, sizes)
        if value is not None and queries:
            error = math.sqrt(max(value * (1 - value), 0) / queries)
        told = "" if value is None or error is None else f" <small>± {error:.3f}</small>"
        cells.append(f"<td>{format_value(value, rank='rank' in c)}{told}</td>")
    return f"<tr class='{css}'><td>{html.escape(name)}</td>{''.join(cells)}</tr>"


def _curves(runs: Sequence[Run]) -> str:
    def points(run: Run, name: str) -> list[tuple[float, float]]:
        return [(line["step"], value) for line in run.lines if (value := line.get(name)) is not None]

    shown = [plots.curves({run.name: points(run, name) for run in runs}, title) for name, title in CURVES]
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line if name.startswith("eval/"))
    wanted = [name for name in names if name.endswith(("image_retrieval_recall@10", "acc1"))]
    english = [name for name in wanted if _is_english(name.split("/")[2])] or wanted
    for name in english[:4]:
        series = {run.name: points(run, name) for run in runs}
        if max(map(len, series.values())) > 1:
            shown.append(plots.curves(series, f"{name.split('/')[2]}: {short_name(name.split('/', 3)[3])}"))
    return f"<h2>Curves</h2><div class='plots'>{''.join(shown)}</div>" if any(shown) else ""


def _substituted(lines: Sequence[Mapping[str, Any]]) -> str:
    last = next((line for line in reversed(lines) if "train/loss" in line), {})
    counts = {
        name.rpartition("/")[2]: value
        for name, value in last.items()
        if name.startswith("train/substituted/") and value
    }
    if not counts:
        return ""
    pairs = sum(value for name, value in last.items() if name.startswith("data/source_") and name.endswith("/pairs"))
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{count:.0f}</td><td>{f'{count / pairs:.2%}' if pairs else ''}</td></tr>"
        for name, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return (
        f"<h2>Substituted samples</h2><table><tr><th>reason</th><th>pairs</th><th>of all seen</th></tr>{rows}</table>"
    )


def _funnel(manifest: str, funnel: Mapping[str, Any]) -> str:
    """The curation that a manifest came from: what each rule took."""
    left, rows = funnel["pairs"], []
    for rule in funnel["applied"]:
        taken = funnel["taken"].get(rule, 0)
        left -= taken
        rows.append(f"<tr><td>{html.escape(rule)}</td><td>{taken}</td><td>{left}</td></tr>")
    return (
        f"<h2>Data funnel</h2><p class='muted'>{html.escape(manifest)}: {funnel['kept']} of {funnel['pairs']} pairs kept</p>"
        f"<div class='scroll'><table><tr><th>rule</th><th>drops</th><th>left</th></tr>{''.join(rows)}</table></div>"
    )


def _config(config: Mapping[str, Any]) -> str:
    text = html.escape(json.dumps(config, indent=1, ensure_ascii=False))
    return f"<h2>Settings</h2><details><summary>config.json</summary><pre>{text}</pre></details>"


def _differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ."""
    flat = [_flat(run.config) for run in runs]
    names = [
        n
        for n in dict.fromkeys(n for one in flat for n in one)
        if n != "workdir" and len({repr(one.get(n)) for one in flat}) > 1
    ]
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    cells = {name: [html.escape(str(one.get(name, "-"))) for one in flat] for name in names}
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{'</td><td>'.join(own)}</td></tr>" for name, own in cells.items()
    )
    return (
        f"<h2>Settings that differ</h2><div class='scroll'><table><tr><th></th>{head}</tr>{rows}</table></div>"
        if names
        else ""
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix[:-1]: value}
    return {name: v for key, item in items for name, v in _flat(item, f"{prefix}{key}.").items()}
