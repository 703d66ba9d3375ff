"""The npz reader and writer: every way in which such files are kept, and every way in which they are broken."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from siglip.formats import big_vision, names
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.trees import flatten

from .tiny import ODD_IMAGE, ODD_TEXT, random_params, square_model


def flat_params(config: ModelConfig) -> dict[str, np.ndarray]:
    return flatten(random_params(config))


def same(found: dict, expected: dict, *, atol: float = 0) -> None:
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_allclose(found[path], np.asarray(array), rtol=0, atol=atol)


@pytest.mark.parametrize("name, pool, text_pool", [("a", "map", "last"), ("c", "tok", "map")])
def test_architecture_of_the_published_layout_is_inferred(fixtures, name, pool, text_pool):
    params, config = big_vision.read(fixtures / f"bv_tiny_{name}.npz")
    stored = np.load(fixtures / f"bv_tiny_{name}.npz")
    assert {f"params/{path}" for path in flatten(params)} == {key for key in stored if key.startswith("params/")}
    assert (config.image.pool, config.text.pool) == (pool, text_pool)
    assert config.image.image_size == stored["input/image"].shape[1:3]
    assert config.text.length == stored["input/text"].shape[1]


def test_a_size_with_a_name_is_given_its_name(fixtures):
    lines = [line.split("\t") for line in (fixtures / "bv_keys_siglip_b16_224_loop.txt").read_text().splitlines()]
    shapes = {path.removeprefix("params/"): tuple(map(int, shape.strip("(),").split(","))) for path, shape, _ in lines}
    flat = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    assert big_vision.infer_config(flat, image_size=None, source="x") == ModelConfig()


@pytest.mark.parametrize("prefix", ["params/", "", "opt/target/"])
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_layouts_and_prefixes(tmp_path, prefix, scan):
    config = square_model(image={"scan": scan}, text={"scan": scan})
    params = random_params(config)
    extra = {"opt/count": np.int32(3)} if prefix else {}
    np.savez(tmp_path / "m.npz", **{f"{prefix}{path}": array for path, array in flatten(params).items()}, **extra)
    found, found_config = big_vision.read(tmp_path / "m.npz")
    same(found, params)
    assert (found_config.image.spec, found_config.text.spec) == (config.image.spec, config.text.spec)
    assert (found_config.image.scan, found_config.text.scan) == (scan, scan)


def test_bfloat16_is_kept_as_two_raw_bytes(tmp_path):
    flat = {path: np.asarray(jnp.asarray(a, jnp.bfloat16)) for path, a in flat_params(square_model()).items()}
    np.savez(tmp_path / "m.npz", **{f"params/{path}": array.view("V2") for path, array in flat.items()})
    params, _ = big_vision.read(tmp_path / "m.npz")
    same(params, {path: array.astype(np.float32) for path, array in flat.items()})


def test_one_tower_of_a_file(tmp_path):
    config = square_model()
    params = random_params(config)
    big_vision.write(tmp_path / "m.npz", params, config)
    image, image_config = big_vision.read(f"{tmp_path}/m.npz:img")
    same(image, {"img": params["img"]})
    assert image_config.text is None and image_config.image.pool == "map"

    np.savez(tmp_path / "bare.npz", **flatten(params["img"]))
    same(big_vision.read(tmp_path / "bare.npz")[0], {"img": params["img"]})
    with pytest.raises(ValueError, match="only the sub-tree ':img'"):
        big_vision.read(f"{tmp_path}/m.npz:txt")


@pytest.mark.parametrize(
    "image, text",
    [
        ({"image_size": (21, 27)}, {}),
        ({"image_size": (18, 24), "pool": "tok", "posemb": "sincos2d"}, {"pool": "mean"}),
        ({"image_size": (18, 24), "pool": "gap"}, None),
        ({"image_size": (18, 32), "pool": "none"}, None),
    ],
)
def test_what_shapes_do_not_tell_is_written_beside(tmp_path, image, text):
    image = ImageConfig(**(ODD_IMAGE | image), scan=True)
    text = None if text is None else TextConfig(**(ODD_TEXT | text), scan=True)
    config = ModelConfig(image, text, out_dim=(None, None if text is None else 36))
    params = random_params(config)
    big_vision.write(tmp_path / "m.npz", params, config)
    found, found_config = big_vision.read(tmp_path / "m.npz")
    same(found, unstacked(params))
    loop_text = text and dataclasses.replace(text, scan=False)
    assert found_config == dataclasses.replace(config, image=dataclasses.replace(image, scan=False), text=loop_text)


def unstacked(params: dict) -> dict:
    return names.unstack_blocks(flatten(params))


def test_shapes_that_tell_all_need_no_file_beside(tmp_path):
    config = square_model()
    big_vision.write(tmp_path / "m.npz", random_params(config), config)
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    with np.load(tmp_path / "m.npz") as stored:
        assert set(stored) == {f"params/{path}" for path in flatten(param_shapes(config))}


def test_stacking_is_the_inverse_of_unstacking():
    flat = flat_params(square_model(image={"depth": 11}))
    assert flat.keys() != names.stack_blocks(flat).keys()
    same(names.unstack_blocks(names.stack_blocks(flat)), flat)


def test_a_grid_that_is_not_square_needs_the_image_size(tmp_path):
    config = ModelConfig(ImageConfig(**ODD_IMAGE, image_size=(18, 32)), TextConfig(**ODD_TEXT), (None, 36))
    params = random_params(config)
    np.savez(tmp_path / "m.npz", **flatten(params))
    with pytest.raises(ValueError, match=r"12 positions, no square grid; pass image_size=\(height, width\)"):
        big_vision.read(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"image_size=\(32, 32\) does not give that many"):
        big_vision.read(tmp_path / "m.npz", image_size=(32, 32))
    found, found_config = big_vision.read(tmp_path / "m.npz", image_size=(18, 32))
    same(found, params)
    assert found_config.image.grid == (3, 4)


def test_every_bad_key_is_named_at_once(tmp_path):
    flat = flat_params(square_model())
    flat["img/Transformer/encoder_nrom/scale"] = flat.pop("img/Transformer/encoder_norm/scale")
    flat["img/Transformer/encoderblock_1/LayerNorm_0/bias"] = np.zeros(35, np.float32)
    del flat["txt/head/bias"]
    flat["txt/surplus"] = np.zeros(1, np.float32)
    np.savez(tmp_path / "m.npz", **flat)
    with pytest.raises(ValueError) as error:
        big_vision.read(tmp_path / "m.npz")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "lacks 2 keys: img/Transformer/encoder_norm/scale, txt/head/bias",
        "img/Transformer/encoder_nrom/scale; did you mean 'img/Transformer/encoder_norm/scale'?",
        "txt/surplus",
        "img/Transformer/encoderblock_1/LayerNorm_0/bias of shape (35,) instead of (36,)",
    ):
        assert part in message


def test_a_missing_layer_is_named(tmp_path):
    flat = flat_params(square_model(image={"depth": 3}))
    flat = {path: array for path, array in flat.items() if "img/Transformer/encoderblock_1/" not in path}
    np.savez(tmp_path / "m.npz", **flat)
    with pytest.raises(ValueError, match="lacks 16 keys: img/Transformer/encoderblock_1/LayerNorm_0/bias"):
        big_vision.read(tmp_path / "m.npz")


def test_broken_files_are_one_line(tmp_path):
    config = square_model()
    big_vision.write(tmp_path / "whole.npz", random_params(config), config)
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    np.savez(tmp_path / "pickled.npz", **{"params/t": np.array([{}], object)})
    np.savez(tmp_path / "integers.npz", **{"params/t": np.array([1])})
    np.savez(tmp_path / "other.npz", **{"params/img/embeding/kernel": np.zeros((8, 8, 3, 4), np.float32)})
    for name, content in {
        "cut.npz": whole[: len(whole) // 2],
        "damaged.npz": bytes(damaged),
        "empty.npz": b"",
        "text.npz": b"not a zip",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, words in {
        "cut.npz": "cut short",
        "damaged.npz": "cut short",
        "empty.npz": "cut short",
        "text.npz": "cannot be read",
        "pickled.npz": "pickled object",
        "integers.npz": "t has type int64",
        "other.npz": "lacks img/embedding/kernel; did you mean 'img/embeding/kernel'",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            big_vision.read(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"):
        big_vision.read(tmp_path / "absent.npz")
