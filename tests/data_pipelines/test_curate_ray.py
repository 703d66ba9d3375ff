"""Curation through Ray: the same bytes as on one machine, and what happens when processes and machines die."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine, WorkerDied
from data_pipelines.curate.ray_engine import RayEngine
from data_pipelines.curate.run import curate
from data_pipelines.curate.scoring import closest
from data_pipelines.errors import UserError
from data_pipelines.samples.pixels import Pixels
from tests.data_pipelines import ray_cluster
from tests.data_pipelines.noisy import make_corpus

# Not imported here: Ray reads its settings once, and the engine makes them.
pytestmark = [
    pytest.mark.slow,  # starting Ray takes longer than a fast test may
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed"),
]
ROOT = Path(__file__).parents[2]
WRITTEN = ("manifest.parquet", "closest.parquet", "funnel.json", "report.html")


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, started once. Its processes find this file's functions through PYTHONPATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        with ray_cluster.running(cpus=2) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def engine(cluster, tmp_path_factory):
    with RayEngine(tmp_path_factory.mktemp("shared"), address=cluster.address) as engine:
        yield engine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("noisy"))


class Brightness:
    """Embeds images by how bright they are, captions by how long: scores of every value, made without a model."""

    pixels = Pixels((8, 8))
    fingerprint = "brightness"

    def embed_images(self, images):
        return _unit(images["image"].mean((1, 2, 3), dtype=np.float32) / 255)

    def embed_texts(self, texts):
        return _unit(np.array([len(text) for text in texts], np.float32) / 20)


def _unit(angle):
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def curate_noisy(corpus, out, engine):
    """Every global step: copies, captions, leaks by hash and embedding, shares, balance."""
    concepts = out.parent / "concepts.txt"
    concepts.write_text("face\ncat\nman\nwoman\nsign\nbutton\n")
    config = CurateConfig(top_share=0.8, concept_cap=5, max_caption_pictures=3, leak_similarity=0.999999)
    return curate(
        corpus.shards, out, config=config, engine=engine, against=corpus.against, scorer=Brightness(),
        concepts=str(concepts),
    )  # fmt: skip


def test_a_cluster_writes_the_same_bytes(corpus, engine, tmp_path):
    funnel = curate_noisy(corpus, tmp_path / "local", LocalEngine(1))
    curate_noisy(corpus, tmp_path / "ray", engine)
    for name in WRITTEN:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    rules = {"near_duplicate", "repeated_caption", "eval_leak", "eval_leak_embedding", "low_score", "crowded_concept"}
    assert rules <= set(funnel["applied"])  # each of the steps had something to say
    assert funnel["kept"] > 5


def test_the_closest_image_does_not_depend_on_how_the_product_is_shared_out():
    random = np.random.default_rng(0)
    against = random.normal(size=(700, 48)).astype(np.float32)
    zimg = np.concatenate([against[:40], random.normal(size=(500, 48)).astype(np.float32)])
    against = np.concatenate([against, against[:20]])  # of equal ones the first
    against, zimg = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (against, zimg))
    place, similarity = closest(zimg, against)
    assert place[:40].tolist() == list(range(40))
    exact = (zimg.astype(np.float64) @ against.T.astype(np.float64)).max(1)
    np.testing.assert_allclose(similarity, exact, rtol=0, atol=48 * 2**-24)  # float32 sums of 48 products
    for step in (1, 7, 100):
        parts = [closest(zimg[start : start + step], against) for start in range(0, len(zimg), step)]
        assert np.concatenate([part[0] for part in parts]).tobytes() == place.tobytes()
        assert np.concatenate([part[1] for part in parts]).tobytes() == similarity.tobytes()


def answer(task: tuple[int, str]) -> int:
    """Raises for 3; kills its process for 2, and for 5 the first time."""
    value, folder = task
    mark = Path(folder) / str(value)
    if value == 3:
        raise ValueError("three is\nno answer")
    if value == 2 or (value == 5 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value


def test_a_task_that_raises_or_kills_its_process_costs_nobody_else(engine, tmp_path, capfd):
    found = {task[0]: result for task, result in engine.map(answer, [(n, str(tmp_path)) for n in range(12)])}
    raised, died = found.pop(3), found.pop(2)
    assert type(raised) is ValueError and str(raised) == "three is\nno answer"
    assert "in answer" in str(raised.__cause__)  # where
    assert isinstance(died, WorkerDied) and "killed twice" in str(died)
    assert found == {n: n * n for n in range(12) if n not in (2, 3)}
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_machine_that_does_not_share_the_folder_is_named(engine, monkeypatch):
    monkeypatch.setattr(engine, "_marker", "/elsewhere/.cluster-1")
    with pytest.raises(UserError, match=f"machine {socket.gethostname()} does not see '/elsewhere/.cluster-1'; --out"):
        list(engine.map(len, ["a", "bc"]))


@pytest.mark.slow
def test_the_marker_goes_and_the_cluster_stays(engine):
    assert Path(engine._marker).exists()
    program = (
        "import sys; from pathlib import Path; from data_pipelines.curate.ray_engine import RayEngine\n"
        "with RayEngine(Path(sys.argv[1]), address=sys.argv[2]) as engine: assert Path(engine._marker).exists()"
    )
    folder = Path(engine._marker).parent / "other"
    for _ in range(2):  # the first one leaves a cluster for the second
        subprocess.run([sys.executable, "-c", program, str(folder), engine._address], cwd=ROOT, check=True)
        assert folder.is_dir() and not list(folder.iterdir())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at '127.0.0.1:9'.*start --head"),
        ("ray://127.0.0.1:9", "no Ray cluster answers at 'ray://127.0.0.1:9'"),
        ("somewhere", "neither HOST:PORT nor ray://HOST:PORT nor auto"),
    ],
)
def test_nobody_at_the_address(tmp_path, address, message):
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as error, RayEngine(tmp_path / "out", address=address):
        pass
    assert time.monotonic() - began < 15 and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_somebody_else_at_the_address(corpus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = _curate(corpus, tmp_path / "out", address)
        _, told = process.communicate(timeout=120)  # Ray tries for 40 s, and says so in lines of its own
    assert process.returncode == 2
    assert f"no Ray cluster answers at '{address}'" in told.splitlines()[-1] and "start --head" in told
    assert not (tmp_path / "out").exists()


def test_what_was_scanned_before_a_kill_is_not_scanned_again(corpus, engine, tmp_path):
    process = _curate(corpus, tmp_path, engine._address)
    _wait_for(lambda: list(tmp_path.glob("scan/noisy-*.parquet")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "manifest.parquet").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scan/noisy-*.parquet")}
    assert finished
    curate(corpus.shards, tmp_path, config=CurateConfig(), engine=engine)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert (tmp_path / "manifest.parquet").exists() and not list(tmp_path.glob(".work-*"))


def test_a_machine_is_lost_in_the_middle(corpus, tmp_path):
    curate(corpus.shards, tmp_path / "local", config=CurateConfig(), engine=LocalEngine(1), against=corpus.against)
    with ray_cluster.running(cpus=1) as cluster:
        second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        out = tmp_path / "ray"
        process = _curate(corpus, out, cluster.address, "--against", corpus.against)
        _wait_for(lambda: list(out.glob(".work-*/bands/*.arrow")), process)
        cluster.remove_node(second, allow_graceful=False)
        told, warned = process.communicate(timeout=200)
    assert process.returncode == 0 and not _but_progress(warned)
    assert "pairs kept" in told.splitlines()[-3] and "raylet" not in told
    for name in WRITTEN:
        assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def _curate(corpus, out, address, *flags):
    """`siglip data curate` on a cluster, in a process of its own."""
    arguments = [*corpus.shards, "--out", str(out), "--engine", "ray", "--address", address, *flags]
    command = [sys.executable, "-m", "siglip.cli", "data", "curate", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def _but_progress(stderr):
    """The lines of stderr that do not say how far a stage is: how many of those there are depends on the machine's speed."""
    return [line for line in stderr.splitlines() if not re.fullmatch(r".+ \d+/\d+  \d+ s left", line)]


def _wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
