"""Shapes to architectures: every published size, and files with arrays that are lost, misnamed or misshapen."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglip.formats import big_vision, key_maps
from siglip.formats.infer_config import expected_shapes, infer_config
from siglip.models.layers import BlockConfig
from siglip.models.naflex import NaflexConfig
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params, param_shapes
from siglip.trees import flatten
from tests.siglip.tiny import ODD_IMAGE, ODD_TEXT, random_params, square_model


def two_towers(variant: str, size: int, *, text: str, vocab_size: int = 32_000, length: int = 64, head: bool = True):
    tokens = TokenConfig(pad_id=0 if vocab_size == 256_000 else None)  # Gemma's pieces: SigLIP 2
    image = ImageConfig(variant, image_size=(size, size))
    tower = TextConfig(text, vocab_size=vocab_size, length=length, tokens=tokens)
    return ModelConfig(image, tower, out_dim=(None, image.spec.width if head else None))


PUBLISHED = {
    "B/16 512": two_towers("B/16", 512, text="B"),
    "B/16-i18n 256": two_towers("B/16", 256, text="B", vocab_size=250_000),
    "B/32 256 v2": two_towers("B/32", 256, text="B", vocab_size=256_000),
    "L/16 384": two_towers("L/16", 384, text="L"),
    "So400m/14 224": two_towers("So400m/14", 224, text="So400m", length=16),
    "So400m/14 384": two_towers("So400m/14", 378, text="So400m"),
    "So400m/16-i18n 256": two_towers("So400m/16", 256, text="So400m", vocab_size=250_000, head=False),
    "g-opt/16 384 v2": two_towers("g-opt/16", 384, text="So400m", vocab_size=256_000),
    "PaliGemma's": ModelConfig(ImageConfig("So400m/14", image_size=(896, 896), pool="none"), None, (None, None)),
}


def in_layout(config: ModelConfig, *, scan: bool) -> ModelConfig:
    text = config.text and dataclasses.replace(config.text, scan=scan)
    return dataclasses.replace(config, image=dataclasses.replace(config.image, scan=scan), text=text)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size(name, scan):
    inferred = infer_config(expected_shapes(in_layout(PUBLISHED[name], scan=scan)))
    assert inferred.config == PUBLISHED[name]
    assert not inferred.problems and not inferred.unclear


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize(
    "image, text, out_dim",
    [
        # Heads of 12 and 9, of 5 and 27; patches of 6 x 8 px.
        ({"pool": "map"}, {"pool": "map"}, (None, 36)),
        ({"pool": "tok", "num_heads": 4}, {}, (20, 20)),
        ({"pool": "gap", "width": 35, "num_heads": 7}, {"num_heads": 1}, (27, None)),
        ({"pool": "gap"}, None, (11, None)),
        ({"pool": "none", "mlp_dim": 7}, None, (None, None)),
    ],
)
def test_sizes_without_a_name(image, text, out_dim, scan):
    image = ImageConfig(**(ODD_IMAGE | {"image_size": (24, 32)} | image), scan=scan)
    config = ModelConfig(image, None if text is None else TextConfig(**(ODD_TEXT | text), scan=scan), out_dim)
    shapes = expected_shapes(config)
    assert shapes == key_maps.flat_shapes(flatten(param_shapes(config)))
    found = infer_config(shapes).config
    unnamed = ModelConfig(
        dataclasses.replace(config.image, variant="B/6", scan=False),
        config.text and dataclasses.replace(config.text, variant="B", scan=False),
        out_dim,
    )
    assert found == unnamed


@pytest.mark.parametrize(
    "config",
    [
        square_model(image={"scan": True, "depth": 3}),
        square_model(text={"scan": True, "embed_bottleneck": 4, "dtype": "bfloat16", "remat": "dots", "pool": "map"}),
        square_model(
            image={"block": BlockConfig(parallel=True, qk_norm=True), "dropout": 0.1, "residual_dtype": "bfloat16"}
        ),
        square_model(image={"naflex": NaflexConfig(), "attention": "xla", "pool": "gap", "final_norm": False}),
        ModelConfig(ImageConfig(**ODD_IMAGE), None, (5, None)),
    ],
    ids=["image scan", "text scan", "block", "naflex", "image alone"],
)
def test_shapes_found_with_one_layer_are_those_of_the_whole_model(config):
    assert param_shapes(config) == jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def broken(tmp_path, flat: dict) -> str:
    np.savez(tmp_path / "m.npz", **{f"params/{path}": array for path, array in flat.items()})
    with pytest.raises(ValueError) as error:
        big_vision.read(tmp_path / "m.npz")
    assert "\n" not in str(error.value)
    return str(error.value)


@functools.cache
def flat_params(scan: bool) -> dict:
    return flatten(random_params(square_model(image={"scan": scan}, text={"scan": scan})))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), scan=st.booleans())
def test_exactly_the_bad_keys_are_named(tmp_path_factory, data, scan):
    """A model with some arrays dropped, renamed and reshaped: those are named, all of them, and no other."""
    flat = dict(flat_params(scan))
    # A head, positions or one of a layer's halves that are gone altogether make another model, a smaller one.
    paths = sorted(path for path in flat if path not in ("t", "b"))
    chosen = data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=5, unique=True))
    changes = {path: data.draw(st.sampled_from(["drop", "rename", "axis", "larger"])) for path in chosen}
    expected = set()
    for path, change in changes.items():
        array = flat.pop(path)
        if change == "rename":
            flat[path + "_x"] = array
            expected.add(path + "_x")
        elif change == "axis":
            flat[path] = array[None]
        elif change == "larger":
            flat[path] = np.repeat(array, 7, axis=-1)
        expected.add(path)
    message = broken(tmp_path_factory.mktemp("m"), flat)
    told = message.split("does not fit the model it describes: ")[1].split(" (or its positions")[0]
    words = {word.strip(",;?'") for word in message.split()}
    for path in expected:
        assert path in words, (path, message)
    known = flat_params(True).keys() | flat_params(False)
    named = {word for word in words if word in known or word.endswith("_x")}
    hinted = {word.strip("'?;,") for word in told.split() if word.startswith("'")}
    assert named - hinted <= expected, message


def test_missing_layers_are_one_item_each(tmp_path):
    flat = flatten(random_params(square_model(image={"depth": 12}, text={"depth": 5})))
    gone = ("img/Transformer/encoderblock_3/", "txt/Encoder_0/encoderblock_1/", "txt/Encoder_0/encoderblock_2/")
    message = broken(tmp_path, {path: array for path, array in flat.items() if not path.startswith(gone)})
    assert "layer 3 of 12 (16 arrays, img/Transformer/encoderblock_3)" in message
    assert "layers 1 to 2 of 5 (32 arrays, txt/Encoder_0/encoderblock_1 …)" in message


def test_a_stray_layer_number_is_no_deep_model(tmp_path):
    flat = dict(flat_params(False))
    flat["img/Transformer/encoderblock_999999999/LayerNorm_0/bias"] = np.zeros(36, np.float32)
    message = broken(tmp_path, flat)
    assert "has unknown img/Transformer/encoderblock_999999999/LayerNorm_0/bias; did you mean" in message
    assert "lacks" not in message


def test_shapes_of_no_model_are_one_line():
    shapes = dict.fromkeys(("img/Transformer/encoder_norm/scale", "txt/head/x"), (8,))
    with pytest.raises(ValueError, match="^x.npz has shapes of no model: no array of the text tower"):
        infer_config(shapes, source="x.npz")
    with pytest.raises(ValueError, match="^x.npz lacks img/embedding/kernel; it holds 1 arrays, none of a ViT"):
        infer_config({"a": (3,)}, source="x.npz")
