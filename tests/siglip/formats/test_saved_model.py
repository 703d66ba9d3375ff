"""A SavedModel takes files and raw text, gives our numbers, and needs neither jax nor us."""

import io
import struct
import subprocess
import sys
import textwrap
import zlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from data_pipelines.image_ops import PILLOW_FILTERS, decode_image
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.encoder import Encoder
from siglip.exporting.verification import TOLERANCE
from siglip.formats import saved_model, tf_pixels, tf_tokens
from siglip.formats.big_vision import image_only
from siglip.models.text import TextConfig, TokenConfig
from siglip.models.vit import PixelConfig
from tests.siglip.rounding import towers_apart
from tests.siglip.texts import HAND_PICKED, SAMPLE, SPIECE, STRINGS, captions
from tests.siglip.tiny import random_params, square_model

# Importing TensorFlow alone takes longer than a fast test may.
pytestmark = pytest.mark.slow

SIZE, LENGTH = (32, 40), 16
TEXTS = [text for text in HAND_PICKED if "\x00" not in text][:20] + captions(every=3000)


@pytest.fixture(scope="module", autouse=True)
def tf():
    """TensorFlow, once a test runs: at the top of this file, every worker would import it to collect the tests."""
    pytest.importorskip("tensorflow_text")
    return pytest.importorskip("tensorflow")


def config():
    """A model whose inputs are prepared in none of the ways that are the default."""
    pixels, tokens = (
        PixelConfig((0.4, 0.45, 0.5), (0.2, 0.25, 0.3), "bicubic"),
        TokenConfig(pad_id=0, lower="character"),
    )
    image = {"image_size": SIZE, "pixels": pixels}
    return square_model(image=image, text={"length": LENGTH, "vocab_size": 4000, "tokens": tokens})


@pytest.fixture(scope="module")
def files():
    source = TarSource(str(sorted(SAMPLE.glob("*.tar"))[0]))
    return [source[i].image for i in range(0, 60, 12)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, params) of a model with both towers."""
    folder, params = tmp_path_factory.mktemp("saved") / "model", random_params(config())
    folder.mkdir()
    saved_model.write(folder, params, config(), tokenizer=SPIECE)
    return folder, params


def resized(file: bytes, size: tuple[int, int], resample: str = "bilinear") -> np.ndarray:
    """As Pillow resizes; what the training pipeline does may be 1/255 off where it has a faster resizer."""
    image = decode_image(file, max_pixels=1 << 25)
    return np.asarray(image.resize(size[::-1], PILLOW_FILTERS[resample]))


def check_outputs(params: dict, files: list[bytes], found: dict[str, np.ndarray]) -> None:
    """All outputs against our own model on our own pixels and ids."""
    model, tokenizer = Encoder(params, config()), SentencePieceTokenizer(SPIECE, **vars(config().text.tokens))
    pixels = np.stack([resized(file, SIZE, "bicubic") for file in files]).astype(np.float32) / 127.5 - 1
    tokens = np.stack([tokenizer.encode(text, LENGTH) for text in TEXTS])
    np.testing.assert_array_equal(found["tokens"], tokens)
    np.testing.assert_array_equal(found["pixels"], pixels)
    with jax.default_matmul_precision("highest"):
        expected = {"image_tokens": model.image_tokens(pixels), "image_embedding": model.embed_images(pixels)}
        expected["text_embedding"] = model.embed_texts(tokens)
        expected["logits"] = model.logits(expected["image_embedding"], expected["text_embedding"])
    expected["probabilities"] = 1 / (1 + np.exp(-np.asarray(expected["logits"], np.float64)))
    assert found.keys() == expected.keys() | {"pixels", "tokens"}
    for name, array in expected.items():
        atol = towers_apart(config(), array)
        np.testing.assert_allclose(found[name], np.asarray(array), rtol=0, atol=atol, err_msg=name)


def test_outputs_are_ours(written, files):
    folder, params = written
    check_outputs(params, files, saved_model.outputs(folder, files, TEXTS))
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["fingerprint.pb", "saved_model.pb"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    stored = sum(path.stat().st_size for path in (folder / "variables").iterdir())
    assert weights < stored < weights + 100_000


ALONE = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("jax", "jaxlib", "flax", "siglip", "data_pipelines", "PIL", "sentencepiece"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocker())
    import numpy as np
    import tensorflow as tf
    import tensorflow_text

    folder, given, out, tolerance = sys.argv[1:]
    given = np.load(given)
    images = tf.constant([given[f"image{i}"].tobytes() for i in range(int(given["images"]))])
    texts = tf.constant([given[f"text{i}"].tobytes() for i in range(int(given["texts"]))])
    run = tf.saved_model.load(folder).signatures
    found = dict(run["serving_default"](images=images, texts=texts))
    for name in ("image_tokens", "pixels"):
        found |= run[name](images=images)
    found |= run["tokens"](texts=texts)
    one = run["embed_images"](images=images[:1])["image_embedding"], run["embed_texts"](texts=texts[:1])["text_embedding"]
    for array, name in zip(one, ("image_embedding", "text_embedding")):
        np.testing.assert_allclose(array, found[name][:1], rtol=0, atol=float(tolerance))
    np.savez(out, **{name: tensor.numpy() for name, tensor in found.items()})
"""


