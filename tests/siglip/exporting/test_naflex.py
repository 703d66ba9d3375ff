"""Exports of a NaFlex model, each read back; and the one for images of a single size, which fixed-grid consumers take."""

import dataclasses
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

import siglip
from data_pipelines.sources.opening import open_source
from siglip.cli.exporting import sample_inputs
from siglip.errors import UserError
from siglip.exporting.export import export
from siglip.formats import big_vision
from siglip.models.naflex import NaflexConfig, Patches
from siglip.models.resample import _between_edges
from siglip.models.text import TokenConfig
from siglip.models.vit import cut_patches
from siglip.trees import flatten
from tests.data_pipelines.shards import SAMPLE
from tests.siglip.exporting.sources import samples
from tests.siglip.formats.test_big_vision import same
from tests.siglip.rounding import towers_apart
from tests.siglip.texts import trained_pieces
from tests.siglip.tiny import random_params, square_model

CONFIG = square_model(image={"image_size": (24, 24), "naflex": NaflexConfig(12, 40)})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("naflex") / "model.npz"
    big_vision.write(path, random_params(CONFIG), CONFIG)
    return path


def test_the_npz_has_the_published_shapes_and_comes_back(source, tmp_path):
    with np.load(source) as stored:
        assert stored["params/img/embedding/kernel"].shape == (192, 36)
        assert stored["params/img/pos_embedding"].shape == (3, 3, 36)
    found, config = big_vision.read(source)
    same(found, random_params(CONFIG))
    assert config == CONFIG and big_vision.sidecar(source).exists()  # the shapes do not tell its lengths
    standard = dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, naflex=NaflexConfig()))
    big_vision.write(tmp_path / "standard.npz", random_params(CONFIG), standard)
    assert not big_vision.sidecar(tmp_path / "standard.npz").exists()
    assert big_vision.read_config(tmp_path / "standard.npz").image.naflex == NaflexConfig()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"img/pos_embedding": (1, 9, 36)}, r"img/pos_embedding \(1, 9, 36\) is not \(rows, columns, width\)"),
        ({"img/embedding/kernel": (190, 36)}, r"not of patches of \(7, 7\) px in three colours"),
        ({"img/pos_embedding": (9, 1, 36)}, "has 9 x 1 positions, but the config's image has 3 x 3 patches"),
        (
            {"img/embedding/kernel": (8, 8, 3, 36), "img/pos_embedding": (1, 9, 36)},
            "is of a tower for images of one size, but its config is a NaFlex tower's: a mixture",
        ),
    ],
)
def test_a_mixture_of_both_kinds_is_one_line(source, tmp_path, changes, words):
    with np.load(source) as stored:
        arrays = dict(stored)
    for name, shape in changes.items():
        arrays[f"params/{name}"] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "mixed.npz", **arrays)
    if "config" in words:
        shutil.copy(big_vision.sidecar(source), big_vision.sidecar(tmp_path / "mixed.npz"))
    with pytest.raises(UserError, match=words) as error:
        big_vision.read(tmp_path / "mixed.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("grid", [(2, 8), (2, 6)], ids=str)
def test_the_grid_of_a_published_npz_is_that_of_its_positions(tmp_path, grid):
    """Without a config file beside it; 2 x 8 positions are not 4 x 4."""
    image = dataclasses.replace(CONFIG.image, image_size=(grid[0] * 8, grid[1] * 8), naflex=NaflexConfig())
    config = dataclasses.replace(CONFIG, image=image)
    big_vision.write(tmp_path / "model.npz", random_params(config), config)
    big_vision.sidecar(tmp_path / "model.npz").unlink()
    found, found_config = big_vision.read(tmp_path / "model.npz")
    assert found_config.image.grid == grid
    same(found, random_params(config))


@pytest.mark.parametrize(
    "format, tower",
    [
        ("hf", "both"),
        ("bigvision", "image"),
        ("stablehlo", "image"),
        pytest.param("hf", "image", marks=pytest.mark.slow),
        pytest.param("bigvision", "both", marks=pytest.mark.slow),
        pytest.param("stablehlo", "both", marks=pytest.mark.slow),
    ],
)
def test_exports_agree_with_their_source(source, tmp_path, monkeypatch, capsys, format, tower):
    report = export(source, format=format, out=tmp_path / "out", tower=tower)
    found = report.differences["random"]
    assert set(found) >= {"image_tokens", "image_embedding"} and max(found.values()) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the largest grid of at most 12 that keeps the aspect ratio" in card
    assert format != "hf" or "one column of several patches" in card and "one column of several" in report.message
    if format != "stablehlo":
        assert siglip.load(tmp_path / "out").config.image.naflex == CONFIG.image.naflex
    if format != "hf" and tower == "image":
        monkeypatch.chdir(tmp_path / "out")
        exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
        assert "(1, 12, 36) " in capsys.readouterr().out or format == "stablehlo"


@pytest.mark.interop
@pytest.mark.parametrize("tower", ["image", "both"])
def test_transformers_reads_what_is_exported(source, tmp_path, tower):
    """From files: its own preprocessor makes the patches, its own tower the embeddings."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pairs = open_source(str(SAMPLE / "emoji-heldout-*.tar"))
    samples = lambda config, tokenizer: sample_inputs(pairs, config, tokenizer)  # noqa: E731
    report = export(source, format="hf", out=tmp_path / "out", tower=tower, samples=samples)
    assert (
        report.verified and report.differences["sample"]["pixels"] < 3e-7 and report.differences["sample"]["grid"] == 0
    )
    assert max(value for found in report.differences.values() for value in found.values()) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Siglip2VisionModel" in card  # there is no tokenizer for an example with texts


@pytest.mark.slow
def test_a_saved_model_takes_patches_and_strings(source, tmp_path):
    pytest.importorskip("tensorflow_text")
    path = tmp_path / "model.npz"
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=4000, length=8))
    big_vision.write(path, random_params(config), config)
    (tmp_path / "spiece.model").write_bytes((SAMPLE / "spiece.model").read_bytes())
    pairs = open_source(str(SAMPLE / "emoji-heldout-*.tar"))
    samples = lambda config, tokenizer: sample_inputs(pairs, config, tokenizer)  # noqa: E731
    report = export(path, format="savedmodel", out=tmp_path / "out", tower="both", samples=samples)
    found = report.differences["sample"]
    wanted = {"image_tokens", "image_embedding", "text_embedding", "logits", "probabilities", "tokens"}
    assert set(found) == wanted and max(found.values()) < 1e-5 and report.verified
    assert "patches and grids go in" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "format, size",
    [
        pytest.param("bigvision", (24, 24), marks=pytest.mark.slow),
        ("bigvision", (40, 16)),
        pytest.param("hf", (24, 24), marks=pytest.mark.interop),
        pytest.param("hf", (40, 40), marks=pytest.mark.interop),
    ],
)
def test_for_images_of_one_size_it_is_the_same_function(source, tmp_path, format, size):
    """At the table's own grid and at others: positions are resized as the NaFlex tower resizes them."""
    export(source, format=format, out=tmp_path / "fixed", image_size=size)
    fixed, naflex = siglip.load(tmp_path / "fixed"), siglip.load(source)
    assert fixed.config.image.naflex is None and fixed.config.image.image_size == size
    images = np.random.default_rng(0).uniform(-1, 1, (3, *size, 3)).astype(np.float32)
    tokens, mask = naflex.image_tokens(images, max_patches=40)
    zimg = naflex.embed_images(images, max_patches=40)
    tokens = np.asarray(tokens)[np.asarray(mask)].reshape(3, -1, 36)
    ways = [(fixed.image_tokens(images), fixed.embed_images(images))]
    if format == "hf":
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        model, loading = transformers.SiglipVisionModel.from_pretrained(tmp_path / "fixed", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        with torch.no_grad():
            theirs = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
        pooled = torch.nn.functional.normalize(theirs.pooler_output)
        ways.append((theirs.last_hidden_state.numpy(), pooled.numpy()))
    for found_tokens, found_zimg in ways:
        np.testing.assert_allclose(found_tokens, tokens, rtol=0, atol=towers_apart(CONFIG, tokens))
        np.testing.assert_allclose(found_zimg, zimg, rtol=0, atol=towers_apart(CONFIG))


@pytest.mark.parametrize(
    "reader",
    [
        "hf",
        "bigvision",
        pytest.param("transformers", marks=pytest.mark.interop),
        pytest.param("savedmodel", marks=pytest.mark.slow),
    ],
)
def test_texts_of_siglip_2_on_every_way_out(tmp_path, reader):
    """Gemma's pieces of the lower-cased text, the end token, and pads of 0."""
    text = {"vocab_size": 1500, "length": 32, "tokens": TokenConfig(pad_id=0, lower="character", canonical="none")}
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, **text))
    big_vision.write(tmp_path / "model.npz", random_params(config), config)
    (tmp_path / "spiece.model").write_bytes(trained_pieces("gemma"))
    out = tmp_path / "out"
    format = "hf" if reader == "transformers" else reader
    with_samples = {"samples": samples} if format == "savedmodel" else {}  # it takes nothing else
    export(tmp_path / "model.npz", format=format, out=out, tower="both", **with_samples)

    texts = ["A Red HAT,  a dog!", "ÉCLAIR \u4f60 ΣΑΣ", "<img>\nDOG"]
    if reader == "savedmodel":
        tf = pytest.importorskip("tensorflow")
        pytest.importorskip("tensorflow_text")
        found = tf.saved_model.load(str(out)).signatures["tokens"](texts=tf.constant(texts))["tokens"].numpy()
    elif reader == "transformers":
        theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
        found = theirs(texts, padding="max_length", max_length=32, truncation=True, return_tensors="np")["input_ids"]
    else:
        model = siglip.load(out)
        assert model.config.text.tokens == config.text.tokens
        found = model.tokenize(texts)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained_pieces("gemma"))
    ids = [[*pieces.encode("".join(map(str.lower, one))), pieces.eos_id()] for one in texts]
    assert all(len(own) < 32 for own in ids), "a text without a pad"
    np.testing.assert_array_equal(found, [own + [0] * (32 - len(own)) for own in ids])


