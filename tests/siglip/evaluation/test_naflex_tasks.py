"""Tasks that read tokens, masks or corrupted images, with a NaFlex model: images of several aspect ratios, padded."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.corruptions import corrupt
from data_pipelines.loader import make_eval_batches
from data_pipelines.patch_ops import join_patches
from data_pipelines.samples.patches import Patches
from data_pipelines.sources.opening import open_source
from siglip.cli.evaluation import embedder_of
from siglip.evaluation.attentive_probe import AttentiveProbe
from siglip.evaluation.embed import Embedder
from siglip.evaluation.fewshot import FewShot
from siglip.evaluation.frozen_tokens import channel_statistics, read_tokens
from siglip.evaluation.knn import Knn
from siglip.evaluation.linear_probe import LinearProbe
from siglip.evaluation.robustness import Robustness
from siglip.evaluation.segmentation import Segmentation, resize_in_patches
from siglip.formats import big_vision
from siglip.models.naflex import NaflexConfig
from tests.siglip.evaluation.test_tasks import (
    MODEL,
    SPIECE,
    classes,  # noqa: F401
    embedder,  # noqa: F401
    metrics_of,
    src,  # noqa: F401
    test,  # noqa: F401
    train,  # noqa: F401
)
from tests.siglip.rounding import rounding
from tests.siglip.shapes import COLOURS, png
from tests.siglip.tiny import random_params

LENGTH = 20
SIZES = {(16, 80): (2, 10), (80, 16): (10, 2), (16, 64): (2, 8)}  # each with its grid of patches of 8 px


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Embedder:
    """The parameters of `embedder` as NaFlex; of a square image 4 of 20 patches are padding."""
    path = tmp_path_factory.mktemp("naflex") / "m.npz"
    image = dataclasses.replace(MODEL.image, naflex=NaflexConfig(16, 40))
    big_vision.write(path, random_params(MODEL), dataclasses.replace(MODEL, image=image))
    return embedder_of(path, tokenizer=SPIECE, batch_size=16, max_patches=LENGTH)


def write_halves(path: Path, *, count: int, seed: int) -> str:
    """Long images, one half grey and one red or green, which is the label; where is drawn. The mask is 1 in the coloured half."""
    rng, rows = np.random.default_rng(seed), []
    for n in range(count):
        height, width = list(SIZES)[n % 3]
        colour, axis = ("red", "green")[n // 3 % 2], int(width > height)
        mask = np.zeros((height, width), np.uint8)
        half = mask.shape[axis] // 2
        start = half * int(rng.integers(2))
        mask[(slice(None),) * axis + (slice(start, start + half),)] = 1
        pixels = np.where(mask[..., None], COLOURS[colour], 128) + rng.normal(0, 12, (height, width, 3))
        image = png(pixels.clip(0, 255).astype(np.uint8))
        rows.append({"key": f"{seed}-{n}", "image": image, "cls": n // 3 % 2, "mask": png(mask)})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("halves")
    return write_halves(folder / "train.parquet", count=24, seed=0), write_halves(
        folder / "shapes.parquet", count=18, seed=1
    )


@pytest.mark.slow
def test_of_square_images_the_numbers_are_those_of_images_of_one_size(embedder, padded, train, test, classes):  # noqa: F811
    tasks = [
        Knn(test, train, k=5, feature="patch_mean"),
        FewShot(test, train, shots=(5,), seeds=(0,), feature="patch_mean"),
        LinearProbe(test, train, c=(1.0,), feature="patch_mean"),
        AttentiveProbe(test, train, heads=4, epochs=4, images_per_step=16, learning_rate=0.01),
        Segmentation(test, train, steps=20, learning_rate=0.03),
        Robustness(test, classes, corruptions=("gaussian_noise", "pixelate"), severities=(3,)),
    ]
    for task in tasks:
        expected, found = metrics_of(task, embedder), metrics_of(task, padded)
        assert found == pytest.approx(expected, abs=1e-3), task.task


def test_pixels_and_labels_of_long_images_are_learned(padded, halves):
    train, test = halves  # noqa: F811
    segmented = metrics_of(Segmentation(test, train, steps=100, learning_rate=0.03, ignore=()), padded)
    assert segmented["pixel_acc_tokens"] > 0.9
    probed = metrics_of(AttentiveProbe(test, train, heads=4, epochs=20, images_per_step=8, learning_rate=0.01), padded)
    assert probed["ap_acc1_tokens"] > 0.9


def test_tokens_and_masks_of_long_images(padded, halves):
    arrays = read_tokens(padded, halves[1], mask="mask").arrays
    assert arrays["tokens"].shape == (18, LENGTH, 32) and arrays["mask"].shape == (18, LENGTH, 64)
    source = open_source(halves[1])
    for n, size in enumerate([*SIZES] * 6):
        assert tuple(arrays["grid"][n]) == SIZES[size]
        count = np.prod(SIZES[size])
        assert not arrays["tokens"][n, count:].any() and arrays["tokens"][n, :count].any(axis=-1).all()
        stored = source[n].fields["mask"]
        cut = arrays["mask"][n][..., None].repeat(3, -1).reshape(LENGTH, -1)
        expected = np.asarray(Image.open(io.BytesIO(stored)))  # each is whole patches: nothing is resized
        np.testing.assert_array_equal(join_patches(cut, SIZES[size], (8, 8))[..., 0], expected)


def test_statistics_leave_padding_out():
    rng = np.random.default_rng(0)
    grid = np.array([(1, 3), (2, 2), (1, 1)], np.int32)
    tokens = rng.normal(2, 3, (3, 5, 4)).astype(np.float16)
    kept = np.concatenate([own[:count] for own, count in zip(tokens, grid.prod(axis=1), strict=True)]).astype(
        np.float64
    )
    mean, std = channel_statistics({"tokens": tokens, "grid": grid})
    # Sums go between processes in float32.
    np.testing.assert_allclose(mean, kept.mean(axis=0), rtol=0, atol=rounding(2, np.abs(kept).max()))
    np.testing.assert_allclose(std, kept.std(axis=0), rtol=1e-5)


@pytest.mark.parametrize("patch", [(4, 6), (5, 3)], ids=str)
def test_values_of_patches_are_resized_within_each_image(patch):
    grids = np.array([(3, 4), (1, 11), (12, 1), (1, 1), (2, 5)], np.int32)
    x = np.random.default_rng(0).normal(size=(len(grids), 13, 2)).astype(np.float32)
    found = np.asarray(jax.jit(resize_in_patches, static_argnums=2)(x, grids, patch))
    for own, values, grid in zip(found, x, grids, strict=True):
        count, size = np.prod(grid), (grid[0] * patch[0], grid[1] * patch[1])
        whole = jax.image.resize(jnp.asarray(values[:count].reshape(*grid, 2)), (*size, 2), "bilinear")
        joined = own[:count].reshape(*grid, *patch, 2).swapaxes(1, 2).reshape(*size, 2)
        # Weights of either are off by a few roundings of 1, and nine products are summed.
        np.testing.assert_allclose(joined, whole, rtol=0, atol=2 * rounding(16, np.abs(values).max()))


def test_long_images_are_corrupted_as_they_are_seen(halves):
    source, patches = open_source(halves[1]), Patches((8, 8), LENGTH, exact=True)
    options = {"batch_size": 6, "image_size": (32, 32), "patches": patches, "fields": ()}
    clean, corrupted = (
        next(iter(make_eval_batches(source, corruption=corruption, **options)))
        for corruption in (None, ("gaussian_blur", 2))
    )
    for n, key in enumerate(clean["key"]):
        image = join_patches(clean["patches"][n], clean["grid"][n], (8, 8))
        expected = corrupt(image, "gaussian_blur", 2, key=key)
        np.testing.assert_array_equal(join_patches(corrupted["patches"][n], corrupted["grid"][n], (8, 8)), expected)
        assert (expected != image).any() and not corrupted["patches"][n][np.prod(clean["grid"][n]) :].any()