def test_a_process_without_jax_and_siglip_gets_the_same(written, files, tmp_path):
    folder, params = written
    given = {f"image{i}": np.frombuffer(file, np.uint8) for i, file in enumerate(files)}
    given |= {f"text{i}": np.frombuffer(text.encode(), np.uint8) for i, text in enumerate(TEXTS)}
    np.savez(tmp_path / "given.npz", **given, images=len(files), texts=len(TEXTS))
    arguments = [str(folder), str(tmp_path / "given.npz"), str(tmp_path / "found.npz"), str(TOLERANCE)]
    subprocess.run([sys.executable, "-c", textwrap.dedent(ALONE), *arguments], check=True, cwd=tmp_path, timeout=300)
    with np.load(tmp_path / "found.npz") as stored:
        found = dict(stored)
    found["pixels"] = found["pixels"].astype(np.float32) / 127.5 - 1
    check_outputs(params, files, found)


@pytest.mark.parametrize("pool", ["map", "none"])
def test_the_image_tower_alone(tmp_path, files, pool):
    alone = image_only(square_model(image={"image_size": SIZE, "pool": pool}))
    params = random_params(alone)
    saved_model.write(tmp_path, params, alone, tokenizer=None)
    found = saved_model.outputs(tmp_path, files, [])
    assert found.keys() == {"pixels", "image_tokens"} | ({"image_embedding"} if pool == "map" else set())
    expected = Encoder(params, alone).image_tokens(found["pixels"])
    atol = towers_apart(alone, expected)
    np.testing.assert_allclose(found["image_tokens"], np.asarray(expected), rtol=0, atol=atol)


def test_damaged_images_are_errors_that_say_so(tf, written, files):
    run = tf.saved_model.load(str(written[0])).signatures["pixels"]
    cases = ((b"", "neither JPEG"), (b"hello", "neither JPEG"), (files[0][:-300], "Invalid JPEG data"))
    for data, words in cases:
        with pytest.raises(tf.errors.InvalidArgumentError, match=words):
            run(images=tf.constant([files[1], data]))


def test_texts_need_their_tokenizer(tmp_path):
    params = random_params(config())
    with pytest.raises(ValueError, match="has no tokenizer.*--tower image"):
        saved_model.write(tmp_path, params, config(), tokenizer=None)
    small = square_model(text={"vocab_size": 61})
    with pytest.raises(ValueError, match="has 4000 pieces, the text tower room for 61"):
        saved_model.write(tmp_path, random_params(small), small, tokenizer=SPIECE)
    assert not list(tmp_path.iterdir())


TOKENS = [
    TokenConfig(),
    TokenConfig(pad_id=0, lower="character", canonical="none"),
    TokenConfig(canonical="texts"),
    TokenConfig(pad_id=0, end=False, lower="none"),
]


@pytest.fixture(scope="module", params=TOKENS, ids=["siglip", "siglip2", "canonical", "bare"])
def tokenize(request, tf):
    """(the graph's ids, ours)."""
    import tensorflow_text as tf_text

    pieces = tf_text.SentencepieceTokenizer(model=SPIECE.read_bytes(), out_type=tf.int32)
    config = TextConfig(length=64, tokens=request.param)
    graph = tf.function(
        lambda texts: tf_tokens.tokens(texts, pieces, config, eos=1),
        autograph=False,
        input_signature=[tf.TensorSpec([None], tf.string)],
    )
    ids = lambda texts: graph(tf.constant([text.encode() for text in texts], tf.string)).numpy()  # noqa: E731
    return ids, SentencePieceTokenizer(SPIECE, **vars(request.param))


def check_tokens(both, texts: list[str]) -> None:
    tokenize, ours = both
    np.testing.assert_array_equal(tokenize(texts), np.stack([ours.encode(text, 64) for text in texts]))


def test_ids_in_the_graph(tokenize):
    check_tokens(tokenize, HAND_PICKED + captions(every=4))


@settings(deadline=None)
@given(texts=st.lists(STRINGS, min_size=1, max_size=20))
def test_ids_of_any_text_in_the_graph(tokenize, texts):
    check_tokens(tokenize, texts)


def test_lower_case_of_every_character_in_the_graph(tf):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    found = tf_tokens.lower(tf.constant([c.encode() for c in characters])).numpy()
    assert [c for c, low in zip(characters, found, strict=True) if c.lower().encode() != low] == []


