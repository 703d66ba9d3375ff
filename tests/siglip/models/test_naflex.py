"""NaFlex towers: each image of a padded batch against itself alone, in float64, and against the tower for images of one size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.formats.key_maps import unstack_blocks
from siglip.models.attention import attention_fn
from siglip.models.naflex import NaflexConfig, Patches, resize_positions
from siglip.models.resample import _between_edges
from siglip.models.two_tower import (
    ImageConfig,
    ModelConfig,
    TwoTower,
    blank_images,
    init_params,
    make_model,
)
from siglip.models.vit import ViT, cut_patches
from siglip.trees import flatten
from tests.siglip import numpy_model
from tests.siglip.models.test_attention import in_float64, inputs, on_device
from tests.siglip.rounding import likely_rounding, rounding, towers_apart
from tests.siglip.tiny import QUICK, random_params

# Wider, taller, a single row, a single patch, the table's own grid; more rows than the table has, and as long as it gets.
GRIDS = [(2, 5), (7, 1), (1, 12), (1, 1), (3, 4), (5, 2)]
LENGTH = 13
IMAGE = {"variant": "mu", "width": 36, "depth": 2, "mlp_dim": 50, "num_heads": 3, "patch_size": (4, 6)}


def naflex_model(**fields) -> ModelConfig:
    """A tower whose table has 3 x 4 positions."""
    image = ImageConfig(**IMAGE, image_size=(12, 24), naflex=NaflexConfig(12, 1024), **fields)
    return ModelConfig(image, text=None, out_dim=(None, None) if fields.get("pool") == "none" else (20, None))


def draw_images(grids=GRIDS, *, patch=(4, 6), seed=3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, (gh * patch[0], gw * patch[1], 3)).astype(np.float32) for gh, gw in grids]


def batch_of(images, *, length=LENGTH, patch=(4, 6), filler=np.nan) -> dict[str, np.ndarray]:
    """Padded with `filler`, which nothing may notice."""
    cut = [np.asarray(cut_patches(jnp.asarray(image)[None], patch)[0]) for image in images]
    patches = np.full((len(images), length, cut[0].shape[-1]), filler, np.float32)
    for row, own in zip(patches, cut, strict=True):
        row[: len(own)] = own
    grid = np.array([(image.shape[0] // patch[0], image.shape[1] // patch[1]) for image in images], np.int32)
    return {"patches": patches, "grid": grid}


def resized(table, shape, grid):
    """The table for another grid, in float64: two matrices, each row of which is one position."""
    down, across = (_between_edges(old, new) for old, new in zip(shape, grid, strict=True))
    image = np.asarray(table, np.float64).reshape(*shape, -1)
    return np.einsum("hi,wj,ijd->hwd", down, across, image).reshape(1, -1, image.shape[-1])


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (1, 40), (40, 1), (7, 5), (2, 3), (90, 2), (16, 64)], ids=str)
def test_positions_are_an_antialiased_resize_of_the_table(grid):
    table = np.random.default_rng(0).normal(size=(1, 12, 5)).astype(np.float32)
    n = grid[0] * grid[1] + 3
    found = jax.jit(resize_positions, static_argnums=(1, 3))(table, (3, 4), jnp.array([grid]), n)
    # A place on the table, below 4, is off by two roundings; a weight's slope is 1, and two weights are multiplied.
    atol = rounding(8 * 4, np.abs(table).sum(axis=1).max())
    np.testing.assert_allclose(found[:, :-3], resized(table, (3, 4), grid), rtol=0, atol=atol)
    assert np.isfinite(found).all()
    if grid == (3, 4):
        np.testing.assert_array_equal(found[:, :-3], table)


@pytest.mark.parametrize("grid", [(3, 7), (40, 2), (16, 16), (5, 64)], ids=str)
def test_positions_are_the_resize_of_pillow(grid):
    from PIL import Image

    table = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    theirs = Image.fromarray(table).resize(grid[::-1], Image.Resampling.BILINEAR)
    found = resize_positions(jnp.asarray(table.reshape(1, -1, 1)), (16, 16), jnp.array([grid]), grid[0] * grid[1])
    atol = rounding(8 * 16, np.abs(table).max())
    np.testing.assert_allclose(np.asarray(found).reshape(grid), np.asarray(theirs), rtol=0, atol=atol)


@pytest.mark.parametrize("pool, scan", [("map", True), ("gap", False), ("tok", True), ("0", False), ("none", False)])
def test_every_image_is_what_it_is_alone_in_float64(pool, scan):
    """Padding is NaN: nothing of it comes through."""
    config = naflex_model(pool=pool, scan=scan)
    params, images = random_params(config), draw_images()
    batch = batch_of(images)
    zimg, _, out = jax.jit(make_model(config).apply)({"params": params}, batch)
    flat = {path: a.astype(np.float64) for path, a in unstack_blocks(flatten(params)).items()}
    extra = pool == "tok"
    for i, (image, grid) in enumerate(zip(images, GRIDS, strict=True)):
        own = dataclasses.replace(config.image, naflex=None, image_size=image.shape[:2])
        alone = flat | {"img/pos_embedding": resized(flat["img/pos_embedding"], (3, 4), grid)}
        tokens, expected = numpy_model.image_tower(alone, dataclasses.replace(config, image=own), image[None])
        count = grid[0] * grid[1] + extra
        assert (out["img/mask"][i] == (np.arange(LENGTH + extra) < count)).all()
        atol = towers_apart(config, tokens)
        np.testing.assert_allclose(out["img/encoded"][i, :count], tokens[0], rtol=0, atol=atol)
        if pool != "none":
            np.testing.assert_allclose(zimg[i], expected[0], rtol=0, atol=towers_apart(config, expected))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"scan": True, "remat": "full"}, id="scan"),
        pytest.param({"pool": "gap", "remat": "dots"}, id="loop", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_sum_of_those_of_each_image_alone(fields):
    config = naflex_model(**fields)
    grids = [(2, 5), (1, 1), (5, 2)]  # of two lengths: each is a program
    params, images = on_device(random_params(config)), draw_images(grids)
    weight = jnp.asarray(np.random.default_rng(4).normal(size=(len(images), 20)), jnp.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grad(params, batch, weight):
        return jax.grad(lambda p: (make_model(config).apply({"params": p}, batch)[0] * weight).sum())(params)

    found = flatten(grad(params, batch_of(images, filler=1e30), weight))
    alone = [
        flatten(grad(params, batch_of([image], length=grid[0] * grid[1]), weight[i : i + 1]))
        for i, (image, grid) in enumerate(zip(images, grids, strict=True))
    ]
    for path, leaf in found.items():
        expected = sum(np.asarray(one[path], np.float64) for one in alone)
        atol = len(images) * towers_apart(config, np.append(expected, 1), passes=2)
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_square_images_at_the_table_s_own_grid_are_the_fixed_tower(dtype):
    config = naflex_model(dtype=dtype)
    fixed = dataclasses.replace(config, image=dataclasses.replace(config.image, naflex=None))
    params, images = on_device(random_params(config)), draw_images([(3, 4)] * 3)
    apply = lambda config: jax.jit(make_model(config).apply, compiler_options=QUICK)  # noqa: E731
    expected, _, there = apply(fixed)({"params": params}, {"image": np.stack(images)})
    found, _, here = apply(config)({"params": params}, batch_of(images, length=12))
    atol = towers_apart(config) if dtype == "float32" else 0.03  # bfloat16 keeps 8 bits
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    np.testing.assert_array_equal(here["img/with_posemb"], there["img/with_posemb"])


def test_256_patches_of_square_images_are_what_the_fixed_tower_makes_of_them():
    """SigLIP 2's table; uint8 pixels, and a batch that is longer than its images."""
    image = ImageConfig(**IMAGE | {"patch_size": (4, 4)}, image_size=(64, 64), naflex=NaflexConfig(256, 1024))
    config = ModelConfig(image, text=None, out_dim=(20, None))
    fixed = dataclasses.replace(config, image=dataclasses.replace(image, naflex=None))
    params = on_device(random_params(config))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    batch = batch_of(pixels.astype(np.float32), length=260, patch=(4, 4), filler=77)
    batch["patches"] = batch["patches"].astype(np.uint8)
    apply = lambda config, batch: jax.jit(make_model(config).apply, compiler_options=QUICK)({"params": params}, batch)  # noqa: E731
    expected, _, there = apply(fixed, {"image": pixels})
    found, _, here = apply(config, batch)
    for own, other in ((found, expected), (here["img/encoded"][:, :256], there["img/encoded"])):
        assert np.abs(own - other).max() <= 1e-5 * np.abs(other).max()


