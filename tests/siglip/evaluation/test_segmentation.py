"""Metrics of segmentation: by hand, and their errors by drawing sets of images."""

import numpy as np
import pytest

from siglip.evaluation.segmentation import counts_of, segmentation_metrics


def test_intersection_over_union_by_hand():
    mask = np.array([[0, 0], [1, 255]], np.uint8)
    predicted = np.array([[0, 1], [1, 1]], np.uint8)
    counts = counts_of(predicted, mask, classes=3)
    assert counts.tolist() == [[1, 1, 0], [2, 1, 0], [1, 2, 0]]
    # Class 0: one hit of two; class 1: one of two; class 2 is nowhere. At random: 2/3 of 2 + 1 - 2/3, 1/3 of 1 + 1 - 1/3, none.
    expected = {"mean_iou_tokens": 0.5, "pixel_acc_tokens": 2 / 3, "pixel_acc_tokens_chance": 1 / 3}
    expected |= {"mean_iou_tokens_chance": (2 / 7 + 1 / 5 + 0) / 3}
    found = segmentation_metrics(counts[None])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-15)
    assert np.isnan(found["mean_iou_tokens_se"])  # one image tells nothing of others
    with pytest.raises(ValueError, match="class 4, but those of training end at 2"):
        counts_of(predicted, np.full_like(mask, 4), classes=3)


def test_the_error_of_a_segmentation_is_its_spread_over_sets_of_images():
    rng, classes = np.random.default_rng(0), 4

    def of_images(n):
        masks = rng.integers(0, classes, (n, 8, 8)).astype(np.uint8)
        right = rng.random((n, 8, 8)) < rng.uniform(0.2, 1, (n, 1, 1))  # images differ more than their pixels
        predicted = np.where(right, masks, rng.integers(0, classes, masks.shape)).astype(np.uint8)
        pairs = zip(predicted, masks, strict=True)
        return segmentation_metrics(np.stack([counts_of(*pair, classes=classes) for pair in pairs]))

    sets = [of_images(50) for _ in range(200)]
    for name in ("mean_iou_tokens", "pixel_acc_tokens"):
        spread, errors = np.std([one[name] for one in sets]), [one[f"{name}_se"] for one in sets]
        # A spread of 200 is known to 1 / sqrt(400) = 5 %, the mean of their errors much better: four times that.
        assert np.mean(errors) == pytest.approx(spread, rel=0.2)
