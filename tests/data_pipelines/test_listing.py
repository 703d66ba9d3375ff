"""Lists of image files: CSV, TSV, JSONL; offsets of rows, quoted line ends, encodings, images that are not there."""

import csv
import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.sources import files, listing
from data_pipelines.sources.listing import ListSource
from data_pipelines.sources.opening import check_columns, open_source
from tests.data_pipelines.http_server import serving
from tests.data_pipelines.shards import SPIECE, encode, quadrants
from tests.data_pipelines.streams import SHAPES

IMAGE = encode(quadrants())
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


def test_a_list_of_each_kind(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").write_bytes(IMAGE)
    (tmp_path / "2.png").write_bytes(b"second")
    rows = [
        {"file_name": "cats/1.png", "caption": 'a cat, "asleep"\nat home', "lang": "ü"},
        {"file_name": str(tmp_path / "2.png"), "caption": "", "lang": "de"},
        {"file_name": "cats/../2.png", "caption": "up and down", "lang": ""},
        {"file_name": "cats/none.png", "caption": "gone", "lang": ""},
        {"file_name": "cats", "caption": "a folder", "lang": ""},
    ]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    for name in ("a.csv", "a.tsv", "a.jsonl"):
        source = pickle.loads(pickle.dumps(open_source(tmp_path / name, fields=["caption"])))
        pairs = list(source)
        assert [pair.image for pair in pairs] == [IMAGE, b"second", b"second", None, None]
        assert [pair.problems for pair in pairs] == [(), (), (), ("missing_image",), ("missing_image",)]
        assert [pair.key for pair in pairs] == [row["file_name"] for row in rows]
        assert [dict(pair.fields) for pair in pairs] == [
            {"caption": row["caption"], "lang": row["lang"]} for row in rows
        ]
        assert set(source.columns) == {"file_name", "caption", "lang"}


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=20),
    line_end=st.sampled_from(["\n", "\r\n"]),
    window_bytes=st.sampled_from([1, 7, 1 << 20]),
    bom=st.booleans(),
)
def test_rows_are_found_wherever_they_end(tmp_path_factory, table, line_end, window_bytes, bom):
    path = tmp_path_factory.mktemp("list") / "a.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("path", "caption"), *(("x" + name, caption) for name, caption in table)])
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
    before, files._LOCAL_WINDOW_BYTES = files._LOCAL_WINDOW_BYTES, window_bytes
    try:
        source = ListSource(path)
    finally:
        files._LOCAL_WINDOW_BYTES = before
    read = [source._tables(0)["rows"][row] for row in range(len(source))]
    lines = [path.read_bytes()[row["offset"] : row["offset"] + row["bytes"]].decode() for row in read]
    assert [tuple(next(csv.reader(io.StringIO(line, newline="")))) for line in lines] == [
        ("x" + name, caption) for name, caption in table
    ]


def test_broken_rows_are_stated_not_raised(tmp_path):
    (tmp_path / "1.png").write_bytes(IMAGE)
    (tmp_path / "a.jsonl").write_bytes(b'{"image": "1.png", "txt": "a"}\n{"image": \n[1]\n{"image": 3}\n{"txt": "b"}\n')
    pairs = list(open_source(tmp_path / "a.jsonl"))
    assert [pair.image for pair in pairs] == [IMAGE, None, None, None, None]
    assert [pair.problems for pair in pairs] == [(), ("invalid_json",), ("invalid_json",), (), ()]
    (tmp_path / "b.jsonl").write_bytes(b'{"image": \n[1]\n{"image": "1.png", "txt": "a"}\n')
    assert [pair.problems for pair in open_source(tmp_path / "b.jsonl")] == [("invalid_json",)] * 2 + [()]
    (tmp_path / "a.csv").write_bytes(b"image,txt\n1.png\n1.png,a,b\n\n1.png,\xff\xe9\n1.png,c,\n")
    pairs = list(open_source(tmp_path / "a.csv"))
    assert [(pair.image, pair.fields.get("txt"), pair.problems) for pair in pairs] == [
        (IMAGE, None, ()),
        (None, None, ("invalid_csv",)),
        (IMAGE, None, ("invalid_utf8",)),
        (IMAGE, "c", ()),
    ]


