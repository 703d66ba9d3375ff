"""tf.train.Example without TensorFlow, held to TensorFlow; TFRecord, ArrayRecord and TFDS folders; the writers."""

import gzip
import json
import multiprocessing
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.records import Pair, ShardLost
from data_pipelines.sources import examples, tfds, tfrecord
from data_pipelines.sources.arrayrecord import ArrayRecordSource
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.tfrecord import TFRecordSource
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.sources.writing import ArrayRecordWriter, TarWriter
from tests.data_pipelines.http_server import serving
from tests.data_pipelines.shards import SAMPLE, encode, quadrants, write_tar

IMAGE = encode(quadrants())
FEATURES = st.dictionaries(
    st.text(max_size=5),
    st.lists(st.binary(max_size=9))
    | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1)
    | st.lists(st.floats(width=32, allow_nan=False), min_size=1),
    max_size=5,
)


def framed(record: bytes) -> bytes:
    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def record(number: int, **more) -> bytes:
    features = {"image": [IMAGE], "caption": [f"caption {number}"], "id": [number], **more}
    return examples.serialize(features)


def write_records(path: Path, count: int, *, first: int = 0) -> Path:
    path.write_bytes(b"".join(framed(record(number)) for number in range(first, first + count)))
    return path


def write_array(path: Path, count: int) -> Path:
    with ArrayRecordWriter(path) as shard:
        for number in range(count):
            shard.write(Pair(f"k{number}", IMAGE, {"txt": f"caption {number}"}))
    return path


@settings(deadline=None)  # the first example builds the message classes
@given(FEATURES)
def test_what_is_serialized_parses(features):
    data = examples.serialize(features)
    assert examples.parse(data) == features
    assert examples.serialize(dict(reversed(features.items()))) == data


@pytest.mark.slow
def test_records_by_tensorflow(tmp_path):
    tf = pytest.importorskip("tensorflow")
    train, path = tf.train, str(tmp_path / "a.tfrecord")

    def feature(values):
        if isinstance(values[0], bytes):
            return train.Feature(bytes_list=train.BytesList(value=values))
        if isinstance(values[0], int):
            return train.Feature(int64_list=train.Int64List(value=values))
        return train.Feature(float_list=train.FloatList(value=values))

    rows = [
        {"image": [IMAGE], "captions/text": [b"a", "ü".encode()], "label": [-3], "scores": [0.5, 2.0],
         "image/filename": [b"x.png"]},
        {"image": [b""], "label": [2**62], "image/filename": [b"y.png"]},
    ]  # fmt: skip
    with tf.io.TFRecordWriter(path) as writer:
        for row in rows:
            writer.write(
                train.Example(
                    features=train.Features(feature={k: feature(v) for k, v in row.items()})
                ).SerializeToString()
            )
    first, second = TFRecordSource(path)
    assert first == Pair(
        "x.png", IMAGE, {"captions/text": ["a", "ü"], "label": -3, "scores": [0.5, 2.0], "image/filename": "x.png"}
    )
    assert second == Pair("y.png", b"", {"label": 2**62, "image/filename": "y.png"})
    parsed = train.Example.FromString(examples.serialize(rows[0]))
    assert {name: list(parsed.features.feature[name].bytes_list.value) for name in ("image", "captions/text")} == {
        name: rows[0][name] for name in ("image", "captions/text")
    }


def test_an_array_record_file_replaced_under_a_source_stops_the_run(tmp_path):
    paths = [write_array(tmp_path / f"{name}.array_record", 3) for name in "ab"]
    first, second = map(ArrayRecordSource, paths)
    assert second[0].key == "k0"
    with ArrayRecordWriter(paths[0]) as shard:  # as large as before
        for number in range(3, 6):
            shard.write(Pair(f"k{number}", IMAGE, {"txt": f"caption {number}"}))
    write_array(paths[1], 4)
    with pytest.raises(ShardLost, match="a.array_record' was replaced while it was in use; start again"):
        first[0]
    assert second[1].key == "k1"  # of the file that is open
    with pytest.raises(ShardLost, match="b.array_record' was replaced"):
        pickle.loads(pickle.dumps(second))[1]


