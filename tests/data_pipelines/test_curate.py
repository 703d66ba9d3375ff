"""Curation from end to end, on a noisy corpus whose faults are known."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.curate import layout, scan
from data_pipelines.curate.config import PRESETS, REPAIRS, RULES, CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.materialize import materialize
from data_pipelines.curate.run import curate
from data_pipelines.curate.scan import ScanTask, scan_shard
from data_pipelines.curate.stats import describe
from data_pipelines.errors import RunFailed, UserError
from data_pipelines.image_ops import decode_image
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.noisy import make_corpus
from tests.data_pipelines.shards import SAMPLE, encode, write_pairs

ROOT = Path(__file__).parents[2]
NAMED = set(RULES) - {"duplicate_bytes"}  # of two equal ones, either may be the copy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("noisy"))


@pytest.fixture(scope="module")
def curated(corpus, tmp_path_factory):
    """The folder, the rows by key, and the funnel."""
    out = tmp_path_factory.mktemp("curated")
    funnel = curate(corpus.shards, out, config=CurateConfig(), engine=LocalEngine(1), against=corpus.against)
    rows = {row["key"]: row for row in pq.read_table(out / "manifest.parquet").to_pylist()}
    return out, rows, funnel


def test_every_fault_is_named(corpus, curated):
    _, rows, _ = curated
    missed = {}
    for key, (fault, _) in corpus.truth.items():
        if fault in NAMED and fault not in rows[key]["reasons"]:
            if not (fault == "truncated" and "corrupt_image" in rows[key]["reasons"]):  # cut within the tables
                missed[key] = fault, rows[key]["reasons"], rows[key]["caption"]
    assert not missed


def test_what_drops_and_what_repairs(corpus, curated):
    _, rows, _ = curated
    for key, (fault, _) in corpus.truth.items():
        row = rows[key]
        assert row["keep"] == (row["reason"] is None) == set(REPAIRS).issuperset(row["reasons"])
        assert row["reasons"] == sorted(row["reasons"], key=RULES.index)
        if fault == "clean" and not row["keep"]:  # the original of a copy that is as good and comes first
            assert row["duplicate_of"]
    assert rows[next(k for k, (fault, _) in corpus.truth.items() if fault == "mojibake")]["keep"]


def test_repaired_captions_read_well(corpus, curated):
    _, rows, _ = curated
    repaired = {rows[key]["caption"] for key, (fault, _) in corpus.truth.items() if fault in REPAIRS}
    assert {
        "un château",
        "eine Brücke",
        "собака",
        "猫が好き",
        "a dog",
        "a cat",
        "bird",
        "salt & pepper",
        "café table",
    } <= repaired


def test_one_copy_stays_and_strangers_are_no_copies(corpus, curated):
    _, rows, _ = curated
    places = {f"{row['shard']}#{row['index']}": key for key, row in rows.items()}
    expected = {frozenset((key, of)) for key, (_, of) in corpus.truth.items() if of}
    found = {frozenset((key, places[row["duplicate_of"]])) for key, row in rows.items() if row["duplicate_of"]}
    assert found == expected
    for pair in expected:
        assert sum(rows[key]["keep"] for key in pair) == 1
        kept = next(rows[key] for key in pair if rows[key]["keep"])
        assert kept["width"] * kept["height"] == max(rows[key]["width"] * rows[key]["height"] for key in pair)


def test_leaks_and_only_leaks(corpus, curated):
    _, rows, _ = curated
    leaked = {key for key, (fault, _) in corpus.truth.items() if fault == "eval_leak"}
    assert {key for key, row in rows.items() if "eval_leak" in row["reasons"]} == leaked
    assert all(rows[key]["leak_of"].startswith(corpus.against) for key in leaked)


def test_offsets_point_at_the_files(curated):
    _, rows, _ = curated
    row = next(row for row in rows.values() if row["keep"])
    with open(row["shard"], "rb") as shard:
        shard.seek(row["image_offset"])
        image = decode_image(shard.read(row["image_bytes"]), max_pixels=1 << 20)
        shard.seek(row["json_offset"])
        assert "caption" in json.loads(shard.read(row["json_bytes"]))
    assert image.size == (row["width"], row["height"]) and row["format"] == "JPEG"


def test_shards_that_are_cut_or_empty(corpus, curated):
    _, rows, funnel = curated
    problems = {Path(shard["shard"]).name: shard["problem"] for shard in funnel["shards"] if shard["problem"]}
    assert sorted(problems) == ["noisy-cut.tar", "noisy-empty.tar", "noisy-zero.tar"]
    assert "is cut off" in problems["noisy-cut.tar"] and "0 bytes" in problems["noisy-zero.tar"]
    assert 0 < sum(key.startswith("9") for key in rows) < 3


def test_the_funnel_adds_up(corpus, curated):
    out, rows, funnel = curated
    assert json.loads((out / "funnel.json").read_text()) == json.loads(json.dumps(funnel))
    assert funnel["pairs"] == len(rows) and funnel["kept"] == sum(row["keep"] for row in rows.values())
    assert funnel["pairs"] - sum(funnel["taken"].values()) == funnel["kept"]
    applied = collections.Counter(rule for row in rows.values() for rule in row["reasons"])
    assert funnel["applied"] == applied
    page = (out / "report.html").read_text()
    assert all(f"<h3>{rule} " in page for rule in applied) and "<script" not in page
    assert "<p>a cat</p>" not in page and "&lt;p&gt;a cat&lt;/p&gt;" in page  # other people's text
    assert not list(out.rglob("*.partial")) and not list(out.glob(".work-*"))


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(corpus, curated, tmp_path):
    with LocalEngine(3) as engine:
        curate(corpus.shards, tmp_path, config=CurateConfig(), engine=engine, against=corpus.against)
    for name in ("manifest.parquet", "funnel.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (curated[0] / name).read_bytes()


class Shuffled:
    """An engine whose results come in any order, as those of many machines do."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def map(self, function, items):
        return ((item, function(item)) for item in self.random.sample(list(items), len(items)))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 3, 64]), st.sampled_from([40, 3000, 10**6]))
