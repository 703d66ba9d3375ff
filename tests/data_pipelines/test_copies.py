"""Copies of whole remote files: fetched once by whoever wants them, bounded, never taken from under a reader."""

import fcntl
import multiprocessing
import os
import resource
import time

import pytest

from data_pipelines.sources import copies, remote
from tests.data_pipelines import http_server
from tests.data_pipelines.http_server import serving

SIZE = 1 << 20


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    (tmp_path / "served").mkdir()
    for name in "abcd":
        (tmp_path / "served" / name).write_bytes(name.encode() * SIZE)
    with serving(tmp_path / "served") as server:
        server.validator = "X-Nothing"  # so that any version may be asked for
        yield server


def folder() -> list[str]:
    """The first letters of the copies, the longest unused first."""
    where = os.path.join(os.environ["XDG_CACHE_HOME"], "siglip", "copies")
    found = sorted(os.scandir(where), key=lambda entry: entry.stat().st_mtime_ns)
    return [open(entry.path, "rb").read(1).decode() for entry in found if entry.name.endswith(".copy")]


def fetch(url: str) -> bytes:
    with copies.local_copy(url, SIZE, "1") as copy, open(copy, "rb") as file:
        return file.read()


def test_the_copies_used_longest_ago_go(server, monkeypatch):
    monkeypatch.setenv("SIGLIP_COPIES_GIB", str(2.5 * SIZE / 2**30))
    for name, left in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("d", "cd"), ("a", "da")):
        assert fetch(f"{server.url}/{name}") == name.encode() * SIZE
        assert "".join(folder()) == left
    assert [path for path, _ in server.requests] == ["/a", "/b", "/c", "/d", "/a"]


def test_a_copy_in_use_stays(server, monkeypatch):
    monkeypatch.setenv("SIGLIP_COPIES_GIB", str(1.5 * SIZE / 2**30))
    with copies.local_copy(f"{server.url}/a", SIZE, "1") as held:
        fetch(f"{server.url}/b")
        assert folder() == ["a", "b"] and os.path.exists(held)
    fetch(f"{server.url}/c")
    assert folder() == ["c"]


@pytest.mark.slow
def test_processes_share_one_fetch_and_the_limit(server, monkeypatch):
    monkeypatch.setenv("SIGLIP_COPIES_GIB", str(2.5 * SIZE / 2**30))
    server.latency_s = 0.1
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(fetch, [f"{server.url}/a"] * 4, chunksize=1) == [b"a" * SIZE] * 4
        assert len(server.requests) == 1
        asked = [f"{server.url}/{name}" for name in "abcdabcdabcd"]
        assert [data[:1].decode() for data in pool.map(fetch, asked, chunksize=1)] == list("abcdabcdabcd")
    fetch(f"{server.url}/a")
    fetch(f"{server.url}/b")
    assert len(folder()) <= 2


def test_what_a_killed_process_left_is_used_or_goes(server):
    with copies.local_copy(f"{server.url}/a", SIZE, "1") as copy:
        partial = copy.replace(".copy", ".partial")
    os.rename(copy, partial)
    with open(partial, "ab") as file:
        file.write(b"more than it should be")
    assert fetch(f"{server.url}/a") == b"a" * SIZE and not os.path.exists(partial)
    other = partial.replace(".partial", "x.partial")
    with open(other, "wb") as file:
        file.write(b"x")
    os.utime(other, (0, time.time() - 2 * 3600))
    copies._make_room(os.path.dirname(other), copies.limit_bytes())
    assert not os.path.exists(other)


def test_a_fetch_that_fails_leaves_nothing(server, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 2)
    server.always = http_server.refuse(503)
    with pytest.raises(remote.RemoteError):
        fetch(f"{server.url}/a")
    where = os.path.join(os.environ["XDG_CACHE_HOME"], "siglip", "copies")
    assert os.listdir(where) == []
    server.always = None
    assert fetch(f"{server.url}/a") == b"a" * SIZE
    with open(os.path.join(where, os.listdir(where)[0])) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # No lock is left either.


def test_a_disk_that_is_full_leaves_no_cut_copy(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))  # the kernel takes what fits, without an error
    try:
        with pytest.raises(OSError, match=f"only {SIZE // 2} of {SIZE} bytes of .* fit into .*; make room there"):
            fetch(f"{server.url}/a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(os.path.join(os.environ["XDG_CACHE_HOME"], "siglip", "copies")) == []


def test_a_copy_that_was_cut_is_fetched_again(server):
    with copies.local_copy(f"{server.url}/a", SIZE, "1") as copy:
        pass
    os.truncate(copy, SIZE // 2)
    assert fetch(f"{server.url}/a") == fetch(f"{server.url}/a") == b"a" * SIZE
    assert len(server.requests) == 2 and os.path.exists(copy)


def test_the_limit_is_a_number(monkeypatch):
    for told in ("0", "-1", "many", "nan"):
        monkeypatch.setenv("SIGLIP_COPIES_GIB", told)
        with pytest.raises(ValueError, match=f"SIGLIP_COPIES_GIB={told} must be a positive number"):
            copies.limit_bytes()
