"""Texts that cannot be encoded and values that Python does not have: repaired, or one pair's fault, in every format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.stats import describe
from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.sources import examples
from data_pipelines.sources.columns import parse_object
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.writing import ArrayRecordWriter
from data_pipelines.text_ops import iter_captions
from data_pipelines.tokenizers import train_tokenizer
from siglip.cli.data import data_command
from tests.data_pipelines.shards import SPIECE, encode, quadrants, write_tar
from tests.data_pipelines.streams import SHAPES
from tests.data_pipelines.test_tf_examples import framed

IMAGE = encode(quadrants())
LATIN = "un café".encode("latin-1")


@pytest.mark.parametrize(
    "text, repaired",
    [
        (rb'{"a": "x \ud83d", "b": ["\uDE00y", {"c\ud83d": "z"}]}', {"a": "x ", "b": ["y", {"c": "z"}]}),
        (rb'{"a": "\ud83d\ude00", "b": "\udead\ud83d\ude00"}', {"a": "\U0001f600", "b": "\U0001f600"}),
        (b'{"a": "x\xed\xa0\xbd", "n": NaN}', {"a": "x"}),
        ('{"a": "\\ud83d"}'.encode("utf-16"), {"a": ""}),
    ],
)
def test_half_an_emoji_is_taken_out_of_json(text, repaired):
    parsed, problems = parse_object(text)
    parsed.pop("n", None)
    assert (parsed, problems) == (repaired, ["control_chars"])
    json.dumps(parsed, ensure_ascii=False).encode()


@pytest.mark.parametrize("text", [b'{"a": "\xed\x95\x9c\xea\xb5\xad", "n": NaN}', rb'{"a": "\ud83d\ude00 \uac00"}'])
def test_sound_texts_have_no_problem(text):
    assert parse_object(text)[1] == []


@pytest.mark.parametrize("text", [b"[" * 200 + b"]" * 200, b"{" * 100_000, b"5", b"", b'{"n": ' + b"9" * 5000 + b"}"])
def test_json_that_is_no_object_is_a_problem(text):
    for nested in (text, b'{"a": ' + text + b"}"):
        assert parse_object(nested)[1] in (["invalid_json"], [] if text == b"5" else ["invalid_json"])


def bad_parquet(path, text: bytes):
    """Ten pairs; the third has that text, in a column of strings and in one that nobody asks for; odd types besides."""
    captions = [text if n == 2 else f"caption {n}".encode() for n in range(10)]
    raw = pa.array(captions, pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    columns = {
        "image": pa.array([IMAGE] * 10),
        "txt": strings,
        "captions": pa.StructArray.from_arrays([strings, pa.array(["de"] * 10)], ["en", "de"]),
        "list": pa.ListArray.from_arrays(list(range(11)), strings),
        "url": strings.take(pa.array([2] * 10)),
        "date": pa.array([10**15] * 10, pa.timestamp("s")),
        "zone": pa.array([0] * 10, pa.timestamp("us", "Mars/Olympus")),
    }
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def test_a_parquet_text_that_is_not_utf_8_costs_its_pair_alone(tmp_path):
    source = open_source(bad_parquet(tmp_path / "a.parquet", LATIN), fields=["txt", "captions", "list"])
    pairs = list(source)
    assert [pair.problems for pair in pairs] == [("invalid_utf8",) if n == 2 else () for n in range(10)]
    assert pairs[2].fields == {"captions": {"en": None, "de": "de"}, "list": [None]} and pairs[2].image == IMAGE
    repaired = open_source(bad_parquet(tmp_path / "b.parquet", b"caf\xed\xa0\xbd"), fields=["txt"])[2]
    assert (repaired.fields, repaired.problems) == ({"txt": "caf"}, ("control_chars",))


def test_columns_that_nobody_asks_for_do_not_matter(tmp_path):
    path = str(bad_parquet(tmp_path / "a.parquet", LATIN))
    with LocalEngine(1) as engine:
        assert describe(path, captions=["captions.de"], engine=engine)["faults"].get("invalid_utf8") == 1
        assert describe(path, captions=["zone", "captions.de"], engine=engine)["words"] == {"1": 10}
    everything = open_source(path)[2]
    assert everything.fields == {"captions": {"en": None, "de": "de"}, "list": [None]}


def lists_and_records(folder):
    """The same pairs as JSONL, tar and TFRecord; the json of the second pair holds half an emoji in every field."""
    (folder / "1.png").write_bytes(IMAGE)
    meta = [json.dumps({"caption": f"a dog {n}", "keywords": ["x"]}).encode() for n in range(20)]
    meta[1] = rb'{"caption": "a dog \ud83d", "keywords": ["\udead", "x"], "key": "k\ud83d"}'
    rows = [line[:-1] + b', "image": "1.png"}' for line in meta]
    (folder / "a.jsonl").write_bytes(b"\n".join(rows))
    records = [framed(examples.serialize({"image": [IMAGE], "json": [line]})) for line in meta]
    (folder / "a.tfrecord").write_bytes(b"".join(records))
    write_tar(
        folder / "a.tar", [(f"{n:02}.{ext}", d) for n in range(20) for ext, d in (("png", IMAGE), ("json", meta[n]))]
    )
    return [str(folder / name) for name in ("a.jsonl", "a.tfrecord", "a.tar")]


def test_half_an_emoji_stops_neither_training_nor_statistics_nor_a_tokenizer(tmp_path):
    for path in lists_and_records(tmp_path):
        pair = open_source(path)[1]
        assert pair.fields["caption"] == "a dog " and pair.problems == ("control_chars",)
        loader = make_loader(DataConfig((SourceConfig(path, captions=(("caption+keywords", 1.0),)),), SPIECE), **SHAPES)
        keys = [key for _ in range(3) for key in next(loader)["key"]]
        loader.close()
        assert pair.key in keys and not loader.counts
        keys[0].encode()
        with LocalEngine(1) as engine:
            assert describe(path, captions=["caption"], engine=engine)["faults"]["control_chars"] == 1
        train_tokenizer(iter_captions(open_source(path)), tmp_path / "m.model", vocab_size=275)


def test_a_tokenizer_is_trained_on_texts_of_any_origin(tmp_path):
    train_tokenizer([f"a dog {n} \ud83d" for n in range(50)], tmp_path / "m.model", vocab_size=275)
    assert (tmp_path / "m.model").stat().st_size


def test_labels_of_any_length(tmp_path):
    members = {f"{n}.{ext}": data for n in range(3) for ext, data in (("png", IMAGE), ("cls", str(n).encode()))}
    members["1.cls"] = b"9" * 5000
    pairs = list(open_source(write_tar(tmp_path / "a.tar", members)))
    assert [pair.fields for pair in pairs] == [{"cls": 0}, {}, {"cls": 2}]
    assert pairs[1].problems == ("invalid_cls",)
    with ArrayRecordWriter(tmp_path / "a.array_record") as shard:
        for pair in (pairs[0], type(pairs[0])("k", IMAGE, {"cls": 1 << 80})):
            shard.write(pair)
    assert [pair.fields["cls"] for pair in open_source(tmp_path / "a.array_record")] == [0, str(1 << 80)]


@pytest.mark.parametrize("name", ["captions.en", "meta.caption", "image.size", "image"])
def test_columns_with_dots(tmp_path, name):
    columns = {"other": ["x"] * 9, "picture": pa.array([IMAGE] * 9), name: [f"caption {n}" for n in range(9)]}
    nested = pa.array([{"en": n, "x": {"y": n}} for n in range(9)])
    pq.write_table(pa.table(columns | {"meta": nested}), tmp_path / "a.parquet", row_group_size=3)
    for fields in (None, [name.partition(".")[0]]):
        source = open_source(tmp_path / "a.parquet", image="picture", fields=fields)
        assert [pair.fields[name] for pair in source] == columns[name]


def test_a_tokenizer_is_trained_without_what_cannot_be_read(tmp_path, caplog):
    path, data = tmp_path / "a.tfrecord", []
    for n in range(30):
        data.append(
            bytearray(framed(examples.serialize({"image": [IMAGE], "txt": [f"a dog {n}" if n != 3 else LATIN]})))
        )
    data[7][-20] ^= 1
    path.write_bytes(b"".join(data))
    data_command(["tokenizer", str(path), "--out", str(tmp_path / "m.model"), "--vocab-size", "275"])
    assert "{'invalid_utf8': 1, 'unreadable': 1}" in caplog.text