def test_encoders_take_patches_and_lists_of_any_images(source):
    from PIL import Image

    model, encoder = siglip.load(source), siglip.load_encoder(source)
    rng = np.random.default_rng(0)
    shown = [rng.integers(256, size=(*size, 3), dtype=np.uint8) for size in ((40, 9), (8, 60), (31, 33))]
    patches = model.pixels(shown, max_patches=20)
    assert patches.patches.shape == (3, 20, 192) and np.asarray(patches.grid).prod(axis=1).max() <= 20
    z = model.embed_images(shown, max_patches=20)
    np.testing.assert_array_equal(z, model.embed_images(patches))
    np.testing.assert_array_equal(z, model.embed_images([Image.fromarray(one) for one in shown], max_patches=20))
    tokens, mask = encoder.tokens(patches)
    theirs, same_mask = model.image_tokens(shown, max_patches=20)
    np.testing.assert_array_equal(mask, same_mask)
    np.testing.assert_array_equal(np.asarray(tokens)[mask], np.asarray(theirs)[mask])
    assert encoder.pooled(patches).shape == (3, 36) and encoder.spec.tokens == 12
    each, valid = model.embed_patches(patches)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(each)[np.asarray(valid)], axis=-1), 1, atol=1e-5)
    assert "images of any size in up to 12 patches" in repr(model)


