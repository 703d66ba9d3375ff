"""Remote files: a real HTTP server that stalls, drops, lies and answers 503; other file systems; threads, forks, pickles."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from data_pipelines.records import ShardLost
from data_pipelines.sources import copies, files, remote
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines import http_server
from tests.data_pipelines.http_server import Server, serving
from tests.data_pipelines.shards import write_pairs

DATA = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    monkeypatch.setattr(remote, "_warned_hosts", set())
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(DATA)
    with serving(tmp_path / "served") as server:
        yield server


def read(server: Server, offset: int = 1000, size: int = 500) -> bytes:
    return remote.read_range(f"{server.url}/file", offset, size, total=len(DATA))


def test_a_range_is_one_request(server):
    assert read(server) == DATA[1000:1500]
    assert server.requests == [("/file", "bytes=1000-1499")]
    assert remote.stat(f"{server.url}/file").size == len(DATA)
    assert remote.read_range(f"{server.url}/file", 5, 0, total=len(DATA)) == b""


@pytest.mark.parametrize(
    "fault",
    [
        http_server.refuse(503),
        http_server.refuse(500),
        http_server.refuse(429),
        http_server.refuse(408),
        http_server.drop,
        http_server.stall(1),
        http_server.be_silent(1),
        http_server.send_too_little,
        http_server.send_another_range,
    ],
)
def test_faults_that_pass_are_outlived(server, fault):
    server.faults = [fault, None, fault]
    assert read(server) == DATA[1000:1500]
    assert len(server.requests) == 2
    server.faults = [fault, fault]
    assert remote.stat(f"{server.url}/file").size == len(DATA) and len(server.requests) <= 5


@pytest.mark.parametrize(
    "fault, told",
    [
        (http_server.refuse(503), "503 Service Unavailable"),
        (http_server.drop, "Connection"),
        (http_server.stall(1), "no answer in time"),
        (http_server.be_silent(1), "no answer in time"),
        (http_server.send_too_little, "the body ended after 3 of 500 bytes"),
        (http_server.send_another_range, "the answer is for another range"),
    ],
)
def test_faults_that_stay_are_one_line(server, monkeypatch, fault, told):
    monkeypatch.setattr(remote, "TRIES", 3)
    server.always = fault
    with pytest.raises(remote.RemoteError) as error:
        read(server)
    message = str(error.value)
    assert "\n" not in message and isinstance(error.value, OSError)
    assert message.startswith(f"reading bytes 1000 to 1499 of '{server.url}/file' failed 3 times in ")
    assert told in message or (fault is http_server.drop and "Payload" in message)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status, kind", [(404, FileNotFoundError), (403, PermissionError), (400, ValueError)])
def test_what_will_not_pass_fails_at_once(server, status, kind):
    server.always = http_server.refuse(status)
    with pytest.raises(kind, match=rf"{server.url}/file.*{status}"):
        read(server)
    assert len(server.requests) == 1


def test_the_server_says_how_long_to_wait(server):
    server.faults = [http_server.refuse(503, Retry_After="1")]
    started_s = time.monotonic()
    assert read(server) == DATA[1000:1500]
    assert time.monotonic() - started_s >= 1


def test_waits_grow_and_differ(server, monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.always = http_server.refuse(503)
    for _ in range(2):
        with pytest.raises(remote.RemoteError):
            read(server)
    first, second = waits[: remote.TRIES - 1], waits[remote.TRIES - 1 :]
    assert first != second
    for number, wait_s in enumerate(first):
        assert 0.5 <= wait_s / (0.01 * 2**number) <= 1


def test_a_server_without_ranges_works_and_is_warned_about_once(server):
    server.always = http_server.ignore_range
    with pytest.warns(UserWarning, match="ignores byte ranges") as caught:
        assert read(server) == DATA[1000:1500]
        assert read(server, 0, 10) == DATA[:10]
    said = [str(warning.message) for warning in caught]  # the collector may close a socket of an earlier test meanwhile
    assert sum("ignores byte ranges" in line for line in said) == 1


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    with pytest.raises(remote.RemoteError, match="http://127.0.0.1:1/a.tar.*failed 6 times"):
        remote.stat("http://127.0.0.1:1/a.tar")


def test_urls_that_cannot_be():
    for url, message in (("s4://bucket/a.tar", "Protocol not known"), ("gs://bucket/a.tar", "gcsfs")):
        with pytest.raises(ValueError, match=message) as error:
            open_source(url)
        assert "\n" not in str(error.value)


def test_tars_over_http(server, tmp_path):
    for number in range(3):
        write_pairs(server.folder / f"{number:05d}.tar", 20, first=20 * number)
    local = TarSource(f"{server.folder}/*.tar")
    for path in server.folder.glob("*.idx"):
        path.unlink()
    for pattern in ("0000{0..2}.tar", "*.tar", "0000[012].tar"):
        assert open_source(f"{server.url}/{pattern}").paths == [f"{server.url}/{n:05d}.tar" for n in range(3)]
    source = open_source(f"{server.url}/0000{{0..2}}.tar")
    assert list(source) == list(local) and source.fingerprint == local.fingerprint
    server.requests.clear()
    again = open_source(f"{server.url}/0000{{0..2}}.tar")  # from the cached index: only sizes are asked for
    assert len(again) == 60 and {asked for _, asked in server.requests} == {"bytes=0-0"}
    server.requests.clear()
    assert again[33] == local[33] and len(server.requests) == 1
    assert pickle.loads(pickle.dumps(again))[7] == local[7] and len(server.requests) == 2
    write_pairs(server.folder / "00000.tar", 30)
    assert len(open_source(f"{server.url}/00000.tar")) == 30


def test_an_unreliable_server_costs_no_pair(server):
    write_pairs(server.folder / "a.tar", 60)
    faults = [http_server.refuse(503), http_server.drop, http_server.send_too_little, http_server.refuse(429)]
    server.faults = [fault for fault in faults * 3 for fault in (fault, None, None)]
    source = open_source(f"{server.url}/a.tar")
    with ThreadPoolExecutor(8) as pool:
        assert [pair.key for pair in pool.map(source.__getitem__, range(60))] == [f"{n:06d}" for n in range(60)]
    assert not server.faults


def test_a_slow_read_holds_no_other_up(server, monkeypatch):
    monkeypatch.setattr(remote, "STALL_S", 120.0)
    write_pairs(server.folder / "a.tar", 4)
    source = open_source(f"{server.url}/a.tar")
    all_four = threading.Barrier(4)
    server.faults = [http_server.meet(all_four)] * 4 + [None] * 4
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(source.__getitem__, range(4)))) == 4
    assert not all_four.broken  # one after the other they would never have met


def count_keys(source) -> int:
    return len({pair.key for pair in source})


def test_readers_survive_a_new_process(server):
    write_pairs(server.folder / "a.tar", 10)
    source = open_source(f"{server.url}/a.tar")
    assert count_keys(source) == 10  # its connections are open by now
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(count_keys, [source] * 4) == [10] * 4


FORKED = """
import multiprocessing, sys
from data_pipelines.sources.opening import open_source

