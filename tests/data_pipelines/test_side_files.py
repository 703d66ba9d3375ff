"""The files that img2dataset writes beside a tar shard: a table of its pairs, and statistics."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.records import ShardLost
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import write_pairs, write_tar


def write_side(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_the_side_file_adds_what_the_shard_lacks(tmp_path):
    write_tar(tmp_path / "0.tar", {"f/1.jpg": b"i", "f/2.jpg": b"j", "f/3.jpg": b"k"})
    rows = [
        {"key": "2", "url": "u2", "caption": "two", "status": "success", "width": 5},
        {"key": "0", "url": "u0", "caption": None, "status": "failed_to_download", "width": None},
        {"key": "1", "url": "u1", "caption": "one", "status": "success", "width": None},
    ]
    write_side(tmp_path / "0.parquet", rows)
    source = TarSource(tmp_path / "0.tar")
    assert [dict(pair.fields) for pair in pickle.loads(pickle.dumps(source))] == [
        {"url": "u1", "caption": "one", "status": "success"},
        {"url": "u2", "caption": "two", "status": "success", "width": 5},
        {},
    ]
    write_side(tmp_path / "0.parquet", rows[::-1])
    with pytest.raises(ShardLost, match="side file .* has changed"):
        TarSource(tmp_path / "0.tar")[0]


def test_the_side_file_is_read_only_for_what_the_json_members_lack(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.jpg": b"i", "1.json": b'{"url": "from json", "caption": "c"}'})
    write_side(tmp_path / "0.parquet", [{"key": "1", "url": "from side", "caption": "d"}])
    assert "side" not in TarSource(tmp_path / "0.tar")._tables(0)
    write_tar(tmp_path / "1.tar", {"1.jpg": b"i", "1.json": b'{"url": "from json"}'})
    write_side(tmp_path / "1.parquet", [{"key": "1", "url": "from side", "score": 0.5}])
    assert TarSource(tmp_path / "1.tar")[0].fields == {"url": "from json", "score": 0.5}
    (tmp_path / "2.parquet").write_bytes(b"no parquet")
    write_tar(tmp_path / "2.tar", {"1.jpg": b"i"})
    with pytest.warns(UserWarning, match="side file .*2.parquet' cannot be read"):
        assert TarSource(tmp_path / "2.tar")[0].fields == {}


def test_fewer_pairs_than_the_statistics_count_is_a_cut(tmp_path):
    shard = write_pairs(tmp_path / "0.tar", 3)
    (tmp_path / "0_stats.json").write_text('{"count": 9, "successes": 5, "failed_to_download": 4}')
    with pytest.warns(UserWarning, match=r"0.tar' is cut off: its 3 whole pairs are used of the 5 that"):
        assert TarSource(shard).truncated_shards == [str(shard)]
    (tmp_path / "1_stats.json").write_text('{"successes": 3}')
    assert TarSource(write_pairs(tmp_path / "1.tar", 3)).truncated_shards == []
    for damage in ("{", '{"successes": Infinity}'):
        (tmp_path / "2_stats.json").write_text(damage)
        with pytest.warns(UserWarning, match="2_stats.json' cannot be read"):
            TarSource(write_pairs(tmp_path / "2.tar", 3))