@pytest.mark.parametrize(
    "images, options, words",
    [
        ([np.zeros((4, 4, 3), np.uint8)], {"max_patches": 41}, "max_patches=41 must lie in 1 … 40"),
        ([np.zeros((4, 4, 3), np.uint8)], {"max_patches": 0}, "max_patches=0 must lie in 1 … 40"),
        ([np.zeros((0, 4, 3), np.uint8)], {}, "the list of images has an entry that is ndarray"),
        (np.zeros((1, 12, 24, 3), np.float32), {}, "sides of whole patches of .* px, at most max_patches=12"),
        (
            Patches(np.zeros((1, 4, 192), np.float32), np.array([[3, 2]])),
            {},
            r"grid \(3, 2\) .* does not fit 4 patches",
        ),
        (Patches(np.zeros((1, 4, 192), np.uint8), np.array([[2, 2]])), {}, "patches are uint8; pass float32"),
        (Patches(np.full((1, 4, 192), 255.0), np.array([[2, 2]])), {}, r"pixels lie in \[255, 255\]; pass float32"),
        (Patches(np.zeros((1, 4, 192), np.float32), np.array([[1.9, 1.9]])), {}, "grid is float.*; pass int32"),
        (Patches(np.zeros((1, 4, 192), np.float32), np.array([[2, 2]])), {"max_patches": 2}, "Patches are cut already"),
        (Patches(np.zeros((1, 4, 191), np.float32), np.array([[2, 2]])), {}, r"the model takes \[b, n, 192\]"),
    ],
)
def test_bad_images_are_one_line(source, images, options, words):
    with pytest.raises(UserError, match=words) as error:
        siglip.load(source).embed_images(images, **options)
    assert "\n" not in str(error.value)


