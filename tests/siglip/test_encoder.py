"""siglip.load: every source, any resolution, and errors that say what to do."""

import dataclasses
import io
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_ops import resize
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.encoder import Encoder, load
from siglip.errors import UserError
from siglip.formats import big_vision, hugging_face
from siglip.formats.big_vision import image_only
from siglip.models.layers import MAPHead
from tests.data_pipelines.shards import SPIECE
from tests.siglip.rounding import rounding, towers_apart
from tests.siglip.tiny import random_inputs, random_params, square_model


@pytest.fixture(scope="module")
def model() -> Encoder:
    config = square_model()
    return Encoder(random_params(config), config)


@pytest.mark.parametrize("name", ["a", "c"])
def test_public_face_gives_big_visions_numbers(fixtures, name):
    stored = np.load(fixtures / f"bv_tiny_{name}.npz")
    model = load(str(fixtures / f"bv_tiny_{name}.npz"))
    zimg, ztxt = model.embed_images(stored["input/image"]), model.embed_texts(stored["input/text"])
    for found, key in (
        (zimg, "zimg"),
        (ztxt, "ztxt"),
        (model.image_tokens(stored["input/image"]), "img_tokens"),
        (model.logits(zimg, ztxt), "logits"),
    ):
        assert found.dtype == jnp.float32
        expected = stored[f"out/{key}"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=towers_apart(model.config, expected))


def test_another_resolution(tmp_path):
    config = square_model()
    params = random_params(config)
    big_vision.write(tmp_path / "m.npz", params, config)
    model = load(tmp_path / "m.npz", image_size=(48, 64))
    assert model.config.image.image_size == (48, 64) and model.image_tokens(np.zeros((2, 48, 64, 3))).shape == (
        2,
        48,
        36,
    )
    same_grid = load(tmp_path / "m.npz", image_size=39)
    np.testing.assert_array_equal(same_grid.params["img"]["pos_embedding"], params["img"]["pos_embedding"])
    with pytest.raises(ValueError, match="holds no patch"):
        load(tmp_path / "m.npz", image_size=4)


def test_all_sources_of_one_model_agree(tmp_path, model):
    (tmp_path / "hf").mkdir()
    (tmp_path / "bv").mkdir()
    hugging_face.write(tmp_path / "hf", model.params, model.config)
    big_vision.write(tmp_path / "bv" / "model.npz", model.params, model.config)
    (tmp_path / "bv" / "spiece.model").write_bytes(b"pieces")
    images, _ = random_inputs(model.config)
    expected = model.embed_images(images)
    for src in ("hf", "bv", "bv/model.npz", "bv/model.npz:img"):
        found = load(tmp_path / src)
        np.testing.assert_allclose(found.embed_images(images), expected, rtol=0, atol=towers_apart(model.config))
        assert (found.tokenizer is not None) == src.startswith("bv")


def test_calls_work_inside_jit_and_for_any_batch(model):
    images, ids = random_inputs(model.config)
    expected = model.embed_images(images)
    np.testing.assert_allclose(jax.jit(model.embed_images)(images), expected, rtol=0, atol=towers_apart(model.config))
    np.testing.assert_allclose(model.embed_images(images[:1]), expected[:1], rtol=0, atol=towers_apart(model.config))
    np.testing.assert_allclose(
        jax.jit(model.embed_texts)(ids), model.embed_texts(ids), rtol=0, atol=towers_apart(model.config)
    )
    scores = model.logits(expected, model.embed_texts(ids[:2]))
    assert scores.shape == (3, 2)


