"""Other resolutions and patch sizes, against the reference's numbers and against the definition of the resize."""

import jax
import numpy as np
import pytest

from siglip.encoder import Encoder
from siglip.models.resample import resample, resample_patches, resample_positions
from tests.siglip.rounding import rounding
from tests.siglip.tiny import random_params, square_model


def assert_close(found, expected):
    """Both were computed in float64 and rounded to float32 once."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * rounding(1, np.max(np.abs(expected))))


@pytest.mark.parametrize(
    "name, old, new", [("14to32", 14, 32), ("16to58", 16, 58), ("24to16", 24, 16), ("7to14", 7, 14)]
)
def test_positions_are_resampled_as_the_reference_does(fixtures, name, old, new):
    stored = np.load(fixtures / "bv_posemb.npz")
    found = resample_positions(stored[f"{name}/in"], (old, old), (new, new))
    assert_close(found, stored[f"{name}/out"])


def test_positions_of_grids_that_are_not_square():
    rows, columns = np.mgrid[:3, :5]
    plane = (10.0 * rows + columns).reshape(1, 15, 1)
    found = resample_positions(plane, (3, 5), (5, 9)).reshape(5, 9)
    rows, columns = np.mgrid[:5, :9]
    assert_close(found, 10 * rows / 2 + columns / 2)
    # One row left: the first, as scipy.ndimage.zoom takes it.
    assert_close(resample_positions(plane, (3, 5), (1, 5)).ravel(), range(5))


@pytest.mark.parametrize("sizes, tokens", [((224, 448, 896), (256, 1024, 4096)), ((224, 812, 1064), (256, 3364, 5776))])
def test_the_resolutions_of_paligemma_and_pali3(sizes, tokens):
    config = square_model(image={"variant": "mu/14", "image_size": (sizes[0], sizes[0])})
    params = random_params(config)
    for size, count in zip(sizes, tokens, strict=True):
        params, config = resample(params, config, image_size=(size, size))
        assert params["img"]["pos_embedding"].shape == (1, count, 36) and config.image.image_size == (size, size)


def test_fixed_positions_need_no_resampling():
    config = square_model(image={"posemb": "sincos2d"})
    params, resized = resample(random_params(config), config, image_size=(16, 40))
    assert Encoder(params, resized).image_tokens(np.zeros((1, 16, 40, 3))).shape == (1, 10, 36)


@pytest.mark.parametrize("new", [(9, 9), (16, 11), (8, 14)])
def test_enlarged_patches_give_the_old_outputs(new):
    rng = np.random.default_rng(0)
    kernel, patches = rng.normal(size=(8, 8, 3, 5)), rng.normal(size=(4, 8, 8, 3))
    with jax.enable_x64(True):
        larger = np.asarray(jax.image.resize(patches, (4, *new, 3), "linear", antialias=True))
    expected = np.einsum("bhwc,hwcd->bd", patches, kernel)
    resampled = resample_patches(kernel.astype(np.float32), new)
    found = np.einsum("bhwc,hwcd->bd", larger, resampled)
    # The kernel is rounded to float32 twice: what goes in, and what comes out.
    atol = 2 * rounding(1, np.einsum("bhwc,hwcd->bd", np.abs(larger), np.abs(resampled)).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_smaller_patches_are_the_least_squares_fit():
    rng = np.random.default_rng(1)
    kernel, new = rng.normal(size=(8, 6, 1, 1)), (5, 4)
    with jax.enable_x64(True):
        basis = np.eye(48).reshape(48, 8, 6, 1)
        resize = np.asarray(jax.image.resize(basis, (48, *new, 1), "linear", antialias=True)).reshape(48, 20)
    # The kernel that minimises the squared difference over images of white noise.
    expected = np.linalg.lstsq(resize, kernel.reshape(48), rcond=None)[0]
    found = resample_patches(kernel.astype(np.float32), new).ravel()
    # As above: rounded twice.
    atol = 2 * rounding(1, (np.abs(np.linalg.pinv(resize)) @ np.abs(kernel.reshape(48))).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_another_patch_size_keeps_or_changes_the_grid():
    config = square_model()
    params, same_grid = resample(random_params(config), config, image_size=(64, 48), patch_size=(16, 12))
    assert same_grid.image.grid == config.image.grid and params["img"]["embedding"]["kernel"].shape == (16, 12, 3, 36)
    np.testing.assert_array_equal(params["img"]["pos_embedding"], random_params(config)["img"]["pos_embedding"])
    params, other_grid = resample(random_params(config), config, patch_size=(4, 4))
    assert other_grid.image.grid == (8, 8) and params["img"]["pos_embedding"].shape == (1, 64, 36)
    with pytest.raises(ValueError, match="holds no patch"):
        resample(random_params(config), config, patch_size=(64, 64))
