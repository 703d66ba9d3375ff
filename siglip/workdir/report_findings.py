"""The sections of the report that need the model: what it scores, finds and mistakes. From siglip/evaluation/findings.py."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from siglip.workdir import plots


def findings_sections(findings: Mapping[str, Any]) -> list[str]:
    """Sections of HTML; none where nothing was found."""
    thumbs, sections = findings.get("thumbs", {}), []
    if retrieval := findings.get("retrieval"):
        sections += [
            _scores(retrieval, findings.get("recall", [])),
            _found(retrieval, thumbs),
            *(_found(other, other["thumbs"]) for other in findings.get("others", ())),
            _mistakes(retrieval, thumbs),
        ]
    return sections + [_classes(name, found) for name, found in findings.get("zeroshot", {}).items()]


def _scores(found: Mapping[str, Any], recall: Sequence[Sequence[Any]]) -> str:
    histogram, calibration = found["histogram"], found["reliability"]
    similarity, language = found["similarity"], found["language"]
    chance = min(1.0, 10 / next(iter(found["counts"].values()))["images"])
    shown = [
        plots.bars([tuple(row) for row in recall], "t2i R@10 by language", chance=chance, note="± 1 SE") if recall else "",
        plots.logit_histogram(**histogram),
        plots.reliability(
            calibration["bins"], "Reliability",
            f"of probabilities at the set's share of matches, {calibration['prior']:.2g}; calibration error "
            f"{calibration['error']:.2g}",
        ),
        plots.matrix(
            similarity["logits"], "Similarity", "logits of some images (down) and captions (across); pairs are on the diagonal",
            labels=similarity["texts"],
        ),
    ]  # fmt: skip
    return f"<h2>Scores</h2><p class='muted'>Captions: {html.escape(language)}.</p><div class='plots'>{''.join(shown)}</div>"


def _found(found: Mapping[str, Any], thumbs: Mapping[str, str]) -> str:
    rows = []
    for query in found["found"]:
        shown = "".join(_thumbnail(thumbs, row, hit=row == query["right"]) for row in query["top"])
        rows.append(
            f"<div class='query'><div class='text'><span class='lang'>{html.escape(query['language'])}</span>"
            f"<bdi>{html.escape(query['text'])}</bdi></div>{_thumbnail(thumbs, query['right'], hit=True)}"
            f"<span class='rank'>no. {query['rank']}</span><div class='found'>{shown}</div></div>"
        )
    count = next(iter(found["counts"].values()))["images"]
    return (
        f"<h2>What queries find: {html.escape(found['dataset'])}</h2><p class='muted'>First the query, the image that it "
        f"describes and the rank that the model gives it (by chance {(count + 1) / 2:.0f}); then the images that come first, "
        f"of {count}. The right one is framed.</p>" + "".join(rows)
    )


def _mistakes(found: Mapping[str, Any], thumbs: Mapping[str, str]) -> str:
    if not found["mistakes"]:
        return ""
    boxes = "".join(
        f"<div class='mistake'><bdi>{html.escape(one['text'])}</bdi><div>"
        f"<p>{_thumbnail(thumbs, one['right'], hit=True)}<span>right: {one['p_right']:.2g}</span></p>"
        f"<p>{_thumbnail(thumbs, one['wrong'], hit=False)}<span>taken: {one['p_wrong']:.2g}</span></p></div></div>"
        for one in found["mistakes"]
    )
    return (
        "<h2>Worst mistakes</h2><p class='muted'>The queries whose right image is furthest behind another one, with the "
        f"probabilities of both.</p><div class='mistakes'>{boxes}</div>"
    )


def _classes(name: str, found: Mapping[str, Any]) -> str:
    names = [(html.escape(right), html.escape(taken), count) for right, taken, count in found["worst"]]
    rows = "".join(f"<tr><td>{right}</td><td>{taken}</td><td>{count}</td></tr>" for right, taken, count in names)
    note = f"{found['images']} images; classes down, what they are taken for across"
    shown = plots.matrix(found["matrix"], "Confusion", note, labels=found["names"]) if "matrix" in found else ""
    table = f"<table><tr><th>class</th><th>taken for</th><th>images</th></tr>{rows}</table>" if rows else ""
    return (
        f"<h2>Classification: {html.escape(name)}</h2><p class='muted'>Some images with the names that come first of "
        f"{found['classes']}, and the probability of each among all of them; the right name is below each image.</p>"
        f"<div class='mistakes'>{''.join(map(_classified, found['examples']))}</div>"
        f"<div class='plots'>{shown}<div class='scroll'>{table}</div></div>"
    )


def _classified(one: Mapping[str, Any]) -> str:
    is_right = one["classes"][0][0] == one["right"]
    taken = "".join(f"<span>{html.escape(name)} {share:.0%}</span><br>" for name, share in one["classes"])
    image = f"<img class='{'hit' if is_right else ''}' alt='' src='{html.escape(one['image'])}'>"
    return f"<div class='mistake'><div><p>{image}</p><p>{taken}</p></div><bdi>{html.escape(one['right'])}</bdi></div>"


def _thumbnail(thumbs: Mapping[str, str], row: int, *, hit: bool) -> str:
    source = thumbs.get(str(row), "data:,")
    return f"<img class='{'hit' if hit else ''}' alt='image {row}' src='{html.escape(source)}'>"
