"""Checkpoints whose files are damaged, and on storage that fails: noticed, or harmless."""

import resource
import shutil
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from siglip.errors import UserError
from siglip.training.step import TrainState
from siglip.workdir.checkpoint import CheckpointConfig, Checkpointer, read_run_params
from siglip.workdir.checksums import checksums

DATA = {"position": 7, "counts": {"truncated": 3}}


def a_state() -> TrainState:
    """Arrays of several kinds and sizes."""
    kernel = jax.random.normal(jax.random.key(0), (64, 33))
    params = {"img": {"kernel": kernel, "half": kernel[:5].astype(jnp.bfloat16)}, "t": jnp.ones(1), "b": jnp.zeros(1)}
    return TrainState(jnp.asarray(7), params, (jnp.zeros((), jnp.int32), {"mu": kernel * 2}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints 4 and 7, the last with a best metric."""
    workdir = tmp_path_factory.mktemp("saved")
    (workdir / "config.json").write_text('{"model": {}}')
    checkpointer = Checkpointer(workdir, CheckpointConfig(best_metric="eval/x"))
    for step in (4, 7):
        checkpointer.save(step, a_state(), data_state=DATA, config={"model": {}}, best_metric=step / 10)
    checkpointer.close()
    return workdir


def restore(workdir):
    """What a start does, and what an evaluation does."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), a_state())
    checkpointer = Checkpointer(workdir, CheckpointConfig(best_metric="eval/x"))
    try:
        best = checkpointer.best_value()
        state, data = checkpointer.restore(checkpointer.latest_step(), abstract)
    finally:
        checkpointer.close()
    params, _, _ = read_run_params(workdir)
    return best, data, jax.tree.map(np.asarray, (state, params))


def assert_same(found, expected):
    assert found[:2] == expected[:2]
    jax.tree.map(np.testing.assert_array_equal, found[2], expected[2])


def damaged(workdir, saved, file, place):
    """A copy of `saved`, in which a file of checkpoint 7 has a flipped bit."""
    shutil.copytree(saved, workdir)
    path = workdir / "checkpoints" / "7" / file
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    return workdir


def files_of(saved):
    checkpoint = saved / "checkpoints" / "7"
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def test_checksums_are_the_same_here_and_on_any_devices():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    arrays = {
        "large": np.random.default_rng(0).normal(size=(8, 300, 64)).astype(np.float32),
        "half": np.asarray(jnp.linspace(-1, 1, 64, dtype=jnp.bfloat16)).reshape(8, 8),
        "number": np.int32(-7),
        "none": np.zeros((0, 3), np.float32),
        "one": {"b": np.full(1, -10.0, np.float32)},
    }
    layout = {"large": P(("data", "fsdp")), "half": P("fsdp", "data"), "number": P(), "none": P(), "one": {"b": P()}}
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    sharded = jax.tree.map(put, arrays, layout)
    here = checksums(arrays)
    assert here == checksums(jax.tree.map(jnp.asarray, arrays)) == checksums(sharded)
    assert list(here) == ["half", "large", "none", "number", "one/b"]
    for bit in (0, 15, 31):
        arrays["large"].reshape(-1).view(np.uint32)[150_000] ^= np.uint32(1 << bit)
        assert checksums(arrays)["large"] != here["large"]
    arrays["large"][0, :2] = arrays["large"][0, 1::-1]
    assert len({checksums({"x": arrays["large"]})["x"], here["large"]}) == 2


def test_a_flipped_number_is_named_with_the_checkpoint_before(saved, tmp_path):
    sizes = {file: (saved / "checkpoints" / "7" / file).stat().st_size for file in files_of(saved)}
    workdir = damaged(tmp_path / "run", saved, max(sizes, key=sizes.get), 3000)
    with pytest.raises(UserError) as raised:
        restore(workdir)
    line = str(raised.value)
    assert f"{workdir}/checkpoints/7 cannot be read" in line and "\n" not in line
    assert line.endswith("move that folder away to go on from step 4")


def test_of_a_cut_file_one_line_is_told(saved, tmp_path, monkeypatch):
    """The other reads of its arrays go on in threads, and would print a traceback each."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    state = workdir / "checkpoints" / "7" / "state"
    for path in state.glob("**/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoints/7 cannot be read \(.*\); move") as told:
        restore(workdir)
    assert "\n" not in str(told.value)
    time.sleep(0.5)
    assert not printed


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_noticed_or_harmless(saved, tmp_path):
    expected, rng, noticed = restore(saved), np.random.default_rng(0), set()
    for file in files_of(saved):
        for place in rng.integers(1 << 30, size=12).tolist():
            workdir = damaged(tmp_path / str(place), saved, file, place)
            try:
                found = restore(workdir)
            except UserError as error:
                assert f"{workdir}/checkpoints/7 " in str(error) and "\n" not in str(error)
                noticed.add(file.parts[0])
            else:
                assert_same(found, expected)
            shutil.rmtree(workdir)
    assert noticed >= {"state", "data", "checksums", "metrics"}


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    for total, free, room in (
        (10_000, 7_999, False),
        (10_000, 8_000, True),
        (0, 0, True),
    ):  # 0 in all: it does not tell
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, of=(total, free): types.SimpleNamespace(total=of[0], free=of[1])
        )
        if room:
            checkpointer._check_room({"w": np.zeros(1000)})
            continue
        with pytest.raises(OSError, match="No space left on device for a checkpoint of 8000 bytes; free some"):
            checkpointer.save(1, {"w": np.zeros(1000)}, data_state={}, config={})
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_that_fails_is_an_error_of_the_system(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100, before[1])
    )  # no file may be longer: as near to a full disk as a test comes
    try:
        with pytest.raises(OSError) as error:
            checkpointer.save(1, {"w": np.arange(1000.0)}, data_state={}, config={})
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(error.value) and "File too large" in str(error.value)
