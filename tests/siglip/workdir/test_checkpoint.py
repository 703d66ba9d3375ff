"""Checkpoints on storage that fails."""

import resource
import shutil
import types

import numpy as np
import pytest

from siglip.workdir.checkpoint import CheckpointConfig, Checkpointer


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
