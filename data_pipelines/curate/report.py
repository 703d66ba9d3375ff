"""report.html: what each rule dropped, ten pairs of each to look at; languages, sizes and scores before and after.

Everything is inlined, thumbnails as they are in the scans and plots as SVG, so the file can be mailed. Captions are other
people's text, so every string is escaped before it becomes HTML.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.atomic import new_file
from data_pipelines.curate.config import REPAIRS
from data_pipelines.curate.scores import SCORE_STEP

_LANGUAGES = 20
_BEFORE, _AFTER = "#b9c4dc", "#3457d5"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; color: #1d2433; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #dde2ea; padding-bottom: .3rem }
h3 { margin: 1.4rem 0 .3rem } .muted { color: #6a7385 } table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eceff4 } th { font-weight: 600 }
th:first-child, td:first-child, td.text { text-align: left }
.examples { display: flex; flex-wrap: wrap; gap: .6rem } .example { width: 104px; font-size: 11px; line-height: 1.25 }
.shown { width: 104px; height: 104px; object-fit: contain; background: #f2f4f8; display: block; margin-bottom: .2rem }
.none { color: #9aa3b5; text-align: center; line-height: 104px } img.plot { max-width: 100% }
.caption { overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
  overflow-wrap: anywhere }
"""


def write_report(path: Path, funnel: Mapping, examples: Mapping[str, Sequence], shards: Sequence[str]) -> None:
    """Writes the page. examples: {rule: [[draw, shard, index, caption, thumbnail in hex], …]}; shard indexes `shards`."""
    sections = [_head(funnel), _rules(funnel), _plots(funnel), _shards(funnel)]
    sections += ["<h2>Examples</h2>"]
    sections += [_examples(rule, examples[rule], shards, funnel) for rule in funnel["applied"]]
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Curation</title>"
        f"<style>{_STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )
    with new_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _head(funnel: Mapping) -> str:
    share = funnel["kept"] / funnel["pairs"]
    return f"<h1>Curation</h1><p class='muted'>{funnel['kept']} of {funnel['pairs']} pairs kept ({share:.1%})</p>"


def _rules(funnel: Mapping) -> str:
    """The funnel as a table, in the order in which the rules decide."""
    left = funnel["pairs"]
    rows = [f"<tr><td>all</td><td></td><td></td><td>{left}</td></tr>"]
    for rule, applied in funnel["applied"].items():
        taken = funnel["taken"].get(rule, 0)
        left -= taken
        shown = "repaired" if rule in REPAIRS else str(taken)
        rows.append(f"<tr><td>{html.escape(rule)}</td><td>{applied}</td><td>{shown}</td><td>{left}</td></tr>")
    return (
        "<h2>Rules</h2><p class='muted'>A pair is dropped by the first dropping rule that applies to it; "
        "repaired pairs are kept.</p>"
        f"<table><tr><th>rule</th><th>applies to</th><th>drops</th><th>left</th></tr>{''.join(rows)}</table>"
    )


def _plots(funnel: Mapping) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    scored = "scores" in funnel  # only with a model
    figure = Figure(figsize=(11, 10.5 if scored else 7.5), layout="constrained")
    grid = figure.add_gridspec(3 if scored else 2, 2)
    top, left, right = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    taken = {"all": funnel["pairs"]}
    for rule, count in funnel["taken"].items():
        taken[rule] = list(taken.values())[-1] - count
    top.bar(list(taken), list(taken.values()), color=_AFTER)
    top.set_title("pairs left after each rule", fontsize=10)
    top.set_xticks(range(len(taken)), list(taken), rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    before, after = funnel["languages"]["before"], funnel["languages"]["after"]
    names = sorted(before, key=lambda name: (-before[name], name))[:_LANGUAGES]
    left.set_yscale("symlog", linthresh=1)  # the second language of a corpus is often a hundredth of the first
    _before_after(left, names, before, after, "captions by language, log scale")
    before, after = funnel["sides_px"]["before"], funnel["sides_px"]["after"]
    _before_after(right, sorted(before, key=int), before, after, "images by shorter side, px from")
    if scored:
        _scores(figure.add_subplot(grid[2, :]), funnel)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "curate"}):  # the same counts, the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"<h2>Before and after</h2><img class='plot' alt='plots' src='{_data_url(buffer.getvalue(), 'svg+xml')}'>"


def _before_after(axes, names: Sequence[str], before: Mapping, after: Mapping, title: str) -> None:
    places = range(len(names))
    axes.bar([place - 0.2 for place in places], [before[name] for name in names], 0.4, color=_BEFORE, label="before")
    axes.bar([p + 0.2 for p in places], [after.get(name, 0) for name in names], 0.4, color=_AFTER, label="after")
    axes.set_xticks(places, names, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def _scores(axes, funnel: Mapping) -> None:
    """Histograms of the scores before and after, and the threshold if it is one for all pairs."""
    before, after = funnel["scores"]["before"], funnel["scores"]["after"]
    edges = sorted(before, key=float)
    for counts, color, label in ((before, _BEFORE, "before"), (after, _AFTER, "after")):
        heights = [counts.get(edge, 0) for edge in edges]
        axes.bar([float(edge) for edge in edges], heights, SCORE_STEP, align="edge", color=color, label=label)
    minimum = funnel["config"]["min_score"]
    if minimum is not None:
        axes.axvline(minimum, color="#c0392b", linewidth=1, label=f"min_score {minimum:g}")
    axes.set_title("pairs by image-text score", fontsize=10)
    axes.legend(fontsize=8)


def _shards(funnel: Mapping) -> str:
    problems = [shard for shard in (*funnel["shards"], *funnel["against"]) if shard["problem"]]
    if not problems:
        return ""
    rows = "".join(f"<tr><td class='text'>{html.escape(shard['problem'])}</td></tr>" for shard in problems)
    return f"<h2>Shards with a problem</h2><table>{rows}</table>"


def _examples(rule: str, examples: Sequence, shards: Sequence[str], funnel: Mapping) -> str:
    shown = "".join(_example(shards[shard], index, caption, data) for _, shard, index, caption, data in examples)
    count = funnel["applied"][rule]
    return f"<h3>{html.escape(rule)} <span class='muted'>{count}</span></h3><div class='examples'>{shown}</div>"


def _example(shard: str, index: int, caption: str, thumbnail: str) -> str:
    image = "<div class='shown none'>no image</div>"
    if thumbnail:
        image = f"<img class='shown' alt='' src='{_data_url(bytes.fromhex(thumbnail), 'jpeg')}'>"
    place = html.escape(f"{shard}#{index}", quote=True)
    return f"<div class='example' title='{place}'>{image}<div class='caption'><bdi>{html.escape(caption)}</bdi></div></div>"


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
