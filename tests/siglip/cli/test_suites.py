"""Suites: what a file says, what is run, resumed and shown, and entries that fail."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from data_pipelines.sample import LANGUAGES
from siglip.cli import run, suites
from siglip.cli.evaluation import format_table
from siglip.cli.reporting import _with_chance, _without_languages
from siglip.evaluation import text_cache
from siglip.evaluation.class_files import canonicalize, read_classes
from siglip.evaluation.embed import Embedder
from siglip.evaluation.suite_file import metric_of, read_suite
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.workdir.report import Run
from tests.data_pipelines.shards import encode, write_tar
from tests.siglip.jobs import ROOT, SAMPLE
from tests.siglip.tiny import random_params
from tests.siglip.tiny_run import use_devices

SUITES = ROOT / "configs" / "suites"
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)


@pytest.fixture(autouse=True)
def few_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.npz"
    big_vision.write(path, random_params(MODEL), MODEL)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two data sets: CLIP_benchmark's folder of three labelled images, and captions in two languages."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 255, (20, 20, 3), np.uint8)) for _ in range(3)]
    (folder / "wds_pets" / "test").mkdir(parents=True)
    members = {f"s{n}.{end}": data for n in range(3) for end, data in (("png", images[n]), ("cls", str(n).encode()))}
    write_tar(folder / "wds_pets" / "test" / "0.tar", members)
    (folder / "wds_pets" / "test" / "nshards.txt").write_text("1")
    (folder / "wds_pets" / "classnames.txt").write_text("cat\ndog\nhen\n")
    captions = [
        json.dumps({"captions": {"en": f"image {n}", "de": [f"Bild {n}", f"das {n}."]}}).encode() for n in range(3)
    ]
    members = {f"{n}.{end}": data for n in range(3) for end, data in (("png", images[n]), ("json", captions[n]))}
    write_tar(folder / "xm.tar", members)
    return folder


ENTRIES = {
    "defaults": {"task": "zeroshot", "canonical": False},
    "sources": {"b16": "a paper, Table 1"},
    "average": True,
    "entries": [
        {"name": "pets", "data": "wds_pets", "published": {"b16": 0.5}},
        {"name": "xm", "task": "retrieval", "data": "xm.tar", "captions": ["captions.en", "captions.de"]},
    ],
}


def write_suite(folder: Path, tree=ENTRIES, **changes) -> str:
    (folder / "suite.yaml").write_text(yaml.safe_dump(tree | changes))
    return str(folder / "suite.yaml")


def evaluate(src, suite, root, out, *flags, tokenizer=SAMPLE / "spiece.model") -> int:
    args = ["eval", str(src), "--suite", suite, "--out", str(out), "--tokenizer", str(tokenizer), "--batch-size", "4"]
    return run([*args, *(["--root", str(root)] if root else []), *flags])


def test_the_quick_starts_suite_runs_on_the_sample(src, tmp_path, capsys):
    suite, out = str(SUITES / "quickstart.yaml"), tmp_path / "out"
    assert evaluate(src, suite, None, out, "--only", "unseen-ideas", "flags", "--batch-size", "64") == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == ["unseen-ideas-mean"] * 4 + ["flags"] * 2
    result = json.loads((out / "flags.json").read_text())
    assert {"dataset", "model", "pretrained", "task", "language", "metrics"} <= result.keys()
    assert result["task"] == "zeroshot_classification" and 0 <= result["metrics"]["acc1"] < 0.1


def test_a_suite_resumes_by_model_and_settings(src, root, tmp_path, capsys, monkeypatch):
    suite, out = write_suite(tmp_path), tmp_path / "out"
    assert evaluate(src, suite, root, out, "--published", "b16") == 0
    first = capsys.readouterr().out
    files = {path: path.read_bytes() for path in out.glob("*.json")}
    assert {path.name for path in files} == {"pets.json", "xm-en.json", "xm-de.json", "xm-mean.json"}
    assert "of 2 of 2 sets" in first and "published: b16, a paper, Table 1" in first
    assert json.loads((out / "xm-de.json").read_bytes())["language"] == "de"
    with monkeypatch.context() as patch:  # nothing is embedded
        patch.setattr(Embedder, "embed_shards", None)
        assert evaluate(src, suite, root, out, "--published", "b16") == 0
    assert capsys.readouterr().out == first and {path: path.read_bytes() for path in out.glob("*.json")} == files
    with monkeypatch.context() as patch:  # of several processes all go by what the first finds done
        patch.setattr(suites, "gather_records", lambda records: [{}])
        patch.setattr(Embedder, "embed_shards", None)
        assert evaluate(src, suite, root, out) == 1
    capsys.readouterr()
    (out / "xm-de.json").unlink()  # an entry of which a part is missing is run again; its texts are on disk
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed_texts", None)
        assert evaluate(src, suite, root, out) == 0
    assert {path: path.read_bytes() for path in out.glob("*.json")} == files
    changed = [ENTRIES["entries"][0] | {"pixels": "square875"}, ENTRIES["entries"][1]]
    assert evaluate(src, write_suite(tmp_path, entries=changed), root, out) == 0
    assert {path for path in files if path.read_bytes() != files[path]} == {out / "pets.json"}
    params = jax.tree.map(lambda leaf: leaf * 1.5, random_params(MODEL))
    big_vision.write(tmp_path / "other.npz", params, MODEL)
    before = (out / "xm-en.json").read_bytes()
    assert evaluate(tmp_path / "other.npz", suite, root, out) == 0
    assert (out / "xm-en.json").read_bytes() != before


def test_the_others_go_on_past_a_broken_entry(src, root, tmp_path, capsys, caplog):
    gone, bare = {"name": "gone", "data": "gone.tar"}, {"name": "bare", "data": "xm.tar"}
    short = {"name": "short", "data": "wds_pets", "classes": '["cat", "dog"]'}  # fails when its images are embedded
    suite = write_suite(tmp_path, entries=[gone, short, bare, ENTRIES["entries"][0]])
    assert evaluate(src, suite, root, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "3 of 4 entries failed: gone, short, bare" in told.err and "Traceback" not in told.err
    assert [line.split()[:2] for line in told.out.splitlines()[1:4]] == [
        [name, "failed"] for name in ("gone", "short", "bare")
    ]
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["pets.json"]
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "gone failed: no shard at" in messages and "bare failed: these data bring no class names" in messages
    assert (
        'short failed: ["cat", "dog"] has 2 classes, but' in messages
        and "labels from 0 to 2; a line is missing" in messages
    )


def test_an_entry_called_like_anothers_language_has_a_file_of_its_own(src, root, tmp_path, monkeypatch):
    both = [
        ENTRIES["entries"][1],
        {"name": "xm-en", "task": "retrieval", "data": "xm.tar", "captions": ["captions.en"]},
    ]
    suite, out = write_suite(tmp_path, entries=both), tmp_path / "out"
    assert evaluate(src, suite, root, out) == 0
    assert {path.name for path in out.glob("*.json")} == {"xm-en-0.json", "xm-de.json", "xm-mean.json", "xm-en.json"}
    monkeypatch.setattr(Embedder, "embed_shards", None)  # nothing is embedded
    assert evaluate(src, suite, root, out) == 0


def test_a_bug_keeps_its_traceback_and_the_others_go_on(src, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("siglip.evaluation.zeroshot.classification", lambda *args, **more: 1 / 0)
    assert evaluate(src, write_suite(tmp_path), root, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert "ZeroDivisionError" in told.err and "xm-mean" in told.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": []}, "holds no suite"),
        ({"entires": []}, "has no field 'entires'; did you mean 'entries'"),
        (
            {"entries": [{"task": "zeroshop", "data": "a"}]},
            "entries.0.task='zeroshop' must be one of .*; did you mean 'zeroshot'",
        ),
        ({"entries": [{"data": "a", "label": 3}]}, "entries.0.label=3 is not a str"),
        ({"entries": [{"data": "a", "lable": "x"}]}, "no field 'lable'; did you mean 'label'"),
        ({"entries": [{"name": "x"}]}, "entries.0 is incomplete: add data"),
        ({"entries": [{"data": "a", "task": ["knn"]}]}, r"entries.0.task=\['knn'\] must be one of"),
        ({"entries": [{"data": "a", 1: "x"}]}, "entries.0 has no field 1"),
        ({"average": "no"}, "average='no' must be true or false"),
        ({"root": None}, "root=None a folder"),
        ({"entries": [{"data": "a", "pixels": "crop"}]}, "pixels='crop' must be one of squash, square875, aspect75"),
        ({"entries": [{"data": "x/a.tar"}, {"data": "y/a.tar"}]}, "2 entries are called 'a'"),
        (
            {"entries": [{"data": "a", "published": {"l14": 0.5}}]},
            "published names 'l14', which `sources` does not have",
        ),
        ({"entries": [{"data": "a", "published": {"b16": "high"}}]}, "must be a number, or numbers by metric"),
        ({"entries": ["a"]}, "entries.0='a' is not a mapping"),
        ({"entries": [{"data": "a", "metrics": "acc1"}]}, "metrics='acc1' is not a list"),
        ({"defaults": ["a"]}, "defaults=.* is not a mapping"),
        ({"defaults": {"pixel": "squash"}}, "defaults: no task has a field 'pixel'; did you mean 'pixels'"),
    ],
)
def test_mistakes_in_a_suite(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_suite(Path(write_suite(tmp_path, **changes)))


def test_paths_in_a_suite_may_begin_at_home_or_look_like_patterns_and_name_several_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.txt").write_text("cat\ndog\n")
    data = ["x.tar::y.tar", "{a}/x.tar", "[1]/x.tar", "~/x.tar", "/x.tar"]
    entries = [{"name": str(n), "data": path, "classes": "~/c.txt"} for n, path in enumerate(data)]
    suite = read_suite(Path(write_suite(tmp_path, entries=entries, root="~/sets")))
    home, sets = tmp_path / "home", tmp_path / "home" / "sets"
    expected = [f"{sets}/x.tar::{sets}/y.tar", f"{sets}/{{a}}/x.tar", f"{sets}/[1]/x.tar", f"{home}/x.tar", "/x.tar"]
    assert [entry.task.data for entry in suite.entries] == expected
    assert all(entry.task.classes == f"{home}/c.txt" and entry.settings["files"] for entry in suite.entries)


def test_the_mean_of_a_metric_that_nobody_has(tmp_path):
    suite = read_suite(Path(write_suite(tmp_path, entries=[{"name": "pets", "data": "a", "metrics": ["acc9"]}])))
    record = {"dataset": "pets", "language": "", "metrics": {"acc1": 0.5}}
    lines = suites.format_results(suite, {"pets": [record]}, None).splitlines()
    assert lines[-1].split() == ["mean", "of", "0", "of", "1", "sets", "-"]


def test_mistakes_in_the_flags_of_a_suite(src, tmp_path, capsys):
    suite = write_suite(tmp_path)
    for flags, message in (
        (["--only", "petz"], "the suite has no entry 'petz'; did you mean 'pets'"),
        (["--published", "b32"], "has no published values of 'b32'; there are b16"),
        (["--task", "zeroshot"], "--task"),
    ):
        assert evaluate(src, suite, None, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err
    twice = "entries: [{task: knn, train: a, data: a, data: b}]"
    for content, message in (("entries: [", "is not YAML"), (twice, "the key 'data' is there more than once")):
        (tmp_path / "suite.yaml").write_text(content)
        assert evaluate(src, suite, None, tmp_path / "out") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_suites(path):
    suite = read_suite(path, root="/data")
    published = [value for entry in suite.entries for values in entry.published.values() for value in values.values()]
    sizes = {"datacomp38": 38, "vtab19": 19, "siglip": 5, "siglip2": 6, "quickstart": 6, "flags": len(LANGUAGES)}
    assert len(suite.entries) == sizes[path.stem]
    assert all(0 < value < 1 for value in published) and {m for e in suite.entries for m in e.published} == set(
        suite.sources
    )


def test_the_flags_have_their_names_in_every_language():
    names = pq.read_table(SAMPLE / "flags.parquet", columns=["captions"])["captions"].to_pylist()
    entries = {entry.task.name: entry.task for entry in read_suite(SUITES / "flags.yaml").entries}
    assert list(entries) == [f"flags-{language}" for language in LANGUAGES]
    for language in LANGUAGES:
        task = entries[f"flags-{language}"]
        classes = read_classes(task.classes).names
        assert task.label == f"captions.{language}" and classes == [own[language] for own in names]
        assert len(set(map(canonicalize, classes))) == 200


def test_metrics_by_name():
    metrics = {"text_retrieval_recall@1": 0.5, "image_retrieval_recall@1": 0.25}
    assert metric_of(metrics, "mean_recall@1") == 0.375 and metric_of(metrics, "acc1") is None
    assert metric_of(metrics, "text_retrieval_recall@1") == 0.5 and metric_of({}, "mean_recall@1") is None


def test_the_cache_of_texts(tmp_path, monkeypatch):
    z = np.arange(4, dtype=np.float32).reshape(2, 2)
    path = tmp_path / "texts" / "a.npy"
    text_cache._write(path, z)
    np.testing.assert_array_equal(text_cache._read(path, 2), z)
    assert text_cache._read(path, 3) is None and text_cache._read(tmp_path / "none.npy", 2) is None
    path.write_bytes(path.read_bytes()[:-3])
    assert text_cache._read(path, 2) is None
    monkeypatch.setattr(text_cache, "MAX_BYTES", 300)
    for name in "bcd":
        text_cache._write(path.with_name(f"{name}.npy"), z)
    assert sorted(p.name for p in path.parent.iterdir()) == ["c.npy", "d.npy"]
    params = {"a": np.zeros(2, np.float32), "b": {"c": np.ones(())}}
    same, other = (
        text_cache.digest_params(params),
        text_cache.digest_params(params | {"a": np.zeros((2, 1), np.float32)}),
    )
    assert same == text_cache.digest_params(dict(reversed(params.items()))) != other
    assert text_cache.digest(["ab", "c"]) != text_cache.digest(["a", "bc"])


def test_of_many_languages_english_and_the_mean_of_the_others_are_printed():
    recall = {"en": 0.5, "de": 0.3, "fr": 0.2, "th": 0.1, "zh": 0.0}
    sets = {f"toy-{language}": {"image_retrieval_recall@10": value} for language, value in recall.items()}
    sets |= {"toy-mean": {"image_retrieval_recall@10": 0.22}, "toy-two-en": {"acc1": 1.0}, "digits": {"acc1": 0.1}}
    shown = _without_languages(sets)
    assert list(shown) == ["toy-en", "toy-two-en", "digits", "toy-4 others"]
    assert shown["toy-4 others"] == {"image_retrieval_recall@10": pytest.approx(0.15)}
    few = {name: row for name, row in sets.items() if name not in ("toy-de", "toy-fr")}
    assert _without_languages(few) == few


def test_chance_is_printed_beside_the_value_that_it_is_of():
    counts = {n: {"images": 50, "described": 50, "texts": 50} for n in ("en", "de", "fr", "th", "zh")}
    sizes = {"retrieval": {"dataset": "toy", "counts": counts}, "zeroshot": {"ten": {"images": 9, "classes": 10}}}
    names = ("text_retrieval_recall@10", "image_retrieval_recall@10", "image_retrieval_median_rank")
    sets = {f"toy-{n}": dict.fromkeys(names, 0.5) for n in (*counts, "mean")} | {"other": dict.fromkeys(names, 0.5)}
    run = Run("run", [], {}, sizes)
    head, *rows = format_table(_without_languages(_with_chance(run, "retrieval", sets))).splitlines()
    assert head.split() == ["i2t", "R@10", "t2i", "R@10", "chance", "t2i", "rank"]
    assert [row.split()[-4:] for row in rows] == [
        ["0.500", "0.500", "0.200", "0.5"],  # English
        ["0.500", "0.500", "-", "0.5"],  # of another set nobody knows the size
        ["0.500", "0.500", "0.200", "0.5"],  # the four other languages
    ]
    shown = _with_chance(run, "zeroshot", {"ten": {"acc1": 0.5, "acc5": 0.9}})
    assert shown == {"ten": {"acc1": 0.5, "chance": 0.1, "acc5": 0.9}}
    told = {"knn_acc1_map": 0.5, "knn_acc1_map_chance": 0.25}
    assert _with_chance(run, "knn", {"x": told})["x"] == told | {"chance": 0.25}
    assert _with_chance(run, "knn", {"x": {"knn_acc1_map": 0.5}}) == {"x": {"knn_acc1_map": 0.5}}
