"""siglip.load: every source, any resolution, and errors that say what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.encoder import Encoder, load
from siglip.formats import big_vision, hugging_face
from siglip.formats.big_vision import image_only
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import random_inputs, random_params, square_model

pytestmark = pytest.mark.unoptimized


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
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing at"):
        load(tmp_path / "absent")
    for src in ("file.bin", "folder"):
        with pytest.raises(ValueError, match="is not a model; a model is a run's workdir"):
            load(tmp_path / src)