def test_inputs_that_do_not_fit_are_named(model):
    images, ids = random_inputs(model.config)
    for call, words in [
        (
            lambda: model.embed_images(images[:, :24]),
            r"shape \(3, 24, 32, 3\) .* \[b, 32, 32, 3\]; resize them, or load",
        ),
        (lambda: model.embed_images(images[0]), "shape"),
        (lambda: model.image_tokens((images * 127).astype(np.uint8)), "images are uint8; pass float32 in"),
        (lambda: model.embed_texts(ids[:, :3]), r"pad or cut them to \[b, 7\]"),
        (lambda: model.embed_texts(ids.astype(np.float32)), "tokens are float32"),
        (lambda: model.embed_texts(ids + 61), "outside the vocabulary of 61"),
        (lambda: model.embed_texts(ids - 61), "outside the vocabulary of 61"),
        (lambda: model.embed_texts(text for text in ["a"]), "texts is generator; pass a list of strings"),
        (lambda: model.embed_texts({"a": "b"}), "texts is dict; pass a list of strings"),
        (lambda: model.embed_images("cat.jpg"), "images is str; pass a list of Pillow images"),
        (lambda: model.image_tokens(None), "images is NoneType; pass a list of Pillow images"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_an_image_tower_alone_says_what_it_lacks(model):
    alone = Encoder({"img": model.params["img"]}, image_only(model.config))
    with pytest.raises(ValueError, match="only the image tower"):
        alone.embed_texts(np.zeros((1, 7), np.int32))
    with pytest.raises(ValueError, match="only the image tower"):
        alone.logits(np.zeros((1, 36)), np.zeros((1, 36)))
    config = dataclasses.replace(alone.config, image=dataclasses.replace(alone.config.image, pool="none"))
    params = {name: leaf for name, leaf in model.params["img"].items() if name != "MAPHead_0"}
    images, _ = random_inputs(config)
    bare = Encoder({"img": params}, config)
    tokens = model.image_tokens(images)
    np.testing.assert_allclose(bare.image_tokens(images), tokens, rtol=0, atol=towers_apart(config, tokens))
    with pytest.raises(ValueError, match="no pooling"):
        bare.embed_images(images)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"")
    (tmp_path / "file.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing at"):
        load(tmp_path / "absent")
    for src in ("file.txt", "folder"):
        with pytest.raises(ValueError, match="is not a model; a model is a run's workdir"):
            load(tmp_path / src)
    others = ("adapter/adapter_config.json", "exported/saved_model.pb")
    for name in (*others, "a.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for src, error, words in (
        (tmp_path / "adapter", UserError, "is a LoRA adapter: merge it"),
        (tmp_path / "exported", UserError, "is an exported program: name the model"),
        (tmp_path / "a.safetensors", UserError, "one file of a Hugging Face model; name the folder"),
        (tmp_path / "file.bin", UserError, "a file of torch, which may run code .* save_pretrained"),
        (
            "google/siglip-base-patch16-224",
            FileNotFoundError,
            "hf download google/siglip-base-patch16-224 --local-dir DIR",
        ),
        ("gs://big_vision/siglip/webli_en_b16_224.npz:img", UserError, "is a URL; .* copy it here first"),
    ):
        with pytest.raises(error, match=words) as told:
            load(src)
        assert "\n" not in str(told.value)


def test_torch_arrays_in_an_npz(tmp_path):
    np.savez(tmp_path / "torch.npz", **{"vision_model.post_layernorm.weight": np.zeros(4, np.float32)})
    with pytest.raises(UserError, match=r"torch.npz has keys of torch .*save_pretrained"):
        load(tmp_path / "torch.npz")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = square_model()
    big_vision.write(tmp_path / "m.npz", random_params(config), config)
    for src in ("~/m.npz", "~/m.npz:img"):
        assert load(src).config.image.spec == config.image.spec


def test_an_encoder_is_pickled_and_shown_in_one_line(model):
    images, ids = random_inputs(model.config)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.embed_images(images), model.embed_images(images))
    np.testing.assert_array_equal(again.embed_texts(ids), model.embed_texts(ids))
    assert len(repr(model)) < 120 and "32 x 32 px" in repr(model)


def test_strings_are_embedded_as_their_tokens_are(tmp_path):
    config = square_model(text={"vocab_size": 4000})
    big_vision.write(tmp_path / "m.npz", random_params(config), config)
    with pytest.raises(UserError, match="came without a tokenizer"):
        load(tmp_path / "m.npz").embed_texts(["a cat"])
    (tmp_path / "spiece.model").write_bytes(Path(SPIECE).read_bytes())
    model, texts = load(tmp_path / "m.npz"), ["A cat", "zwei Hunde im Schnee, die einer Katze nachlaufen"]
    ids = np.stack([SentencePieceTokenizer(SPIECE).encode(text, 7) for text in texts])
    for given in (texts, tuple(texts), np.array(texts), np.array(texts, object)):
        np.testing.assert_array_equal(model.embed_texts(given), model.embed_texts(ids))
    for given, told in (
        ("a cat", r"takes a list of texts, not one: pass \['a cat'\]"), ([], "the list of texts is empty"),
        (["a cat", None], "has an entry that is NoneType"), ([3], "has an entry that is int; pass strings"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            model.embed_texts(given)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).embed_texts(texts), model.embed_texts(ids))


