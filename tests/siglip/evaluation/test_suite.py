"""Evaluations from flags and configs to results: every field of a shard, several processes, a new evaluation."""

import datetime
import decimal
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import errors as data_errors
from data_pipelines import workers
from data_pipelines.image_ops import decode_image, resize
from data_pipelines.sources.webdataset import TarSource
from siglip.cli import evaluation as cli
from siglip.cli import reporting, run
from siglip.cli.evaluation import embedder_of, first_values, values_of
from siglip.evaluation import embed
from siglip.evaluation.embed import Embedder
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.suite import run_tasks
from siglip.evaluation.zeroshot import ZeroShot
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel import sharding
from siglip.training.config import EvalConfig
from siglip.workdir import plots
from tests.siglip.jobs import ROOT, SAMPLE
from tests.siglip.tiny import random_params

SPIECE = str(SAMPLE / "spiece.model")
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)
PAIRS = 13


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """A model with random parameters."""
    path = tmp_path_factory.mktemp("model") / "m.npz"
    big_vision.write(path, random_params(MODEL), MODEL)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Parquet with images, captions, labels, and columns of types that JSON does not have."""
    pairs = list(TarSource(SAMPLE / "emoji-heldout-00000.tar"))[:PAIRS]
    path = tmp_path_factory.mktemp("table") / "heldout.parquet"
    columns = {
        "key": [pair.key for pair in pairs],
        "image": [pair.image for pair in pairs],
        "txt": [[pair.fields["captions"]["en"], f"caption {n}"] for n, pair in enumerate(pairs)],
        "taken": [datetime.datetime(2026, 1, 1 + n, tzinfo=datetime.UTC) for n in range(PAIRS)],
        "price": [decimal.Decimal(n % 3) for n in range(PAIRS)],
        "blob": [b"\xff\x00"] * PAIRS,
        "raw_label": [(b"cat", b"dog", b"cow")[n % 3] for n in range(PAIRS)],
        "box": [{"at": datetime.date(2026, 1, 1), "sides": [1.5, 2.5]}] * PAIRS,
    }
    pq.write_table(pa.table(columns), path)
    return path


def as_json(records):
    """What the other processes would be told."""
    return json.loads(json.dumps(records))


@pytest.mark.parametrize("label", ["price", "raw_label"])
def test_fields_of_any_type_do_not_matter_and_may_be_labels(src, table, tmp_path, monkeypatch, label):
    monkeypatch.setattr(embed, "gather_records", as_json)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncow\n")
    tasks = (Retrieval(str(table)), ZeroShot(str(table), str(tmp_path / "classes.txt"), label=label))
    for task in tasks:
        task.check(first_values)
    embedder = embedder_of(src, tokenizer=SPIECE, batch_size=8)
    retrieval, zeroshot = run_tasks(tasks, embedder)
    assert retrieval.dataset == zeroshot.dataset == "heldout"
    assert 0 < retrieval.metrics["text_retrieval_recall@10"] <= 1 and zeroshot.metrics["tied_fraction"] == 0
    found = embedder.embed_shards(str(table), ("txt", label, "taken"))
    assert found.values["txt"][2][1] == "caption 2" and found.index == list(range(PAIRS))
    assert found.values[label][:2] == ([["0"], ["1"]] if label == "price" else [["cat"], ["dog"]])
    assert found.values["taken"][0] == ["2026-01-01 00:00:00+00:00"]


def test_only_the_fields_asked_for_are_read(src, table, monkeypatch):
    seen = []
    original, iterate = cli.make_eval_batches, workers.iterate

    def spy(source, **settings):
        seen.append(set(source[0].fields))
        return original(source, **settings)

    def count_threads(*args, threads, **settings):
        seen.append(threads)
        return iterate(*args, threads=threads, **settings)

    monkeypatch.setattr(cli, "make_eval_batches", spy)
    monkeypatch.setattr(workers, "iterate", count_threads)
    embedder_of(src, tokenizer=SPIECE, batch_size=8).embed_shards(str(table), ("txt",))
    assert seen == [{"txt"}, workers.usable_cores()]


def test_values_of_a_field():
    record = {
        "txt": " a cat \nthe cat\n",
        "n": 3,
        "captions": {"en": "x", "de": ["y", "z"]},
        "empty": None,
        "flag": True,
    }
    assert values_of(record, "txt") == ["a cat \nthe cat"] and values_of(record, "txt.*") == ["a cat", "the cat"]
    assert values_of(record, "n") == [3] and values_of(record, "flag") == [True]
    assert values_of(record, "captions.de") == ["y", "z"] and values_of(record, "captions.fr") == []
    assert values_of(record, "captions") == values_of(record, "empty") == values_of(record, "none") == []


def test_lines_of_a_caption_file_are_captions_each(src, tmp_path, caplog):
    texts = [["a cat", "the cat"], ["a dog"], ["one hen", "two hens", "hens"]]
    with tarfile.open(SAMPLE / "emoji-heldout-00000.tar") as sample:
        images = [sample.extractfile(m).read() for m in sample.getmembers() if m.name.endswith(("jpg", "png", "webp"))]
    for name, members in (
        ("lines", lambda n: {f"{n}.txt": "\n".join(texts[n])}),
        ("numbered", lambda n: {f"{n}.{k}.txt": text for k, text in enumerate(texts[n])}),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as out:
            for n in range(3):
                for member, content in ({f"{n}.webp": images[n]} | members(n)).items():
                    info = tarfile.TarInfo(member)
                    content = content if isinstance(content, bytes) else content.encode()
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))
    embedder = embedder_of(src, tokenizer=SPIECE, batch_size=8)
    lines, numbered = (embedder.embed_shards(str(tmp_path / f"{name}.tar"), ("txt",)) for name in ("lines", "numbered"))
    assert Retrieval("x").captions_in(numbered, "txt") == texts and not caplog.records
    assert Retrieval("x", lines=False).captions_in(lines, "txt") == [["\n".join(own)] for own in texts]
    assert not caplog.records and Retrieval("x").captions_in(lines, "txt") == texts
    assert "x: the texts of 2 images have several lines; each line counts as a caption" in caplog.text


def test_pairs_without_a_label_are_left_out_and_counted(src, tmp_path, caplog):
    (tmp_path / "classes.json").write_text(json.dumps(["cat \ud83d", "dog", "cow"]))
    with tarfile.open(SAMPLE / "emoji-heldout-00000.tar") as sample:
        image = next(
            sample.extractfile(m).read() for m in sample.getmembers() if m.name.endswith(("jpg", "png", "webp"))
        )
    labels = [None, b"1", None, b"dog", b"0", b"2"]
    task = ZeroShot("a.tar", str(tmp_path / "classes.json"))
    assert task._number([float("nan")], "image", {}) is None and task._number(["-1"], "image", {}) == -1
    for label in ("9" * 5000, 10**400, 1e300):
        with pytest.raises(ValueError, match="which is neither a number nor a name"):
            task._number([label], "image", {})
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for n, label in enumerate(labels):
            for member, content in ((f"{n}.webp", image), (f"{n}.cls", label)):
                if content is not None:
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))
    task = ZeroShot(str(tmp_path / "a.tar"), str(tmp_path / "classes.json"))
    task.check(first_values)
    (result,) = task.run(embedder_of(src, tokenizer=SPIECE, batch_size=8))
    assert 0 <= result.metrics["acc1"] <= 1
    assert "2 images of" in caplog.text and "left out because they have no label 'cls', such as 0" in caplog.text


def test_all_devices_work_and_one_shape_is_compiled(src, monkeypatch):
    shapes = {"image": [], "text": []}

    @jax.jit
    def towers(params, batch):
        ((kind, rows),) = batch.items()
        shapes[kind].append(rows.shape)
        z = jax.numpy.zeros((len(rows), 5)).at[:, 0].set(rows.reshape(len(rows), -1)[:, 0] + params["shift"])
        jax.debug.callback(lambda: None)
        return z

    mesh = sharding.make_mesh(sharding.MeshConfig())
    assert mesh.size == 8
    places = []
    original = embed.own_rows
    monkeypatch.setattr(
        embed, "own_rows", lambda z, mesh: places.append(len(z.sharding.device_set)) or original(z, mesh)
    )
    images = np.arange(21, dtype=np.uint8).reshape(21, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)

    class Read:
        counts = {"corrupt_image": 2}

        def __iter__(self):
            for start in (0, 16):
                rows = list(range(start, min(start + 16, 21)))
                told = {
                    "index": [r + 1 for r in rows],
                    "key": [f"k{r}" for r in rows],
                    "fields": [{"row": r} for r in rows],
                }
                yield told | {"image": images[rows]}

    embedder = Embedder(
        functools.partial(towers, {"shift": np.float32(1)}),
        mesh=mesh,
        rows=embed.rows_per_process(13, mesh),
        image_size=(2, 2),
        patch_px=(1, 1),
        no_images={"image": np.zeros((0, 2, 2, 3), np.uint8)},
        resample="bilinear",
        canonical_prompts=True,
        tokenize=lambda texts: np.array([[len(text)] for text in texts], np.int32).reshape(-1, 1),
        read=lambda data, fields: (23, Read()),
        values_of=lambda record, field: [record[field]],
    )
    found = embedder.embed_shards("x", ("row",))
    np.testing.assert_array_equal(found.zimg[:, 0], np.arange(21) + 1)
    assert found.values == {"row": [[r] for r in range(21)]} and found.keys[20] == "k20" and found.index[0] == 1
    z = embedder.embed_texts(["aa", "b", "aa"] + ["c" * n for n in range(5, 40)])
    assert z[:3, 0].tolist() == [3, 2, 3] and z[-1, 0] == 40
    # 13 rows are rounded up to 16 over 8 devices; 21 images and 37 different texts end in a batch that is not full.
    assert shapes == {"image": [(16, 2, 2, 3)], "text": [(16, 1)]}
    assert places == [8] * 5


def test_a_collapsed_encoder_is_named(src, table, tmp_path, caplog):
    params = random_params(MODEL)
    params["txt"]["head"]["kernel"] = 0 * params["txt"]["head"]["kernel"]
    params["txt"]["head"]["bias"] = np.ones_like(params["txt"]["head"]["bias"])
    big_vision.write(tmp_path / "collapsed.npz", params, MODEL)
    embedder = embedder_of(tmp_path / "collapsed.npz", tokenizer=SPIECE, batch_size=16)
    caplog.set_level("WARNING", logger="siglip")
    (result,) = run_tasks([Retrieval(str(table))], embedder)
    assert "the text tower has collapsed" in caplog.text and "image tower" not in caplog.text
    assert result.metrics["tied_fraction"] > 0.3
    caplog.clear()
    run_tasks([Retrieval(str(table))], embedder_of(src, tokenizer=SPIECE, batch_size=16))
    assert not caplog.text


ALIGNMENT = '''
import dataclasses
from typing import ClassVar, Literal

from siglip.evaluation.results import Evaluation, Result


@dataclasses.dataclass(frozen=True)
class Alignment(Evaluation):
    """Mean similarity of images and their captions.

    Attributes:
        field: field that holds the caption.
    """

    data: str
    field: str = "txt"
    name: str | None = None
    task: Literal["alignment"] = "alignment"

    BENCHMARK_TASK: ClassVar[str] = "alignment"

    def check(self, first_values):
        assert first_values(self.data, (self.field,))[self.field]

    def run(self, embedder):
        images = embedder.embed_shards(self.data, (self.field,))
        ztxt = embedder.embed_texts([own[0] for own in images.values[self.field]])
        return [Result(self, self.dataset, "", {"mean_similarity": float((images.zimg * ztxt).sum(1).mean())})]
'''

# Through the command line, as flags of a training run, and to config.json and back.
USE_ALIGNMENT = """
import dataclasses, json, sys
from siglip.cli import reporting, run
from siglip.cli.arguments import parse
from siglip.cli.evaluation import embedder_of, first_values
from siglip.evaluation.alignment import Alignment
from siglip.evaluation.suite import named_metrics, run_tasks
from siglip.training.config import EvalConfig
from siglip.trees import build_dataclass
from siglip.workdir.report import write_report