def test_any_order_and_any_division_give_the_same_manifest(corpus, curated, seed, groups, rows_per_bucket):
    out = curated[0]
    before = (out / "manifest.parquet").read_bytes()
    with mock.patch.multiple(layout, MIN_GROUPS=groups, ROWS_PER_BUCKET=rows_per_bucket):
        curate(corpus.shards, out, config=CurateConfig(), engine=Shuffled(seed), against=corpus.against)
    assert (out / "manifest.parquet").read_bytes() == before


def test_finished_shards_are_not_scanned_again(tmp_path):
    shards = [str(write_pairs(tmp_path / f"{n}.tar", 4, first=4 * n)) for n in range(3)]
    run = lambda **changes: curate(shards, tmp_path / "out", config=CurateConfig(**changes), engine=LocalEngine(1))  # noqa: E731
    run(min_side_px=1)
    scans = sorted((tmp_path / "out" / "scan").iterdir())
    before = [path.stat().st_mtime_ns for path in scans]
    write_pairs(tmp_path / "1.tar", 5, first=4)
    run(min_side_px=1, duplicates="off")  # not asked of a scan
    assert [path.stat().st_mtime_ns == time_ns for path, time_ns in zip(scans, before, strict=True)] == [
        True,
        False,
        True,
    ]
    run(min_side_px=2)
    assert not {path.stat().st_mtime_ns for path in scans} & {before[0], before[2]}


def test_a_killed_run_goes_on(corpus, curated, tmp_path):
    arguments = [*corpus.shards, "--out", str(tmp_path), "--against", corpus.against, "--workers", "1"]
    command = [sys.executable, "-m", "siglip.cli", "data", "curate", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("scan/noisy-*.parquet")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "manifest.parquet").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scan/noisy-*.parquet")}
    assert finished
    curate(corpus.shards, tmp_path, config=CurateConfig(), engine=LocalEngine(1), against=corpus.against)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items())
    assert (tmp_path / "manifest.parquet").read_bytes() == (curated[0] / "manifest.parquet").read_bytes()


def test_a_shard_that_is_gone_is_named_and_the_others_are_kept(tmp_path):
    shards = [str(write_pairs(tmp_path / f"{n}.tar", 4, first=4 * n)) for n in range(3)]
    os.unlink(shards[1])
    with pytest.raises(ValueError, match=r"1 of 3 shards failed: .*1\.tar.*the others are scanned") as error:
        curate(shards, tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1))
    assert "\n" not in str(error.value)
    assert (
        len(list((tmp_path / "out" / "scan").iterdir())) == 2 and not (tmp_path / "out" / "manifest.parquet").exists()
    )