def test_uint8_patches_are_normalised_and_have_the_model_s_range():
    config = naflex_model()
    pixels = dataclasses.replace(config.image.pixels, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, pixels=pixels))
    raw = np.random.default_rng(0).integers(256, size=(2, 6, 72), dtype=np.uint8)
    grid, params = jnp.array([(2, 3), (1, 4)], jnp.int32), on_device(random_params(config))
    apply = functools.partial(jax.jit(make_model(config).apply), {"params": params})
    found, _, out = apply({"patches": jnp.asarray(raw), "grid": grid})
    floats = jnp.asarray(raw.astype(np.float32) / np.float32(127.5) - 1)
    np.testing.assert_allclose(found, apply({"patches": floats, "grid": grid})[0], rtol=0, atol=towers_apart(config))
    kernel = np.asarray(params["img"]["embedding"]["kernel"], np.float64).reshape(-1, 36)
    values = ((raw.reshape(2, 6, 24, 3) / 255 - pixels.mean) / pixels.std).reshape(2, 6, 72)
    expected = values @ kernel + params["img"]["embedding"]["bias"].reshape(1, 1, -1)
    atol = 2 * likely_rounding(80, np.abs(values).max() * np.abs(kernel).sum(axis=0).max())
    np.testing.assert_allclose(out["img/stem"][0], expected[0], rtol=0, atol=atol)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_keys_after_an_image_s_length_get_no_weight(kernel):
    lengths, args = np.array([1, 7, 40]), inputs(3, 40, 2, 24)
    fill = lambda x: jnp.stack([row.at[count:].set(1e6) for row, count in zip(x, lengths, strict=True)])  # noqa: E731
    query, key, value, weight = args
    attention = functools.partial(attention_fn, kernel=kernel, interpret=True, lengths=jnp.asarray(lengths, jnp.int32))
    counts = (np.arange(40) < lengths[:, None])[..., None, None]
    weighted = lambda q, k, v: jnp.where(counts, weight * attention(q, k, v), 0).sum()  # noqa: E731
    padded = query, fill(key), fill(value)
    found = jax.jit(lambda *x: (attention(*x), *jax.grad(weighted, (0, 1, 2))(*x)))(*padded)
    for row, count in enumerate(lengths):
        alone = in_float64(*(x[row : row + 1, :count] for x in args))
        for x, exact in zip(found, alone, strict=True):
            atol = 2 * likely_rounding(4 * (40 + 24), np.append(np.abs(exact), 1).max())
            np.testing.assert_allclose(x[row : row + 1, :count], exact, rtol=0, atol=atol)