@pytest.fixture(scope="module")
def with_texts() -> Encoder:
    config = square_model(text={"vocab_size": 4000})
    return Encoder(random_params(config), config, tokenizer=Path(SPIECE))


def test_images_of_any_size_and_strings_go_in_as_they_are(with_texts):
    model, rng = with_texts, np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((50, 40), (32, 32), (17, 90))]
    resized = np.stack([resize(one, (32, 32)) for one in pixels]) / np.float32(127.5) - 1
    np.testing.assert_allclose(model.pixels(pixels), resized, atol=1e-6)
    np.testing.assert_array_equal(model.pixels([Image.fromarray(one) for one in pixels]), model.pixels(pixels))
    np.testing.assert_array_equal(resized[1], np.asarray(pixels[1] / np.float32(127.5) - 1))
    images, texts = [Image.fromarray(one) for one in pixels], ["a red ball", "ein roter Ball"]
    zimg, ztxt = model.embed_images(images), model.embed_texts(texts)
    np.testing.assert_array_equal(zimg, model.embed_images(model.pixels(pixels)))
    p = model.probabilities(images, texts)
    assert p.shape == (3, 2) and p.dtype == jnp.float32
    t, b = (float(model.params[name][0]) for name in "tb")
    logits = np.exp(t) * np.asarray(zimg, np.float64) @ np.asarray(ztxt, np.float64).T + b
    # logits of about exp(t) = 10: rounding of the product and of exp(t) is some 1e-6 of it, and sigmoid's slope is at most 1/4
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-logits)), rtol=1e-4, atol=1e-7)
    assert model.image_tokens(images).shape == (3, 16, 36)


def test_an_image_is_seen_as_a_browser_shows_it(with_texts):
    model, left_black = with_texts, np.full((32, 32, 3), 255, np.uint8)
    left_black[:, :16] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter: shown after a turn clockwise
    file = io.BytesIO()
    Image.fromarray(left_black).save(file, "png", exif=exif)
    shown = np.rot90(left_black, -1)
    np.testing.assert_array_equal(model.pixels([Image.open(file)]), model.pixels([np.ascontiguousarray(shown)]))
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    np.testing.assert_array_equal(model.pixels([clear]), np.ones((1, 32, 32, 3), np.float32))
    assert model.pixels([Image.new("L", (9, 9), 255)]).shape == (1, 32, 32, 3)


def test_lists_that_are_not_images(with_texts):
    for images, told in (
        (["cat.jpg"], "is str; pass Pillow images"),
        ([Image.new("RGB", (4, 4)), np.zeros((4, 4, 3))], "is ndarray"),
        ([], "the list of images is empty"),
        (Image.new("RGB", (4, 4)), r"pass \[image\]"),
    ):
        with pytest.raises(UserError, match=told):
            with_texts.embed_images(images)


@pytest.mark.parametrize("pool", ["map", "gap", "tok"])
def test_a_patch_is_embedded_as_an_image_whose_tokens_are_all_that_patchs(pool):
    """Pooling n equal tokens, by attention or as a mean, is pooling one of them."""
    config = square_model(image={"pool": pool})
    model = Encoder(random_params(config), config)
    images = random_inputs(config, batch=2)[0]
    z, tokens = np.asarray(model.embed_patches(images)), np.asarray(model.image_tokens(images))
    assert z.shape == (2, 16, 36)
    # A norm is off by half as much as its sum of 36 squares; then come its root and a division.
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=0, atol=2 * rounding(36 // 2 + 2))
    atol = towers_apart(config, z)
    if pool != "map":
        own = tokens[:, 1:] if pool == "tok" else tokens
        np.testing.assert_allclose(z, own / np.linalg.norm(own, axis=-1, keepdims=True), rtol=0, atol=atol)
        return
    repeated = jnp.repeat(jnp.asarray(tokens[:1, 3:4]), 16, axis=1)
    head = MAPHead(config.image.spec, np.dtype("float32")).apply(
        {"params": model.params["img"]["MAPHead_0"]}, repeated
    )[0]
    np.testing.assert_allclose(z[0, 3], head / np.linalg.norm(head), rtol=0, atol=atol)