def test_an_evaluation_set_that_is_not_there_protects_nothing(tmp_path):
    shard = str(write_pairs(tmp_path / "a.tar", 2))
    (tmp_path / "held.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(ValueError, match="evaluation .*held.tar"):
        curate(
            shard, tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1), against=str(tmp_path / "held.tar")
        )


def test_nothing_readable(tmp_path):
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="no pair in 1 shards can be read"):
        curate(str(tmp_path / "zero.tar"), tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1))


def test_other_formats_and_fields(tmp_path):
    encoded = [encode(np.full((16, 16, 3), 40 * n, np.uint8)) for n in range(4)]
    images = pa.array([{"bytes": data, "path": f"{n}.png"} for n, data in enumerate([*encoded[:3], b"<html>"])])
    captions = ["a red car", "<b>a dog</b>", "two cats", "a bird"]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet")
    run = lambda **changes: curate(  # noqa: E731
        str(tmp_path / "a.parquet"), tmp_path / "out", config=CurateConfig(**changes), engine=LocalEngine(1)
    )
    with pytest.raises(ValueError, match="no pair has a caption in txt; name the field with --captions"):
        run()
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    run(captions=("caption",))
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert [row["reason"] for row in rows] == [None, "markup", None, "not_an_image"]
    assert rows[0]["caption"] == "a red car" and rows[0]["image_offset"] == -1


def test_copies_with_other_captions_stay_when_pairs_are_compared(tmp_path):
    one, two = write_pairs(tmp_path / "a.tar", 3), write_pairs(tmp_path / "b.tar", 3)
    data = two.read_bytes().replace(b"caption 1", b"another 1")
    two.write_bytes(data)
    config = CurateConfig(duplicates="pair", min_side_px=1)
    curate([str(one), str(two)], tmp_path / "out", config=config, engine=LocalEngine(1))
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert [row["keep"] for row in rows] == [True] * 3 + [False, True, False]


def test_a_caption_on_many_different_images(tmp_path):
    shard = write_pairs(tmp_path / "a.tar", 6)
    data = shard.read_bytes()
    for number in range(4):
        data = data.replace(f"caption {number}".encode(), b"a drawing")
    shard.write_bytes(data)
    config = CurateConfig(min_side_px=1, max_caption_pictures=3, duplicates="off")
    curate(str(shard), tmp_path / "out", config=config, engine=LocalEngine(1))
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["repeated_caption"] * 4 + [None] * 2


def test_balance_keeps_about_the_cap(tmp_path):
    shard = write_pairs(tmp_path / "a.tar", 400)
    concepts = tmp_path / "concepts.txt"
    concepts.write_text("caption\ncaption 7\n")
    config = CurateConfig(min_side_px=1, concept_cap=100, duplicates="off", max_caption_pictures=0)
    funnel = curate(str(shard), tmp_path / "out", config=config, engine=LocalEngine(1), concepts=str(concepts))
    assert 70 < funnel["kept"] < 130  # 4 standard deviations of a binomial around 100
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert rows[7]["keep"]  # the rare concept is below its cap


def test_presets_and_what_they_need(corpus, tmp_path):
    for name, preset in PRESETS.items():
        config = preset()
        needs = "--model" if config.needs_scores else "--concepts" if config.concept_cap else None
        if needs:
            with pytest.raises(ValueError, match=needs):
                curate(corpus.shards, tmp_path, config=config, engine=LocalEngine(1))
        else:
            funnel = curate(corpus.shards, tmp_path / name, config=config, engine=LocalEngine(1))
            assert funnel["kept"] == 0 and funnel["taken"]["too_small"] > 50  # nothing here is 200 px wide


