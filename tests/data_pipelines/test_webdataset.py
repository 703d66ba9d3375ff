"""Tar shards: what a pair holds, cut and damaged shards, patterns, errors."""

import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.stats import describe
from data_pipelines.image_ops import decode_image
from data_pipelines.records import ShardLost
from data_pipelines.samples.pairs import BrokenPair, read_pair
from data_pipelines.sources.files import expand_shards
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import SAMPLE, encode, keys, quadrants, write_pairs, write_tar


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
    with pytest.warns(UserWarning, match="members of no pair are not read: 2, such as 'd/1.mp4'"):
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
        "5.json": b"[" * 100_000,  # deeper than Python recurses
    }
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    json_problem = ("invalid_json",)
    assert [pair.problems for pair in pairs] == [("invalid_json", "invalid_utf8"), (), json_problem, (), json_problem]
    assert [pair.image for pair in pairs] == [b"i", None, None, b"", None]
    assert pairs[0].fields == {}


def test_members_far_apart(tmp_path):
    members = {"1.jpg": b"i", "2.jpg": bytes(1 << 18), "1.txt": b"one", "2.txt": b"two"}
    pairs = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    assert [(len(pair.image), pair.fields["txt"]) for pair in pairs] == [(1, "one"), (1 << 18, "two")]


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
    assert source.truncated_shards == [str(shard)]
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

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # chmod does not stop root
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
    with pytest.raises(ValueError, match="must run upwards"):
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


def test_several_captions(tmp_path):
    members = [
        ("a.1.txt", b"third"), ("a.0.txt", b"second"), ("b.txt", b"only"), ("a.jpg", b"i"), ("c.10.txt", b"b"),
        ("c.9.txt", b"a"), ("a.txt", b"first"), ("c.jpg", b"j"), ("d.0.txt", b"alone"),
    ]  # fmt: skip
    source = TarSource(write_tar(tmp_path / "a.tar", members))
    texts = {pair.key: pair.fields["txt"] for pair in source}
    assert texts == {"a": ["first", "second", "third"], "b": "only", "c": ["a", "b"], "d": "alone"}
    assert source.member_extents(0).keys() == {"image", "txt"} and source.member_extents(1).keys() == {"txt"}
    assert [pair.image for pair in source] == [b"i", None, b"j", None]


def test_places_are_where_the_members_lie(tmp_path):
    shard = write_pairs(tmp_path / "a.tar", 3)
    source = TarSource(shard)
    offset, size = source.member_extents(2)["image"]
    assert shard.read_bytes()[offset : offset + size] == source[2].image
    assert source.locate(2) == (0, 2)


def test_a_shard_that_vanishes_or_is_replaced_stops_the_run(tmp_path):
    shards = [write_pairs(tmp_path / f"{name}.tar", 3) for name in "abc"]
    gone, replaced, cut = map(TarSource, shards)
    shards[0].unlink()
    with pytest.raises(ShardLost, match=r"a\.tar' vanished while it was in use"):
        gone[0]
    write_pairs(shards[1], 5)
    TarSource(shards[1])
    with pytest.raises(ShardLost, match=r"b\.tar' was replaced while it was in use"):
        replaced[0]
    keys(cut)
    os.truncate(shards[2], 600)
    with pytest.raises(ShardLost, match=r"c\.tar' was cut while it was in use: it ends before byte \d+"):
        cut[2]


def test_another_shard_of_the_same_size_is_noticed(tmp_path):
    """Its places may be the same, its pairs are not."""
    write_pairs(tmp_path / "a.tar", 3)
    source = TarSource(tmp_path / "a.tar")
    write_pairs(tmp_path / "b.tar", 3, first=500)
    assert (tmp_path / "b.tar").stat().st_size == (tmp_path / "a.tar").stat().st_size
    os.utime(tmp_path / "b.tar", ns=(0, (tmp_path / "a.tar").stat().st_mtime_ns + 10**9))
    os.replace(tmp_path / "b.tar", tmp_path / "a.tar")
    with pytest.raises(ShardLost, match=r"a\.tar' was replaced while it was in use"):
        source[0]
    with pytest.raises(ShardLost, match=r"a\.tar' was replaced while it was in use"):
        pickle.loads(pickle.dumps(source))[0]


def test_packed_tars_are_named(tmp_path):
    shard = write_pairs(tmp_path / "a.tar", 3)
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match="packed with gzip; unpack it"):
        TarSource(shard)


def test_storage_that_fails_costs_a_pair_and_a_lost_shard_the_run(tmp_path, monkeypatch):
    worn, gone = (TarSource(write_pairs(tmp_path / f"{name}.tar", 3)) for name in "ab")
    (tmp_path / "b.tar").unlink()
    with monkeypatch.context() as patched, pytest.raises(BrokenPair) as error:
        patched.setattr(os, "pread", lambda *_: os.close(-1))  # raises OSError, as a worn disk does
        read_pair(worn, 2)
    assert error.value.reason == "unreadable" and read_pair(worn, 2)
    with pytest.raises(ShardLost, match="b.tar"):
        read_pair(gone, 2)


def read(path, members, **options) -> dict[str, tuple]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = list(TarSource(write_tar(path, members, **options)))
    return {pair.key: (pair.image, pair.fields.get("txt")) for pair in pairs}