def test_tfrecords_at_random(tmp_path):
    shards = [write_records(tmp_path / f"a.tfrecord-{n:05d}-of-00003", 40, first=40 * n) for n in range(3)]
    source = pickle.loads(pickle.dumps(open_source(f"{tmp_path}/a.tfrecord-*-of-*")))
    assert isinstance(source, TFRecordSource) and source.paths == list(map(str, shards))
    order = [7 * n % 120 for n in range(600)]
    with ThreadPoolExecutor(8) as pool:
        pairs = list(pool.map(source.__getitem__, order))
    assert [(pair.key, pair.image, dict(pair.fields)) for pair in pairs] == [
        (str(n), IMAGE, {"caption": f"caption {n}", "id": n}) for n in order
    ]
    assert source.columns == ("caption", "id", "image")


@pytest.mark.parametrize("window_bytes", [16, 200, 1 << 20])
@pytest.mark.parametrize("cut", [-1, -4, -5, -300, 13])
def test_a_cut_tfrecord(tmp_path, monkeypatch, cut, window_bytes):
    monkeypatch.setattr("data_pipelines.sources.files._LOCAL_WINDOW_BYTES", window_bytes)
    path = write_records(tmp_path / "a.tfrecord", 4)
    size = len(framed(record(0)))
    at = cut if cut < 0 else 2 * size + cut
    path.write_bytes(path.read_bytes()[:at])
    whole = {-300: 3 if size > 300 else 2, 13: 2}.get(cut, 3)
    with pytest.warns(UserWarning, match=f"is cut off: its {whole} whole pairs are used"):
        source = TFRecordSource(path)
    assert [pair.fields["id"] for pair in source] == list(range(whole))


def test_a_damaged_record_is_unreadable_and_the_others_are_not(tmp_path):
    path = write_records(tmp_path / "a.tfrecord", 3)
    data, size = bytearray(path.read_bytes()), len(framed(record(0)))
    data[size + 100] ^= 1
    path.write_bytes(data)
    source = TFRecordSource(path)
    assert (source[0].fields["id"], source[2].fields["id"]) == (0, 2)
    with pytest.raises(OSError, match="record 1 of shard .* is damaged: its checksum"):
        source[1]


