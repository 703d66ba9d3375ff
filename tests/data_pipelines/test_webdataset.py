"""Tar shards: what a pair holds, the index and its life, cut and damaged shards, patterns, errors."""

import json
import multiprocessing
import os
import pickle
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shards import SAMPLE, encode, quadrants, write_pairs, write_tar

from data_pipelines.image_ops import decode_image
from data_pipelines.sources import tar_index
from data_pipelines.sources.webdataset import TarSource, expand_shards


def keys(source):
    return [pair.key for pair in source]


def index_of(shard: Path) -> Path:
    return Path(f"{shard}.idx")


@pytest.fixture
def builds(monkeypatch):
    """Counts how often an index is built."""
    count = []
    build = tar_index._build
    monkeypatch.setattr(tar_index, "_build", lambda *args: count.append(1) or build(*args))
    return count


@pytest.mark.parametrize(
    "shard, pairs", [("emoji-train-00000", 925), ("emoji-train-00001", 925), ("emoji-heldout-00000", 312)]
)
def test_every_pair_of_the_sample_decodes(shard, pairs):
    source = TarSource(SAMPLE / f"{shard}.tar")
    assert len(source) == pairs
    for pair in source:
        assert decode_image(pair.image, max_pixels=72 * 72).size == (72, 72)
        assert pair.fields["txt"] == pair.fields["captions"]["en"] and len(pair.fields["captions"]) == 12
        assert not pair.problems


def test_a_pair(tmp_path):
    image = encode(quadrants())
    members = {
        "1.png": image,
        "1.txt": "père".encode(),
        "1.json": b'{"captions": {"en": "x"}, "n": 3}',
        "1.cls": b"7\n",
    }
    (pair,) = TarSource(write_tar(tmp_path / "a.tar", members))
    assert (pair.key, pair.image, pair.problems) == ("1", image, ())
    assert pair.fields == {"txt": "père", "captions": {"en": "x"}, "n": 3, "cls": 7}


def test_members_in_any_order_folders_and_strangers(tmp_path):
    members = [
        ("d/2.txt", b"two"), ("d/1.txt", b"one"), ("README", b"?"), ("d/1.JPEG", b"i1"), ("d/1.mp4", b"?"),
        ("d/._1.jpg", b"junk"), ("d/2.webp", b"i2"), ("d/2.png", b"second image of 2"), ("d/3.png", b"i3"),
    ]  # fmt: skip
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    assert [(pair.key, pair.image, pair.fields.get("txt")) for pair in pairs] == [
        ("d/2", b"i2", "two"), ("d/1", b"i1", "one"), ("d/3", b"i3", None),
    ]  # fmt: skip


def test_a_repeated_member_begins_a_new_pair(tmp_path):
    members = [("1.jpg", b"a"), ("1.txt", b"first"), ("1.jpg", b"b"), ("1.txt", b"again")]
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    assert [(pair.image, pair.fields["txt"]) for pair in pairs] == [(b"a", "first"), (b"b", "again")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    names = ["ß" * 90 + "/" + "k" * 150, "日本/猫"]
    members = {f"{name}.{ext}": name.encode() for name in names for ext in ("jpg", "txt")}
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members, format=format)))
    assert [(pair.key, pair.image.decode(), pair.fields["txt"]) for pair in pairs] == [(name,) * 3 for name in names]


def test_broken_texts_are_stated_not_raised(tmp_path):
    members = {
        "1.jpg": b"i",
        "1.txt": b"\xff\xfe",
        "1.json": b"{",
        "2.txt": b"no image",
        "3.json": b"[1]",
        "4.jpg": b"",
    }
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    assert [pair.problems for pair in pairs] == [("invalid_json", "invalid_utf8"), (), ("invalid_json",), ()]
    assert [pair.image for pair in pairs] == [b"i", None, None, b""]
    assert pairs[0].fields == {}


def test_members_far_apart(tmp_path):
    members = {"1.jpg": b"i", "2.jpg": bytes(1 << 18), "1.txt": b"one", "2.txt": b"two"}
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    assert [(len(pair.image), pair.fields["txt"]) for pair in pairs] == [(1, "one"), (1 << 18, "two")]


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
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(open_and_count, [shard] * 12) == [200] * 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.idx"]


