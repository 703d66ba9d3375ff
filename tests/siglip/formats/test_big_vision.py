"""The npz reader and writer: every way in which such files are kept, and every way in which they are broken."""

import dataclasses
import errno
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.errors import UserError
from siglip.formats import big_vision, key_maps
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, make_model, param_shapes
from siglip.models.variants import BlockConfig
from siglip.trees import flatten
from tests.siglip import numpy_model
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import ODD_IMAGE, ODD_TEXT, random_inputs, random_params, square_model

VIT_22B = BlockConfig(parallel=True, qk_norm=True, bias=False)


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
        ({"image_size": (18, 24), "block": VIT_22B}, {}),
        ({"image_size": (18, 24), "block": VIT_22B}, None),
        ({"image_size": (18, 24), "pool": "map"}, {"block": VIT_22B}),
        ({"image_size": (18, 24), "pool": "map"}, {"embed_bottleneck": 5}),
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
    return key_maps.unstack_blocks(flatten(params))


POOLS = [
    ({"pool": "map"}, {"pool": "map"}, (None, 36)),
    ({"pool": "gap", "num_heads": 4}, {"pool": "mean", "num_heads": 9}, (27, None)),
    # What is read is equal, and test_models.py has the numbers of every pooling: two of them suffice here.
    pytest.param({"pool": "0", "num_heads": 9}, {"pool": "first"}, (20, 20), marks=pytest.mark.slow),
    pytest.param({"pool": "tok", "num_heads": 2}, {"pool": "max", "num_heads": 1}, (11, 11), marks=pytest.mark.slow),
    pytest.param({"pool": "none"}, {"pool": "last"}, (None, 5), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", ["loop", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("image, text, out_dim", POOLS, ids=lambda part: isinstance(part, dict) and part["pool"] or "")
def test_what_is_read_back_computes_the_same_as_float64_numpy(tmp_path, image, text, out_dim, layout):
    """Grids of 3 x 4, heads of 4 to 36, every pooling there is."""
    image = ImageConfig(**(ODD_IMAGE | image), image_size=(19, 32))
    config = ModelConfig(image, TextConfig(**(ODD_TEXT | text)), out_dim)
    params = random_params(config)
    big_vision.write(tmp_path / "m.npz", params, config, layout=layout)
    found, found_config = big_vision.read(tmp_path / "m.npz")
    assert found_config.image.scan == found_config.text.scan == (layout == "scan")

    images, ids = random_inputs(config)
    zimg, ztxt, out = jax.jit(make_model(found_config).apply)({"params": found}, {"image": images, "text": ids})
    flat = {path: array.astype(np.float64) for path, array in flatten(params).items()}
    for tower, z, (tokens, expected) in (
        ("img", zimg, numpy_model.image_tower(flat, config, images.astype(np.float64))),
        ("txt", ztxt, numpy_model.text_tower(flat, config, ids)),
    ):
        np.testing.assert_allclose(out[f"{tower}/encoded"], tokens, rtol=0, atol=towers_apart(config, tokens))
        assert (z is None) == (expected is None)
        if z is not None:
            np.testing.assert_allclose(z, expected, rtol=0, atol=towers_apart(config))


@pytest.mark.parametrize("head", [True, False], ids=["head", "no-head"])
@pytest.mark.parametrize("towers", ["both", "image"])
@pytest.mark.parametrize("layout", ["loop", "scan"])
@pytest.mark.parametrize("image, out_dim", [({}, (None, 36)), ({"pool": "gap", "scan": True}, (24, 24))])
def test_what_a_trainer_of_language_models_wants(tmp_path, image, out_dim, layout, towers, head):
    config = ModelConfig(square_model(image=image).image, TextConfig(**ODD_TEXT), out_dim)
    params = random_params(config)
    if towers == "image":
        params, config = {"img": params["img"]}, big_vision.image_only(config)
    written = (params, config) if head else big_vision.without_head(params, config)
    big_vision.write(tmp_path / "m.npz", *written, layout=layout)

    expected = key_maps.unstack_blocks(flatten(params))
    if not head:
        expected = {path: array for path, array in expected.items() if not path.startswith(("img/MAPHead", "img/head"))}
    expected = key_maps.stack_blocks(expected) if layout == "scan" else expected
    with np.load(tmp_path / "m.npz") as stored:
        assert {key: array.shape for key, array in stored.items()} == {
            f"params/{k}": a.shape for k, a in expected.items()
        }
    found, found_config = big_vision.read(tmp_path / "m.npz")
    same(found, expected)
    assert found_config.image.pool == (config.image.pool if head else "none")
    assert found_config.out_dim == (config.out_dim[0] if head else None, config.out_dim[1])
    same(big_vision.read(f"{tmp_path}/m.npz:img")[0], {p: a for p, a in expected.items() if p.startswith("img/")})


def test_a_class_token_stays_with_its_tower():
    config = square_model(image={"pool": "tok"})
    with pytest.raises(ValueError, match="class token, so it cannot go; keep the head"):
        big_vision.without_head(random_params(config), config)


def test_shapes_that_tell_all_need_no_file_beside(tmp_path):
    config = square_model()
    big_vision.write(tmp_path / "m.npz", random_params(config), config)
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    with np.load(tmp_path / "m.npz") as stored:
        assert set(stored) == {f"params/{path}" for path in flatten(param_shapes(config))}


def test_a_tree_of_another_model_is_refused_and_leaves_no_file(tmp_path):
    config = square_model()
    params = random_params(config)
    del params["img"]["Transformer"]["encoderblock_1"]
    params["img"]["extra"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="does not fit the model .* lacks .*encoderblock_1.* has unknown img/extra"):
        big_vision.write(tmp_path / "ft.npz", params, config)
    with pytest.raises(UserError, match="lacks 9 keys: .*txt/head/kernel"):
        big_vision.write(tmp_path / "ft.npz", {"img": random_params(config)["img"]}, config)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one_with_its_config_file(tmp_path, monkeypatch):
    odd, square = square_model(image={"image_size": (16, 24)}), square_model()
    big_vision.write(tmp_path / "m.npz", random_params(odd), odd)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        big_vision.write(tmp_path / "m.npz", random_params(square), square)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.config.json", "m.npz"]
    assert big_vision.read(tmp_path / "m.npz")[1].image.image_size == (16, 24)


def test_the_config_file_of_another_model_does_not_stay_beside_a_new_one(tmp_path):
    odd, square = square_model(image={"image_size": (16, 24)}), square_model()
    big_vision.write(tmp_path / "m.npz", random_params(odd), odd)
    assert (tmp_path / "m.config.json").exists()
    big_vision.write(tmp_path / "m.npz", random_params(square), square)
    assert big_vision.read(tmp_path / "m.npz")[1].image.image_size == (32, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


def test_stacking_is_the_inverse_of_unstacking():
    flat = flat_params(square_model(image={"depth": 11}))
    assert flat.keys() != key_maps.stack_blocks(flat).keys()
    same(key_maps.unstack_blocks(key_maps.stack_blocks(flat)), flat)


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


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"img/pre_logits/kernel": (36, 36), "img/pre_logits/bias": (36,)},
            "has img/pre_logits/bias, img/pre_logits/kernel: a tanh",
        ),
        (
            {"img/Transformer/encoderblock/LayerNorm_0/bias": (2, 36)},
            "holds two models: blocks one by one .* and stacked",
        ),
        ({"../img/t": (1,)}, "has unknown ../img/t"),
    ],
)
def test_other_models_are_named(tmp_path, change, words):
    flat = flat_params(square_model()) | {path: np.zeros(shape, np.float32) for path, shape in change.items()}
    np.savez(tmp_path / "m.npz", **{f"params/{path}": array for path, array in flat.items()})
    with pytest.raises(ValueError, match=words) as error:
        big_vision.read(tmp_path / "m.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefixes", [("params/", ""), ("params/", "opt/target/")])
