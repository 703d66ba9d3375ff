"""A manifest's pairs: only what is kept, in order, in a bit a row; a manifest of other shards is refused."""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.run import curate
from data_pipelines.errors import UserError
from data_pipelines.sources import parquet
from data_pipelines.sources.kept_pairs import Kept, KeptPairs, read_manifest
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import encode, write_pairs, write_tar


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20_000), st.floats(0, 1), st.integers(0, 99))
def test_select_finds_every_kept_row(rows, share, seed):
    keep = np.random.default_rng(seed).random(rows) < share
    kept = Kept.from_bits(np.packbits(keep))
    assert len(kept) == keep.sum()
    places = np.flatnonzero(keep)
    for n in np.linspace(0, len(places) - 1, min(len(places), 50)).astype(int).tolist():
        assert kept.select(n) == places[n]


@pytest.fixture
def corpus(tmp_path):
    """Two shards of 13 and 29 pairs in a folder, and their manifest's rows: every third pair is dropped."""
    write_pairs(tmp_path / "a.tar", 13)
    write_pairs(tmp_path / "b.tar", 29, first=100)
    rows = [
        {"shard": str(tmp_path / f"{name}.tar"), "index": index, "key": f"{first + index:06d}", "keep": index % 3 != 0}
        for name, count, first in (("a", 13, 0), ("b", 29, 100))
        for index in range(count)
    ]
    return tmp_path, rows


def write_manifest(folder: Path, rows: list[dict]) -> Path:
    schema = pa.schema([("key", pa.string()), ("shard", pa.string()), ("index", pa.int32()), ("keep", pa.bool_())])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def kept_keys(rows):
    return [row["key"] for row in rows if row["keep"]]


def test_only_kept_pairs_in_the_order_of_the_shards(corpus):
    folder, rows = corpus
    manifest = write_manifest(folder, rows)
    source = KeptPairs(TarSource(folder / "*.tar"), manifest)
    assert [source[n].key for n in range(len(source))] == kept_keys(rows)
    with pytest.raises(IndexError, match="pair 27 of 27"):
        source[27]
    turned = KeptPairs(TarSource([folder / "b.tar", folder / "a.tar"]), manifest)
    assert [turned[n].key for n in range(len(turned))] == kept_keys(rows[13:] + rows[:13])


def test_rows_may_be_in_any_order_and_of_more_shards(corpus):
    folder, rows = corpus
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]
    source = KeptPairs(TarSource(folder / "b.tar"), write_manifest(folder, shuffled))
    assert [source[n].key for n in range(len(source))] == kept_keys(rows[13:])


def test_shards_that_were_moved_are_known_by_name(corpus):
    folder, rows = corpus
    moved = [row | {"shard": row["shard"].replace(str(folder), "s3://bucket/web")} for row in rows]
    source = KeptPairs(TarSource(folder / "*.tar"), write_manifest(folder, moved))
    assert len(source) == 27
    doubled = moved + [row | {"shard": row["shard"].replace("web", "other")} for row in moved]
    with pytest.raises(UserError, match="the manifest has both 's3://bucket/web/a.tar' and 's3://bucket/other/a.tar'"):
        KeptPairs(TarSource(folder / "*.tar"), write_manifest(folder, doubled))


def test_the_fingerprint_is_of_pairs_and_choice(corpus):
    folder, rows = corpus
    source = TarSource(folder / "*.tar")
    first = KeptPairs(source, write_manifest(folder, rows)).fingerprint
    assert KeptPairs(source, write_manifest(folder, rows)).fingerprint == first != source.fingerprint
    rows[1]["keep"] = False
    assert KeptPairs(source, write_manifest(folder, rows)).fingerprint != first


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[:-1], "b.tar' it has 28 pairs where the shard has 29; curate again"),
        (lambda rows: rows[13:], "a.tar' it has nothing"),
        (lambda rows: rows[:12] + [rows[12] | {"index": 13}] + rows[13:], "a.tar' it has more pairs than the shard"),
        (lambda rows: [rows[0], rows[1] | {"key": "999999"}, *rows[2:]], "a.tar' it has '999999' in place of '000001'"),
        (lambda rows: [row | {"keep": False} for row in rows], "keeps none of the 42 pairs"),
    ],
)
def test_a_manifest_of_other_shards_is_refused(corpus, change, message):
    folder, rows = corpus
    with pytest.raises(UserError, match=message):
        KeptPairs(TarSource(folder / "*.tar"), write_manifest(folder, change(rows)))


def test_what_is_no_manifest(corpus):
    folder, _ = corpus
    source = TarSource(folder / "a.tar")
    with pytest.raises(FileNotFoundError, match="no manifest at .*none.parquet"):
        KeptPairs(source, folder / "none.parquet")
    with pytest.raises(UserError, match="a.tar' is no Parquet file"):
        KeptPairs(source, folder / "a.tar")
    pq.write_table(pa.table({"shard": ["a"]}), folder / "other.parquet")
    with pytest.raises(UserError, match="has no column 'index'"):
        KeptPairs(source, folder / "other.parquet")


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("keep", pa.array([0, 1], pa.int8()), "a column 'keep' of int8, not of booleans"),
        ("shard", pa.array([0, 1]), "a column 'shard' of int64, not of strings"),
        ("keep", pa.array([True, None]), "rows without 'keep'"),
        ("index", pa.array([None, 1], pa.int32()), "rows without 'index'"),
    ],
)
def test_columns_of_another_kind(corpus, column, values, message):
    folder, rows = corpus
    table = pa.Table.from_pylist(rows[:2])
    table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, folder / "manifest.parquet")
    with pytest.raises(UserError, match=message):
        KeptPairs(TarSource(folder / "a.tar"), folder / "manifest.parquet")


