"""The page that a curation writes: what is on it, that other people's text stays text, that it does not depend on chance."""

import base64
import re

import pytest

from data_pipelines.curate.report import write_report

FUNNEL = {
    "pairs": 30,
    "kept": 20,
    "taken": {"truncated": 4, "low_score": 6},
    "applied": {"truncated": 4, "low_score": 7, "mojibake": 1},
    "shards": [{"shard": "a.tar", "pairs": 30, "problem": "shard 'a<b>.tar' is cut off"}],
    "against": [],
    "languages": {"before": {"en": 28, "de": 2}, "after": {"en": 20}},
    "sides_px": {"before": {"32": 10, "64": 20}, "after": {"64": 20}},
    "config": {"min_score": 0.1},
}
SCORES = {"before": {"-0.02": 3, "0.06": 4, "0.10": 10, "0.30": 10}, "after": {"0.10": 10, "0.30": 10}}
EXAMPLES = {
    "truncated": [[0.1, 0, 3, "<script>alert(1)</script>", ""]],
    "low_score": [[0.2, 0, 4, "a cat", b"\xff\xd8\xff".hex()]],
    "mojibake": [],
}


def page_of(path, **changes) -> tuple[str, str]:
    """The page and, decoded, the plot in it."""
    write_report(path, FUNNEL | changes, EXAMPLES, ["a.tar"])
    page = path.read_text(encoding="utf-8")
    (plot,) = re.findall(r"data:image/svg\+xml;base64,([^']+)'", page)
    return page, base64.b64decode(plot).decode()


def test_rules_examples_and_problems_are_shown_and_escaped(tmp_path):
    page, _ = page_of(tmp_path / "report.html")
    cells = re.findall(r"<tr><td>(\w+)</td><td>(\d*)</td><td>(\w*)</td><td>(\d+)</td></tr>", page)
    assert cells == [
        ("all", "", "", "30"),
        ("truncated", "4", "4", "26"),
        ("low_score", "7", "6", "20"),
        ("mojibake", "1", "repaired", "20"),
    ]
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a&lt;b&gt;.tar" in page and "title='a.tar#3'" in page
    assert page.count(">no image<") == 1 and page.count("data:image/jpeg;base64,/9j/") == 1


@pytest.mark.parametrize("min_score", [0.1, None])
def test_scores_are_plotted_with_their_threshold_where_a_model_scored(tmp_path, min_score):
    # Matplotlib draws letters as outlines and leaves each text as a comment before them.
    _, without = page_of(tmp_path / "report.html")
    assert "<!-- pairs left after each rule -->" in without and "image-text score" not in without
    _, plot = page_of(tmp_path / "report.html", scores=SCORES, config={"min_score": min_score})
    assert "<!-- pairs by image-text score -->" in plot
    assert ("<!-- min_score 0.1 -->" in plot) == (min_score is not None)


def test_the_same_counts_give_the_same_bytes(tmp_path):
    assert page_of(tmp_path / "1.html", scores=SCORES) == page_of(tmp_path / "2.html", scores=SCORES)
