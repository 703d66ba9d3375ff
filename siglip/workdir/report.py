"""report.html: a run in one self-contained page, with curves, tables and the images that queries found.

Everything is inlined (plots and thumbnails as data URLs), so the file can be mailed.

Captions are other people's text: every string is escaped before it becomes HTML.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siglip.array_types import Float, UInt8
from siglip.atomic import write_atomically
from siglip.workdir.metrics import format_value, read_metrics, short_name

CURVES = (
    ("train/loss", "loss"),
    ("train/temperature", "temperature exp(t)"),
    ("train/bias", "bias b"),
    ("train/pairs_per_s", "pairs per second"),
    ("train/grad_norm", "gradient norm"),
    ("train/schedule", "schedule"),
)
TOP = 8  # images shown per query

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; color: #1d2433; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #dde2ea; padding-bottom: .3rem }
.muted { color: #6a7385 } table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eceff4 } th { font-weight: 600 }
th:first-child, td:first-child { text-align: left } .baseline td { color: #6a7385; font-style: italic }
.query { display: flex; align-items: center; gap: .5rem; margin: .35rem 0 } .query .text { width: 15rem; flex: none }
.query .lang { display: inline-block; min-width: 2.2rem; color: #6a7385; font-size: .8rem }
.query img { width: 72px; height: 72px; border: 3px solid transparent; border-radius: 8px; background: #fff }
.query img.hit { border-color: #23a35a } .rank { width: 4.6rem; flex: none;
         color: #6a7385; font-size: .85rem; text-align: right; padding-right: .6rem }
img.plot { width: 100% }
"""


class Gallery(NamedTuple):
    """Images to find and what to look for.

    Attributes:
        images: row numbers -> uint8 [k, h, w, 3] of these images, as shown. zimg: the embeddings of all [n, e].
        queries: (language, text, row of the right image) each. ztxt: their embeddings, in the same order.
    """

    images: Callable[[Sequence[int]], UInt8[np.ndarray, "k h w 3"]]
    zimg: Float[np.ndarray, "n e"]
    queries: Sequence[tuple[str, str, int]]
    ztxt: Float[np.ndarray, "m e"]


def write_report(
    workdir: Path, *, gallery: Gallery | None = None, baselines: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """Writes WORKDIR/report.html from metrics.jsonl and returns its path.

    Args:
        gallery: images found; None leaves that section out.
        baselines: rows of other models for the table, {name: {metric: value}}.

    Raises:
        FileNotFoundError: if the workdir has no metrics.jsonl.
    """
    lines = read_metrics(workdir)
    sections = [_head(workdir, lines), _results(lines, baselines or {}), _curves(lines)]
    if gallery is not None:
        sections.append(_gallery(gallery))
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(workdir.name)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )
    path = workdir / "report.html"
    write_atomically(path, page)
    return path


def final_results(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {data set: {metric: value}}} of the last evaluation of each."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("eval/"):
                _, task, dataset, metric = name.split("/", 3)
                results.setdefault(task, {}).setdefault(dataset, {})[metric] = value
    return results


def _head(workdir: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    trained = [line for line in lines if "train/loss" in line]
    if not trained:
        return f"<h1>{html.escape(workdir.name)}</h1><p class='muted'>no training step logged yet</p>"
    last = trained[-1]
    rates = [rate for line in trained if (rate := line.get("train/pairs_per_s")) is not None]
    rate = f"{np.median(rates):.0f} pairs/s (median) · " if rates else ""
    broken = sum(v or 0 for k, v in last.items() if k.startswith("train/substituted/"))
    return (
        f"<h1>{html.escape(workdir.name)}</h1><p class='muted'>{last['step']} steps · loss {format_value(last['train/loss'])} · "
        f"{rate}{broken} broken pairs replaced</p>"
    )


def _results(lines: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    for task, datasets in final_results(lines).items():
        columns = list(dict.fromkeys(m for metrics in datasets.values() for m in metrics))
        head = "".join(f"<th>{html.escape(short_name(c))}</th>" for c in columns)
        rows = [_row(name, metrics, columns, "") for name, metrics in datasets.items()]
        rows += [
            _row(name, metrics, columns, "baseline") for name, metrics in baselines.items() if set(columns) & {*metrics}
        ]
        parts.append(f"<h2>{html.escape(task)}</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>")
    return "".join(parts)


def _row(name: str, metrics: Mapping[str, float], columns: Sequence[str], css: str) -> str:
    cells = "".join(f"<td>{format_value(metrics.get(c), rank='rank' in c)}</td>" for c in columns)
    return f"<tr class='{css}'><td>{html.escape(name)}</td>{cells}</tr>"


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    trained = [line for line in lines if "train/loss" in line]
    if len(trained) < 2:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, CURVES, strict=True):
        points = [(line["step"], line[name]) for line in trained if line.get(name) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], color="#3457d5", linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"<h2>Curves</h2><img class='plot' alt='training curves' src='{_data_url(buffer.getvalue(), 'svg+xml')}'>"


def _gallery(gallery: Gallery) -> str:
    orders = [np.argsort(-(gallery.zimg @ z), kind="stable").tolist() for z in gallery.ztxt]
    shown = sorted({wanted for _, _, wanted in gallery.queries}.union(*(order[:TOP] for order in orders)))
    images = dict(zip(shown, gallery.images(shown), strict=True))
    rows = []
    for (language, text, wanted), order in zip(gallery.queries, orders, strict=True):
        rank = order.index(wanted) + 1
        found = "".join(_thumbnail(images[i], hit=i == wanted) for i in order[:TOP])
        rows.append(
            f"<div class='query'><div class='text'><span class='lang'>{html.escape(language)}</span>"
            f"<bdi>{html.escape(text)}</bdi></div>{_thumbnail(images[wanted], hit=True)}"
            f"<span class='rank'>no. {rank}</span>{found}</div>"
        )
    return (
        f"<h2>What queries find</h2><p class='muted'>On the left the query, the image that it describes "
        f"and the rank that the model gives it; on the right the {TOP} images that come first, of "
        f"{len(gallery.zimg)}. The right one is framed.</p>{''.join(rows)}"
    )


def _thumbnail(image: UInt8[np.ndarray, "h w 3"], *, hit: bool) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return f"<img class='{'hit' if hit else ''}' alt='' src='{_data_url(buffer.getvalue(), 'png')}'>"


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