def count_keys(source):
    return len({pair.key for pair in source})

source = open_source(sys.argv[1])
assert count_keys(source) == 10
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(count_keys, [source] * 4) == [10] * 4
"""


def test_readers_survive_a_fork(server):
    """In a process of their own: the threads of other libraries here may hold what a child would wait for."""
    write_pairs(server.folder / "a.tar", 10)
    done = subprocess.run([sys.executable, "-c", FORKED, f"{server.url}/a.tar"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_shard_that_vanishes_or_changes_stops_the_run(server):
    for name in "abc":
        write_pairs(server.folder / f"{name}.tar", 3)
    gone, changed, forbidden = (open_source(f"{server.url}/{name}.tar") for name in "abc")
    (server.folder / "a.tar").unlink()
    with pytest.raises(ShardLost, match=rf"{server.url}/a.tar' vanished while it was in use"):
        gone[0]
    write_pairs(server.folder / "b.tar", 30)
    with pytest.raises(ShardLost, match=rf"{server.url}/b.tar' had \d+ bytes when it was opened"):
        changed[0]
    server.always = http_server.refuse(403)
    with pytest.raises(ShardLost, match="not permitted"):
        forbidden[0]


def replace_by_one_of_equal_size(shard: Path) -> None:
    size, before = shard.stat().st_size, shard.stat().st_mtime_ns
    write_pairs(shard, 3, first=500)
    os.utime(shard, ns=(before + 10**9, before + 10**9))
    assert shard.stat().st_size == size


@pytest.mark.parametrize("validator", ["ETag", "Last-Modified"])
def test_a_shard_replaced_by_one_of_equal_size_is_noticed(server, validator):
    server.validator = validator
    url, shard = f"{server.url}/a.tar", write_pairs(server.folder / "a.tar", 3)
    opened = open_source(url)
    assert [pair.key for pair in opened] == ["000000", "000001", "000002"]
    replace_by_one_of_equal_size(shard)
    for source in (opened, pickle.loads(pickle.dumps(opened))):
        with pytest.raises(ShardLost, match=rf"{url}' was replaced: its version was"):
            source[0]
    assert [pair.key for pair in open_source(url)] == ["000500", "000501", "000502"]


def test_a_server_without_versions_is_read_all_the_same(server):
    server.validator = "X-Nothing"
    source = open_source(f"{server.url}/{write_pairs(server.folder / 'a.tar', 3).name}")
    assert source[2].key == "000002"


def test_a_copy_is_of_the_version_that_was_asked_for(server):
    path = server.folder / "file"
    opened = remote.stat(f"{server.url}/file")
    os.utime(path, ns=(1, 1))
    with (
        pytest.raises(ValueError, match="was replaced"),
        copies.local_copy(f"{server.url}/file", opened.size, opened.version),
    ):
        pass


def test_other_file_systems_are_asked_for_the_version_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_looked_at", {})
    memory, shard = fsspec.filesystem("memory"), write_pairs(tmp_path / "a.tar", 3)
    memory.pipe("/replaced/a.tar", shard.read_bytes())
    asked, info = [], type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, path, **more: asked.append(path) or info(self, path, **more))
    source = open_source("memory://replaced/a.tar")
    asked.clear()
    assert [source[n].key for n in (0, 1, 2)] == ["000000", "000001", "000002"] and len(asked) == 1
    replace_by_one_of_equal_size(shard)
    memory.pipe("/replaced/a.tar", shard.read_bytes())
    monkeypatch.setattr(remote, "LOOK_AGAIN_S", 0.0)
    with pytest.raises(ShardLost, match="memory://.*replaced/a.tar' was replaced"):
        source[0]


def test_bad_remote_shards(server):
    (server.folder / "empty.tar").write_bytes(b"")
    (server.folder / "page.tar").write_bytes(b"<html>" * 1000)
    for name, kind, message in (
        ("empty.tar", ValueError, "is empty"),
        ("page.tar", ValueError, "is not an uncompressed tar"),
        ("none.tar", FileNotFoundError, "no such file"),
        ("x*.tar", FileNotFoundError, "no shard matches"),
        ("nowhere/*.tar", FileNotFoundError, "no shard matches"),
    ):
        with pytest.raises(kind, match=message) as error:
            open_source(f"{server.url}/{name}")
        assert server.url in str(error.value) and "\n" not in str(error.value)


def test_other_file_systems(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for number in range(2):
        shard = write_pairs(tmp_path / f"{number}.tar", 5, first=5 * number)
        memory.pipe(f"/bucket/{number}.tar", shard.read_bytes())
    source = open_source("memory://bucket/*.tar")
    assert [pair.key for pair in source] == [f"{n:06d}" for n in range(10)]
    assert open_source("memory://bucket/{0..1}.tar").fingerprint == source.fingerprint
    assert [pair.key for pair in open_source(f"file://{tmp_path}/1.tar")] == [f"{n:06d}" for n in range(5, 10)]
    memory.rm("/bucket/1.tar")
    with pytest.raises(ShardLost, match="memory://.*bucket/1.tar' vanished"):
        source[7]
    with pytest.raises(ValueError, match="is a folder"):
        files.stat("memory://bucket")


@pytest.mark.parametrize(
    "name, kind, told",
    [
        ("NoCredentialsError", PermissionError, "check the credentials"),
        ("EndpointConnectionError", remote.RemoteError, "failed 6 times"),
    ],
)
def test_errors_of_cloud_clients_are_one_line(monkeypatch, name, kind, told):
    base = type("BotoCoreError", (Exception,), {})  # as in botocore, which need not be installed: no OSError
    module = types.ModuleType("botocore.exceptions")
    module.BotoCoreError = base
    monkeypatch.setitem(sys.modules, "botocore.exceptions", module)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    error = type(name, (base,), {})("Unable to\nconnect")

    def fail(*args):
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", fail)
    with pytest.raises(
        kind, match=f"memory://bucket/a.tar.*{name}: Unable to connect.*{told}|{told}.*{name}"
    ) as caught:
        files.stat("memory://bucket/a.tar")
    assert "\n" not in str(caught.value)
