"""Plots for the report, each an SVG of its own, so that a phone shows one below the other; drawn by matplotlib."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_COLORS = ("#3457d5", "#d97706", "#23a35a", "#c02b6b", "#6b4fbb", "#0e8fa3", "#8a6d3b", "#667085")
_SMOOTHED_OVER = 0.05  # share of the points


def data_url(content: bytes, kind: str) -> str:
    """An image file of a kind ("png", "svg+xml") as a URL that needs no network."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png(image: np.ndarray) -> str:
    """uint8 [h, w, 3] as a data URL."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return data_url(buffer.getvalue(), "png")


def _axes(width: float = 4.6, height: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    return figure, axes


def _figure(figure: Any, title: str, note: str = "") -> str:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):  # texts stay texts: smaller, and in the reader's font
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    caption = f"<figcaption><b>{html.escape(title)}</b> {html.escape(note)}</figcaption>"
    source = data_url(buffer.getvalue(), "svg+xml")
    return f"<figure>{caption}<img class='plot' alt='{html.escape(title)}' src='{source}'></figure>"


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the points, at least 3, shorter at the ends."""
    values = np.asarray(values, float)
    half = max(1, round(len(values) * _SMOOTHED_OVER / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, note: str = "") -> str:
    """{name: [(step, value), …]}: smoothed, with the raw values behind; "" without points."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    figure, axes = _axes()
    for (name, points), color in zip(series.items(), _COLORS * len(series), strict=False):
        steps, values = np.asarray(points, float).T
        if len(values) < 8:
            axes.plot(steps, values, "o-", color=color, linewidth=1.4, markersize=3, label=name)
            continue
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth(values), color=color, linewidth=1.6, label=name)
    axes.set_xlabel("step", fontsize=8)
    if len(series) > 1:
        axes.legend(fontsize=7)
    return _figure(figure, title, note)


def logit_histogram(edges: Sequence[float], positives: Sequence[int], negatives: Sequence[int]) -> str:
    """Shares of matching and of other pairs by logit; n counts of each lie between n + 1 edges."""
    figure, axes = _axes()
    centres, width = (np.asarray(edges[1:]) + edges[:-1]) / 2, edges[1] - edges[0]
    for counts, color, name in ((negatives, _COLORS[-1], "other pairs"), (positives, _COLORS[2], "matching pairs")):
        share = np.asarray(counts) / max(1, sum(counts))
        axes.bar(centres, share, width, color=color, alpha=0.6, label=f"{name} (n = {sum(counts)})")
    used = np.flatnonzero(np.asarray(positives) + np.asarray(negatives))
    axes.set_xlim(edges[used[0]] - width, edges[used[-1] + 1] + width)
    axes.set_xlabel("logit", fontsize=8)
    axes.set_ylabel("share of pairs", fontsize=8)
    axes.legend(fontsize=7)
    return _figure(figure, "Logits", "of matching and of other pairs, each summing to 1")


def reliability(bins: Sequence[Sequence[float]], title: str, note: str) -> str:
    """[(mean predicted probability, observed share, pairs)]."""
    figure, axes = _axes(4.6, 3.6)
    predicted, observed, pairs = (
        np.asarray([one for one in bins if one[1] > 0], float).reshape(-1, 3).T
    )  # a log axis has no 0
    lowest = max(1e-7, min(predicted.min(initial=1), observed.min(initial=1)) / 2)
    axes.plot([lowest, 1], [lowest, 1], color="#98a2b3", linewidth=1, linestyle="--", label="calibrated")
    error = np.sqrt(observed * (1 - observed) / pairs)
    axes.errorbar(predicted, observed, error, fmt="o-", color=_COLORS[0], capsize=2, markersize=4)
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1.3), ylim=(lowest * 0.8, 1.3))
    axes.set_xlabel("predicted probability", fontsize=8)
    axes.set_ylabel("observed share of matches, ± 1 SE", fontsize=8)
    return _figure(figure, title, note)


def bars(rows: Sequence[tuple[str, float, float | None]], title: str, *, chance: float | None, note: str = "") -> str:
    """[(name, share, standard error or None)], the first on top, with chance as a line."""
    figure, axes = _axes(4.6, 0.9 + 0.24 * len(rows))
    places = np.arange(len(rows))[::-1]
    errors = [error or 0 for _, _, error in rows]
    axes.barh(
        places, [value for _, value, _ in rows], xerr=errors, color=_COLORS[0], alpha=0.8, ecolor="#1d2433", capsize=2
    )
    axes.set_yticks(places, [name for name, _, _ in rows], fontsize=8)
    if chance is not None:
        axes.axvline(chance, color=_COLORS[3], linewidth=1.2, linestyle="--", label=f"chance {chance:.3f}")
        axes.legend(fontsize=7)
    return _figure(figure, title, note)


def matrix(values: Sequence[Sequence[float]], title: str, note: str, *, labels: Sequence[str] = ()) -> str:
    """Values [rows, columns] as colours, with their scale."""
    figure, axes = _axes(4.6, 4.2)
    axes.grid(visible=False)
    shown = axes.imshow(np.asarray(values, float), cmap="viridis", aspect="auto")
    figure.colorbar(shown, ax=axes).ax.tick_params(labelsize=7)
    if labels:
        short = [label if len(label) <= 18 else label[:17] + "…" for label in labels]
        axes.set_yticks(range(len(short)), short, fontsize=6)
        axes.set_xticks(range(len(short)), short, fontsize=6, rotation=90)
    return _figure(figure, title, note)
