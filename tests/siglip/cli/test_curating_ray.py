"""`siglip data curate --engine ray` as a user types it, and a model that goes to the workers."""

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from siglip.cli import curating, run
from siglip.cli.curating import ModelScorer
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params
from tests.data_pipelines import ray_cluster

SAMPLE = Path(__file__).parents[3] / "data_pipelines" / "sample"
SPIECE, HELD = str(SAMPLE / "spiece.model"), str(SAMPLE / "emoji-heldout-00000.tar")
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)
pytestmark = pytest.mark.slow  # starting Ray takes longer than a fast test may
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "m.npz"
    big_vision.write(path, init_params(MODEL, jax.random.key(0)), MODEL)
    return str(path)


def test_a_scorer_travels_as_what_it_was_made_from(weights):
    scorer = ModelScorer(weights, SPIECE, 4)
    data = pickle.dumps(scorer)
    assert len(data) < 1000
    arrived = pickle.loads(data)
    assert arrived is pickle.loads(data)  # the second task of a process finds the model loaded
    assert arrived.fingerprint == scorer.fingerprint
    images = {"image": np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)}
    np.testing.assert_array_equal(arrived.embed_images(images), scorer.embed_images(images))


@needs_ray
def test_workers_score_as_the_driver_does(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curating, "_SECONDS_BETWEEN_LINES", float("inf"))  # on a slow machine there would be lines
    # As many devices as here: on another number of them the last bits of a score differ.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(jax.device_count()))
    flags = ["--preset", "pali-top-10", "--top-share", "0.5", "--against", HELD, "--batch-size", "16"]
    flags += ["--model", weights, "--tokenizer", SPIECE, "--leak-similarity", "0.9999"]
    shard = str(SAMPLE / "emoji-train-00000.tar")
    with ray_cluster.running(cpus=1) as cluster:
        for engine, where in (("local", ["--workers", "1"]), ("ray", ["--address", cluster.address])):
            out = str(tmp_path / engine)
            assert run(["data", "curate", shard, "--out", out, "--engine", engine, *where, *flags]) == 0
            told = capsys.readouterr()
            # Ray says so where another test's cluster began before this one, on the same machine.
            errors = [line for line in told.err.splitlines() if "Overwriting previous Ray address" not in line]
            assert "pairs kept" in told.out and not errors
    local, ray = tmp_path / "local" / "manifest.parquet", tmp_path / "ray" / "manifest.parquet"
    assert ray.read_bytes() == local.read_bytes()
    assert np.isfinite(pq.read_table(ray)["leak_similarity"].to_numpy()).all()


def test_mistakes(tmp_path, capsys, monkeypatch):
    shard, out = str(SAMPLE / "emoji-train-00000.tar"), ["--out", str(tmp_path / "out")]
    cases = [
        (["--address", "head:6379"], "--address head:6379 is for a cluster; add --engine ray"),
        (["--gpus-per-task", "1"], "--gpus-per-task 1.0 is for a cluster; add --engine ray"),
        (["--engine", "spark"], "local"),
        (["--engine", "ray", "--workers", "3"], "--workers 3 is for this machine; a Ray cluster has its own"),
        (["--engine", "ray", "--gpus-per-task", "-1"], "gpus_per_task=-1"),
        (["--workers", "-1"], "workers=-1"),
        (["--engine", "ray", "--address", "127.0.0.1:9"], "no Ray cluster answers at '127.0.0.1:9'"),
    ]
    for arguments, message in cases if find_spec("ray") else cases[:-1]:
        assert run(["data", "curate", shard, *out, *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert run(["data", "curate", shard, *out, "--engine", "ray"]) == 2
    assert "pip install 'siglip-stage0[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