@pytest.mark.parametrize(
    "cut, whole", [(-1024, 4), (-10240, 4), (1, 4), (5000, 4), ("in image", 3), ("in text", 3), ("in header", 3)]
)
def test_what_is_whole_of_a_cut_shard_is_used(tmp_path, cut, whole):
    shard = write_pairs(tmp_path / "a.tar", 4)
    with tarfile.open(shard) as archive:
        last = {member.name.split(".")[1]: member for member in archive.getmembers()[-3:]}
        end = last["json"].offset_data + 512
    places = {
        "in image": last["png"].offset_data + 10,
        "in text": last["txt"].offset_data + 3,
        "in header": last["png"].offset + 100,
    }
    data = shard.read_bytes()
    at = places.get(cut) or (end if cut < 0 else min(end + cut, len(data)))
    shard.write_bytes(data[:at] if at < end or cut < 0 else data[:end] + b"\1" * cut)
    with pytest.warns(UserWarning, match=f"is cut off: its {whole} whole pairs are used"):
        source = TarSource(shard)
    assert keys(source) == [f"{number:06d}" for number in range(whole)]
    assert source.truncated_shards == [shard]
    with pytest.warns(UserWarning, match="is cut off"):  # from the cached index as well
        TarSource(shard)


def test_a_whole_shard_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TarSource(write_pairs(tmp_path / "a.tar", 2)).truncated_shards == []


def test_bad_shards(tmp_path):
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"<html>not found</html>" * 100)
    write_tar(tmp_path / "none.tar", {})
    write_tar(tmp_path / "other.tar", {"README": b"hello"})
    for name, message in [
        ("zero", "is empty .0 bytes."),
        ("text", "is not an uncompressed tar"),
        ("none", "holds no image-text pairs"),
        ("other", "holds no image-text pairs"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            TarSource(tmp_path / f"{name}.tar")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no shard at"):
        TarSource(tmp_path / "nothing.tar")
    with pytest.raises(ValueError, match="is a folder"):
        TarSource(tmp_path)


def test_no_permission(tmp_path, monkeypatch):
    shard = write_pairs(tmp_path / "a.tar", 1)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(PermissionError, match="no permission to read shard"):
        TarSource(shard)


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-00000.tar", "a-00001.tar", "a-00010.tar", "b.tar", "c[1].tar"):
        Path(name).touch()
    names = lambda shards: [str(path) for path in expand_shards(shards)]  # noqa: E731
    assert names("a-{00000..00001}.tar") == ["a-00000.tar", "a-00001.tar"]
    assert names("a-*.tar") == ["a-00000.tar", "a-00001.tar", "a-00010.tar"]
    assert names(["b.tar", "a-{00001..00001}.tar", "b.tar"]) == ["b.tar", "a-00001.tar"]
    assert names("{a-0001?,b}.tar") == ["a-00010.tar", "b.tar"]
    assert names(Path("c[1].tar")) == ["c[1].tar"]
    assert names("{x,y}{1..2}.tar") == ["x1.tar", "x2.tar", "y1.tar", "y2.tar"]
    with pytest.raises(FileNotFoundError, match="no shard matches 'z-..tar'"):
        names("z-*.tar")
    with pytest.raises(ValueError, match="runs backwards"):
        names("a-{3..1}.tar")
    for nothing in ([], "", [""]):
        with pytest.raises(ValueError, match="names nothing"):
            names(nothing)


def test_random_access_from_threads_and_after_pickling(tmp_path):
    shards = [write_pairs(tmp_path / f"{n}.tar", 50, first=50 * n) for n in range(3)]
    source = pickle.loads(pickle.dumps(TarSource(shards)))
    order = [7 * n % 150 for n in range(600)]
    with ThreadPoolExecutor(8) as pool:
        assert [pair.key for pair in pool.map(source.__getitem__, order)] == [f"{n:06d}" for n in order]
    for outside in (-1, 150):
        with pytest.raises(IndexError):
            source[outside]


def test_fingerprint_follows_content_not_place(tmp_path):
    write_pairs(tmp_path / "a.tar", 3)
    write_pairs(tmp_path / "b.tar", 3, first=3)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "copy" / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes())
    fingerprint = TarSource(f"{tmp_path}/*.tar").fingerprint
    assert TarSource(f"{tmp_path}/copy/*.tar").fingerprint == fingerprint
    assert TarSource([f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"]).fingerprint != fingerprint
    json.dumps(fingerprint)
