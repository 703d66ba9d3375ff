"""Corrupted images and their errors, also relative to those of a reference."""

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest

from data_pipelines.corruptions import CORRUPTIONS
from siglip.evaluation.robustness import ALEXNET, Corruption, Robustness
from siglip.evaluation.zeroshot import ZeroShot
from tests.siglip.evaluation.test_tasks import (
    classes,  # noqa: F401
    embedder,  # noqa: F401
    metrics_of,
    src,  # noqa: F401
    test,  # noqa: F401
)


def test_corruption_errors_by_hand():
    """Two corruptions of four images; AlexNet's errors are averaged over the severities that run."""
    task = Robustness("x.tar", corruptions=("brightness", "contrast"), severities=(1, 2), reference="alexnet")
    clean, shares = np.array([1.0, 1, 1, 0]), np.array([[1, 0.5, 0.5, 0], [0, 0, 0.5, 0]])
    found = task._metrics(clean, shares, chance=0.1)
    brightness, contrast = (0.45140 + 0.48502) / 2, (0.64548 + 0.76150) / 2
    each = [(1 - a) / brightness / 2 + (1 - b) / contrast / 2 for a, b in shares.T]
    relative = (0.25 / (brightness - 0.435) + 0.625 / (contrast - 0.435)) / 2
    chances = {"clean": 0.1, "brightness": 0.1, "contrast": 0.1, "corrupted": 0.1}
    errors = {"brightness": np.std(shares[0]) / 2, "contrast": np.std(shares[1]) / 2}
    assert found == pytest.approx(
        {f"acc1_{name}_chance": value for name, value in chances.items()}
        | {f"acc1_{name}_se": value for name, value in errors.items()}
        | {
            "acc1_clean": 0.75, "acc1_clean_se": np.sqrt(0.75 * 0.25 / 4), "acc1_brightness": 0.5, "acc1_contrast": 0.125,
            "acc1_corrupted": 0.3125, "acc1_corrupted_se": np.std([0.5, 0.25, 0.5, 0]) / 2, "relative": 0.3125 / 0.75,
            "error_increase": 0.4375, "error_increase_se": np.std([0.5, 0.75, 0.5, 0]) / 2,
            "mean_corruption_error": 0.6875, "mean_corruption_error_se": np.std([0.5, 0.25, 0.5, 0]) / 2,
            "mean_corruption_error_chance": 0.9, "relative_se": found["relative_se"],
            "mce": np.mean(each), "mce_se": np.std(each) / 2,
            "relative_mce": relative, "relative_mce_se": found["relative_mce_se"],
        }
    )  # fmt: skip
    alone = dataclasses.replace(task, reference=None)._metrics(clean, shares, chance=0.1)
    assert alone == {name: value for name, value in found.items() if "mce" not in name}
    # Means over all severities, as the authors of ImageNet-C print them.
    assert [np.mean(ALEXNET[name]) for name in ("gaussian_noise", "zoom_blur", "jpeg_compression")] == pytest.approx(
        [0.886428, 0.798360, 0.606500]
    )
    assert set(ALEXNET) == set(get_args(Corruption)) == set(CORRUPTIONS)


def test_the_error_of_a_ratio_is_its_spread_over_sets_of_images():
    rng, task, sets = np.random.default_rng(0), Robustness("x.tar", corruptions=("brightness",)), []
    for _ in range(200):
        clean = rng.random(100) < 0.7
        share = np.where(clean, rng.random(100) < 0.8, rng.random(100) < 0.1)
        sets.append(task._metrics(clean.astype(float), share[None].astype(float), chance=0.1))
    # A spread of 200 is known to 1 / sqrt(400) = 5 %: four times that.
    assert np.mean([one["relative_se"] for one in sets]) == pytest.approx(
        np.std([one["relative"] for one in sets]), rel=0.2
    )


def test_corrupted_images(embedder, test, classes, tmp_path):  # noqa: F811
    file = tmp_path / "errors.json"
    file.write_text(json.dumps({"gaussian_noise": 0.9, "jpeg_compression": 0.5, "clean": 0.4}))
    names = ("gaussian_noise", "jpeg_compression")
    task = Robustness(test, classes, corruptions=names, severities=(1, 5), reference=str(file))
    found = metrics_of(task, embedder)
    assert found == metrics_of(task, embedder)  # noise is drawn from the keys
    noise, jpeg, clean = (found[f"acc1_{name}"] for name in (*names, "clean"))
    assert found["acc1_corrupted"] == pytest.approx((noise + jpeg) / 2)
    assert clean == metrics_of(ZeroShot(test, classes), embedder)["acc1"]
    assert found["mce"] == pytest.approx(((1 - noise) / 0.9 + (1 - jpeg) / 0.5) / 2)
    assert found["relative_mce"] == pytest.approx(((clean - noise) / 0.5 + (clean - jpeg) / 0.1) / 2)
    file.write_text(json.dumps({"gaussian_noise": 0.9, "jpeg_compression": 0.5}))
    assert metrics_of(task, embedder).keys() == found.keys() - {"relative_mce", "relative_mce_se"}
