"""The report: what it computes against plain float64 loops, and what it makes of other people's texts."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.curate.closest import CLOSEST_SCHEMA
from siglip.cli.evaluation import format_table
from siglip.cli.reporting import _closest
from siglip.evaluation import findings
from siglip.evaluation.findings import classified, confusion, found_images, retrieval_findings
from siglip.workdir import plots
from siglip.workdir.report import Run, _chance, chance_rows, final_results, write_report
from tests.data_pipelines.shards import SAMPLE

TEMPERATURE, BIAS, BATCH = 9.0, -4.0, 64


def unit(rng, count: int) -> np.ndarray:
    z = rng.normal(size=(count, 8))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [1 << 22, 40])
def test_findings_equal_a_loop_over_all_pairs(monkeypatch, block):
    """Images with 0, 1 or 2 captions; in one block or in many."""
    monkeypatch.setattr(findings, "_BLOCK", block)
    rng = np.random.default_rng(0)
    captions = [[f"{n}.{k}" for k in range((1, 2, 1, 0)[n % 4])] for n in range(13)]
    texts, owner = [t for own in captions for t in own], [n for n, own in enumerate(captions) for _ in own]
    zimg, ztxt = unit(rng, 13), unit(rng, len(texts))
    scale = {"temperature": TEMPERATURE, "bias": BIAS, "batch_size": BATCH}
    found = retrieval_findings(zimg, {"en": captions}, ztxt, **scale)
    logits = TEMPERATURE * np.float64(ztxt) @ np.float64(zimg).T + BIAS
    match = np.array(owner)[:, None] == np.arange(13)
    assert found["counts"] == {"en": {"images": 13, "described": 10, "texts": len(texts)}}
    edges = found["histogram"]["edges"]
    assert found["histogram"]["positives"] == np.histogram(logits[match], edges)[0].tolist()
    assert found["histogram"]["negatives"] == np.histogram(logits[~match], edges)[0].tolist()
    prior = 1 / 13
    p = 1 / (1 + np.exp(-(logits + math.log(prior / (1 - prior)) + math.log(BATCH - 1))))
    bins = found["reliability"]["bins"]
    assert sum(n for *_, n in bins) == match.size and found["reliability"]["prior"] == pytest.approx(prior)
    assert sum(mean * n for mean, _, n in bins) == pytest.approx(p.sum(), rel=1e-5)
    assert sum(share * n for _, share, n in bins) == pytest.approx(match.sum())
    assert found["reliability"]["error"] == pytest.approx(
        sum(abs(mean - share) * n for mean, share, n in bins) / match.size
    )
    behind = np.where(match, -np.inf, logits).max(axis=1) - logits[match]
    worst = found["mistakes"][0]
    assert texts.index(worst["text"]) == behind.argmax() and worst["right"] == owner[behind.argmax()]
    assert worst["p_wrong"] == pytest.approx(p[behind.argmax(), worst["wrong"]], rel=1e-5)
    embed = lambda asked: ztxt[[texts.index(text) for text in asked]]  # noqa: E731
    queries = found_images(zimg, {"en": captions}, embed, queries=16)
    assert [query["text"] for query in queries] == [own[0] for own in captions if own]
    for query in queries:
        scores = logits[texts.index(query["text"])]
        assert query["rank"] == 1 + np.sum(scores > scores[query["right"]])
        assert query["top"] == np.argsort(-scores)[:8].tolist()


def test_queries_over_unseen_ideas_have_the_eggplant_and_several_languages():
    table = pq.read_table(SAMPLE / "unseen-ideas.parquet", columns=["captions"])["captions"].to_pylist()
    captions = {language: [[own[language]] for own in table] for language in ("en", "de", "hi")}
    rng = np.random.default_rng(0)
    found = found_images(
        unit(rng, len(table)), captions, lambda texts: unit(rng, len(texts)), queries=findings.FEW_QUERIES
    )
    assert [query["language"] for query in found] == ["en"] * 6 + ["de", "hi"] * 2 + ["de"]
    assert "eggplant" in [query["text"] for query in found]


def test_the_page_shows_what_queries_find_in_every_retrieval_set(tmp_path):
    query = {"language": "en", "text": "<eggplant>", "right": 3, "rank": 2, "top": [5, 3]}
    counts = {"en": {"images": 9, "described": 9, "texts": 9}}
    other = {"dataset": "ideas", "counts": counts, "found": [query], "thumbs": {"3": "data:,three", "5": "data:,five"}}
    found = {"retrieval": {"counts": counts, **SCORES}, "thumbs": {}, "others": [other]}
    page = write_report(tmp_path / "r.html", [Run("run", [], {}, found)]).read_text()
    assert "What queries find: toy" in page and "<bdi>&lt;eggplant&gt;</bdi>" in page.partition("find: ideas")[2]
    assert (page.count("src='data:,three'"), page.count("src='data:,five'")) == (2, 1) and "by chance 5" in page


def test_confusion():
    weights, labels = np.eye(3, 8, dtype=np.float32), np.array([0, 0, 1, 2, 2, 2])
    zimg = weights[[0, 1, 1, 0, 0, 2]]
    found = confusion(zimg, weights, labels, ["cat", "dog", "cow"])
    assert found["matrix"] == [[1, 1, 0], [0, 1, 0], [2, 0, 1]] and found["worst"] == [
        ["cow", "cat", 2],
        ["cat", "dog", 1],
    ]


def test_classified_images_have_the_softmax_over_all_classes():
    rng, names = np.random.default_rng(0), ["cat", "dog", "cow", "owl"]
    weights, labels = np.eye(4, dtype=np.float32), rng.integers(4, size=20)
    zimg = rng.normal(size=(20, 4)).astype(np.float32)
    examples = classified(zimg, weights, labels, names, temperature=3.0)
    assert [one["image"] for one in examples] == [0, 2, 5, 8, 10, 13, 16, 19]
    for one in examples:
        odds = np.exp(3.0 * zimg[one["image"]].astype(float))
        wanted = sorted(zip(odds / odds.sum(), names, strict=True), reverse=True)[:3]
        assert one["right"] == names[labels[one["image"]]] and [name for name, _ in one["classes"]] == [
            n for _, n in wanted
        ]
        np.testing.assert_allclose([share for _, share in one["classes"]], [share for share, _ in wanted], rtol=1e-5)


def test_smoothing_keeps_a_line_and_halves_noise():
    line = np.arange(100.0)
    np.testing.assert_allclose(plots.smooth(line)[5:-5], line[5:-5])
    noise = np.random.default_rng(0).normal(size=400)
    assert plots.smooth(noise).std() < 0.5 * noise.std() and len(plots.smooth([1.0])) == 1


EXAMPLE = {"image": "data:,", "right": "dog", "classes": [["dog", 0.75], ["<i>", 0.25]]}
LINES = [
    {"step": 1, "train/loss": 3.0, "train/substituted/truncated": 1, "data/source_0/pairs": 100},
    {"step": 2, "train/loss": 2.0, "train/substituted/truncated": 4, "data/source_0/pairs": 200},
    {
        "step": 2,
        "eval/retrieval/toy-de/image_retrieval_recall@10": 0.2,
        "eval/retrieval/toy-en/image_retrieval_recall@10": 0.36,
    },
    {"step": 2, "eval/zeroshot/things/acc1": 0.5},
]


def test_numbers_have_their_chance_and_standard_error_and_english_is_first(tmp_path):
    counts = {"en": {"images": 50, "described": 50, "texts": 100}, "de": {"images": 50, "described": 50, "texts": 100}}
    zeroshot = {"things": {"images": 25, "classes": 4, "worst": [["<b>", "dog", 3]], "examples": [EXAMPLE]}}
    funnel = {"pairs": 10, "kept": 7, "applied": {"bomb": 2, "<i>": 1}, "taken": {"bomb": 2, "<i>": 1}}
    found = {"retrieval": {"counts": counts, **SCORES}, "zeroshot": zeroshot}
    run = Run("<run>", LINES, {"data": "<x>"}, found, {"m.parquet": funnel}, ["left <out>"])
    baselines = {"ridge <1>": {"image_retrieval_recall@10": 0.48}}
    page = write_report(tmp_path / "r.html", [run], baselines=baselines).read_text()
    assert list(final_results(LINES)["retrieval"]) == ["toy-en", "toy-de"]
    assert "0.360 <small>± 0.048</small>" in page  # sqrt(.36 * .64 / 100)
    assert "0.500 <small>± 0.100</small>" in page and page.index("toy-en") < page.index("toy-de")
    assert "<td>chance</td><td>0.200</td>" in page and "<td>chance</td><td>0.250</td>" in page
    assert "<span>dog 75%</span><br><span>&lt;i&gt; 25%</span>" in page
    assert "ridge &lt;1&gt;" in page and "<td>truncated</td><td>4</td><td>2.00%</td>" in page
    assert "&lt;i&gt;</td><td>1</td><td>7</td>" in page and "7 of 10 pairs kept" in page
    for raw in ("<run>", "<out>", "<x>", "<b></td>", "<1>", "<i></td>", "<i> "):
        assert raw not in page


def test_sizes_of_one_data_set_are_not_those_of_another(tmp_path):
    sizes = {"images": 50, "described": 50, "texts": 100}
    found = {
        "retrieval": {"counts": {"en": sizes}, **SCORES},
        "zeroshot": {"a": {"images": 25, "classes": 4, "worst": [], "examples": []}},
    }
    lines = [
        {"step": 2, **{f"eval/retrieval/{name}/image_retrieval_recall@10": 0.36 for name in ("toy", "other-en")}},
        {"step": 2, "eval/zeroshot/a/acc1": 0.5, "eval/zeroshot/b/acc1": 0.5},
    ]
    page = write_report(tmp_path / "r.html", [Run("run", lines, {}, found)]).read_text()
    assert page.count("0.360 <small>± 0.048</small>") == 1 == page.count("0.500 <small>± 0.100</small>")
    assert "<td>other-en</td><td>0.360</td>" in page and "<td>chance</td>" not in page
    assert "<td>chance: toy</td><td>0.200</td>" in page and "<td>chance: a</td><td>0.250</td>" in page


def test_each_data_set_has_its_own_chance(tmp_path):
    sizes = {"images": 50, "described": 50, "texts": 50}
    counts = {
        name: {"images": 9, "classes": n, "worst": [], "examples": []} for name, n in {"ten": 10, "four": 4}.items()
    }
    found = {"retrieval": {"counts": {"en": sizes, "de": sizes}, **SCORES}, "zeroshot": counts}
    sizes = {"images": 20, "described": 20, "texts": 36}
    found["others"] = [{"dataset": "b", "counts": {"en": sizes}, "found": [], "thumbs": {}}]
    lines = [
        {
            "step": 2,
            **{
                f"eval/retrieval/{name}/image_retrieval_recall@10": 0.36
                for name in ("toy-en", "toy-de", "toy-mean", "b-en")
            },
        },
        {"step": 2, "eval/zeroshot/ten/acc1": 0.5, "eval/zeroshot/four/acc1": 0.5},
        {"step": 2, "eval/knn/toy/knn_acc1_map": 0.5, "eval/knn/toy/knn_acc1_map_chance": 0.125},
    ]
    page = write_report(tmp_path / "r.html", [Run("run", lines, {}, found)]).read_text()
    assert page.count("<td>chance: toy</td><td>0.200</td>") == 1 and "<td>chance: b-en</td><td>0.500</td>" in page
    assert "<td>b-en</td><td>0.360 <small>± 0.080</small>" in page  # sqrt(.36 * .64 / 36)
    assert "<td>chance: ten</td><td>0.100</td>" in page and "<td>chance: four</td><td>0.250</td>" in page
    assert "<td>chance</td><td>0.125</td>" in page and "_chance" not in page


def test_a_mean_over_languages_has_the_error_of_one_of_them_at_most(tmp_path):
    sizes = {"images": 50, "described": 50, "texts": 100}
    found = {"retrieval": {"counts": {"en": sizes, "de": sizes}, **SCORES}}
    lines = [{"step": 2, "eval/retrieval/toy-mean/text_retrieval_recall@1": 0.36}]
    page = write_report(tmp_path / "r.html", [Run("run", lines, {}, found)]).read_text()
    assert "0.360 <small>± 0.068</small>" in page  # sqrt(.36 * .64 / 50)


def test_an_error_that_an_evaluation_computes_stands_beside_its_number(tmp_path):
    metrics = {"acc1_corrupted": 0.4, "acc1_corrupted_se": 0.05, "ece@0.1": 0.2, "ece_se@0.1": 0.01, "acc1_se": 0.3}
    lines = [{"step": 2, **{f"eval/robustness/toy/{name}": value for name, value in metrics.items()}}]
    page = write_report(tmp_path / "r.html", [Run("run", lines, {}, {})]).read_text()
    assert "0.400 <small>± 0.050</small>" in page and "0.200 <small>± 0.010</small>" in page
    assert "corrupted_se" not in page and "ece_se" not in page and "± 1 standard error" in page
    assert "<th>acc1_se</th>" in page  # of no number that is there: a group may be called so


def test_chance_of_several_right_ones_equals_drawing_at_random():
    sizes, rng = {"images": 10, "described": 10, "texts": 30}, np.random.default_rng(0)
    drawn = np.array([rng.permutation(30)[:5].min() < 3 for _ in range(20_000)])
    found = _chance("text_retrieval_recall@5", sizes)
    assert found == pytest.approx(1 - math.comb(27, 5) / math.comb(30, 5))
    assert abs(drawn.mean() - found) < 5 * drawn.std() / math.sqrt(len(drawn))
    assert _chance("image_retrieval_recall@5", sizes) == pytest.approx(0.5) and _chance("text_median_rank", {}) is None


def write_closest(folder, rows):
    """closest.parquet of a curation. rows: (evaluation shard, index, distance, whether there are thumbnails)."""
    folder.mkdir()
    names = CLOSEST_SCHEMA.names
    table = [
        (shard, index, f"<{index}>", f"{folder.name}.tar", 7, "<key>", 5, distance, *(b"<&>" if shown else None,) * 2)
        for shard, index, distance, shown in rows
    ]
    columns = dict(zip(names, map(list, zip(*table, strict=True)), strict=True))
    pq.write_table(pa.table(columns, CLOSEST_SCHEMA), folder / "closest.parquet")
    return str(folder / "manifest.parquet")


def test_the_closest_training_images_are_those_of_all_sources(tmp_path):
    many = [("sets/style-00.tar", n, 2.0 + n / 100, n < 12) for n in range(30)]
    one = write_closest(tmp_path / "one", [*many, ("sets/ideas.tar", 0, 3.5, True)])
    two = write_closest(tmp_path / "two", [("sets/style-00.tar", 20, 1.25, True), ("sets/style-01.tar", 0, 0.75, True)])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "closest.parquet").write_text("no table")
    found = _closest([one, two, str(tmp_path / "other" / "manifest.parquet"), str(tmp_path / "none" / "m.parquet")])
    assert {name: len(rows) for name, rows in found.items()} == {"style": 31, "ideas": 1}
    page = write_report(tmp_path / "r.html", [Run("run", [], {}, closest=found)]).read_text()
    assert (
        "<td>style</td><td>31</td><td>0.75</td><td>0.90</td>" in page
    )  # quantile .01 of 31 lies at .75 + .3 (1.25 - .75)
    assert "<td>ideas</td><td>1</td><td>3.50</td>" in page and page.count("<td>1</td></tr>") == 1  # up to 1
    shown = re.findall(r"title='([^']*)'></p></div><span>distance ([\d.]+), 5 bits", page)
    distances = [float(distance) for _, distance in shown]
    assert distances == [0.75, 1.25, *(2 + n / 100 for n in range(10)), 3.5]
    assert [name for name, _ in shown[:3]] == ["two.tar: &lt;key&gt;"] * 2 + ["one.tar: &lt;key&gt;"]
    assert page.count("src='data:image/jpeg;base64,PCY+'") == 2 * len(shown) and "sets/style-01.tar: &lt;0&gt;" in page
    assert "Closest" not in write_report(tmp_path / "r.html", [Run("run", [], {})]).read_text()


SCORES = {
    "dataset": "toy", "language": "en", "histogram": {"edges": [-2.0, -1.0, 0.0], "positives": [0, 5], "negatives": [9, 1]},
    "reliability": {"bins": [[0.01, 0.0, 50], [0.2, 0.25, 20]], "error": 0.02, "prior": 0.02},
    "similarity": {"texts": ["a", "b"], "logits": [[0.0, -1.0], [-2.0, 0.5]]}, "found": [], "mistakes": [],
}  # fmt: skip


def test_languages_of_a_set_share_the_chance_that_is_the_same_for_all():
    names = ("text_retrieval_recall@10", "image_retrieval_recall@10")
    results = {f"toy-{language}": dict.fromkeys(names, 0.3) for language in ("en", "de", "mean")}
    sizes = {f"toy-{language}": {"images": 50, "described": 50, "texts": n} for language, n in (("en", 50), ("de", 60))}
    assert chance_rows(results, sizes) == {"chance": {"image_retrieval_recall@10": pytest.approx(0.2)}}
    other = {"b": dict.fromkeys(names, 0.3)}
    assert list(chance_rows(results | other, sizes | {"b": {"images": 9, "described": 9, "texts": 9}})) == [
        "chance: toy",
        "chance: b",
    ]
    assert chance_rows({"toy-mean": {}}, {}) == {}


def test_an_error_stands_beside_its_number_and_has_no_column():
    rows = {"a": {"acc1": 0.5, "acc1_se": 0.02, "acc1_chance": 0.1, "x_se": 3.0}, "chance": {"acc1": 0.1}}
    head, *lines = format_table(rows).splitlines()
    assert head.split() == ["acc1", "x_se"]  # of no number that is there: a group may be called so
    assert [line.split() for line in lines] == [["a", "0.500", "±0.020", "3.000"], ["chance", "0.100", "-"]]
