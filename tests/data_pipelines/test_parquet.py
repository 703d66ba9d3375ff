"""Parquet with images: layouts, row groups and how often they are read, remote files, damage, columns that are not there."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import UserError
from data_pipelines.records import ShardLost
from data_pipelines.sources import arrow_values, files, parquet, parquet_headers, remote
from data_pipelines.sources.arrow_values import _bytes_in_python, _holds_lists
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.parquet import ParquetSource
from tests.data_pipelines.http_server import serving


def rows(count: int, *, first: int = 0, image_bytes: int = 50) -> list[dict]:
    return [
        {
            "image": {"bytes": bytes([number % 256]) * image_bytes, "path": f"{number}.jpg"},
            "caption": f"caption {number}",
            "captions": {"en": f"en {number}", "de": None},
            "alt": [f"a {number}", f"b {number}"],
            "embedding": bytes(2000),
        }
        for number in range(first, first + count)
    ]


def write(path: Path, table: list[dict] | pa.Table, **options) -> Path:
    table = table if isinstance(table, pa.Table) else pa.Table.from_pylist(table)
    pq.write_table(table, path, **{"row_group_size": 10, **options})
    return path


@pytest.fixture
def reads(monkeypatch):
    """What is read of local files: (offset, bytes) each."""
    seen, read = [], files.Reader.read
    monkeypatch.setattr(files.Reader, "read", lambda self, *args: seen.append(args[1:]) or read(self, *args))
    return seen


def test_rows_of_the_hugging_face_layout(tmp_path):
    for number in range(3):
        write(tmp_path / f"train-{number:05d}-of-00003.parquet", rows(25, first=25 * number))
    source = pickle.loads(pickle.dumps(open_source(f"{tmp_path}/*.parquet", fields=["caption", "captions", "alt"])))
    assert isinstance(source, ParquetSource) and len(source) == 75
    assert source.group_starts.tolist() == [0, 10, 20, 25, 35, 45, 50, 60, 70]
    for number, pair in enumerate(source):
        assert pair.key == f"train-{number // 25:05d}-of-00003.parquet/{number % 25}"
        assert pair.image == bytes([number]) * 50
        assert pair.fields == {
            "caption": f"caption {number}",
            "captions": {"en": f"en {number}", "de": None},
            "alt": [f"a {number}", f"b {number}"],
        }
    assert "embedding" in open_source(f"{tmp_path}/*.parquet")[0].fields
    for outside in (-1, 75):
        with pytest.raises(IndexError):
            source[outside]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["jpg", "something"])
def test_plain_columns_and_keys(tmp_path, kind, name):
    columns = {name: pa.array([b"i", None], kind), "text": ["a", "b"], "key": [7, 8]}
    source = ParquetSource(write(tmp_path / "a.parquet", pa.table(columns)))
    assert [(pair.key, pair.image, dict(pair.fields)) for pair in source] == [
        ("7", b"i", {"text": "a"}),
        ("8", None, {"text": "b"}),
    ]


def test_neighbours_cost_one_read_and_other_columns_none(tmp_path, reads):
    path = write(tmp_path / "a.parquet", rows(40, image_bytes=3000), compression="none", use_dictionary=False)
    source = open_source(path, fields=["caption"])
    reads.clear()
    assert [source[number].fields["caption"] for number in range(10, 20)] == [f"caption {n}" for n in range(10, 20)]
    footer, group = reads
    # Images and captions of ten rows; the embeddings lie behind them and stay on disk.
    assert 10 * 3000 <= group[1] < 10 * (3000 + 1000) < 10 * (3000 + 2000)
    reads.clear()
    assert source[15].image == bytes([15]) * 3000 and not reads


def test_memory_is_bounded(tmp_path, monkeypatch, reads):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 35_000)
    source = open_source(write(tmp_path / "a.parquet", rows(60, image_bytes=1000)), fields=["caption"])
    for number in range(60):
        source[number]
    kept = source._groups._tables
    assert [group for _, group in kept] == [3, 4, 5]
    assert sum(table.result().nbytes for table in kept.values()) <= 35_000
    monkeypatch.setattr(source._groups, "_limit_bytes", 10)  # less than one group
    assert source[0].image[:1] == b"\0" and [group for _, group in kept] == [0]


def test_threads_that_want_one_group_share_its_read(tmp_path, reads):
    source = open_source(write(tmp_path / "a.parquet", rows(40)))
    source[0]
    reads.clear()
    barrier = threading.Barrier(8)

    def read(number: int) -> str:
        barrier.wait()
        return source[number].fields["caption"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(20, 28))) == [f"caption {n}" for n in range(20, 28)]
    assert len(reads) == 1


def test_a_read_that_failed_is_tried_again(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "a.parquet", rows(20)))
    read = files.Reader.read

    def fail(*args):
        raise remote.RemoteError("down")

    monkeypatch.setattr(files.Reader, "read", fail)
    with pytest.raises(OSError, match="down"):
        source[12]
    monkeypatch.setattr(files.Reader, "read", read)
    assert source[12].fields["caption"] == "caption 12"


def captions(source) -> list[str]:
    return [pair.fields["caption"] for pair in source]


def test_remote_files_and_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    local = open_source(write(tmp_path / "served" / "a.parquet", rows(30)))
    with serving(tmp_path / "served") as server:
        source = open_source(f"{server.url}/*.parquet")
        assert source.fingerprint == local.fingerprint
        server.requests.clear()
        assert list(source) == list(local)
        assert len(server.requests) == 1 + 3  # the footer and three groups
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(captions, [source]) == [captions(local)]
        (tmp_path / "served" / "a.parquet").unlink()
        fresh = pickle.loads(pickle.dumps(source))
        with pytest.raises(ShardLost, match="a.parquet' vanished"):
            fresh[0]


def test_the_fingerprint_follows_the_content(tmp_path):
    first = open_source(write(tmp_path / "a.parquet", rows(20))).fingerprint
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    assert open_source(tmp_path / "b" / "a.parquet").fingerprint == first
    assert open_source(write(tmp_path / "a.parquet", rows(20, first=1))).fingerprint != first


def test_bad_files(tmp_path):
    data = write(tmp_path / "a.parquet", rows(20)).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-10])
    (tmp_path / "text.parquet").write_bytes(b"hello" * 100)
    (tmp_path / "tiny.parquet").write_bytes(b"hi")
    write(tmp_path / "none.parquet", pa.Table.from_pylist(rows(1)).slice(0, 0))
    write(tmp_path / "texts.parquet", pa.table({"text": ["a"], "url": ["u"]}))
    write(tmp_path / "two.parquet", pa.table({"left": [b"a"], "right": [b"b"], "text": ["a"]}))
    for name, message in (
        ("cut", "is cut or not a Parquet file"),
        ("text", "is cut or not a Parquet file"),
        ("tiny", "is cut or not a Parquet file"),
        ("none", "holds no rows"),
        ("texts", "no column with images; there are text, url"),
        ("two", "no column with images; there are left, right, text"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(tmp_path / f"{name}.parquet")
        assert f"{name}.parquet" in str(error.value) and "\n" not in str(error.value)
    assert open_source(tmp_path / "two.parquet", image="right")[0].image == b"b"


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "a.parquet", rows(2))
    with pytest.raises(ValueError, match="has no field 'captoin'; there are .*, did you mean 'caption'"):
        open_source(path, fields=["caption", "captoin"])
    with pytest.raises(ValueError, match="has no image column 'imag'; there are .*, did you mean 'image'"):
        open_source(path, image="imag")


def test_two_needed_columns_of_one_name_are_refused(tmp_path):
    """Only one of them could be read."""
    columns = [pa.array([b"i"]), *map(pa.array, (["x"], ["y"]))]
    path = write(tmp_path / "a.parquet", pa.table(columns, names=["image", "txt", "txt"]))
    with pytest.raises(UserError, match=r"a.parquet' has two columns called 'txt'; rename one"):
        open_source(path)
    path = write(tmp_path / "b.parquet", pa.table([*columns, columns[1]], names=["image", "txt", "odd", "odd"]))
    assert open_source(path, fields=["txt"])[0].fields == {"txt": "x"}


def test_a_damaged_group_is_unreadable_and_the_others_are_not(tmp_path):
    path = write(tmp_path / "a.parquet", rows(30), compression="none", write_page_checksum=True)
    source = open_source(path)
    data = bytearray(path.read_bytes())
    start, end, _ = source._tables(0)["chunks"].reshape(3, -1)[1, 0].tolist()
    data[start:end] = bytes(end - start)
    modified_ns = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(modified_ns, modified_ns))  # a worn disk changes no dates
    assert source[5].fields["caption"] == "caption 5" and source[25].fields["caption"] == "caption 25"
    with pytest.raises(OSError, match="row group 1 of shard .*a.parquet' is damaged"):
        source[15]


def test_a_file_replaced_under_a_source_stops_the_run(tmp_path):
    path = write(tmp_path / "a.parquet", rows(30))
    source = open_source(path)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ShardLost, match="a.parquet' was replaced"):
        source[0]


def test_a_damaged_footer_is_told_at_opening(tmp_path):
    """Some bits of it: names that are not UTF-8, columns that lie outside of the file, more rows than there are."""
    path = write(tmp_path / "a.parquet", rows(4), row_group_size=2)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for place in range(footer, len(data) - 8, 23):
        damaged = bytearray(data)
        damaged[place] ^= 0x80 | place % 8
        path = tmp_path / f"{place}.parquet"
        path.write_bytes(damaged)
        try:
            source = open_source(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for index in range(len(source)):
            with contextlib.suppress(OSError):
                str(source[index].key).encode()


def test_no_damage_of_a_footer_ends_the_process(tmp_path):
    """Where definition levels and the histogram of them differ in length, pyarrow calls `abort` when asked for a column."""
    path = write(tmp_path / "a.parquet", pa.table({"jpg": [b"i", b"j"], "txt": ["a", "b"]}))
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for place in range(footer, footer + 60):
        damaged = bytearray(data)
        damaged[place] ^= 16
        (tmp_path / f"{place}.parquet").write_bytes(damaged)
    script = """
        import sys
        from data_pipelines.sources.opening import open_source
        for path in sys.argv[1:]:
            try:
                open_source(path)[0]
            except (ValueError, OSError) as error:
                assert "\\n" not in str(error), error
    """
    paths = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *paths], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_headers_say_what_pyarrow_says(tmp_path):
    options = {"data_page_size": 512, "use_dictionary": ["caption"], "row_group_size": 7, "write_statistics": False}
    for version in ("1.0", "2.0"):
        path = write(tmp_path / "a.parquet", rows(30), data_page_version=version, compression="zstd", **options)
        data, metadata = path.read_bytes(), pq.read_metadata(path)
        found = parquet._read_columns(data, metadata, len(data))
        theirs = [metadata.row_group(group).column(n) for group in range(5) for n in range(metadata.num_columns)]
        assert [column.path for column in found] == [column.path_in_schema for column in theirs]
        for ours, column in zip(found, theirs, strict=True):
            assert ours.start == (column.dictionary_page_offset or column.data_page_offset)
            assert ours.end - ours.start == column.total_compressed_size
            took = parquet_headers.expansion(data[ours.start : ours.end])
            assert took.values == column.num_values
            # Theirs counts the headers of pages too, at most 100 bytes each without statistics.
            pages = took.nbytes - 16 * took.values
            assert 0 < pages <= column.total_uncompressed_size <= pages + 100 * (took.values + 1)
            assert bool(took.repeated_bytes) == (column.path_in_schema == "caption")


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_headers_that_are_cut_are_damaged(tmp_path, cut):
    data = write(tmp_path / "a.parquet", rows(3)).read_bytes()
    footer = data[len(data) - 8 - int.from_bytes(data[-8:-4], "little") : -8]
    with pytest.raises(parquet_headers.Damaged):
        parquet_headers.read_columns(footer[:cut], len(data))
    lists = bytes.fromhex("1500 1502 1502 2905 00")  # where the numbers of a page should be
    assert parquet_headers.expansion(lists) == (0, 0, 0)
    deep = bytes([0x1C]) * 100_000  # structs in structs
    with pytest.raises(parquet_headers.Damaged, match="nested too deep"):
        parquet_headers.read_columns(deep, len(data))


def test_a_group_of_repeated_images_takes_little_memory(tmp_path, monkeypatch):
    """One image a thousand times is stored once, and so it is kept; values that are not in a dictionary are refused."""
    monkeypatch.setattr(parquet, "_SPARE_BYTES", 1 << 20)
    values = [{"image": {"bytes": b"i" * 50_000, "path": None}, "txt": ["t" * 9000] * 2} for _ in range(300)]
    path = write(tmp_path / "a.parquet", values, row_group_size=300, compression="zstd")
    source = open_source(path)
    assert source[7].image == b"i" * 50_000 and source[299].fields["txt"] == ["t" * 9000] * 2
    (table,) = (kept.result() for kept in source._groups._tables.values())
    assert table.nbytes < 1 << 20 < 300 * 50_000
    path = write(tmp_path / "b.parquet", values, row_group_size=300, compression="zstd", use_dictionary=False)
    with pytest.raises(OSError, match=r"row group 0 of shard .*b.parquet' takes \d+ bytes on disk and \d+ in memory"):
        open_source(path)[0]


@pytest.mark.parametrize("nested", [False, True])
def test_a_list_that_repeats_one_text_is_refused_before_it_is_in_python(tmp_path, monkeypatch, nested):
    """Of a few thousand bytes on disk 20 MB would be made, a text for each entry."""
    monkeypatch.setattr(parquet, "_SPARE_BYTES", 1 << 20)  # so that the column is read as a dictionary
    monkeypatch.setattr(arrow_values, "_MAX_ROW_BYTES", 1 << 22)
    inside = (lambda texts: [{"of": texts}]) if nested else list
    values = [{"image": b"i", "txt": inside(["t" * 100_000] * count)} for count in (1, 200)]
    source = open_source(write(tmp_path / "a.parquet", values, compression="zstd"))
    tracemalloc.start()
    with pytest.raises(
        OSError, match=r"row group 0 of .*a.parquet': the lists of row 1 take 200\d+ bytes in memory, more"
    ) as told:
        source[0]
    assert tracemalloc.get_traced_memory()[1] < 1 << 21 and "\n" not in str(told.value)
    tracemalloc.stop()
    path = write(tmp_path / "b.parquet", values, row_group_size=1, compression="zstd")
    assert open_source(path)[0].fields["txt"] == inside(["t" * 100_000])


@pytest.mark.parametrize(
    ("kind", "value", "objects", "nbytes"),
    [
        (pa.list_(pa.string()), ["abc", None, "de"], 4, 5),
        (pa.large_list(pa.large_binary()), [b"abc"], 2, 3),
        (pa.list_view(pa.string()), ["abc", "de"], 3, 5),
        (pa.list_(pa.int64(), 2), [1, 2], 3, 0),
        (pa.list_(pa.list_(pa.string())), [["abc"], None, ["de", "f"]], 7, 6),
        (pa.map_(pa.string(), pa.int64()), [("abc", 1)], 4, 3),
        (pa.struct([("a", pa.list_(pa.string()))]), {"a": ["abc"]}, 3, 3),
        (pa.list_(pa.dictionary(pa.int8(), pa.string())), ["abc", None, "abc"], 3, 6),
    ],
)
def test_what_lists_of_all_kinds_take(kind, value, objects, nbytes):
    """A value for each list, struct and entry, and the bytes of the texts; a null that is in a dictionary takes nothing."""
    array = pa.array([None, value, value], kind)
    for part in (array, array[1:]):
        assert _bytes_in_python(part)[-2:].tolist() == [64 * objects + nbytes] * 2
    assert len(_bytes_in_python(array[:0])) == 0


def test_a_tensor_is_a_list_too():
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3, 4), np.float32))
    assert _bytes_in_python(tensors).tolist() == [64 * 13] * 2
    assert _holds_lists(tensors.type) and not _holds_lists(pa.string())
