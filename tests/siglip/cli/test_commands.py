"""The commands as a user types them: what they do, and one line with exit code 2 for every mistake."""

import dataclasses
import io
import json
import os
import re
import shutil
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.sources.webdataset import TarSource
from siglip.cli import run, training
from siglip.cli.arguments import parse
from siglip.cli.exporting import ExportArgs
from siglip.errors import UserError
from siglip.model_source import read_config
from siglip.training import loop
from siglip.training.config import load_config_file
from siglip.workdir.metrics import read_metrics
from tests.siglip.tiny_run import drifting_program, toy_program, use_devices

SAMPLE = Path(__file__).parents[3] / "data_pipelines" / "sample"

RECIPE = """
    from data_pipelines.augment import AugmentConfig
    from data_pipelines.loader import DataConfig
    from data_pipelines.order.mixture import SourceConfig
    from siglip.workdir.checkpoint import CheckpointConfig
    from siglip.evaluation.retrieval import Retrieval
    from siglip.training.config import EvalConfig, TrainConfig
    from siglip.workdir.metrics import LogConfig
    from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
    from siglip.training.optim import OptimConfig

    SHARD = {shard!r}

    def get_config():
        return TrainConfig(
            data=DataConfig(
                sources=(SourceConfig(SHARD, captions=(("captions.*", 0.5), ("captions.en", 0.5))),),
                tokenizer={tokenizer!r},
                augment=AugmentConfig(scale=(0.8, 1.2), shift=0.1),
            ),
            model=ModelConfig(
                image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
                text=TextConfig(variant="mu", vocab_size=4000, length=8),
                out_dim=(None, 32),
            ),
            total_steps=40,
            batch_size=8,
            workdir={workdir!r},
            optim=OptimConfig(lr=3e-3, warmup_steps=4),
            eval=EvalConfig(tasks=(Retrieval(SHARD, captions=("captions.en", "captions.de"), name="toy"),)),
            checkpoint=CheckpointConfig(every_steps=10),
            log=LogConfig(every_steps=5),
        )
"""


# Every run here that needs no other takes these steps, on two devices: one program.
STEPS = ["--total-steps", "8", "--optim.warmup-steps", "1"]


@pytest.fixture(scope="session")
def shard(tmp_path_factory) -> Path:
    """The first 40 pairs of the shipped sample."""
    path = tmp_path_factory.mktemp("shards") / "toy-00000.tar"
    with tarfile.open(SAMPLE / "emoji-train-00000.tar") as sample, tarfile.open(path, "w") as small:
        for member in sample.getmembers()[: 3 * 40]:
            small.addfile(member, io.BytesIO(sample.extractfile(member).read()))
    return path


def test_the_column_of_the_images_can_be_named(trained, shard, tmp_path, capsys):
    """Two columns of bytes under other names than usual: which are the images is for the user to say."""
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(member).read() for member in tar if member.name.endswith((".png", ".webp", ".jpg"))][
            :3
        ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"mask": [b"none"] * len(files), "photo": files}), path)
    fails(["embed", str(trained), "--data", str(path), "--out", str(tmp_path / "z.npz")], capsys, "mask, photo")
    assert (
        run(["embed", str(trained), "--data", str(path), "--image-column", "photo", "--out", str(tmp_path / "z.npz")])
        == 0
    )
    assert np.load(tmp_path / "z.npz")["embedding"].shape == (len(files), 32)