@pytest.mark.parametrize(
    "names, pairs",
    [
        ("1.jpg 1.txt 2.5x.jpg 2.5x.txt", {"1": "1.jpg 1.txt", "2.5x": "2.5x.jpg 2.5x.txt"}),
        ("v1.0.jpg v1.0.txt v1.1.jpg v1.1.txt", {"v1.0": "v1.0.jpg v1.0.txt", "v1.1": "v1.1.jpg v1.1.txt"}),
        ("d.e/v1.a.jpg d.e/v1.b.JPG", {"d.e/v1.a": "d.e/v1.a.jpg -", "d.e/v1.b": "d.e/v1.b.JPG -"}),
        ("1.input.jpg 1.txt 2.txt 2.input.jpg", {"1": "1.input.jpg 1.txt", "2": "2.input.jpg 2.txt"}),
        ("1.input.jpg 1.caption.txt", {"1": "1.input.jpg 1.caption.txt"}),
        ("1.input.jpg 1.0.txt 1.1.txt", {"1": "1.input.jpg 1.0.txt,1.1.txt"}),
        ("1.jpg 1.txt 1.mask.png 2.mask.png 3.jpg", {"1": "1.jpg 1.txt", "3": "3.jpg -"}),
        ("1.jpg 1.txt 2.txt 2.mask.png", {"1": "1.jpg 1.txt", "2": "- 2.txt"}),
        ("1.0.txt 1.jpg 1.1.txt", {"1": "1.jpg 1.0.txt,1.1.txt"}),
    ],
)
def test_where_keys_end(tmp_path, names, pairs):
    def shown(image, text):
        texts = text if isinstance(text, list) else [text or "-"]
        return f"{(image or b'-').decode()} {','.join(texts)}"

    found = read(tmp_path / "a.tar", {name: name.encode() for name in names.split()})
    assert {key: shown(*value) for key, value in found.items()} == pairs


@pytest.mark.parametrize(
    "names, told",
    [
        ("1.jpg 1.img 1.cap 2.jpg 2.img", "members of no pair are not read: 3, such as '1.img'"),
        ("1.jpg 1.png 1.txt", "members of no pair are not read: 1, such as '1.png'"),
        ("1.jpg 1.mask.png 2.mask.png", "members of no pair are not read: 2, such as '1.mask.png'"),
        ("1.input.jpg 1.output.jpg 1.txt", "members of no pair are not read: 1, such as '1.output.jpg'"),
    ],
)
def test_members_of_no_pair_are_counted(tmp_path, names, told):
    members = {name: b"x" for name in names.split()}
    with pytest.warns(UserWarning, match=f"^{told} of shard .*a.tar'$"):
        source = TarSource(write_tar(tmp_path / "a.tar", members))
    with pytest.warns(UserWarning, match=told):  # of an index on disk
        TarSource(tmp_path / "a.tar")
    with LocalEngine(1) as engine:
        assert describe(str(tmp_path / "a.tar"), engine=engine)["problems"] == source.faults()
    with pytest.raises(ValueError, match="holds no image-text pairs .*, only members such as '1.img'"):
        TarSource(write_tar(tmp_path / "b.tar", {"1.img": b"x", "1.cap": b"y"}))


def test_links_are_pairs(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data, kind in (
            ("1.jpg", b"image", None),
            ("2.jpg", "1.jpg", tarfile.LNKTYPE),
            ("3.jpg", "1.jpg", tarfile.SYMTYPE),
            ("4.jpg", "/images/4.jpg", tarfile.SYMTYPE),
            *((f"{n}.txt", b"text", None) for n in range(1, 5)),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind or tarfile.REGTYPE, data if kind else ""
            member.size = 0 if kind else len(data)
            archive.addfile(member, io.BytesIO(b"" if kind else data))
    with pytest.warns(UserWarning, match="members of no pair are not read: 1, such as '4.jpg'"):
        pairs = list(TarSource(path))
    assert [pair.image for pair in pairs] == [b"image"] * 3 + [None]
    assert [pair.fields["txt"] for pair in pairs] == ["text"] * 4


def test_one_long_name_does_not_cost_every_row_its_length(tmp_path):
    members = [
        ("x" * 300_000 + ".jpg", b"i"),
        ("x" * 300_001 + ".jpg", b"j"),
        *((f"{n}.jpg", b"k") for n in range(500)),
    ]
    source = TarSource(write_tar(tmp_path / "a.tar", members))
    assert len(source) == 502 and len(set(keys(source))) == 502
    assert (tmp_path / "a.tar.idx").stat().st_size < 1 << 20


def test_an_index_is_no_larger_than_its_shard_by_much(tmp_path):
    """The least that a pair takes in a tar is a header; one name that would be kept whole elsewhere widens all rows."""
    path = write_tar(tmp_path / "a.tar", [("x" * 1000 + ".jpg", b"i"), *((f"{n}.jpg", b"") for n in range(2000))])
    assert TarSource(path)[0].key.startswith("x" * 200)
    assert (tmp_path / "a.tar.idx").stat().st_size < 1.2 * path.stat().st_size


def test_the_fingerprint_of_a_sound_shard_is_what_it_was():
    source = TarSource(SAMPLE / "emoji-heldout-00000.tar")
    assert source.fingerprint == "0c97d40c4beaa90d465a05b311f9606cfd9c60172e200a90fa56dd1fc1670279"


def test_a_member_of_a_terabyte_is_unreadable(tmp_path):
    path, size = tmp_path / "a.tar", 1 << 40
    member = tarfile.TarInfo("1.jpg")
    member.size = size
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, 1)  # a hole in the file
        file.write(write_tar(tmp_path / "b.tar", {"2.jpg": b"i"}).read_bytes())
    source = TarSource(path)
    with pytest.raises(OSError, match="has 1099511627776 bytes, more than"):
        source[0]
    assert source[1].image == b"i"