def test_rows_of_zeros_that_fill_up_a_batch_are_finite():
    config = naflex_model()
    batch = on_device(blank_images(config.image, 2))
    zimg, *_ = jax.jit(make_model(config).apply)({"params": random_params(config)}, batch)
    assert np.isfinite(zimg).all()


def test_parameters_are_those_of_the_fixed_tower():
    config = naflex_model()
    fixed = dataclasses.replace(config, image=dataclasses.replace(config.image, naflex=None))
    shapes = [jax.eval_shape(lambda c=c: init_params(c, jax.random.key(0))) for c in (config, fixed)]
    assert flatten(shapes[0]) == flatten(shapes[1])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"naflex": NaflexConfig(), "patch_dropout": 0.5}, "image.naflex needs posemb='learn' and patch_dropout=0"),
        ({"naflex": NaflexConfig(), "posemb": "sincos2d"}, "not 'sincos2d' and 0.0"),
    ],
)
def test_what_does_not_go_together_is_one_line(change, words):
    with pytest.raises(ValueError, match=words):
        ImageConfig(**IMAGE, image_size=(12, 24), **change)


@pytest.mark.parametrize(
    "sizes, words", [((0, 9), "patches=0 must be at least 1"), ((9, 8), "patches=9 must be at most max_patches=8")]
)
def test_lengths_of_a_tower_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        NaflexConfig(*sizes)


def test_inputs_of_the_wrong_kind_are_told():
    config = naflex_model()
    params, fixed = on_device(random_params(config)), dataclasses.replace(config.image, naflex=None)
    tower = lambda config, image: ViT(config, 20).apply({"params": params["img"]}, image)  # noqa: E731
    with pytest.raises(ValueError, match="takes patches bxnx72 with the grid of each image, not 2x12x24x3 alone"):
        tower(config.image, jnp.zeros((2, 12, 24, 3)))
    with pytest.raises(ValueError, match="not patches; set model.image.naflex"):
        tower(fixed, Patches(jnp.zeros((2, 5, 72)), jnp.ones((2, 2), jnp.int32)))
    with pytest.raises(ValueError, match="patches=1025 must lie in 1 … 1024"):
        tower(config.image, Patches(jnp.zeros((1, 1025, 72)), jnp.ones((1, 2), jnp.int32)))
    assert TwoTower(config).apply({"params": params}, {})[0] is None