def test_bad_lists(tmp_path):
    (tmp_path / "header.csv").write_text("image,txt\n")
    (tmp_path / "columns.csv").write_text("picture;txt\na.png;b\n")
    (tmp_path / "quote.csv").write_text('image,txt\na.png,"b" c\n')
    (tmp_path / "text.jsonl").write_text("hello\n")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name, message in (
        ("header.csv", "has no rows"),
        ("columns.csv", "no column with images; there are picture;txt: separate columns with commas"),
        ("quote.csv", "is not CSV at line 2"),
        ("text.jsonl", "does not begin with a JSON object"),
        ("blank.jsonl", "has no rows"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "a.csv").write_text("photo,title\na.png,b\n")
    with pytest.raises(ValueError, match="there are photo, title; name the right one: --image-column, or image= in"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="no image column 'foto'; there are photo, title, did you mean 'photo'"):
        open_source(tmp_path / "a.csv", image="foto")
    with pytest.raises(ValueError, match="no field 'titel'; there are photo, title, did you mean 'title'"):
        open_source(tmp_path / "a.csv", image="photo", fields=["titel"])
    assert open_source(tmp_path / "a.csv", image="photo", fields=["title"])[0].fields == {"title": "b"}


def test_a_list_over_http_names_images_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served" / "set"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(IMAGE)
    with serving(tmp_path / "served") as server:
        (folder / "a.csv").write_text(f"image,txt\n1.png,a\n{server.url}/set/1.png,b\nnone.png,c\n")
        pairs = list(open_source(f"{server.url}/set/a.csv"))
    assert [pair.image for pair in pairs] == [IMAGE, IMAGE, None]
    assert pairs[2].problems == ("missing_image",)


def test_random_access_from_threads(tmp_path):
    (tmp_path / "1.png").write_bytes(IMAGE)
    (tmp_path / "a.csv").write_text("image,txt\n" + "".join(f"1.png,caption {n}\n" for n in range(500)))
    source = open_source(tmp_path / "a.csv")
    order = [7 * n % 500 for n in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        assert [pair.fields["txt"] for pair in pool.map(source.__getitem__, order)] == [f"caption {n}" for n in order]


@pytest.mark.timeout(20)
def test_rows_that_name_devices_pipes_or_endless_files_have_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    names = ["/dev/zero", "/dev/tty", "pipe", "link", "/proc/self/status", "huge"]
    (tmp_path / "a.csv").write_text("image,txt\n" + "".join(f"{name},a\n" for name in names))
    source = open_source(tmp_path / "a.csv")
    assert [source[n].image for n in range(5)] == [None] * 4 + [b""]
    assert [source[n].problems for n in range(4)] == [("missing_image",)] * 4
    with pytest.raises(OSError, match="huge' has 1099511627776 bytes"):
        source[5]
    for name in ("pipe", "link"):
        with pytest.raises(FileNotFoundError, match=f"no shard at .*{name}', but a device or a pipe"):
            open_source(f"{tmp_path}/{name}")


def test_a_comma_without_quotes_never_cuts_a_caption(tmp_path):
    (tmp_path / "1.png").write_bytes(IMAGE)
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        rows = [f"1.png{separator}a dog{separator} asleep", *[f"1.png{separator}a cat"] * 3]
        (tmp_path / name).write_text(f"image{separator}txt\n" + "\n".join(rows))
        source = open_source(tmp_path / name)
        assert [(pair.fields, pair.problems) for pair in source] == [
            ({}, ("invalid_csv",)),
            *[({"txt": "a cat"}, ())] * 3,
        ]
        loader = make_loader(DataConfig((SourceConfig(str(tmp_path / name)),), SPIECE), **SHAPES)
        next(loader)
        loader.close()
        assert loader.counts.keys() == {"invalid_csv"}
        (tmp_path / name).write_text(f"image{separator}txt\n" + "\n".join(rows[:1] * 3 + rows))
        with pytest.raises(
            ValueError, match="has 2 columns and more values in 4 of 7 rows, the first at line 2; put texts"
        ):
            open_source(tmp_path / name)


def test_a_long_caption_is_read_in_any_process(tmp_path):
    (tmp_path / "a.csv").write_text("image,txt\n1.png," + "a " * 100_000)
    open_source(tmp_path / "a.csv")
    csv.field_size_limit(1 << 17)
    assert len(open_source(tmp_path / "a.csv")[0].fields["txt"]) == 200_000


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_an_endless_line_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(listing, "_MAX_LINE_BYTES", 1 << 21)
    (tmp_path / name).write_bytes(b"image,txt\n" * (name == "a.csv") + b"x" * (1 << 26))
    with pytest.raises(ValueError, match="has a line of more than"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"id;image;title, short\n1;a.png;b\n", "separate columns with commas"),
        (b"image\tcaption\na.png\tb\n", "or with tabs in a file called .tsv"),
        (
            b"cats/1.JPG,a cat\ncats/2.JPG,two cats\n",
            "its first line is a row; put one before it that names the columns",
        ),
        (b"https://x.y/1,a cat\nhttps://x.y/2,b\n", "its first line is a row"),
        (b"image,caption,caption\na.png,b,c\n", "two columns called 'caption'; rename one"),
        ("image,caption\na.png,b\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        (b"image,caption\ra.png,b\r", "is not CSV at line 1 "),
        (b'image,"caption\na.png,b\n', "is not CSV at line 2 "),
    ],
)
def test_separators_headers_and_encodings_that_lists_do_not_have(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text)
    for fields in (None, ("caption",)):
        with pytest.raises(ValueError, match=message) as error:
            check_columns(tmp_path / "a.csv", fields=fields or ())
            open_source(tmp_path / "a.csv", fields=fields)
        assert "a.csv" in str(error.value) and "\n" not in str(error.value)


def test_the_columns_of_jsonl_are_those_of_its_first_whole_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"image": \n{"image": "a.png", "caption": "b"}\n')
    check_columns(tmp_path / "a.jsonl", fields=("caption",))
    assert len(open_source(tmp_path / "a.jsonl", fields=("caption",))) == 2
    (tmp_path / "b.jsonl").write_bytes(b'[{"image": "a.png", "caption": "b"}]')
    check_columns(tmp_path / "b.jsonl", fields=("caption",))  # what is wrong with it, reading tells
    with pytest.raises(ValueError, match="does not begin with a JSON object; write one per line"):
        open_source(tmp_path / "b.jsonl", fields=("caption",))