def test_padding_may_hold_anything(source):
    patches = np.full((1, 4, 192), np.nan, np.float32)
    patches[:, :3] = 0.5
    assert np.isfinite(siglip.load(source).embed_images(Patches(patches, np.array([[1, 3]])))).all()


@pytest.mark.parametrize(
    "options, images, words",
    [
        ({}, np.zeros((1, 24, 24, 3), np.float32), "this tower is NaFlex: it takes Patches"),
        (
            {"image_size": 24},
            Patches(np.zeros((1, 9, 192), np.float32), np.array([[3, 3]])),
            "not Patches; it is not NaFlex",
        ),
    ],
)
def test_encoders_are_told_apart_in_one_line(source, options, images, words):
    with pytest.raises(UserError, match=words) as error:
        siglip.load_encoder(source, **options).tokens(images)
    assert "\n" not in str(error.value)


def test_lengths_are_of_naflex_models_alone(source):
    with pytest.raises(UserError, match="max_patches=9: this tower takes images of .* it is not NaFlex"):
        siglip.load(source, image_size=24).embed_images([np.zeros((4, 4, 3), np.uint8)], max_patches=9)


def test_enlarged_patches_give_the_source_s_embeddings(source):
    """Each patch resized by itself, as FlexiViT's kernel has it."""
    model, theirs = siglip.load(source, patch_size=16), siglip.load(source)
    assert model.config.image.naflex == CONFIG.image.naflex and model.config.image.grid == (3, 3)
    assert flatten(model.params)["img/embedding/kernel"].shape == (16, 16, 3, 36)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 40, 3)).astype(np.float32)
    patches, resize = np.asarray(cut_patches(jnp.asarray(images), (8, 8))).reshape(2, 5, 8, 8, 3), _between_edges(8, 16)
    larger = np.einsum("ih,jw,bnhwc->bnijc", resize, resize, patches).reshape(2, 5, 768).astype(np.float32)
    found = model.embed_images(Patches(larger, np.array([[1, 5]] * 2)))
    np.testing.assert_allclose(found, theirs.embed_images(images), rtol=0, atol=towers_apart(CONFIG))