def test_a_damaged_page_is_told_with_the_name(corpus):
    folder, rows = corpus
    manifest = write_manifest(folder, rows)
    content = bytearray(manifest.read_bytes())
    content[4:60] = bytes(56)
    manifest.write_bytes(content)
    with pytest.raises(UserError, match=r"manifest '.*manifest.parquet' cannot be read \([^\n]*\); curate again"):
        KeptPairs(TarSource(folder / "*.tar"), manifest)


def test_a_manifest_too_large_for_memory(corpus, monkeypatch):
    """One name many times is read as a dictionary; names that are not in one would take all that they unpack to."""
    monkeypatch.setattr(parquet, "_SPARE_BYTES", 1 << 20)
    folder, rows = corpus
    rows += [row | {"shard": "s" * 100_000} for row in rows * 3]
    source, manifest = TarSource(folder / "*.tar"), folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows), manifest, compression="zstd")
    assert len(KeptPairs(source, manifest)) == 27
    pq.write_table(pa.Table.from_pylist(rows), manifest, compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"row group 0 takes \d+ bytes on disk and 12\d+ in memory[^\n]*; curate again"):
        KeptPairs(source, manifest)


def test_a_manifest_with_a_column_twice(corpus):
    folder, rows = corpus
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.append_column("keep", table["keep"]), folder / "manifest.parquet")
    with pytest.raises(UserError, match="has two columns called 'keep'"):
        KeptPairs(TarSource(folder / "*.tar"), folder / "manifest.parquet")


def test_other_images_under_the_same_names_and_keys(tmp_path):
    """img2dataset calls the first shard of every set 00000.tar and its first pair 000000000."""
    for name, start in (("ours", 100), ("theirs", 200), ("longer", 200)):
        (tmp_path / name).mkdir()
        members = {}
        for number in range(5):
            image = encode(np.full((4, 4, 3), start + number, np.uint8))
            members[f"{number:09d}.png"] = image + bytes(9999 if name == "longer" else 0)
            members[f"{number:09d}.txt"] = b"a caption"
        write_tar(tmp_path / name / "00000.tar", members)
    made_of = tmp_path / "made_of"
    with LocalEngine(1) as engine:
        curate(str(tmp_path / "ours" / "00000.tar"), made_of, config=CurateConfig(min_side_px=0), engine=engine)
    assert len(KeptPairs(TarSource(tmp_path / "ours" / "00000.tar"), made_of / "manifest.parquet")) == 5
    for name, told in (("theirs", "another image '000000000'"), ("longer", "image '000000000' in another place")):
        with pytest.raises(UserError, match=told):
            KeptPairs(TarSource(tmp_path / name / "00000.tar"), made_of / "manifest.parquet")


@pytest.mark.slow
def test_ten_million_rows_take_a_megabyte_and_a_seek_takes_no_time(tmp_path):
    shards, pairs = [f"{number:05d}.tar" for number in range(1000)], 10_000
    keep = np.random.default_rng(0).random((len(shards), pairs)) < 0.3
    indices = pa.array(np.arange(pairs, dtype=np.int32))
    with pq.ParquetWriter(tmp_path / "manifest.parquet", pa.schema(_MANIFEST)) as writer:
        for shard, kept in zip(shards, keep, strict=True):
            columns = [pa.array([shard] * pairs), indices, indices.cast(pa.string()), pa.array(kept)]
            writer.write_table(pa.table(columns, schema=pa.schema(_MANIFEST)))
    tracemalloc.start()
    kept, _ = read_manifest(tmp_path / "manifest.parquet", shards, range(0, pairs * len(shards) + 1, pairs))
    stays_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept.nbytes == pytest.approx(0.127 * 10**7, rel=0.01) and stays_bytes < 2 * kept.nbytes
    assert peak_bytes < 32 << 20  # A million rows at a time or ten, it is the same.
    start = time.thread_time()
    found = [kept.select(n) for n in range(0, len(kept), len(kept) // 100)]
    assert (time.thread_time() - start) / len(found) < 0.001
    assert (np.flatnonzero(keep.reshape(-1))[:: len(kept) // 100][: len(found)] == found).all()


_MANIFEST = [("shard", pa.string()), ("index", pa.int32()), ("key", pa.string()), ("keep", pa.bool_())]


def test_indexes_of_any_integer_type(corpus):
    folder, rows = corpus
    table = pq.read_table(write_manifest(folder, rows))
    for kind in (pa.uint64(), pa.int8()):
        pq.write_table(table.set_column(2, "index", table["index"].cast(kind)), folder / "other.parquet")
        assert len(KeptPairs(TarSource(folder / "*.tar"), folder / "other.parquet")) == len(kept_keys(rows))
    huge = pa.array([2**64 - 1] * len(rows), pa.uint64())
    pq.write_table(table.set_column(2, "index", huge), folder / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet.* is of other shards"):
        KeptPairs(TarSource(folder / "*.tar"), folder / "other.parquet")
