import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_pipelines.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from data_pipelines.samples.masks import Mask
from data_pipelines.samples.pairs import BrokenPair, SamplePair
from data_pipelines.samples.pixels import Pixels


def an_image(seed=0, size=(40, 48)):
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[: size[0], : size[1]]
    smooth = 120 + 60 * np.sin(down / 4)[..., None] + 40 * np.cos(across / 3)[..., None] * np.array([1, -1, 0.5])
    return (smooth + rng.integers(0, 20, (*size, 3))).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_worse_and_the_same_every_time(name):
    image = an_image()
    worse = [corrupt(image, name, severity, key="a") for severity in SEVERITIES]
    away = [np.abs(out.astype(float) - image).mean() for out in worse]
    assert all(out.shape == image.shape and out.dtype == np.uint8 for out in worse)
    assert away == sorted(away) and away[0] > 0.5
    np.testing.assert_array_equal(worse[2], corrupt(image, name, 3, key="a"))
    drawn = not np.array_equal(worse[2], corrupt(image, name, 3, key="b"))
    assert drawn == name.endswith("noise")


def test_strengths_are_those_of_the_paper():
    grey = np.full((200, 200, 3), 128, np.uint8)
    spread = {
        name: corrupt(grey, name, 1, key="k").std() / 255 for name in ("gaussian_noise", "speckle_noise", "shot_noise")
    }
    # Standard deviations of 120000 draws: known to 0.2 %; cutting off at 1 and at whole numbers moves them less than 1 %.
    x = 128 / 255
    assert spread["gaussian_noise"] == pytest.approx(0.08, rel=0.01)
    assert spread["speckle_noise"] == pytest.approx(0.15 * x, rel=0.01)
    assert spread["shot_noise"] == pytest.approx(np.sqrt(x / 60), rel=0.01)
    hit = corrupt(grey, "impulse_noise", 5, key="k")
    assert np.mean(hit != 127) == pytest.approx(0.27, rel=0.03) or np.mean(hit != 128) == pytest.approx(0.27, rel=0.03)
    assert np.mean(hit == 0) == pytest.approx(np.mean(hit == 255), rel=0.05)
    np.testing.assert_allclose(corrupt(grey, "brightness", 2, key="k"), 128 + 51, atol=1)
    image = an_image()
    mean = image.mean(axis=(0, 1))
    np.testing.assert_allclose(corrupt(image, "contrast", 3, key="k"), mean + 0.2 * (image - mean), atol=1)


def test_blurs_spread_a_point_as_their_kernels_say():
    point = np.zeros((61, 61, 3), np.uint8)
    point[30, 30] = 255
    disk = corrupt(np.full((61, 61, 3), 255, np.uint8) - point, "defocus_blur", 5, key="k")  # radius 10
    lower = 255 - disk[..., 0].astype(float)
    assert (lower[30, 21:40] >= 0).all() and lower[30, 30 - 13] == lower[30, 30 + 13] == 0
    wide = corrupt(
        np.kron(np.eye(2)[..., None] * 255, np.ones((30, 30, 3))).astype(np.uint8), "gaussian_blur", 3, key="k"
    )
    # A step through a Gaussian of sigma 3 is its distribution function: between pixels 29 and 30 it is one half.
    assert abs(int(wide[5, 29, 0]) + int(wide[5, 30, 0]) - 255) <= 1
    assert wide[5, 26, 0] / 255 == pytest.approx(0.878, abs=0.01)  # 3.5 pixels = 1.167 sigma


@pytest.mark.parametrize("size", [(40, 48), (33, 17)])
def test_zooms_are_those_of_scipy(size):
    """The recipe of ImageNet-C's authors, in float64; numbers are cut off, so one that is nearly whole may be one apart."""
    image, factors = an_image(size=size), np.arange(1, 1.21, 0.02)
    total = image / 255
    for factor in factors:
        inner = [int(np.ceil(side / factor)) for side in size]
        middle = tuple(slice((side - n) // 2, (side - n) // 2 + n) for side, n in zip(size, inner, strict=True))
        zoomed = ndimage.zoom((image / 255)[middle], (factor, factor, 1), order=1)
        trim = [(n - side) // 2 for n, side in zip(zoomed.shape, size, strict=False)]
        total = total + zoomed[trim[0] : trim[0] + size[0], trim[1] : trim[1] + size[1]]
    expected = (total / (len(factors) + 1) * 255).astype(np.uint8)
    found = corrupt(image, "zoom_blur", 3, key="k").astype(int)
    assert np.abs(found - expected).max() <= 1 and np.mean(found != expected) < 0.01
    assert corrupt(image[:1, :1], "zoom_blur", 5, key="k").shape == (1, 1, 3)


def test_masks_keep_their_classes():
    mask = np.kron(np.array([[1, 7], [200, 255]], np.uint8), np.ones((6, 6), np.uint8))
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")

    def read(value, size=(4, 4)):
        return Mask(Pixels(size), "mask").make(SamplePair(0, 0, "k", {"mask": value}, ()), None)["mask"]

    expected = np.kron(np.array([[1, 7], [200, 255]]), np.ones((2, 2)))
    for value in (file.getvalue(), {"bytes": file.getvalue(), "path": None}):
        np.testing.assert_array_equal(read(value), expected)
    colour = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(colour, "PNG")
    for value, reason in (
        (None, "missing_mask"),
        ("text", "missing_mask"),
        (b"no image", "corrupt_mask"),
        (file.getvalue()[:60], "corrupt_mask"),
        (colour.getvalue(), "mask_of_several_channels"),
    ):
        with pytest.raises(BrokenPair, match=reason):
            read(value)
