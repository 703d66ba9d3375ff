"""`siglip embed`: every kind of data into every kind of file, resumed, and the same vectors as `siglip.load` gives."""

import functools
import json
import tarfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import siglip
from data_pipelines.image_ops import decode_pixels
from data_pipelines.sources.webdataset import TarSource
from siglip.cli import embedding, embedding_files, run
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from tests.siglip.jobs import SAMPLE
from tests.siglip.tiny import random_params

MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)
TEXTS = ["a red heart", "ein rotes Herz", "", "日本", "a red heart"]
# Two ways through the same float32 program in batches of another size: a few roundings of numbers below 1.
ATOL = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and 20 images as a tar, as Parquet and as files, one of which is broken."""
    out = tmp_path_factory.mktemp("embed")
    big_vision.write(out / "m.npz", random_params(MODEL), MODEL)
    (out / "spiece.model").write_bytes((SAMPLE / "spiece.model").read_bytes())
    (out / "images" / "more").mkdir(parents=True)
    with tarfile.open(SAMPLE / "emoji-heldout-00000.tar") as sample, tarfile.open(out / "toy.tar", "w") as toy:
        for member in sample.getmembers()[: 3 * 20]:
            toy.addfile(member, sample.extractfile(member))
    pairs = list(TarSource(out / "toy.tar"))
    for n, pair in enumerate(pairs):
        (out / "images" / f"{'more/' if n % 2 else ''}{n:02d}.jpg").write_bytes(pair.image)
    (out / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (out / "images" / "notes.md").write_text("not an image")
    captions = [pair.fields["captions"]["en"] for pair in pairs]
    columns = {"key": [pair.key for pair in pairs], "image": [pair.image for pair in pairs], "txt": captions}
    pq.write_table(pa.table(columns), out / "toy.parquet")
    (out / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return out


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, np.ndarray]:
    """By `siglip.load`, on one device."""
    model, pairs = siglip.load(folder / "m.npz"), list(TarSource(folder / "toy.tar"))
    images = [decode_pixels(pair.image, max_pixels=1 << 20) for pair in pairs]
    captions = [pair.fields["captions"]["en"] for pair in pairs]
    found = {
        "images": model.embed_images(images),
        "tokens": model.image_tokens(images),
        "texts": model.embed_texts(TEXTS),
        "captions": model.embed_texts(captions),
    }
    return {name: np.asarray(values) for name, values in found.items()} | {"keys": [pair.key for pair in pairs]}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embedding, "_PART_ROWS", 8)


def embed(folder: Path, data: str, out: Path, *flags: str) -> int:
    return run(
        ["embed", str(folder / "m.npz"), "--data", str(folder / data), "--out", str(out), "--batch-size", "8", *flags]
    )


def test_every_file_has_the_vectors_of_the_model_on_eight_devices(folder, expected, tmp_path):
    assert len(jax.devices()) == 8
    for data, out in (
        ("toy.tar", "z.npz"),
        ("toy.parquet", "z.npy"),
        ("toy.tar", "z.parquet"),
        ("toy.parquet", "parts"),
    ):
        assert embed(folder, data, tmp_path / out) == 0
    npz = np.load(tmp_path / "z.npz")
    assert npz["key"].tolist() == expected["keys"] and npz["embedding"].dtype == np.float32
    np.testing.assert_allclose(npz["embedding"], expected["images"], atol=ATOL)
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy", mmap_mode="r"), npz["embedding"])
    assert (tmp_path / "z.keys.txt").read_text().splitlines() == expected["keys"]
    for path in (tmp_path / "z.parquet", tmp_path / "parts"):
        table = pq.read_table(path)
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
        assert table["key"].to_pylist() == expected["keys"]
        np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), npz["embedding"])
    parts = sorted((tmp_path / "parts").glob("*.parquet"))
    assert [path.name for path in parts] == [f"part-{n:05d}.parquet" for n in range(3)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"z.npz", "z.npy", "z.keys.txt", "z.parquet", "parts"}  # no hidden parts are left


def test_a_folder_of_images_and_a_text_file(folder, expected, tmp_path, caplog):
    assert embed(folder, "images", tmp_path / "z.npz") == 0
    found = np.load(tmp_path / "z.npz")
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    assert found["key"].tolist() == [f"{'more/' if n % 2 else ''}{n:02d}.jpg" for n in order]
    np.testing.assert_allclose(found["embedding"], expected["images"][order], atol=ATOL)
    assert "cannot be decoded: {'corrupt_image': 1}" in caplog.text or "{'truncated': 1}" in caplog.text
    for name in ("t.npz", "t.parquet"):
        assert embed(folder, "texts.txt", tmp_path / name) == 0
    found = np.load(tmp_path / "t.npz")
    assert found["text"].tolist() == TEXTS and found["key"].tolist() == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose(found["embedding"], expected["texts"], atol=ATOL)
    assert pq.read_table(tmp_path / "t.parquet").column_names == ["key", "embedding", "text"]


def test_a_key_of_several_images_is_told(folder, expected, tmp_path, caplog):
    (tmp_path / "toy.tar").write_bytes((folder / "toy.tar").read_bytes())
    (tmp_path / "toy2.tar").write_bytes((folder / "toy.tar").read_bytes())
    assert embed(folder, str(tmp_path / "*.tar"), tmp_path / "z.npz") == 0
    assert "40 images of" in caplog.text and "have 20 keys" in caplog.text
    np.testing.assert_allclose(np.load(tmp_path / "z.npz")["embedding"], np.tile(expected["images"], (2, 1)), atol=ATOL)


def test_captions_of_shards(folder, expected, tmp_path):
    for data, field in (("toy.tar", "captions.en"), ("toy.parquet", "txt")):
        assert embed(folder, data, tmp_path / "t.npz", "--captions", field) == 0
        found = np.load(tmp_path / "t.npz")
        assert found["key"].tolist() == expected["keys"]
        np.testing.assert_allclose(found["embedding"], expected["captions"], atol=ATOL)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tokens(folder, expected, tmp_path, dtype):
    assert embed(folder, "toy.tar", tmp_path / "z.npy", "--tokens", "--dtype", dtype) == 0
    found = np.load(tmp_path / "z.npy", mmap_mode="r")
    found = found.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else found
    assert found.shape == (20, 4, 32) and found.dtype == dtype
    # One rounding to so many bits of a number of up to `top`, beside the float32 roundings.
    top, bits = np.abs(expected["tokens"]).max(), {"float16": 11, "bfloat16": 8}[dtype]
    assert np.abs(found.astype(np.float32) - expected["tokens"]).max() <= 2.0**-bits * top + 1e-5
    if dtype == "float16":
        assert embed(folder, "toy.tar", tmp_path / "parts", "--tokens") == 0
        table = pq.read_table(tmp_path / "parts")
        assert table.schema.field("embedding").type == pa.list_(pa.list_(pa.float16(), 32), 4)
        np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float16), found)


@pytest.mark.parametrize("out", ["z.npz", "z.parquet", "parts"])
def test_a_run_that_was_killed_goes_on(folder, expected, tmp_path, monkeypatch, out):
    written, original = [], embedding_files.PartFiles.write

    def write(self, rows, part, *, until):
        if len(written) == until:
            raise KeyboardInterrupt
        written.append(rows.start)
        original(self, rows, part)

    monkeypatch.setattr(embedding_files.PartFiles, "write", functools.partialmethod(write, until=2))
    assert embed(folder, "toy.tar", tmp_path / out) == 130
    assert written == [0, 8] and not (tmp_path / out).is_file()
    monkeypatch.setattr(embedding_files.PartFiles, "write", functools.partialmethod(write, until=9))
    assert embed(folder, "toy.tar", tmp_path / out) == 0
    assert written == [0, 8, 16]
    if out == "parts":  # a folder that is whole has nothing left to compute
        assert embed(folder, "toy.tar", tmp_path / out) == 0 and len(written) == 3
    z = (
        np.load(tmp_path / out)["embedding"]
        if out == "z.npz"
        else np.array(pq.read_table(tmp_path / out)["embedding"].to_pylist())
    )
    np.testing.assert_allclose(z, expected["images"], atol=ATOL)


def test_captions_that_a_part_has_none_of(folder, tmp_path):
    table = pq.read_table(folder / "toy.parquet")
    captions = [None if 8 <= row < 16 else text for row, text in enumerate(table["txt"].to_pylist())]
    sparse = table.set_column(table.column_names.index("txt"), "txt", pa.array(captions, pa.string()))
    pq.write_table(sparse, tmp_path / "sparse.parquet")
    for out, flags in (("z.npz", ()), ("z.parquet", ()), ("t.npz", ("--tokens",))):
        assert embed(folder, str(tmp_path / "sparse.parquet"), tmp_path / out, "--captions", "txt", *flags) == 0
    found, tokens = np.load(tmp_path / "z.npz"), np.load(tmp_path / "t.npz")
    assert found["text"].tolist() == [text for text in captions if text is not None]
    assert found["embedding"].shape == (12, 32) and tokens["embedding"].shape == (12, 8, 32)
    assert pq.read_table(tmp_path / "z.parquet")["text"].to_pylist() == found["text"].tolist()


@pytest.mark.parametrize("content", ["", "{}", '{"model": "x"}', "[1]"])
def test_a_folder_with_another_about_is_not_deleted(folder, tmp_path, capsys, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "_about.json").write_text(content)
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert embed(folder, "toy.tar", tmp_path / "mine") == 2
    assert "holds a damaged _about.json; name a new one" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_parts_of_something_else_are_not_taken(folder, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / ".z.npz.parts").mkdir()
    (tmp_path / ".z.npz.parts" / "_about.json").write_text(json.dumps({"model": "another", "part_rows": 8}))
    np.savez(tmp_path / ".z.npz.parts" / "part-00000.npz", key=["x"], embedding=np.zeros((1, 32)))
    assert embed(folder, "toy.tar", tmp_path / "z.npz") == 0
    np.testing.assert_allclose(np.load(tmp_path / "z.npz")["embedding"], expected["images"], atol=ATOL)
    assert embed(folder, "toy.parquet", tmp_path / "parts") == 0
    capsys.readouterr()
    for args, told in (
        (("toy.tar", "parts"), "holds embeddings of another model, other data or other settings; name a new one"),
        (("toy.parquet", "parts", "--tokens"), "other settings; name a new one"),
        (("toy.parquet", "parts", "--image-column", "image"), "other settings; name a new one"),
        (("toy.tar", "."), "has other files; name a new one"),
        (("toy.tar", "z.grid.npy"), "names that end in .grid.npy are for the grids beside an .npy"),
        (("toy.tar", "z.csv"), "must end in .npz, .npy or .parquet, or be a folder"),
        (("toy.tar", "no/z.npz"), "of --out does not exist; make it first"),
        (("toy.tar", "z.parquet", "--dtype", "bfloat16"), "Parquet has no bfloat16; use --dtype float16"),
        (("toy.tar", "z.npz", "--captions", "captoins"), "has a field 'captoins'; there are caption"),
        (("texts.txt", "z.npz", "--captions", "txt"), "is a text file"),
        (("none.txt", "z.npz"), "none.txt: No such file"),
        (("images/more/01.jpg", "z.npz"), "is of no known format"),
    ):
        data, out, *flags = args
        assert embed(folder, data, tmp_path / out, *flags) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("siglip: error: ") == 1 and "Traceback" not in error, error
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    for name, told in (("empty", "holds neither images nor shards"), ("blank.txt", "holds no text")):
        assert embed(folder, str(tmp_path / name), tmp_path / "z.npz") == 2
        assert told in capsys.readouterr().err