@pytest.fixture(scope="module")
def pixels(tf):
    """(file, size, filter) -> the graph's pixels; traced once for each size and filter."""
    traced = {}

    def run(file: bytes, size: tuple[int, int], resample: str = "bilinear") -> np.ndarray:
        if (size, resample) not in traced:
            spec = [tf.TensorSpec([], tf.string)]
            traced[size, resample] = tf.function(
                lambda data: tf_pixels.pixels(data, size, resample), autograph=False, input_signature=spec
            )
        return traced[size, resample](tf.constant(file)).numpy()

    return run


def image(height: int, width: int, channels: int = 3) -> Image.Image:
    """Soft blobs: neither flat, nor noise that JPEG would only destroy."""
    small = np.random.default_rng(height * width).integers(
        0, 256, (height // 8 + 2, width // 8 + 2, channels), np.uint8
    )
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def png(rows: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the kinds that Pillow does not write. rows: uint8 [height, bytes a row]."""
    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, rows.shape[0], depth, colour, 0, 0, 0)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def encoded_files() -> dict[str, bytes]:
    rgb, rng = image(60, 75), np.random.default_rng(0)
    rgba = Image.merge("RGBA", [*rgb.split(), image(60, 75, 1)])
    noise = rng.integers(0, 256, (24, 48), np.uint8)
    palette = (b"PLTE", noise.tobytes()[:768])
    files = {
        "jpeg": saved(rgb, "JPEG"), "4:4:4": saved(rgb, "JPEG", subsampling=0, quality=95),
        "4:2:2": saved(rgb, "JPEG", subsampling=1), "progressive": saved(rgb, "JPEG", progressive=True),
        "grey jpeg": saved(rgb.convert("L"), "JPEG"), "cmyk jpeg": saved(rgb.convert("CMYK"), "JPEG"),
        "broken exif": saved(rgb, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "png": saved(rgb, "PNG"), "rgba": saved(rgba, "PNG"), "la": saved(rgba.convert("LA"), "PNG"),
        "1": saved(rgb.convert("1"), "PNG"),
        "l": saved(rgb.convert("L"), "PNG"), "l, one transparent": saved(rgb.convert("L"), "PNG", transparency=100),
        "p": saved(rgb.quantize(50), "PNG"), "p, 2 bits": saved(rgb.quantize(4), "PNG", bits=2),
        "p, alpha": saved(rgba.quantize(50), "PNG"),
        "one transparent": saved(rgb, "PNG", transparency=rgb.getpixel((5, 5))), "16-bit grey": png(noise, 16, 0),
        "16-bit grey, one transparent": png(noise, 16, 0, (b"tRNS", noise.tobytes()[:2])), "16-bit rgb": png(noise, 16, 2),
        "16-bit la": png(noise, 16, 4), "16-bit rgba": png(noise, 16, 6), "4-bit grey": png(noise, 4, 0),
        "4-bit p, alpha": png(noise, 4, 3, palette, (b"tRNS", b"\0\x80")),
        "webp": saved(rgb, "WEBP"), "webp, alpha": saved(rgba, "WEBP"), "lossless webp": saved(rgba, "WEBP", lossless=True),
        "gif": saved(rgb.quantize(50), "GIF"), "bmp": saved(rgb, "BMP"),
    }  # fmt: skip
    for orientation in range(1, 9):
        files[f"jpeg, turned {orientation}"] = saved(rgb, "JPEG", exif=oriented(orientation))
        files[f"png, turned {orientation}"] = saved(rgb, "PNG", exif=oriented(orientation))
    return files


@pytest.mark.parametrize("kind", encoded_files())
def test_every_kind_of_file_is_decoded_as_ours(pixels, kind):
    file = encoded_files()[kind]
    np.testing.assert_array_equal(pixels(file, (24, 30)), resized(file, (24, 30)))


@pytest.mark.parametrize(
    "height, width",
    [
        (1, 1),
        (3, 300),
        (300, 3),
        (24, 30),
        (24, 90),
        (90, 30),
        (37, 53),
        (200, 150),
        (150, 200),
        (60, 47),
        (61, 47),
        (500, 700),
    ],
)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(24, 30), (64, 64), (224, 224)])
def test_resizing_is_pillows_to_the_bit(pixels, height, width, size, resample):
    file = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)), "PNG")
    np.testing.assert_array_equal(pixels(file, size, resample), resized(file, size, resample))


def test_what_the_docstring_refuses_is_refused(tf, pixels):
    for file in (saved(image(9, 9).quantize(16), "BMP"), saved(image(9, 9), "AVIF"), saved(image(9, 9), "TIFF")):
        with pytest.raises(tf.errors.InvalidArgumentError, match="neither JPEG, PNG, WebP, GIF nor BMP of 24 bits"):
            pixels(file, (24, 30))
