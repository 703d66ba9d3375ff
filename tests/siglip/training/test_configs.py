"""Every recipe trains: from scratch, or from a run of the quick start, on the shipped sample, for two steps."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import data_pipelines
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.writing import TarWriter
from siglip import trees
from siglip.cli.training import _prepare
from siglip.training.config import EvalConfig, TrainConfig, load_config_file
from siglip.workdir.checkpoint import read_run_params
from siglip.workdir.files import CONFIG_FILE
from siglip.workdir.metrics import LogConfig, read_metrics

CONFIGS = Path(__file__).parents[3] / "configs"


def smoke(name: str, workdir: Path, src: Path | None = None) -> TrainConfig:
    """A shipped recipe, whole but for its length, its batch and its evaluation."""
    config = load_config_file(str(CONFIGS / f"{name}.py"))
    init = config.init if src is None else dataclasses.replace(config.init, src=str(src))
    data = config.data
    if data.image_embeddings is not None:
        data = dataclasses.replace(data, image_embeddings=str(workdir / "image_embeddings"))
    optim = dataclasses.replace(config.optim, warmup_steps=1)
    # Another seed: a new tower that had the source's would look like one that was taken over.
    seed = config.seed if src is None else config.seed + 1
    return dataclasses.replace(
        config, seed=seed, workdir=str(workdir), init=init, data=data, optim=optim, eval=EvalConfig(), total_steps=2,
        batch_size=32,
        log=LogConfig(every_steps=1, progress=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    _prepare(smoke("quickstart", workdir))()
    return workdir


def train(name: str, workdir: Path, src: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """(parameters of the source, parameters after two steps, config.json)."""
    _prepare(smoke(name, workdir, src))()
    before, after = (trees.flatten(read_run_params(run)[0]) for run in (src, workdir))
    assert all(np.isfinite(line["train/loss"]) for line in read_metrics(workdir))
    return before, after, json.loads((workdir / CONFIG_FILE).read_text())


def largest_change(before: dict[str, np.ndarray], after: dict[str, np.ndarray], tower: str) -> float:
    """Of what AdamW moves: one of its steps is as long as the learning rate, in every entry; Muon's are as long on average."""
    muon = re.compile(r"(encoderblock|MAPHead).*/kernel")
    paths = [path for path in before if path.startswith(tower) and not muon.search(path)]
    return max(np.abs(after[path] - before[path]).max() for path in paths)


@pytest.mark.slow
def test_siglit_trains_a_new_text_tower_on_kept_embeddings(quickstart, tmp_path):
    before, after, config = train("siglit", tmp_path, quickstart)
    assert all(np.array_equal(after[path], before[path]) for path in before if path.startswith("img/"))
    assert largest_change(before, after, "txt/") > 0.1
    assert list(tmp_path.glob("image_embeddings/*/00000.npy"))


@pytest.mark.slow
def test_finetune_both_moves_the_image_tower_at_a_tenth_and_does_not_shrink_it(quickstart, tmp_path):
    before, after, config = train("finetune_both", tmp_path, quickstart)
    # The second of two steps is the first that moves; Adam's is then as long as its learning rate.
    lr, schedule = config["optim"]["lr"], read_metrics(tmp_path)[1]["train/schedule"]
    assert largest_change(before, after, "img/") == pytest.approx(0.1 * lr * schedule, rel=0.02)
    fresh = [path for path in after if path.startswith("txt/")]
    assert all(np.any(after[path] != before[path]) for path in fresh if path.endswith("kernel"))


@pytest.mark.slow
def test_higher_resolution_takes_everything_to_a_finer_grid(quickstart, tmp_path):
    before, after, config = train("higher_resolution", tmp_path, quickstart)
    assert config["model"]["image"]["image_size"] == [64, 64]
    assert before["img/pos_embedding"].shape == (1, 4, 128) and after["img/pos_embedding"].shape == (1, 16, 128)
    corners, lr = (tree["img/pos_embedding"][0, 0] for tree in (after, before)), config["optim"]["lr"]
    np.testing.assert_allclose(*corners, rtol=0, atol=1.02 * lr)  # one step of AdamW's
    rest = {path: leaf for path, leaf in before.items() if path not in ("img/pos_embedding", "t", "b")}
    assert 0 < largest_change(rest, after, "") <= 1.02 * lr


@pytest.mark.slow
def test_naflex_goes_on_with_images_of_any_shape(quickstart, tmp_path):
    before, after, config = train("naflex", tmp_path, quickstart)
    image = config["model"]["image"]
    assert image["naflex"] == {"patches": 9, "max_patches": 16} and image["patch_dropout"] == 0
    assert before["img/pos_embedding"].shape == (1, 4, 128) and after["img/pos_embedding"].shape == (1, 16, 128)
    rest = {path: leaf for path, leaf in before.items() if path not in ("img/pos_embedding", "t", "b")}
    assert 0 < largest_change(rest, after, "") <= 1.02 * config["optim"]["lr"]


@pytest.mark.slow
def test_alignment_mixes_the_sample_with_pairs_of_ones_own_that_have_one_caption(tmp_path):
    sample = open_source(str(Path(data_pipelines.__file__).parent / "sample" / "emoji-fxemoji.parquet"))
    with TarWriter(tmp_path / "own.tar") as shard:
        for index in range(100):
            shard.write(dataclasses.replace(sample[index], fields={"txt": sample[index].fields["txt"]}))
    config = smoke("alignment", tmp_path / "run")
    emoji, own = config.data.sources
    sources = (emoji, dataclasses.replace(own, shards=str(tmp_path / "own.tar")))
    _prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources)))()
    first, last = read_metrics(tmp_path / "run")
    assert 0 < last["data/source_1/pairs"] < 2 * config.batch_size and np.isfinite(last["train/loss"])
    assert last["data/source_0/pairs"] + last["data/source_1/pairs"] == 2 * config.batch_size
    assert not any(name.startswith("train/substituted") for name in first)
