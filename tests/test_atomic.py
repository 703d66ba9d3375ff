"""Files appear whole or not at all, by one helper on each side."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_pipelines.atomic
import siglip.atomic

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("side", [siglip.atomic, data_pipelines.atomic])
def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path, side):
    path = tmp_path / "a.json"
    path.write_text("old")
    with side.new_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == path.parent and partial.name.startswith(".")
    assert path.read_text() == "new"
    with pytest.raises(KeyError), side.new_file(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("side", [siglip.atomic, data_pipelines.atomic])
def test_a_full_disk_is_told_with_the_file(tmp_path, side):
    with (
        pytest.raises(OSError, match="No space left on device: .*a.json"),
        side.new_file(tmp_path / "a.json") as partial,
    ):
        partial.symlink_to("/dev/full")
        partial.write_text("content")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("side", [siglip.atomic, data_pipelines.atomic])
def test_what_a_library_says_of_the_disk_is_an_error_of_the_system(tmp_path, side):
    told = "ResourceExhaustedError: {{function_node SaveV2}} /x/part-00000; No space left on device [Op:SaveV2]"
    with pytest.raises(OSError, match="No space left on device: .*a.json") as error, side.new_file(tmp_path / "a.json"):
        raise RuntimeError(told)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="shapes"), side.new_file(tmp_path / "a.json"):
        raise RuntimeError("shapes do not fit")


def test_content_in_one_call(tmp_path):
    siglip.atomic.write_atomically(tmp_path / "a", "text ü")
    siglip.atomic.write_atomically(tmp_path / "b", b"\x00bytes")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "text ü" and (tmp_path / "b").read_bytes() == b"\x00bytes"


def test_a_folder_leaves_nothing_behind_when_its_block_fails(tmp_path):
    with siglip.atomic.new_folder(tmp_path / "made" / "on" / "way") as partial:
        (partial / "a").touch()
    assert [path.name for path in (tmp_path / "made" / "on" / "way").iterdir()] == ["a"]
    with pytest.raises(FileExistsError), siglip.atomic.new_folder(tmp_path / "made" / "on" / "way"):
        pass
    with pytest.raises(KeyError), siglip.atomic.new_folder(tmp_path / "other" / "way"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_nobody_else_renames_files_into_place():
    renames = re.compile(r"os\.(replace|rename)\b|\bpartial\.re(place|name)\(")
    # An export's npz goes with its config file; a copy from a bucket is locked while it is on its way.
    known = {
        "siglip/atomic.py",
        "data_pipelines/atomic.py",
        "siglip/exporting/export.py",
        "data_pipelines/sources/copies.py",
    }
    sources = [path for side in ("siglip", "data_pipelines") for path in (ROOT / side).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in sources if renames.search(path.read_text())}
    assert found <= known


def test_a_folder_that_a_killed_process_left_is_swept_and_one_that_is_being_written_is_not(tmp_path):
    code = "import os, sys, pathlib, siglip.atomic as a\nwith a.new_folder(pathlib.Path(sys.argv[1])): os._exit(9)"
    out = tmp_path / "a[b]"
    assert subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT).returncode == 9
    (left,) = tmp_path.iterdir()
    with siglip.atomic.new_folder(out) as first, siglip.atomic.new_folder(out) as second:
        assert first.exists() and second.exists() and not left.exists()
        second.rmdir()
        second.parent.joinpath("x").mkdir()
        (tmp_path / "x").rename(second)
    assert [path.name for path in tmp_path.iterdir()] == ["a[b]"]