src, table, spiece, out = sys.argv[1:]
assert run(["eval", "--help"]) == 0
assert run(["eval", src, "--task", "alignment", "--data", table, "--tokenizer", spiece, "--field", "txt", "--out", out]) == 0
config = parse(EvalConfig, ["--tasks.0.data", table], prog="x", default=EvalConfig(tasks=(Alignment("y.tar"),)))
assert build_dataclass(EvalConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
print(named_metrics(run_tasks(config.tasks, embedder_of(src, tokenizer=spiece))))
"""


def test_a_new_evaluation_is_a_file_and_its_name_in_the_union(src, table, tmp_path):
    shutil.copytree(ROOT / "siglip", tmp_path / "siglip")
    (tmp_path / "siglip" / "evaluation" / "alignment.py").write_text(ALIGNMENT)
    suite = tmp_path / "siglip" / "evaluation" / "suite.py"
    text = suite.read_text().replace("Retrieval | ZeroShot |", "Alignment | Retrieval | ZeroShot |")
    suite.write_text("from siglip.evaluation.alignment import Alignment\n" + text)
    args = [str(src), str(table), SPIECE, str(tmp_path / "out.json")]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE_ALIGNMENT, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert result["task"] == "alignment" and result["dataset"] == "heldout"
    assert "--task alignment|retrieval|zeroshot|" in done.stdout and "mean_similarity" in done.stdout
    assert f"{{'eval/alignment/heldout/mean_similarity': {result['metrics']['mean_similarity']}}}" in done.stdout


def one_line(args: list[str], capsys) -> str:
    capsys.readouterr()
    assert run(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_mistakes_in_the_flags_of_eval(src, table, tmp_path, capsys):
    base = ["eval", str(src), "--data", str(table), "--tokenizer", SPIECE]
    assert "no task given; add --task retrieval|zeroshot" in one_line(base, capsys)
    assert "unknown task 'zeroshop'; did you mean 'zeroshot'" in one_line([*base, "--task", "zeroshop"], capsys)
    assert "--classes" in one_line([*base, "--task", "retrieval", "--classes", "x"], capsys)
    assert "has 'blob.x'; they have" in one_line([*base, "--task", "retrieval", "--captions", "blob.x"], capsys)
    assert "no field 'text'" in one_line([*base, "--task", "retrieval", "--captions", "text"], capsys)
    assert "batch_size=0" in one_line([*base, "--task", "retrieval", "--batch-size", "0"], capsys)
    (tmp_path / "names.txt").write_text("cat\ndgo\n")
    told = one_line([*base, "--task=zeroshot", "--classes", str(tmp_path / "names.txt"), "--label", "txt"], capsys)
    assert "the first pair of" in told and "nor a name in" in told and "(cat, dgo)" in told


def test_the_report_decodes_only_what_it_shows(src, monkeypatch):
    decoded = []
    original = reporting.make_eval_batches
    monkeypatch.setattr(
        reporting, "make_eval_batches", lambda some, **settings: decoded.extend(some) or original(some, **settings)
    )
    task = Retrieval(str(SAMPLE / "emoji-heldout-*.tar"), captions=("captions.de", "captions.en"))
    findings = reporting._of_retrieval(task, embedder_of(src, tokenizer=SPIECE), batch_size=64)
    found, thumbs = findings["retrieval"], findings["thumbs"]
    assert found["language"] == "en" and found["counts"]["de"]["texts"] == found["counts"]["en"]["images"] == 312
    queries = found["found"]
    assert len(queries) == 16 and [q["language"] for q in queries] == ["en"] * 8 + ["de"] * 8
    shown = {row for query in queries for row in (query["right"], *query["top"])}
    shown |= {one[which] for one in found["mistakes"] for which in ("right", "wrong")}
    assert set(map(int, thumbs)) == shown and len(decoded) == len({pair.key for pair in decoded}) == len(shown) < 312
    pair = next(iter(TarSource(sorted(SAMPLE.glob("emoji-heldout-*.tar"))[0])))
    wanted = resize(decode_image(pair.image, max_pixels=1 << 20), (72, 72))
    assert thumbs["0"] == plots.png(wanted) and queries[0]["text"] == pair.fields["captions"]["en"]
    other = reporting._of_another(task, embedder_of(src, tokenizer=SPIECE))
    assert other["dataset"] == task.dataset and other["counts"] == found["counts"] and len(other["found"]) == 11
    shown = {row for query in other["found"] for row in (query["right"], *query["top"])}
    assert set(map(int, other["thumbs"])) == shown and other["thumbs"]["0"] == thumbs["0"]
    json.dumps(findings)
    assert found["dataset"] == task.dataset and reporting._thumbs(task, [], []) == {}
    results = {
        f"{name}-{n}": {"image_retrieval_recall@10": 0.5} for name in (task.dataset, "other") for n in ("en", "de")
    }
    assert reporting._recall(results, found) == [[n, 0.5, pytest.approx(0.5 / 312**0.5)] for n in ("en", "de")]


def test_a_report_without_the_data_says_so(tmp_path, monkeypatch):
    def compute(*args):
        raise data_errors.UserError("no shard at x.tar")

    monkeypatch.setattr(reporting, "_compute", compute)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    findings, (note,) = reporting._findings(tmp_path, {"eval": {"tasks": []}}, EvalConfig())
    assert findings == {} and note.endswith("the evaluation cannot be repeated here: no shard at x.tar")