@pytest.mark.parametrize("kind", ["tar", "arrayrecord"])
def test_materialized_shards_hold_the_kept_pairs(curated, tmp_path, kind):
    out, rows, _ = curated
    materialize(out / "manifest.parquet", tmp_path, kind, pairs_per_shard=20)
    paths = materialize(out / "manifest.parquet", tmp_path, kind, pairs_per_shard=50)
    assert sorted(tmp_path.glob(f"*.{kind}")) == paths
    kept = [row for row in pq.read_table(out / "manifest.parquet").to_pylist() if row["keep"]]
    pairs = list(open_source([str(path) for path in paths]))
    assert len(paths) == -(-len(kept) // 50) > 1
    assert [(pair.key, pair.fields["txt"], len(pair.image)) for pair in pairs] == [
        (row["key"], row["caption"], row["image_bytes"]) for row in kept
    ]


def test_new_shards_take_no_other_files_place(curated, tmp_path):
    out, _, _ = curated
    manifest = out / "manifest.parquet"
    (tmp_path / "00000.tar").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="holds other files; move them or write to another folder"):
        materialize(manifest, tmp_path, "tar")
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]

    first = materialize(manifest, tmp_path / "new", "tar", pairs_per_shard=20)
    (tmp_path / "new" / "99999.tar").write_bytes(b"somebody's")
    assert materialize(manifest, tmp_path / "new", "tar", pairs_per_shard=50) == first[:2]
    assert {path.name for path in (tmp_path / "new").glob("*.tar")} == {"00000.tar", "00001.tar", "99999.tar"}

    (tmp_path / "new" / "99999.tar").rename(tmp_path / "new" / "00002.tar")
    with pytest.raises(ValueError, match="00002.tar' was not written by an earlier run"):
        materialize(manifest, tmp_path / "new", "tar", pairs_per_shard=20)

    curate(str(first[0]), tmp_path / "again", config=CurateConfig(duplicates="off"), engine=LocalEngine(1))
    before = first[0].read_bytes()
    with pytest.raises(ValueError, match="new shards go to .*new', where .*00000.tar' lies"):
        materialize(tmp_path / "again" / "manifest.parquet", tmp_path / "new", "tar")
    assert first[0].read_bytes() == before


def test_what_storage_did_not_yield_is_asked_for_again(tmp_path, monkeypatch):
    shard = str(write_pairs(tmp_path / "a.tar", 5))
    TarSource(shard)  # leaves an index, so that a scan reads nothing but pairs
    task = ScanTask(shard, tmp_path / "scan.parquet", CurateConfig(min_side_px=1))

    def reasons():
        return pq.read_table(task.out, columns=["reasons"])["reasons"].to_pylist()

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", lambda *_: os.close(-1))  # raises OSError, as a worn disk does
        assert not scan_shard(task).reused and reasons() == [["unreadable"]] * 5
    assert not scan_shard(task).reused and reasons() == [[]] * 5
    assert scan_shard(task).reused


def test_stats_of_the_sample():
    stats = describe(str(SAMPLE / "emoji-heldout-00000.tar"), engine=LocalEngine(1))
    assert (stats["pairs"], stats["shards"], stats["problems"]) == (312, 1, [])
    assert stats["sides_px"] == {"64": 312} and sum(stats["formats"].values()) == 312


def test_a_fault_of_the_code_keeps_its_traceback(tmp_path, monkeypatch):
    shard = str(write_pairs(tmp_path / "a.tar", 3))

    def scan_pair(*_):
        return {}["a bug"]

    monkeypatch.setattr(scan, "_scan_pair", scan_pair)
    with pytest.raises(KeyError) as error:
        curate([shard, str(tmp_path / "none.tar")], tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1))
    assert error.traceback[-1].name == "scan_pair" and any(shard in note for note in error.value.__notes__)
    monkeypatch.setattr(scan, "_scan_pair", mock.Mock(side_effect=OSError(28, "No space left on device")))
    monkeypatch.setattr(scan, "_batches", scan._scan_pair)
    with pytest.raises(RunFailed, match="1 of 1 shards failed: .*No space left on device"):
        curate(shard, tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1))


def test_what_killed_runs_left_is_swept(tmp_path):
    shard, out = str(write_pairs(tmp_path / "a.tar", 3)), tmp_path / "out"
    left = [out / ".work-0123456789ab" / "x", out / ".manifest.parquet.0.partial", out / "scan" / ".a.1.partial"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    curate(shard, out, config=CurateConfig(min_side_px=1), engine=LocalEngine(1))
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("content", ["{", "3", '["../a"]', "[1]"])
def test_a_damaged_list_of_written_shards_is_named(tmp_path, content):
    shard, out = str(write_pairs(tmp_path / "a.tar", 3)), tmp_path / "out"
    curate(shard, out, config=CurateConfig(min_side_px=1), engine=LocalEngine(1))
    (out / "shards").mkdir()
    (out / "shards" / "written.json").write_text(content)
    with pytest.raises(UserError, match="written.json' is damaged; remove the folder"):
        materialize(out / "manifest.parquet", out / "shards", "tar")
