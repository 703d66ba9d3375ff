"""The files that img2dataset writes beside a tar shard: a table of its pairs, and statistics."""

import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.records import ShardLost
from data_pipelines.sources import arrow_values, index_file, parquet
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
    source = TarSource(tmp_path / "0.tar")
    write_side(tmp_path / "0.parquet", rows[::-1])
    with pytest.raises(ShardLost, match="side file .* has changed"):
        source[0]


def test_side_files_that_come_change_or_go_later_are_noticed(tmp_path):
    """Scores that someone adds to shards that were opened before; what is open stays as it is."""
    members = {"1.jpg": b"i", "1.txt": b"t", "2.jpg": b"j", "2.txt": b"u"}
    shard, side = write_tar(tmp_path / "0.tar", members), tmp_path / "0.parquet"
    plain = TarSource(shard)
    write_side(side, [{"key": "1", "score": 0.5}])
    scored = TarSource(shard)
    assert scored[0].fields == {"txt": "t", "score": 0.5} and scored.fingerprint == plain.fingerprint
    plain._tables.cache_clear()
    assert plain[0].fields == {"txt": "t"}
    write_side(side, [{"key": "2", "url": "u"}, {"key": "1", "url": "v"}])
    assert [pair.fields.get("url") for pair in TarSource(shard)] == ["v", "u"]
    assert scored[0].fields == {"txt": "t", "score": 0.5}
    with pytest.raises(ShardLost, match="side file .*0.parquet'"):
        pickle.loads(pickle.dumps(scored))[0]
    changed = TarSource(shard)
    side.unlink()
    assert [pair.fields for pair in TarSource(shard)] == [{"txt": "t"}, {"txt": "u"}]
    with pytest.raises(ShardLost, match="vanished while it was in use"):
        changed[0]
    (tmp_path / "0_stats.json").write_text('{"successes": 5}')
    with pytest.warns(UserWarning, match="its 2 whole pairs are used of the 5 that"):
        assert TarSource(shard).truncated_shards == [str(shard)]


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


@pytest.mark.parametrize("count", [30, 200])
def test_a_side_file_that_does_not_fit_into_memory_is_not_used(tmp_path, monkeypatch, count):
    """Stored once, made a thousand times: many rows that together are too much, and one long list."""
    monkeypatch.setattr(parquet, "_SPARE_BYTES", 1 << 20)
    monkeypatch.setattr(arrow_values, "_MAX_ROW_BYTES", 1 << 22)
    write_tar(tmp_path / "0.tar", {"1.jpg": b"i", "1.txt": b"t"})
    table = pa.table({"key": ["1", "2"], "tags": [["t" * 100_000] * count] * 2})
    pq.write_table(table, tmp_path / "0.parquet", compression="zstd", use_dictionary=count == 200, row_group_size=1)
    tracemalloc.start()
    with pytest.warns(UserWarning, match="side file .*0.parquet' cannot be read .*in memory, more.* and is not used"):
        source = TarSource(tmp_path / "0.tar")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()
    assert source[0].fields == {"txt": "t"}


def test_an_index_from_before_side_files_were_checked_is_made_again(tmp_path, monkeypatch):
    """What version 5 says of a side file may have become a run that stops at one of its pairs."""
    write_tar(tmp_path / "0.tar", {"1.jpg": b"i", "1.txt": b"t"})
    write_side(tmp_path / "0.parquet", [{"key": "1", "url": "u"}])
    with monkeypatch.context() as before:
        before.setattr(index_file, "_VERSION", 5)
        assert TarSource(tmp_path / "0.tar")[0].fields == {"txt": "t", "url": "u"}
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="side file .*0.parquet' cannot be read"):
        assert TarSource(tmp_path / "0.tar")[0].fields == {"txt": "t"}


@pytest.mark.parametrize(
    ("keys", "others", "told"),
    [
        (["1", "1"], ["url"], "cannot be read .it has two columns called 'key'. and is not used"),
        (["1"], ["url", "url"], "cannot be read .it has two columns called 'url'. and is not used"),
        (["9"], ["url"], "has none of its shard's keys"),
    ],
)
def test_a_side_file_that_adds_nothing_says_so(tmp_path, keys, others, told):
    write_tar(tmp_path / "0.tar", {"1.jpg": b"i", "1.txt": b"t"})
    columns = [pa.array([value]) for value in (*keys, *others)]
    pq.write_table(pa.table(columns, names=["key"] * len(keys) + others), tmp_path / "0.parquet")
    with pytest.warns(UserWarning, match=f"side file .*0.parquet' {told}"):
        assert TarSource(tmp_path / "0.tar")[0].fields == {"txt": "t"}


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
