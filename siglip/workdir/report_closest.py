"""The section of the report that shows whether leaks are out: the training image that is closest to each evaluation image."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_SHOWN = 12
_QUANTILES = ((0.0, "least"), (0.01, "1 %"), (0.1, "10 %"), (0.5, "median"))


def closest_section(closest: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """HTML, or "" without any. closest: as in `report.Run`."""
    if not closest:
        return ""
    head = "".join(f"<th>{name}</th>" for _, name in _QUANTILES)
    rows = "".join(_row(name, [one["distance"] for one in found]) for name, found in closest.items())
    shown = "".join(f"<h3>{html.escape(name)}</h3>{_pairs(found)}" for name, found in closest.items())
    return (
        "<h2>Closest training images</h2><p class='muted'>Of each evaluation image, the training image that curation kept "
        "and that is closest to it; the evaluation image is on the left. Curation calls images at a distance of 1 or less the "
        "same; pairs listed here at 1 or less were missed by its search by hash. Bits are those of 63 in which hashes differ."
        "</p><div class='scroll'><table><tr><th>distance</th><th>images</th>"
        f"{head}<th>up to 1</th></tr>{rows}</table></div>{shown}"
    )


def _row(name: str, distances: Sequence[float]) -> str:
    values = "".join(f"<td>{np.quantile(distances, share):.2f}</td>" for share, _ in _QUANTILES)
    leaks = np.count_nonzero(np.asarray(distances) <= 1)
    return f"<tr><td>{html.escape(name)}</td><td>{len(distances)}</td>{values}<td>{leaks}</td></tr>"


def _pairs(found: Sequence[Mapping[str, Any]]) -> str:
    boxes = []
    for one in sorted(found, key=lambda one: one["distance"])[:_SHOWN]:
        sides = zip(one["images"], (one["evaluation"], one["training"]), strict=True)
        images = "".join(
            f"<p><img alt='' src='{html.escape(image)}' title='{html.escape(place)}'></p>" for image, place in sides
        )
        boxes.append(
            f"<div class='mistake'><div>{images}</div><span>distance {one['distance']:.2f}, {one['bits']} bits</span></div>"
        )
    return f"<div class='mistakes'>{''.join(boxes)}</div>"
