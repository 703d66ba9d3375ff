"""Curation of shards behind a URL: the same findings as on disk, from a server that is not always there."""

import pyarrow.parquet as pq
import pytest

from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.materialize import materialize
from data_pipelines.curate.run import curate
from data_pipelines.curate.stats import describe
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.sources import remote
from data_pipelines.sources.opening import open_source
from siglip.cli import run
from tests.data_pipelines import http_server
from tests.data_pipelines.http_server import OfEachFile, serving
from tests.data_pipelines.noisy import make_corpus
from tests.data_pipelines.shards import SPIECE, write_pairs
from tests.data_pipelines.streams import take


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as server:
        yield server


@pytest.mark.slow
def test_a_corpus_behind_a_url_is_curated_and_streamed_as_on_disk(server, tmp_path):
    corpus = make_corpus(server.folder)
    (server.folder / "noisy-cut.tar").rename(server.folder / "cut.tar")
    (server.folder / "noisy-empty.tar").unlink()
    (server.folder / "noisy-zero.tar").unlink()
    server.always = OfEachFile(http_server.refuse(503), first=1)
    manifests, funnels = [], []
    for place in (str(server.folder), server.url):
        out = tmp_path / f"out-{len(funnels)}"
        shards, against = [f"{place}/noisy-*.tar", f"{place}/cut.tar"], f"{place}/held.tar"
        funnels.append(curate(shards, out, config=CurateConfig(), engine=LocalEngine(1), against=against))
        manifests.append(out / "manifest.parquet")
        for name in ("manifest", "report.html", "funnel.json"):
            assert list(out.glob(f"{name}*"))
    assert {path for path, count in server.always.asked.items() if count > 1} > {"/cut.tar", "/held.tar"}
    names = ("pairs", "kept", "taken", "applied", "languages", "sides_px")
    assert [funnels[0][name] for name in names] == [funnels[1][name] for name in names]
    here, there = (pq.read_table(path).to_pylist() for path in manifests)
    for one, other in zip(here, there, strict=True):
        assert other["shard"] == one["shard"].replace(str(server.folder), server.url)
        for row in (one, other):
            for name in ("shard", "duplicate_of", "leak_of"):
                row[name] = row[name] and row[name].rpartition("/")[2]
    assert here == there and funnels[0]["kept"] > 50
    shards = [materialize(path, tmp_path / f"new-{n}", "tar", pairs_per_shard=60) for n, path in enumerate(manifests)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    stats = [describe(f"{place}/noisy-*.tar", engine=LocalEngine(1)) for place in (str(server.folder), server.url)]
    assert stats[0] == stats[1] and stats[0]["pairs"] > 100
    assert len(corpus.truth) <= len(here)
    for blocks in (None, BlockShuffle(20, 2)):
        keys = []
        for number, place in enumerate((str(server.folder), server.url)):
            config = SourceConfig(f"{place}/{{noisy-*,cut}}.tar", manifest=str(manifests[number]))
            batches, _ = take(DataConfig((config,), SPIECE, shuffle_blocks=blocks), 6)
            keys.append([key for batch in batches for key in batch["key"]])
        assert keys[0] == keys[1] and len(set(keys[0])) == 48


def test_pairs_are_scanned_in_long_reads(server, tmp_path):
    write_pairs(server.folder / "a.tar", 200)
    curate(f"{server.url}/a.tar", tmp_path / "out", config=CurateConfig(min_side_px=1), engine=LocalEngine(1))
    assert len(server.requests) < 10


def test_a_shard_that_vanishes_in_the_middle_is_named_and_the_others_are_kept(server, tmp_path, capsys):
    for number, name in enumerate("abc"):
        write_pairs(server.folder / f"{name}.tar", 5, first=5 * number)
    open_source(f"{server.url}/b.tar")  # Its index is there: it vanishes when its pairs are read.
    server.always = OfEachFile(http_server.refuse(404), first=2, times=99, only="b.tar")
    command = ["data", "curate", f"{server.url}/{{a,b,c}}.tar", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run([*command, "--min-side-px", "1"]) == 1
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "1 of 3 shards failed" in told and f"{server.url}/b.tar' vanished" in told
    scans = {path.name[0]: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scan").glob("*.parquet")}
    assert scans.keys() == {"a", "c"} and not (tmp_path / "out" / "manifest.parquet").exists()
    server.always = None
    server.requests.clear()
    assert run([*command, "--min-side-px", "1"]) == 0
    after = {path.name[0]: path.stat().st_mtime_ns for path in (tmp_path / "out" / "scan").glob("*.parquet")}
    assert after.keys() == {"a", "b", "c"} and all(after[name] == time_ns for name, time_ns in scans.items())
    assert {asked for path, asked in server.requests if path != "/b.tar"} == {"bytes=0-0"}  # only their versions
    assert len(pq.read_table(tmp_path / "out" / "manifest.parquet")) == 15


def test_a_server_that_is_down_is_one_line(server, tmp_path, monkeypatch, capsys):
    write_pairs(server.folder / "a.tar", 5)
    monkeypatch.setattr(remote, "TRIES", 2)
    server.always = http_server.refuse(503)
    assert run(["data", "curate", f"{server.url}/a.tar", "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "503 Service Unavailable" in told and f"{server.url}/a.tar" in told
