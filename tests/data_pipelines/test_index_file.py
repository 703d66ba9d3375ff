"""The index of shards and its life: reused, rebuilt, damaged, raced for, without a place to lie."""

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.curate.engine import LocalEngine
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.workers import usable_cores
from tests.data_pipelines.shards import keys, write_pairs


def index_of(shard: Path) -> Path:
    return Path(f"{shard}.idx")


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is built."""
    count = []
    build = TarSource.build
    monkeypatch.setattr(TarSource, "build", staticmethod(lambda *args: count.append(1) or build(*args)))
    return count


def test_index_is_reused_and_rebuilt_when_the_shard_changes(tmp_path, builds):
    shard = write_pairs(tmp_path / "a.tar", 3)
    first = TarSource(shard)
    assert index_of(shard).exists()
    again = TarSource(shard)
    assert len(builds) == 1 and keys(again) == keys(first) and again.fingerprint == first.fingerprint
    write_pairs(shard, 4)
    changed = TarSource(shard)
    assert len(builds) == 2 and len(changed) == 4 and changed.fingerprint != first.fingerprint


def test_same_size_new_time_rebuilds(tmp_path, builds):
    shard = write_pairs(tmp_path / "a.tar", 3)
    TarSource(shard)
    os.utime(shard, ns=(1, 1))
    TarSource(shard)
    assert len(builds) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\0" * len(data),
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[: data.index(b"\n") + 1],
        lambda data: data.replace(b'"pairs": 3', b'"pairs": 2'),
        lambda data: data.replace(b'"shard_bytes": ', b'"shard_bytes":  '),
        lambda data: data.replace(b'"<i8"', b'"|O8"'),
        lambda data: data.replace(b'"tables": [[', b'"tables": 7, "x": [[', 1),
        lambda data: data.replace(b'"notes": {"', b'"notes": [{"', 1),
        lambda data: b"[" * 100_000 + data,
        lambda data: data.replace(b'"version": 3', b'"version": 2')[:-4],  # of before, without a checksum at the end
        lambda data: b'{"version": 1}\n' + data,
        lambda data: b"[]\n",
    ],
)
def test_a_damaged_index_is_rebuilt(tmp_path, builds, damage):
    shard = write_pairs(tmp_path / "a.tar", 3)
    expected = keys(TarSource(shard))
    index_of(shard).write_bytes(damage(index_of(shard).read_bytes()))
    assert keys(TarSource(shard)) == expected and len(builds) == 2
    assert keys(TarSource(shard)) == expected and len(builds) == 2


def test_a_flip_of_any_bit_is_noticed(tmp_path, builds):
    shard = write_pairs(tmp_path / "a.tar", 3)
    expected, whole = keys(TarSource(shard)), index_of(shard).read_bytes()
    places = [*range(0, len(whole), 7), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        index_of(shard).write_bytes(damaged)
        assert keys(TarSource(shard)) == expected
    assert len(builds) == 1 + len(places)


def test_index_goes_to_the_cache_folder_when_the_shard_folder_is_read_only(tmp_path, builds, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = write_pairs(tmp_path / "a.tar", 3)
    index_of(shard).mkdir()  # Nothing can be written there, not even by root.
    assert len(TarSource(shard)) == len(TarSource(shard)) == 3
    assert len(builds) == 1
    assert [path.suffix for path in (tmp_path / "cache" / "siglip" / "index").iterdir()] == [".idx"]


def test_index_stays_in_memory_when_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, so no folder can be made here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shard = write_pairs(tmp_path / "a.tar", 3)
    index_of(shard).mkdir()
    assert len(TarSource(shard)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.idx", "cache"]


def open_and_count(shard) -> int:
    return len(keys(TarSource(shard)))


def test_processes_may_race_for_the_index(tmp_path):
    shard = write_pairs(tmp_path / "a.tar", 200)
    with multiprocessing.get_context("spawn").Pool(4) as pool:  # a fork of a process with threads may hang
        assert pool.map(open_and_count, [shard] * 12) == [200] * 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.idx"]


def test_an_index_deleted_under_a_source_is_made_again(tmp_path, builds):
    shard = write_pairs(tmp_path / "a.tar", 3)
    source = TarSource(shard)
    index_of(shard).unlink()
    assert keys(source) == ["000000", "000001", "000002"] and len(builds) == 2


def test_many_shards_are_indexed_by_several_processes_within_the_limit_of_open_files(tmp_path):
    shards = [write_pairs(tmp_path / f"{number:03d}.tar", 2, first=2 * number) for number in range(200)]
    shards.append(tmp_path / "broken.tar")
    shards[-1].write_bytes(b"no tar" * 1000)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(ValueError, match="broken.tar' is not an uncompressed tar"):
        TarSource(shards)
    assert len(list(tmp_path.glob("*.idx"))) == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        source = TarSource(shards[:-1])
        assert keys(source) == [f"{number:06d}" for number in range(400)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def hang(shard, stat):
    """Builds no index, for ever."""
    Path(f"{shard}.{os.getpid()}").touch()
    time.sleep(600)


@pytest.mark.skipif(usable_cores() < 2, reason="one core indexes in one process")
def test_processes_that_index_go_with_their_parent(tmp_path):
    shards = [tmp_path / f"{number:02d}" for number in range(32)]
    for shard in shards:
        shard.write_bytes(b"x")
    program = (
        "import sys; from data_pipelines.sources.shards import open_indexes; from tests.data_pipelines.test_index_file "
        "import hang; open_indexes(sys.argv[1:], 'tar', hang)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", program, *shards], env=environment)
    deadline = time.monotonic() + 120
    while len(begun := list(tmp_path.glob("*.*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    while any(Path("/proc", path.suffix[1:]).exists() for path in begun):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_shards_are_indexed_where_the_system_tells_no_affinity(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    shards = [str(write_pairs(tmp_path / f"{n:02d}.tar", 1, first=n)) for n in range(32)]
    assert len(TarSource(shards)) == 32
    assert LocalEngine().workers == os.cpu_count()
