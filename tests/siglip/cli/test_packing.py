"""`siglip data pack`: what people have becomes shards that read back, or nothing at all."""

import json
from pathlib import Path

import pytest

from data_pipelines.sources.described import describe
from data_pipelines.sources.opening import open_source
from siglip.cli import run
from tests.data_pipelines.test_layouts import KARPATHY, png, write_images


def packed(capsys, *args: str) -> str:
    assert run(["data", "pack", *map(str, args)]) == 0
    return capsys.readouterr().out


def read(folder: Path) -> list[dict]:
    return [dict(pair.fields) for pair in open_source(folder)]


def test_a_csv_with_columns_named_by_flags(tmp_path, capsys):
    write_images(tmp_path / "shop", "1.png", "2.png", "3.png")
    (tmp_path / "shop" / "4.png").write_bytes(b"<html>not found</html>")
    rows = [
        "photo,title,kind,price",
        "1.png,a shoe,shoe,3",
        "2.png,a hat,hat,4",
        "3.png,,hat,4",
        "4.png,a glove,glove,5",
    ]
    (tmp_path / "shop" / "products.csv").write_text("\n".join([*rows, "5.png,a tie,tie,6"]))
    columns = ["--image-column", "photo", "--captions", "title", "--label", "kind"]
    told = packed(capsys, tmp_path / "shop" / "products.csv", "--out", tmp_path / "out", *columns)
    assert "2 pairs in 1 shards" in told
    assert "skipped 3: 1 missing_text ('3.png'), 1 not_an_image ('4.png'), 1 missing_image ('5.png')" in told
    source = open_source(tmp_path / "out")
    assert [dict(pair.fields) for pair in source] == [
        {"name": "1.png", "price": "3", "txt": "a shoe", "cls": "shoe"},
        {"name": "2.png", "price": "4", "txt": "a hat", "cls": "hat"},
    ]
    assert [pair.key for pair in source] == ["000000000", "000000001"] and source[1].image == png(1)


def test_a_folder_per_class_becomes_numbers_with_their_names(tmp_path, capsys):
    write_images(tmp_path / "pets", "dog/b.png", "cat/2.png", "dog/a.png")
    told = packed(capsys, tmp_path / "pets", "--out", tmp_path / "out", "--shard-pairs", "2")
    assert "3 pairs in 2 shards" in told and "cls: cls, 2 classes" in told and "skipped" not in told
    assert [fields["cls"] for fields in read(tmp_path / "out")] == [0, 1, 1]
    assert describe(open_source(tmp_path / "out")).classes == {"cls": ["cat", "dog"]}


def test_karpathys_json(tmp_path, capsys):
    write_images(tmp_path / "images", *[f"{n}.png" for n in range(5)])
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(KARPATHY))
    packed(capsys, f"{tmp_path}/dataset_flickr8k.json#test", "--out", tmp_path / "out")
    assert [(fields["txt"], fields["cocoid"]) for fields in read(tmp_path / "out")] == [
        (["a 2", "the 2"], 2), (["a 4", "the 4"], 4)
    ]  # fmt: skip


def test_the_same_data_give_the_same_bytes_and_shards_pack_again(tmp_path, capsys):
    write_images(tmp_path / "pets", "dog/b.png", "cat/2.png")
    for name, data in (("a", "pets"), ("b", "pets"), ("c", "a")):
        packed(capsys, tmp_path / data, "--out", tmp_path / name)
    shards = [(tmp_path / name / "00000.tar").read_bytes() for name in "ab"]
    assert shards[0] == shards[1] and [fields["cls"] for fields in read(tmp_path / "c")] == [0, 1]
    assert (tmp_path / "c" / "classnames.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["shop", "--out", "out", "--captions", "titel"],
            "has no field 'titel'; there are image, title, did you mean 'title'",
        ),
        (["shop", "--out", "out", "--image-column", "photo"], "has no image column 'photo'"),
        (["shop", "--out", "shop"], "exists; name a folder that does not"),
        (["shop"], "name the data and a folder to write"),
        (["shop", "--out", "out", "--shard-pairs", "0"], "must be at least 1"),
        (["gone", "--out", "out"], "no known format|no shard at 'gone'"),
        (["shop", "--out", "out"], "none of the 1 pairs can be packed: 1 missing_image"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "list.csv").write_text("image,title\n1.png,a shoe\n")
    assert run(["data", "pack", *args]) == 2
    told = capsys.readouterr().err
    assert any(part in told for part in message.split("|")) and told.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
