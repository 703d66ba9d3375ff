"""benchmarks/learning.py: its numbers by a loop, and the whole of it at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):  # scripts find each other so
    import learning

TOY = """
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig

SAMPLE = {sample!r}

def get_config():
    tower = dict(width=16, depth=1, mlp_dim=16, num_heads=2)
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig(SAMPLE + "/emoji-heldout-*.tar", captions=(("captions.en", 1.0),)),),
            tokenizer=SAMPLE + "/spiece.model", threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig("mu", patch_size=(8, 8), image_size=(16, 16), **tower),
            text=TextConfig("mu", vocab_size=4000, length=4, **tower), out_dim=(None, 16),
        ),
        total_steps=40, batch_size=8, workdir="", optim=OptimConfig(warmup_steps=4),
        eval=EvalConfig(tasks=(Retrieval(SAMPLE + "/emoji-heldout-*.tar", captions=("captions.en",), name="toy"),)),
    )
"""


def test_recall_is_that_of_a_loop():
    zimg, ztxt = np.random.default_rng(0).normal(size=(2, 40, 3))
    scores, hits = zimg @ ztxt.T, []
    for n in range(40):
        hits += [n in np.argsort(-scores[n])[:10], n in np.argsort(-scores[:, n])[:10]]
    assert 0.2 < np.mean(hits) < 0.8 and learning.recall(zimg, ztxt) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("value", [np.nan, 1.0])
def test_an_encoder_that_tells_nothing_apart_finds_nothing(value):
    assert learning.recall(np.full((40, 3), value), np.full((40, 3), value)) == 0


def test_curves_are_compared_at_the_same_seconds():
    marks = [{"seconds": 10.0, "a": 0.2}, {"seconds": 20.0, "a": 0.6}]
    assert [learning.value_at(marks, "a", seconds) for seconds in (5, 15, 20)] == pytest.approx([0.1, 0.4, 0.6])


def test_the_time_to_a_target_lies_between_two_marks():
    marks = [{"seconds": 10.0, "a": 0.2}, {"seconds": 20.0, "a": 0.6}, {"seconds": 30.0, "a": 0.5}]
    assert learning.seconds_to(marks, "a", 0.1) == pytest.approx(5)
    assert learning.seconds_to(marks, "a", 0.5) == pytest.approx(17.5)
    assert learning.seconds_to(marks, "a", 0.7) is None


@pytest.mark.slow
def test_a_run_of_each_loss_leaves_its_marks(tmp_path):
    recipe, out = tmp_path / "toy.py", tmp_path / "out.json"
    recipe.write_text(TOY.format(sample=str(ROOT / "data_pipelines" / "sample")))
    settings = [
        "--config",
        str(recipe),
        "--seconds",
        "2",
        "--marks",
        "2",
        "--seeds",
        "1",
        "--side",
        "ours",
        "softmax",
        "adamw",
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "learning.py"), *settings, "--out", str(out)]
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUMPY_RANK_PROMOTION"}  # as users run it
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["label"] for row in rows] == ["ours", "softmax", "adamw"]
    for row in rows:
        assert row["marks"][-1]["step"] == row["steps"] and row["marks"][-1]["seconds"] == row["seconds"]
        assert all(0 <= mark[name] <= 1 for mark in row["marks"] for name in ("toy/225", "toy/all"))
        assert row["compile_s"] > 0 and row["label"] in run.stdout