def test_bad_tfrecords(tmp_path):
    (tmp_path / "packed.tfrecord").write_bytes(gzip.compress(framed(record(0))))
    (tmp_path / "text.tfrecord").write_bytes(b"hello " * 100)
    (tmp_path / "foreign.tfrecord").write_bytes(framed(b"\xff\xff\xff"))
    (tmp_path / "short.tfrecord").write_bytes(framed(record(0))[:50])
    (tmp_path / "texts.tfrecord").write_bytes(framed(examples.serialize({"text": ["a"], "label": [1]})))
    for name, message in (
        ("packed", "packed with gzip"),
        ("text", "is not a TFRecord file"),
        ("foreign", "does not hold tf.train.Example"),
        ("short", "does not hold one whole record"),
        ("texts", "no column with images; there are label, text"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(tmp_path / f"{name}.tfrecord")
        assert f"{name}.tfrecord" in str(error.value) and "\n" not in str(error.value)


def test_features_by_name(tmp_path):
    rows = {"photo": [IMAGE], "mask": [IMAGE], "text": [b"\xff"], "json": [b'{"n": 1, "text": "repaired"}']}
    (tmp_path / "a.tfrecord").write_bytes(framed(examples.serialize(rows)))
    with pytest.raises(ValueError, match="no column with images"):
        open_source(tmp_path / "a.tfrecord")
    with pytest.raises(
        ValueError, match="no image column 'foto'; there are json, mask, photo, text, did you mean 'photo'"
    ):
        open_source(tmp_path / "a.tfrecord", image="foto")
    (pair,) = open_source(tmp_path / "a.tfrecord", image="photo", fields=["text", "n"])
    assert (pair.image, pair.fields, pair.problems) == (IMAGE, {"n": 1, "text": "repaired"}, ("invalid_utf8",))
    assert pair.key == "a.tfrecord/0"


def write_tfds(folder: Path, splits: dict[str, list[int]]) -> Path:
    folder.mkdir()
    described = [{"name": name, "shardLengths": list(map(str, counts))} for name, counts in splits.items()]
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord", "splits": described}))
    features = {"label": {"text": {}}, "picture": {"image": {"shape": {}}}, "image": {"text": {}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    for name, counts in splits.items():
        for shard, count in enumerate(counts):
            data = [framed(examples.serialize({"picture": [IMAGE], "image": ["text"], "n": [n]})) for n in range(count)]
            (folder / f"set-{name}.tfrecord-{shard:05d}-of-{len(counts):05d}").write_bytes(b"".join(data))
    return folder


def test_tfds_folders(tmp_path):
    source = open_source(write_tfds(tmp_path / "one", {"train": [3, 2]}))
    assert [pair.fields for pair in source] == [{"image": "text", "n": n} for n in (0, 1, 2, 0, 1)]
    assert {pair.image for pair in source} == {IMAGE}
    two = write_tfds(tmp_path / "two", {"train": [3], "test": [2]})
    with pytest.raises(ValueError, match="holds the splits train, test; name one: .*#train"):
        open_source(two)
    assert len(open_source(f"{two}/*-test.*-of-*")) == 2
    (two / "dataset_info.json").write_text(json.dumps({"splits": [{"name": "train", "shardLengths": ["7"]}]}))
    path = two / "set-train.tfrecord-00000-of-00001"
    Path(f"{path}.idx").unlink(missing_ok=True)
    tfds._json.cache_clear()
    with pytest.warns(UserWarning, match="its 3 whole pairs are used of the 7"):
        open_source(path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds neither images nor shards"):
        open_source(tmp_path / "none")


@pytest.mark.parametrize("writer, name", [(TarWriter, "a.tar"), (ArrayRecordWriter, "a.array_record")])
def test_what_is_written_reads_back(tmp_path, writer, name):
    pairs = [
        *TarSource(SAMPLE / "emoji-heldout-00000.tar"),
        Pair("d/1", IMAGE, {"txt": ["a", "b", "ü"], "cls": 3, "nested": {"x": [1, None]}}),
        Pair("d/2", None, {"txt": "no picture"}),
        Pair("d/3", IMAGE, {"cls": "cat"}),
    ]
    for path in (tmp_path / name, tmp_path / f"again-{name}"):
        with writer(path) as shard:
            for pair in pairs:
                shard.write(pair)
    source = open_source(tmp_path / name)
    assert list(source) == pairs == list(pickle.loads(pickle.dumps(source)))
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.idx", f"again-{name}"]


@pytest.mark.parametrize("writer", [TarWriter, ArrayRecordWriter])
def test_nothing_stays_of_a_shard_that_failed(tmp_path, writer):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(RuntimeError, match="stop"), writer(tmp_path / "a") as shard:
        shard.write(Pair("1", IMAGE, {}))
        raise RuntimeError("stop")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"before")]


def test_keys_with_dots_and_images_by_their_bytes(tmp_path):
    kinds = {"jpg": encode(quadrants(), "JPEG"), "webp": encode(quadrants(), "WEBP"), "gif": encode(quadrants(), "GIF")}
    with TarWriter(tmp_path / "a.tar") as shard:
        for kind, image in kinds.items():
            shard.write(Pair(f"v1.0/{kind}.of.site", image, {}))
    assert {pair.key: pair.image for pair in TarSource(tmp_path / "a.tar")} == {
        f"v1.0/{kind}_of_site": image for kind, image in kinds.items()
    }


def count_keys(source) -> int:
    return len({pair.key for pair in source})


def test_array_records_at_random_from_threads_and_processes(tmp_path):
    source = open_source([write_array(tmp_path / f"{n}.array_record", 50) for n in range(2)])
    order = [7 * n % 100 for n in range(500)]
    with ThreadPoolExecutor(8) as pool:
        assert [pair.key for pair in pool.map(source.__getitem__, order)] == [f"k{n % 50}" for n in order]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(count_keys, [source]) == [50]


def test_bad_array_records(tmp_path):
    path = write_array(tmp_path / "a.array_record", 300)
    data = path.read_bytes()
    source = ArrayRecordSource(path)
    (tmp_path / "cut.array_record").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.array_record").write_bytes(b"hello" * 30000)
    (tmp_path / "small.array_record").write_bytes(b"hello")
    for name in ("cut", "text", "small"):
        with pytest.raises(ValueError, match=f"{name}.array_record' is cut, empty or not an ArrayRecord file"):
            open_source(tmp_path / f"{name}.array_record")
    damaged = bytearray(data)
    damaged[data.index(b"caption 7") + 2] ^= 1
    path.write_bytes(damaged)
    fresh = ArrayRecordSource(path)
    with pytest.raises(OSError, match="record 7 of shard .* is damaged"):
        fresh[7]
    assert fresh[8].key == "k8"
    path.unlink()
    with pytest.raises(ShardLost, match="vanished"):
        source[0]


def test_remote_array_records_are_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    local = list(ArrayRecordSource(write_array(tmp_path / "served" / "a.array_record", 30)))
    write_records(tmp_path / "served" / "a.tfrecord", 30)
    with serving(tmp_path / "served") as server:
        source = open_source(f"{server.url}/a.array_record")
        asked = len(server.requests)
        assert list(source) == local and len(server.requests) == asked
        assert [pair.fields["id"] for pair in open_source(f"{server.url}/a.tfrecord")] == list(range(30))


def test_the_masked_checksum_is_that_of_the_format():
    assert tfrecord._masked_crc(b"") == struct.pack("<I", 0xA282EAD8)
    assert framed(b"abc")[12:15] == b"abc"


def test_unknown_and_mixed_formats(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"1.jpg": b"i"})
    tar.rename(tmp_path / "download")
    assert isinstance(open_source(tmp_path / "download"), TarSource)
    write_records(tmp_path / "a.tfrecord", 1)
    with pytest.raises(ValueError, match="download' and .*a.tfrecord' are of two formats"):
        open_source([tmp_path / "download", tmp_path / "a.tfrecord"])
    (tmp_path / "a.zip").write_bytes(b"PK\3\4" * 100)
    with pytest.raises(ValueError, match="a.zip' is of no known format .tar, parquet"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(FileNotFoundError, match="no shard matches '.*/x-.*tfrecord'"):
        open_source(f"{tmp_path}/x-*.tfrecord")
    with pytest.raises(FileNotFoundError, match="no shard at '.*/x.tfrecord'"):
        open_source(f"{tmp_path}/x.tfrecord")
    with pytest.raises(ValueError, match="a tar has no columns"):
        open_source(tmp_path / "download", image="jpg")


def test_a_damaged_first_record_costs_itself_alone(tmp_path):
    records = [framed(record(n)) for n in range(3)]
    (tmp_path / "a.tfrecord").write_bytes(framed(b"\xff\xff\xff") + b"".join(records))
    data = write_array(tmp_path / "a.array_record", 3).read_bytes()
    (tmp_path / "a.array_record").write_bytes(data.replace(b"caption 0", b"captain 0"))
    for name in ("a.tfrecord", "a.array_record"):
        source = open_source(tmp_path / name)
        with pytest.raises(OSError, match="record 0 of shard"):
            source[0]
        assert source[1].image == IMAGE


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_info.json", '{"splits": [{"name": "train", "shardLengths": [1e400]}]}'),
        ("dataset_info.json", '{"splits": [{"name": "train", "shardLengths": [-3]}]}'),
        ("dataset_info.json", '{"splits": ["train"]}'),
        ("dataset_info.json", '{"splits": null}'),
        ("dataset_info.json", "[1]"),
        ("features.json", '{"featuresDict": null}'),
        ("features.json", '{"featuresDict": {"features": [1]}}'),
        ("features.json", '"image"'),
        ("features.json", "1" * 5000),
    ],
)
def test_odd_descriptions_of_tfds_are_named(tmp_path, name, content):
    folder = write_tfds(tmp_path / "set", {"train": [2]})
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_odd_features_are_no_images(tmp_path):
    folder = write_tfds(tmp_path / "set", {"train": [2]})
    features = {"n": 3, "text": "an image", "picture": {"image": {}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    assert open_source(folder)[0].image == IMAGE