def test_two_models_in_a_file(tmp_path, prefixes):
    flat = flat_params(square_model())
    np.savez(tmp_path / "m.npz", **{prefix + path: array for prefix in prefixes for path, array in flat.items()})
    with pytest.raises(ValueError, match="holds two models, under params/ and"):
        big_vision.read(tmp_path / "m.npz")


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


def test_broken_files_are_one_line(tmp_path):
    config = square_model()
    big_vision.write(tmp_path / "whole.npz", random_params(config), config)
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    np.savez(tmp_path / "pickled.npz", **{"params/t": np.array([{}], object)})
    flat = flat_params(config)
    np.savez(tmp_path / "objects.npz", **flat | {"img/embedding/bias": np.array([{}], object)})
    np.savez(tmp_path / "integers.npz", **flat | {"t": np.array([1])})
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
        "pickled.npz": "no arrays of an image tower .* but Python objects",
        "objects.npz": "img/embedding/bias of Python objects, which may run code",
        "integers.npz": "t of type int64, and parameters are floating-point",
        "other.npz": "lacks img/embedding/kernel; did you mean 'img/embeding/kernel'",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            big_vision.read(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"):
        big_vision.read(tmp_path / "absent.npz")


def full_size(fixtures, layout: str) -> dict[str, tuple[int, ...]]:
    lines = [line.split("\t") for line in (fixtures / f"bv_keys_siglip_b16_224_{layout}.txt").read_text().splitlines()]
    return {path: tuple(map(int, shape.strip("(),").split(","))) for path, shape, _ in lines}


_MEASURE = """
import resource, sys
from siglip.formats import big_vision
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
big_vision.read(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout, dtype", [("loop", "float32"), ("scan", "bfloat16")])
def test_a_published_base_model_in_full_size(fixtures, tmp_path, layout, dtype):
    """203 million parameters: read in seconds, and never in memory twice."""
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(shape, np.float32) for path, shape in full_size(fixtures, layout).items()}
    if dtype == "bfloat16":
        flat = {path: np.asarray(jnp.asarray(array, dtype)) for path, array in flat.items()}
    np.savez(tmp_path / "m.npz", **{k: array.view("V2") if dtype == "bfloat16" else array for k, array in flat.items()})
    start = time.process_time()
    params, config = big_vision.read(tmp_path / "m.npz")
    assert time.process_time() - start < 5
    scan = layout == "scan"
    image, text = (dataclasses.replace(tower, scan=scan) for tower in (ModelConfig().image, ModelConfig().text))
    assert config == ModelConfig(image, text)
    same(params, {path.removeprefix("params/"): np.asarray(array, np.float32) for path, array in flat.items()})

    big_vision.write(tmp_path / "again.npz", params, config, layout=layout)
    with np.load(tmp_path / "again.npz") as stored:
        assert {key: stored[key].shape for key in stored} == full_size(fixtures, layout)
    weights = sum(array.size for array in flat.values()) * 4
    del flat, params
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "m.npz")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024
    for file in tmp_path.iterdir():
        file.unlink()  # pytest keeps the folders of three runs
    assert peak < 1.3 * weights  # the float32 copy, and of a bfloat16 file one array more