@pytest.mark.parametrize("args", [["data", "stats"], ["embed", "m.npz", "--data", "a.tar", "--out"], ["report"]])
def test_names_that_are_not_utf8_are_refused(tmp_path, capsys, args):
    fails([*args, str(tmp_path / os.fsdecode(b"a\xff"))], capsys, r"/a\\xff' is not UTF-8.* rename it")
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_in_the_flags_of_any_program(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    args = parse(ExportArgs, ["~/run", "--format", "hf", "--out=~/out"], prog="examples")
    assert (args.src, args.out) == ("/somewhere/run", "/somewhere/out")


def write_recipe(folder: Path, shard: Path) -> Path:
    """recipe.py in a folder, whose run is in `run` beside it."""
    settings = {"shard": str(shard), "tokenizer": str(SAMPLE / "spiece.model"), "workdir": str(folder / "run")}
    (folder / "recipe.py").write_text(textwrap.dedent(RECIPE).format(**settings))
    return folder / "recipe.py"


@pytest.fixture
def recipe(tmp_path, shard) -> Path:
    return write_recipe(tmp_path, shard)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shard) -> Path:
    """Workdir of a finished run of eight steps."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_recipe(folder, shard)
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 2)
        assert run(["train", str(path), *STEPS, "--log.every-steps", "1"]) == 0
    return folder / "run"


def fails(args: list[str], capsys, *patterns: str, code: int = 2) -> str:
    """Asserts exit code, a single line on standard error, and what it must say."""
    capsys.readouterr()
    assert run(args) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("siglip: error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]
    return lines[0]


def test_a_run_can_be_evaluated_exported_embedded_and_reported(trained, shard, tmp_path, capsys):
    last = read_metrics(trained)[-1]
    assert {f"eval/retrieval/toy-{name}/image_retrieval_recall@10" for name in ("en", "de", "mean")} <= last.keys()

    args = ["--task", "retrieval", "--data", str(shard), "--captions", "captions.en", "captions.de", "--name", "toy"]
    assert run(["eval", str(trained), *args, "--out", str(tmp_path / "eval.json")]) == 0
    results = json.loads((tmp_path / "eval.json").read_text())
    assert [(r["dataset"], r["task"], r["language"]) for r in results] == [
        ("toy-en", "zeroshot_retrieval", "en"),
        ("toy-de", "zeroshot_retrieval", "de"),
        ("toy-mean", "zeroshot_retrieval", "mean"),
    ]  # fmt: skip
    for result in results:
        for name, value in result["metrics"].items():
            assert value == pytest.approx(last[f"eval/retrieval/{result['dataset']}/{name}"], abs=1e-6)

    for source in ("run", "npz", "hf"):
        if source != "run":
            out = tmp_path / source
            kind = {"npz": "bigvision", "hf": "hf"}[source]
            tower = {"npz": "both", "hf": "image"}[source]
            assert run(["export", str(trained), "--format", kind, "--tower", tower, "--out", str(out)]) == 0
        src = {"run": trained, "npz": tmp_path / "npz" / "model.npz", "hf": tmp_path / "hf"}[source]
        out = tmp_path / f"{source}.npz"
        assert run(["embed", str(src), "--data", str(shard), "--out", str(out)]) == 0
    embedded = [np.load(tmp_path / f"{source}.npz") for source in ("run", "npz", "hf")]
    assert embedded[0]["embedding"].shape == (40, 32) and len(set(embedded[0]["key"])) == 40
    for other in embedded[1:]:
        np.testing.assert_allclose(other["embedding"], embedded[0]["embedding"], atol=1e-5)

    assert run(["embed", str(trained), "--data", str(shard), "--out", str(tmp_path / "z.parquet")]) == 0
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "z.parquet").to_pydict()
    np.testing.assert_array_equal(np.asarray(table["embedding"], np.float32), embedded[0]["embedding"])

    capsys.readouterr()
    record = {"model": "m", "dataset": "x", "metrics": {"image_retrieval_recall@1": 0.1, "unknown_se": None}}
    (tmp_path / "of_a_suite.json").write_text(json.dumps(record))
    baselines = [str(tmp_path / "eval.json"), str(tmp_path / "of_a_suite.json")]
    assert run(["report", str(trained), "--baseline", *baselines]) == 0
    told = capsys.readouterr().out
    assert "toy-mean" in told and "m (x)" in told
    page = (trained / "report.html").read_text()
    assert (
        page.count("<img") > 40 and "Worst mistakes" in page and "toy-en" in page and "±" in page and "chance" in page
    )
    assert not re.search(r"(src|href)=['\"](?!data:)", page)  # nothing is fetched

    findings, made = json.loads((trained / "findings.json").read_text()), (trained / "findings.json").stat().st_mtime_ns
    (trained / "report.html").unlink()
    assert run(["report", str(trained)]) == 0 and (trained / "findings.json").stat().st_mtime_ns == made
    assert findings["findings"]["retrieval"]["counts"]["de"] == {"images": 40, "described": 40, "texts": 40}
    shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("findings.json"))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["seed"], config["eval"]["tasks"][0]["data"] = 3, "gone.tar"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run(["report", str(trained), str(tmp_path / "other"), "--out", str(tmp_path / "both.html")]) == 0
    told = capsys.readouterr().out
    assert "other: scores, images found and mistakes are left out" in told and "gone.tar" in told
    page = (tmp_path / "both.html").read_text()
    assert "<td>seed</td><td>0</td><td>3</td>" in page and "toy-en · run" in page and "toy-en · other" in page
    fails(["report"], capsys, "name the workdir of a run, or of several")
    fails(["report", str(trained), "--out", str(tmp_path / "no" / "x.html")], capsys, "does not exist; make it first")
    fails(["report", str(tmp_path / "no")], capsys, "is .*no the workdir of a run")


def test_zero_shot_classification_from_files(trained, tmp_path, capsys):
    names = ["red", "blue", "green", "grey", "pink", "white"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    (tmp_path / "templates.txt").write_text("{}\na {} thing\n")
    shard = tmp_path / "labelled.tar"
    with tarfile.open(SAMPLE / "emoji-heldout-00000.tar") as sample, tarfile.open(shard, "w") as out:
        for i, member in enumerate(m for m in sample.getmembers() if m.name.endswith(".jpg")):
            if i == 12:
                break
            out.addfile(member, io.BytesIO(sample.extractfile(member).read()))
            label = tarfile.TarInfo(member.name.replace(".jpg", ".cls"))
            label.size = 1
            out.addfile(label, io.BytesIO(str(i % 6).encode()))
    base = ["eval", str(trained), "--task", "zeroshot", "--data", str(shard)]
    args = [*base, "--classes", str(tmp_path / "classes.txt"), "--templates", str(tmp_path / "templates.txt")]
    assert run([*args, "--out", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert result["task"] == "zeroshot_classification"
    recall = {"mean_per_class_recall", "mean_per_class_recall_se"}
    assert set(result["metrics"]) == {"acc1", "acc5", "tied_fraction"} | recall
    fails(
        [*args, "--label", "colour"],
        capsys,
        r"none of the first \d+ pairs of .*labelled.tar has 'colour'; they have cls: name the right one",
    )
    fails(base, capsys, "--classes")


def test_the_shipped_tokenizer_can_be_remade(tmp_path):
    out = tmp_path / "spiece.model"
    args = ["--out", str(out), "--vocab-size", "4000", "--repeat", "captions.en", "6", "keywords", "6"]
    assert run(["data", "tokenizer", str(SAMPLE / "emoji-train-*.tar"), *args]) == 0
    assert out.read_bytes() == (SAMPLE / "spiece.model").read_bytes()


def test_mistakes_in_flags(recipe, capsys, tmp_path):
    train = ["train", str(recipe)]
    fails(["trian"], capsys, "unknown command 'trian'; did you mean 'train'")
    fails([*train, "--optim.lrr", "1"], capsys, r"--optim\.lrr", r"; perhaps you meant --optim\.lr")
    fails([*train, "--optim.lr", "fast"], capsys, "--optim.lr", "'fast'")
    fails([*train, "--optim.lr", "-1"], capsys, r"optim\.lr=-1\.0 must be positive")
    fails([*train, "--loss.impl", "star"], capsys, "star", "ring")
    fails(["train", str(tmp_path / "none.py")], capsys, "none.py does not exist")
    (tmp_path / "empty.py").write_text("")
    fails(["train", str(tmp_path / "empty.py")], capsys, r"defines no get_config\(\)")
    (tmp_path / "broken.py").write_text("def get_config(:")
    fails(["train", str(tmp_path / "broken.py")], capsys, r"broken\.py.*line 1")
    (tmp_path / "typo.py").write_text(recipe.read_text().replace("warmup_steps=4", "warmup_step=4"))
    fails(
        ["train", str(tmp_path / "typo.py")],
        capsys,
        r"typo\.py, line \d+: .*'warmup_step'; did you mean 'warmup_steps'",
    )
    fails(["eval", "nowhere", "--task", "retrieval", "--data", "x.tar"], capsys, "nowhere")
    fails(["embed", "nowhere", "--data", "x.tar", "--out", str(tmp_path / "no" / "z.npz")], capsys, "does not exist")
    fails(["embed", "nowhere", "--data", "x.tar", "--out", "z.csv"], capsys, r"must end in \.npz, \.npy or \.parquet")
    fails(["data", "indx"], capsys, "did you mean 'index'")


def test_mistakes_in_data_and_model(recipe, capsys, tmp_path):
    train = ["train", str(recipe)]
    fails([*train, "--data.sources.0.shards", str(tmp_path / "no-*.tar")], capsys, r"no-\*\.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    fails([*train, "--data.sources.0.shards", str(tmp_path / "empty.tar")], capsys, r"empty\.tar")
    typo = ["--data.sources.0.captions", "captoins.en", "1.0"]
    fails([*train, *typo], capsys, "has a field 'captoins'.* did you mean 'captions'")
    fails([*train, "--data.tokenizer", str(recipe)], capsys, "SentencePiece")
    fails([*train, "--model.text.vocab-size", "100"], capsys, "4000 pieces", r"--model\.text\.vocab-size 4000")
    fails([*train, "--model.text.vocab-size", "5000"], capsys, "4000 pieces", r"--model\.text\.vocab-size 4000")
    fails([*train, "--eval.add", "retreival --data x"], capsys, "did you mean 'retrieval'")
    fails([*train, "--eval.add=zeroshot"], capsys, "--data")
    fails([*train, "--eval.add", "knn 'a"], capsys, "No closing quotation")
    fails([*train, "--batch-size", "12"], capsys, "batch_size=12 does not divide over 8 devices; use 8 or 16")
    fails([*train, "--mesh.fsdp", "3"], capsys, "does not cover 8 devices")
    text = recipe.read_text()
    for old, new, message in (
        ("Retrieval(SHARD", 'Retrieval("no-eval.tar"', r"no-eval\.tar"),
        ('captions=("captions.en", "captions.de")', 'captions=("captions.xx",)', "has 'captions.xx'; they have"),
    ):
        recipe.write_text(text.replace(old, new))
        fails(train, capsys, message)
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_started_with_a_larger_vocabulary_goes_on(recipe, tmp_path, caplog):
    config = load_config_file(str(recipe))
    text = dataclasses.replace(config.model.text, vocab_size=5000)
    config = dataclasses.replace(
        config, workdir=str(tmp_path / "old"), model=dataclasses.replace(config.model, text=text)
    )
    with pytest.raises(UserError, match=r"has 4000 pieces, but model\.text\.vocab_size=5000"):
        training._prepare(config)
    (tmp_path / "old" / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "4" / "_CHECKPOINT_METADATA").touch()
    training._prepare(config)
    assert "1000 token embeddings will never be trained" in caplog.text


def test_a_workdir_of_another_config_and_one_that_is_a_file(trained, recipe, capsys, tmp_path):
    before = (trained / "config.json").read_bytes()
    args = ["train", str(recipe), *STEPS, "--workdir", str(trained)]
    fails([*args, "--seed", "3"], capsys, "belongs to another run: seed is 0 there and 3 here")
    assert (trained / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    fails(["train", str(recipe), "--workdir", str(tmp_path / "file")], capsys, "file")


def test_an_evaluation_is_added_by_a_flag_and_the_last_one_is_printed(recipe, shard, capsys, tmp_path, monkeypatch):
    use_devices(monkeypatch, 2)
    monkeypatch.setattr(loop, "make_program", drifting_program)
    pairs = [(pair.image, pair.fields["captions"]["fr"]) for pair in TarSource(shard)]
    rows = [{"image": b"no image", "photo": photo, "french": text} for photo, text in pairs]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "french.parquet")
    added = f"retrieval --data {tmp_path}/french.parquet --image-column photo --captions french"
    own = ["--eval.every-steps-of", "retrieval/french", "5"]
    assert run(["train", str(recipe), *STEPS, "--eval.add", added, *own]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {
        name: [line["step"] for line in lines if any(key.startswith(f"eval/retrieval/{name}") for key in line)]
        for name in ("toy", "french")
    }
    assert steps == {"toy": [8], "french": [5, 8]}
    last = lines[-1]
    told = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    names = ["retrieval/toy-en", "retrieval/toy-de", "retrieval/toy-mean", "retrieval/french"]
    assert list(told) == names
    assert f"{last['eval/retrieval/french/text_retrieval_recall@1']:.3f}" in told["retrieval/french"]


def test_a_checkpoint_of_another_model(trained, recipe, capsys, tmp_path):
    shutil.copytree(trained, tmp_path / "old")
    (tmp_path / "old" / "config.json").unlink()
    args = ["train", str(recipe), *STEPS, "--workdir", str(tmp_path / "old")]
    fails(
        [*args, "--model.image.patch-size", "4", "4"],
        capsys,
        r"checkpoints/8 is of another model: img/embedding/kernel is \(8, 8, 3, 32\) there and \(4, 4, 3, 32\) here .* --workdir",
    )
    (tmp_path / "old" / "config.json").unlink()
    fails([*args, "--optim.ema", "0.9"], capsys, "ema is False there and True here")


def test_where_and_how_fast_a_run_computes_may_change_between_starts(trained, recipe, tmp_path):
    shutil.copytree(trained, tmp_path / "moved")
    args = ["train", str(recipe), *STEPS, "--workdir", str(tmp_path / "moved")]
    free = [
        "--loss.impl", "ring", "--loss.chunk-size", "1", "--loss.micro-batch-size", "8", "--data.workers", "1",
        "--distributed.timeout-s", "7", "--mesh.fsdp", "2", "--mesh.fsdp-min-size-bytes", "1024", "--log.every-steps", "1",
    ]  # fmt: skip
    assert run([*args, *free]) == 0


def test_weights_and_places_of_sources_may_change_between_starts(shard, recipe, tmp_path, capsys, monkeypatch):
    """Positions 0 to 31 are dealt out 1:1, those up to 63 3:1, so the first source gives 16 + 24 pairs."""
    monkeypatch.setattr(loop, "make_program", toy_program)
    monkeypatch.setattr(training, "make_evaluate", lambda *_: None)
    assert run(["data", "curate", str(shard), "--out", str(tmp_path / "curated"), "--workers", "1"]) == 0
    manifest, sources = tmp_path / "curated" / "manifest.parquet", "(SourceConfig(SHARD, captions="
    more = f'SourceConfig(SHARD, manifest="{manifest}", captions=(("captions.en", 1.0),)), '
    recipe.write_text(recipe.read_text().replace(sources, f"({more}{sources[1:]}"))
    train = ["train", str(recipe), *STEPS, "--checkpoint.every-steps", "4", "--log.every-steps", "4"]
    assert run(train) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    manifest = manifest.rename(tmp_path / "moved.parquet")
    moved = ["--data.sources.0.manifest", str(manifest), "--data.block-bytes", "1024"]
    assert run([*train, *moved, "--data.sources.0.weight", "3"]) == 0
    pairs = [line["data/source_0/pairs"] for line in read_metrics(tmp_path / "run") if "data/source_0/pairs" in line]
    assert pairs == [16, 40]
    rows = pq.read_table(manifest)
    keep = pa.array([n != 5 for n in range(40)])
    pq.write_table(rows.set_column(rows.column_names.index("keep"), "keep", keep), manifest)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    fails([*train, *moved], capsys, "the data (changed|position was saved)")


def test_an_export_has_the_size_that_is_asked_for(trained, tmp_path):
    args = ["--format", "bigvision", "--image-size", "24", "16", "--out", str(tmp_path / "m.npz")]
    assert run(["export", str(trained), *args]) == 0
    assert read_config(tmp_path / "m.npz")[0].image.image_size == (24, 16)


def test_an_export_never_overwrites_and_leaves_nothing_when_it_fails(trained, capsys, tmp_path):
    (tmp_path / "there").mkdir()
    fails(["export", str(trained), "--format", "hf", "--out", str(tmp_path / "there")], capsys, "there")
    before = sorted(tmp_path.iterdir())
    bad = ["export", str(tmp_path / "missing.npz"), "--format", "hf", "--out", str(tmp_path / "new")]
    fails(bad, capsys, r"missing\.npz")
    assert sorted(tmp_path.iterdir()) == before
