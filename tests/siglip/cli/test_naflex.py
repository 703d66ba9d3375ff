"""The commands with a NaFlex model: trained, evaluated at several lengths, embedded, exported; and mistakes, in one line each."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import siglip
from siglip.cli import run
from siglip.workdir.metrics import read_metrics
from tests.data_pipelines.shards import encode, write_tar
from tests.siglip.cli.test_commands import RECIPE, SAMPLE, fails, shard  # noqa: F401
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny_run import use_devices

IMPORTS = """
    from data_pipelines.order.lengths import LengthConfig
    from siglip.models.naflex import NaflexConfig
"""
NAFLEX = IMPORTS + RECIPE.replace("image_size=(16, 16))", "image_size=(16, 16), naflex=NaflexConfig(4, 9))").replace(
    "augment=AugmentConfig(", "lengths=LengthConfig((4, 9), start=0.4), augment=AugmentConfig("
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, shard) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("naflex")
    settings = {"shard": str(shard), "tokenizer": str(SAMPLE / "spiece.model"), "workdir": str(folder / "run")}
    (folder / "recipe.py").write_text(textwrap.dedent(NAFLEX).format(**settings))
    return folder / "recipe.py"


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    """Five steps: two of squares, three of any shape."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        flags = ["--total-steps", "5", "--log.every-steps", "1", "--optim.warmup-steps", "1"]
        assert run(["train", str(recipe), *flags]) == 0
    return recipe.parent / "run"


def test_a_run_is_evaluated_at_several_lengths_embedded_and_exported(trained, shard, tmp_path, capsys):  # noqa: F811
    lines = read_metrics(trained)
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
    args = ["--task", "retrieval", "--data", str(shard), "--captions", "captions.en", "--name", "toy"]
    capsys.readouterr()
    assert run(["eval", str(trained), *args, "--max-patches", "4", "9", "--out", str(tmp_path / "e.json")]) == 0
    told = capsys.readouterr().out
    assert "toy @4" in told and "toy @9" in told and "at most 4, 9 patches" in told
    results = {result["max_patches"]: result["metrics"] for result in json.loads((tmp_path / "e.json").read_text())}
    assert list(results) == [4, 9]
    for name, value in results[4].items():  # the model's own length is that of the evaluation while training
        assert value == pytest.approx(lines[-1][f"eval/retrieval/toy-en/{name}"], abs=1e-6)

    assert (
        run(["export", str(trained), "--format", "bigvision", "--tower", "both", "--out", str(tmp_path / "npz")]) == 0
    )
    for name, flags in (("own", []), ("same", ["--max-patches", "4"]), ("long", ["--max-patches", "9"])):
        src = trained if name == "own" else tmp_path / "npz"
        assert run(["embed", str(src), "--data", str(shard), "--out", str(tmp_path / f"{name}.npz"), *flags]) == 0
    z = {name: np.load(tmp_path / f"{name}.npz")["embedding"] for name in ("own", "same", "long")}
    np.testing.assert_allclose(z["same"], z["own"], atol=1e-5)
    assert np.abs(z["long"] - z["own"]).max() > 1e-3


def test_a_suite_goes_on_past_entries_for_images_of_one_size(trained, shard, tmp_path, capsys, caplog):  # noqa: F811
    retrieval = {"task": "retrieval", "data": str(shard), "captions": ["captions.en"]}
    entries = [retrieval | {"name": "squares", "pixels": "square875"}, retrieval | {"name": "own"}]
    (tmp_path / "suite.yaml").write_text(json.dumps({"entries": entries}))
    args = ["eval", str(trained), "--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]
    assert run(args) == 1
    assert "1 of 2 entries failed: squares" in capsys.readouterr().err
    own = json.loads((tmp_path / "out" / "own.json").read_text())["metrics"]
    with caplog.at_level("INFO", logger="siglip"):
        for flags, done in (([], True), (["--max-patches", "9"], False)):
            caplog.clear()
            assert run([*args, "--only", "own", *flags]) == 0
            assert ("own: done before" in caplog.messages) == done
    assert json.loads((tmp_path / "out" / "own.json").read_text())["metrics"] != own
    fails([*args, "--max-patches", "10"], capsys, "--max-patches=10 must lie in 1 … 9")


def test_mistakes(trained, recipe, shard, tmp_path, capsys):  # noqa: F811
    task = ["--task", "retrieval", "--data", str(shard), "--captions", "captions.en"]
    fails(["eval", str(trained), *task, "--max-patches", "0"], capsys, "--max-patches=0 must lie in 1 … 9, the longest")
    fails(["eval", str(trained), *task, "--max-patches", "4", "10"], capsys, "--max-patches=10 must lie in 1 … 9")
    fails(["eval", str(trained), *task, "--pixels", "square875"], capsys, "square875 is for images of one size")
    new = ["--workdir", str(tmp_path / "new")]
    wrong = ["--data.lengths.patches", "4", "10"]
    fails(["train", str(recipe), *new, *wrong], capsys, "data.lengths.patches=10 must lie in 1 … 9")
    fails(["train", str(recipe), *new, "--data.jpeg-scaling", "True"], capsys, "data.jpeg_scaling needs images of one")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def long_images(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """A shard of noise, wide, tall and square, and its images."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((24, 72), (64, 16), (40, 40), (9, 80))]
    members = {f"{n}.png": encode(image) for n, image in enumerate(images)}
    members |= {f"{n}.txt": f"caption number {n}".encode() for n in range(len(images))}
    return write_tar(tmp_path_factory.mktemp("long") / "long.tar", members), images


@pytest.mark.parametrize("out", ["z.npz", "z.npy", "z.parquet"])
def test_tokens_are_padded_and_come_with_their_grids(trained, long_images, tmp_path, out):
    path, images = long_images
    args = ["embed", str(trained), "--data", str(path), "--tokens", "--dtype", "float32", "--max-patches", "9"]
    assert run([*args, "--out", str(tmp_path / out)]) == 0
    if out == "z.npy":
        tokens, grid = np.load(tmp_path / out), np.load(tmp_path / "z.grid.npy")
    elif out == "z.npz":
        tokens, grid = (np.load(tmp_path / out)[name] for name in ("embedding", "grid"))
    else:
        table = pq.read_table(tmp_path / out)
        tokens, grid = (np.array(table[name].to_pylist(), np.float32) for name in ("embedding", "grid"))
    model = siglip.load(trained)
    expected, mask = map(np.asarray, model.image_tokens(images, max_patches=9))
    assert tokens.shape == expected.shape == (4, 9, 32) and not mask.all() and not tokens[~mask].any()
    np.testing.assert_array_equal(grid, model.pixels(images, max_patches=9).grid)
    np.testing.assert_allclose(tokens[mask], expected[mask], atol=2 * towers_apart(model.config, expected))
    if out == "z.npy":  # embeddings under the same name have no grids
        args.remove("--tokens")
        assert run([*args, "--out", str(tmp_path / out)]) == 0 and not (tmp_path / "z.grid.npy").exists()


@pytest.mark.slow
def test_pairs_are_scored_for_curation(trained, long_images, tmp_path):
    path, images = long_images
    flags = "--min-score -1 --min-side-px 1 --max-aspect 100 --workers 1".split()
    assert run(["data", "curate", str(path), "--out", str(tmp_path / "out"), "--model", str(trained), *flags]) == 0
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    model = siglip.load(trained)
    zimg, ztxt = model.embed_images(images), model.embed_texts([row["caption"] for row in rows])
    expected = (np.asarray(zimg) * np.asarray(ztxt)).sum(axis=1)
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=0, atol=2 * towers_apart(model.config))
