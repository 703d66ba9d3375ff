"""Evaluations and embeddings of several processes are those of one; of a NaFlex model, whose batches hold more arrays.

Retrieval with images of one size runs in several processes in tests/siglip/parallel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from siglip.evaluation.suite import task_classes
from siglip.formats import big_vision
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from tests.siglip.jobs import ROOT, SAMPLE, free_port
from tests.siglip.rounding import towers_apart
from tests.siglip.shapes import CLASSES, write_shapes
from tests.siglip.tiny import random_params

pytestmark = pytest.mark.slow
SPIECE = str(SAMPLE / "spiece.model")
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(32, 32), naflex=NaflexConfig(20, 40)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(24, 24),
)
PAIRS = 30
ENTRIES = [
    {"name": "retrieval", "task": "retrieval"},
    {"name": "zeroshot", "task": "zeroshot", "classes": "classes.txt"},
    {"name": "knn", "task": "knn", "train": "train.parquet", "k": 3},
    {"name": "fewshot", "task": "fewshot", "train": "train.parquet", "shots": [1, 5], "seeds": [0]},
    {"name": "linear", "task": "linear_probe", "train": "train.parquet", "c": [1.0]},
    {"name": "selection", "task": "selection"},
    {"name": "association", "task": "association", "instances": "instances.jsonl"},
    {"name": "verification", "task": "verification", "negatives": 3},
    {
        "name": "robustness", "task": "robustness", "classes": "classes.txt", "corruptions": ["pixelate"],
        "severities": [3],
    },
    {"name": "groups", "task": "groups", "classes": "classes.txt", "group": "place", "min_images": 2},
]  # fmt: skip
# Each process draws the order of its own share of the images: heads that are trained in steps are those of another seed.
TRAINED_IN_STEPS = [
    {
        "name": "attentive", "task": "attentive_probe", "train": "train.parquet", "heads": 4, "epochs": 2,
        "images_per_step": 16,
    },
    {"name": "segmentation", "task": "segmentation", "train": "train.parquet", "steps": 4},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    big_vision.write(folder / "m.npz", random_params(MODEL), MODEL)
    write_shapes(folder / "train.parquet", count=48, seed=0)
    write_shapes(folder / "shapes.parquet", count=PAIRS, seed=1)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    instance = {"cue": "disc", "candidates": [f"1-{n}" for n in range(5)], "associations": ["1-1", "1-3"]}
    (folder / "instances.jsonl").write_text(json.dumps(instance))
    suite = {"defaults": {"data": "shapes.parquet"}, "entries": ENTRIES + TRAINED_IN_STEPS}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder


def start(count: int, devices: int, out: Path, command: list[str]) -> None:
    port, processes = free_port(), []
    for index in range(count):
        who = ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", str(count)]
        who = [*who, "--distributed.process-id", str(index)] if count > 1 else []
        env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
        line = [sys.executable, "-m", "siglip.cli", *command, "--out", str(out), "--batch-size", "16", *who]
        processes.append(subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            error = process.communicate()[1]
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()


def test_every_task_finds_in_two_processes_what_it_finds_in_one(folder):
    command = ["eval", str(folder / "m.npz"), "--suite", str(folder / "suite.yaml"), "--tokenizer", SPIECE]
    start(1, 1, folder / "one", command)
    start(2, 2, folder / "two", command)
    for entry in ENTRIES + TRAINED_IN_STEPS:
        one, two = (json.loads((folder / n / f"{entry['name']}.json").read_text())["metrics"] for n in ("one", "two"))
        assert one.keys() == two.keys() and one
        if entry in ENTRIES:
            assert one == pytest.approx(two, rel=1e-6, abs=1e-5), entry  # scores differ by roundings of float32
    assert {entry["task"] for entry in ENTRIES + TRAINED_IN_STEPS} == set(task_classes())


def test_tokens_of_two_processes_are_those_of_one(folder):
    command = ["embed", str(folder / "m.npz"), "--data", str(folder / "shapes.parquet"), "--tokens"]
    command += ["--dtype", "float32"]
    start(1, 1, folder / "one.npz", command)
    start(2, 2, folder / "two.npz", command)
    one, two = (np.load(folder / f"{n}.npz") for n in ("one", "two"))
    assert one["key"].tolist() == two["key"].tolist() and len(one["key"]) == PAIRS
    np.testing.assert_array_equal(one["grid"], two["grid"])
    np.testing.assert_allclose(one["embedding"], two["embedding"], atol=towers_apart(MODEL, one["embedding"]))
