"""Metrics and probes against their definitions, written out in float64."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglip.errors import UserError
from siglip.evaluation.association import association
from siglip.evaluation.fewshot import draw_shots, ridge_classes
from siglip.evaluation.frozen_tokens import standardised, train_head
from siglip.evaluation.groups import group_gaps
from siglip.evaluation.knn import knn_classes
from siglip.evaluation.labels import multi_hot, read_label_map, read_subset
from siglip.evaluation.linear_probe import fit_logistic
from siglip.evaluation.metrics import (
    average_precision,
    brier_score,
    calibration_error,
    jackknife_error,
    mean_average_precision,
    mean_recall,
    probe_accuracies,
    roc_auc,
)
from siglip.evaluation.ranking import rank_both_ways
from siglip.evaluation.selection import selection
from siglip.evaluation.verification import draw_pairs, verification
from siglip.evaluation.zeroshot import multi_label
from siglip.parallel import sharding

MESH = sharding.make_mesh(sharding.MeshConfig())


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def scored(seed, n=40, levels=7):
    """Scores of few levels, so that many are equal; weights; at least one of either kind."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    positive[:2] = True, False
    return rng.integers(0, levels, n).astype(float), positive, rng.random(n) + 0.1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_average_precision_and_auc_by_their_definitions(seed):
    scores, positive, weights = scored(seed)
    expected, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = scores >= threshold
        recall = weights[above & positive].sum() / weights[positive].sum()
        expected += (recall - recall_before) * weights[above & positive].sum() / weights[above].sum()
        recall_before = recall
    assert average_precision(scores, positive, weights) == pytest.approx(expected)
    won = (scores[positive][:, None] > scores[~positive]) + (scores[positive][:, None] == scores[~positive]) / 2
    both = weights[positive][:, None] * weights[~positive]
    assert roc_auc(scores, positive, weights) == pytest.approx((won * both).sum() / both.sum())


def test_average_precision_of_constant_scores_is_the_prevalence_and_of_no_positives_zero():
    positive = np.arange(20) < 2
    assert average_precision(np.zeros(20), positive) == average_precision(np.zeros(20), positive[::-1]) == 0.1
    assert average_precision(np.arange(20.0), np.zeros(20, bool)) == 0
    assert np.isnan(roc_auc(np.arange(3.0), np.ones(3, bool)))
    classes, zimg = np.eye(40), np.random.default_rng(0).normal(size=(9, 40))
    positive = np.random.default_rng(1).random((9, 40)) < 0.3
    own = [average_precision(zimg[:, k], positive[:, k]) for k in range(40)]
    assert mean_average_precision(zimg, classes, positive) == pytest.approx(np.mean(own))
    with pytest.raises(ValueError, match="not finite"):
        average_precision(np.array([1.0, np.nan]), np.array([True, False]))


def test_calibration_error_by_hand():
    probability, positive = np.array([0.1, 0.1, 0.3, 0.5, 1.0]), np.array([False, True, False, True, True])
    # Bins [0, .5) and [.5, 1]: |.5/3 - 1/3| * 3/5 + |1.5/2 - 1| * 2/5.
    error, spread = calibration_error(probability, positive, np.ones(5), bins=2)
    assert error == pytest.approx((1 - 0.5) / 5 + 0.5 / 5) and 0 < spread < 0.5
    # Of equal mass: the two lowest, the others: |.2 - 1| / 4 + |.8 - 1| / 4.
    error, _ = calibration_error(probability[[0, 1, 2, 3]], positive[:4], np.ones(4), bins=2, equal_mass=True)
    assert error == pytest.approx((1 - 0.2) / 4 + (1 - 0.8) / 4)
    assert brier_score(probability, positive, np.ones(5)) == pytest.approx((0.01 + 0.81 + 0.09 + 0.25 + 0) / 5)


def test_the_spread_of_a_calibration_error_is_what_repeating_the_outcomes_gives():
    rng = np.random.default_rng(0)
    probability = rng.random(500)
    errors, spreads = zip(
        *(calibration_error(probability, rng.random(500) < probability**2, np.ones(500)) for _ in range(60)),
        strict=True,
    )
    # A standard deviation of 60 values is known to 1 / sqrt(2 * 59) = 9 %; four times that.
    assert np.mean(spreads) == pytest.approx(np.std(errors), rel=0.4)


def test_a_prior_shift_makes_a_calibrated_model_calibrated_at_another_prior():
    # A model whose logits are the log odds at 1 / B: densities of the score are those of two normals.
    rng, batch, prior = np.random.default_rng(0), 64, 0.25
    positive = np.arange(40_000) < 20_000
    x = rng.normal(size=len(positive)) + 2 * positive
    logits = 2 * x - 2 - np.log(batch - 1)  # log of the ratio of densities, and the prior's odds
    found = verification(logits, positive, prior=prior, train_batch_size=batch)
    assert found["ece_shifted"] < 4 * found["ece_shifted_se"] < 0.05 < found["ece"]
    assert found["brier_shifted"] < found["brier"]
    assert found["observed_over_expected_shifted"] == pytest.approx(1, abs=0.05) and found["observed_over_expected"] > 3
    assert found["average_precision"] > verification(logits, positive, prior=0.01)["average_precision"]


def test_errors_are_the_spread_over_sets_of_cases_and_chance_is_what_random_scores_get():
    rng, found, errors = np.random.default_rng(0), collections.defaultdict(list), collections.defaultdict(list)
    positive, case = np.tile(np.arange(4) == 0, 100), np.repeat(np.arange(100), 4)  # a caption and three wrong images
    for draw in range(300):
        # Captions differ in all of their scores: pairs are not independent.
        logits = np.repeat(rng.normal(size=100), 4) + rng.normal(size=400) + positive
        labels = rng.random((200, 3)) < 0.4
        zimg, names = rng.normal(size=(200, 3)) + labels, rng.integers(0, 5, 200) * rng.integers(0, 2, 200)
        recall, error = mean_recall(rng.random(200) < 0.2 + 0.1 * names, names)
        found["average_precision"].append(average_precision(logits, positive))
        found["brier"].append(brier_score(1 / (1 + np.exp(-logits)), positive, np.ones(400)))
        found["mean_average_precision"].append(mean_average_precision(zimg, np.eye(3), labels))
        found["recall"].append(recall)
        if draw < 20:
            one = verification(logits, positive, prior=0.25, case=case) | multi_label(zimg, np.eye(3), labels)
            for name in found:
                errors[name].append({"recall_se": error, **one}[f"{name}_se"])
    for name, values in found.items():
        # A spread of 300 is known to 1 / sqrt(598) = 4 %, the mean of 20 errors to 16 % / sqrt(20) = 4 %: four times both.
        assert np.mean(errors[name]) == pytest.approx(np.std(values), rel=0.23), name
    at_random = multi_label(rng.normal(size=(20_000, 3)), np.eye(3), rng.random((20_000, 3)) < 0.4)
    assert at_random["mean_average_precision"] == pytest.approx(at_random["mean_average_precision_chance"], rel=0.05)
    assert np.isnan(jackknife_error(np.mean, np.zeros(3, int)))


def test_drawn_pairs_never_match_by_accident():
    image_of_text = np.array([3, 3, 5, 9])
    image, text, positive = draw_pairs(image_of_text, 50, seed=0)
    np.testing.assert_array_equal(positive, image == image_of_text[text])
    assert positive.sum() == 4 and len(image) == 4 * 51 and set(image) == {3, 5, 9}
    with pytest.raises(ValueError, match="two images are needed"):
        draw_pairs(np.zeros(3, int), 1, seed=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_ranks_both_ways_with_equal_vectors_and_several_right_ones(seed):
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(-1, 2, (n, 2)).astype(np.float32) for n in (7, 11))
    row_ids, column_ids = rng.integers(0, 4, 7), rng.integers(0, 4, 11)
    texts = rng.integers(0, 6, 11)

    def slowly(queries, candidates, query_ids, candidate_ids, texts):
        for query, wanted in zip(queries, query_ids, strict=True):
            scores, right = candidates @ query, candidate_ids == wanted
            order = np.argsort(-scores, kind="stable")
            if not right.any():
                yield 0, False
                continue
            best = next(n for n in order if right[n])
            before = [n for n in order[: list(order).index(best)] if not right[n]]
            equal = [n for n in range(len(scores)) if scores[n] == scores[best] and not right[n]]
            yield 1 + len(before), any(texts[n] != texts[best] for n in equal)

    of_rows, of_columns = rank_both_ways(rows, columns, row_ids, column_ids, column_texts=texts.tolist())
    assert list(zip(*of_rows, strict=True)) == list(slowly(rows, columns, row_ids, column_ids, texts))
    assert list(zip(*of_columns, strict=True)) == list(slowly(columns, rows, column_ids, row_ids, np.arange(7)))


def test_ranks_in_many_tiles_are_those_in_one(monkeypatch):
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    columns[100:120] = columns[:20]
    ids = rng.integers(0, 300, 200)
    whole = rank_both_ways(rows, columns, np.arange(300), ids)
    monkeypatch.setattr("siglip.evaluation.ranking._TILE", (64, 64))
    for one, other in zip(whole, rank_both_ways(rows, columns, np.arange(300), ids), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nearest_neighbours_vote_by_distance():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 8))
    labels, wanted = rng.integers(0, 5, 90), rng.integers(0, 5, 33)
    train, queries = centres[labels] + rng.normal(size=(90, 8)), centres[wanted] + rng.normal(size=(33, 8))
    expected = []
    for query in unit(queries):
        cosines = unit(train) @ query
        nearest = np.argsort(-cosines, kind="stable")[:7]
        votes = [np.exp(cosines[nearest[labels[nearest] == k]] / 0.07).sum() for k in range(5)]
        expected.append(np.argmax(votes))
    found = knn_classes(train, labels, queries, k=7)
    np.testing.assert_array_equal(found, expected)
    assert 0.5 < np.mean(found == wanted) < 1  # neither trivial nor chance
    # More neighbours than there are training images: all of them; and many tiles as one.
    np.testing.assert_array_equal(knn_classes(train, labels, queries, k=500), knn_classes(train, labels, queries, k=90))


def test_neighbours_of_many_tiles_are_those_of_one(monkeypatch):
    rng = np.random.default_rng(0)
    train, labels, queries = rng.normal(size=(50, 4)), rng.integers(0, 3, 50), rng.normal(size=(21, 4))
    whole = knn_classes(train, labels, queries, k=5)
    monkeypatch.setattr("siglip.evaluation.knn._TILE", (8, 16))
    np.testing.assert_array_equal(knn_classes(train, labels, queries, k=5), whole)


@pytest.mark.parametrize("shots", [3, 40])  # fewer and more images than features
def test_ridge_is_the_least_squares_solution(shots):
    rng = np.random.default_rng(0)
    centres = 0.5 * rng.normal(size=(4, 12))
    labels, wanted = np.repeat(np.arange(4), shots), rng.integers(0, 4, 50)
    features, queries = centres[labels] + rng.normal(size=(4 * shots, 12)), centres[wanted] + rng.normal(size=(50, 12))
    mean, scale = features.mean(0), features.std(0) + 1e-5
    x = np.column_stack([(features - mean) / scale, np.full(len(labels), 100.0)])
    y = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    # |x W - y|^2 + l |W|^2 is the plain problem with sqrt(l) I below x and zeros below y.
    weights = np.linalg.lstsq(np.vstack([x, 32 * np.eye(13)]), np.vstack([y, np.zeros((13, 4))]), rcond=None)[0]
    scores = np.column_stack([(queries - mean) / scale, np.full(50, 100.0)]) @ weights
    np.testing.assert_array_equal(ridge_classes(features, labels, queries, classes=4), np.argmax(scores, 1))
    assert 0.3 < np.mean(np.argmax(scores, 1) == wanted) < 1


def test_more_shots_contain_the_fewer_and_a_seed_is_a_draw():
    labels = np.array([2, 0, 2, 0, 2, 2, 0, 2, 5])
    few, more = draw_shots(labels, 1, seed=1), draw_shots(labels, 3, seed=1)
    assert set(few) < set(more) and len(few) == 3 and np.bincount(labels[more]).tolist() == [3, 0, 3, 0, 0, 1]
    assert any(set(draw_shots(labels, 1, seed)) != set(few) for seed in range(5))


def shares(found):
    """Without standard errors and chance levels."""
    return {name: value for name, value in found.items() if not name.endswith(("_se", "_chance"))}


def test_selection_by_hand_and_ties():
    # Winoground: the first instance is right, the second prefers caption 1 for both images.
    pairs = [np.array([[0.9, 0.2], [0.1, 0.8]]), np.array([[0.5, 0.9], [0.4, 0.8]])]
    assert shares(selection(pairs)) == {"text_acc": 0.5, "image_acc": 0.5, "acc": 0.5, "tied_fraction": 0.0}
    one_way = [np.array([[0.9, 0.2], [0.95, 0.99]])]  # image 1 picks its caption, caption 0 picks image 1
    assert shares(selection(one_way)) == {"text_acc": 1.0, "image_acc": 0.0, "acc": 0.0, "tied_fraction": 0.0}
    # SugarCrepe: one image each. A collapsed encoder is right nowhere, or everywhere where the first of equal scores wins.
    same = [np.ones((1, 2))] * 3
    assert shares(selection(same)) == {"text_acc": 0.0, "tied_fraction": 1.0}
    assert shares(selection(same, strict=False)) == {"text_acc": 1.0, "tied_fraction": 1.0}
    with pytest.raises(ValueError, match="not finite"):
        selection([np.array([[np.nan, 1.0]])])


def test_random_scores_are_at_the_chance_that_is_told():
    rng, many = np.random.default_rng(0), 5000
    right = [rng.permutation(np.arange(count) < 2) for count in rng.integers(5, 7, many)]
    labels = rng.integers(0, 4, many)
    both_ways = selection(list(rng.random((many, 2, 2))))
    for found, names in {
        "pairs": (both_ways, ("text_acc", "image_acc", "acc")),
        "captions": (selection(list(rng.random((many, 1, 3)))), ("text_acc",)),
        "associations": (association([rng.random(len(own)) for own in right], right), ("jaccard",)),
        "probe": (
            probe_accuracies(rng.integers(0, 4, many), labels, "knn", "map", classes=4),
            ("knn_acc1_map", "knn_mean_per_class_recall_map"),
        ),
    }.values():
        for name in names:
            assert abs(found[name] - found[f"{name}_chance"]) < 4 * found[f"{name}_se"] < 0.04, name
    share = both_ways["acc"]
    assert both_ways["acc_se"] == pytest.approx(np.sqrt(share * (1 - share) / many))


def test_labels_as_zeros_and_ones_and_as_lists():
    index = {"cat": 0, "dog": 1, "cow": 2}
    expected = [[True, False, True], [False, True, False], [False] * 3]
    for values in ([[1, 0, 1], [0, 1, 0], [0, 0, 0]], [["cow", "cat"], [1], []], [["2", 0], ["dog"], []]):
        assert multi_hot(values, index, 3, pairs="abc").tolist() == expected
    with pytest.raises(ValueError, match="image b has the label 'dgo', .* did you mean 'dog'"):
        multi_hot([["cat", "dog"], ["dgo"]], index, 3, pairs=["image a", "image b"])
    with pytest.raises(ValueError, match="the label '3', which is neither a number below 3"):
        multi_hot([[0, 3]], index, 3, pairs=["x"])
    for number in (float("nan"), 0.5):
        with pytest.raises(ValueError, match=f"image a has the label '{number}', which is neither a number"):
            multi_hot([[0.0, number]], index, 3, pairs=["image a"])
    assert multi_hot([[1, 0, 1], []], index, 3, pairs="ab").tolist() == [expected[0], expected[2]]
    # A text that is a class's name is that class, also where it is a number.
    numbers = {"1": 0, "2": 1, "3": 2}
    assert multi_hot([["1", "3"], ["2"], []], numbers, 3, pairs="abc").tolist() == expected
    for label in ("9" * 5000, 10**400, "-1"):
        with pytest.raises(ValueError, match="image a has the label"):
            multi_hot([["cat", label]], index, 3, pairs=["image a"])


def test_a_head_leaves_the_statistics_of_its_input_as_they_are():
    tokens = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float16)
    first = {"kernel": np.ones(3, np.float32), "mean": np.full(3, 0.3, np.float32), "std": np.full(3, 0.7, np.float32)}
    trained = train_head(
        first, lambda params, batch, key: jnp.mean((standardised(params, batch["tokens"]) @ params["kernel"]) ** 2),
        {"tokens": tokens}, steps=3, batch_size=8, learning_rate=0.1, weight_decay=0.5, seed=0, mesh=MESH,
    )  # fmt: skip
    assert np.all(trained["kernel"] < first["kernel"])
    np.testing.assert_array_equal(trained["mean"], first["mean"])
    np.testing.assert_array_equal(trained["std"], first["std"])


def test_subsets_and_maps_of_classes(tmp_path):
    path = tmp_path / "subset.txt"
    index = {"tench": 0, "n01443537": 1, "shark": 2}
    for content in ("shark\ntench\n", '["2", "tench"]', "2\n0\n2"):
        path.write_text(content)
        assert read_subset(str(path), index, 3) == [0, 2]
    for content, message in (
        (b"\n", "names no class"), (b"shrk", "did you mean 'shark'"), (b"3", "'3' is none of the 3"),
        (b"\xff\xfes\0", "is not UTF-8 text"), (b'[["tench"]]', "must be a list"), (b'{"tench": 1}', "must be a list"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_subset(str(path), index, 3)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_subset(str(path), index, 3)
    # ObjectNet's root: 3 folders, two of them ImageNet's.
    (tmp_path / "folder_to_objectnet_label.json").write_text(
        '{"alarm_clock": "Alarm clock", "air_freshener": "Air freshener"}'
    )
    (tmp_path / "objectnet_to_imagenet_1k.json").write_text('{"Alarm clock": "analog clock; digital clock"}')
    assert read_label_map(str(tmp_path)) == {"alarm_clock": "alarm clock"}
    path.write_text('{"a": 3, "b": "cat"}')
    assert read_label_map(str(path)) == {"a": "3", "b": "cat"}
    for content, message in (
        ("[1]", "must be a JSON object"),
        ("{", "is not JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' is there more than once"),
        ('{"a": [1]}', "name or the number"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_label_map(str(path))


def test_the_linear_probe_is_at_the_minimum():
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(4, 6))
    labels = rng.integers(0, 4, 60)
    features = 5 + (centres[labels] + rng.normal(size=(60, 6))) * np.array([1, 1, 20, 1, 1, 0])
    for c, (weights, bias) in zip(
        (0.01, 10.0), fit_logistic(features, labels, [0.01, 10.0], classes=4, mesh=MESH), strict=True
    ):
        scores = features @ weights + bias
        probability = np.exp(scores - scores.max(1, keepdims=True))
        probability /= probability.sum(1, keepdims=True)
        # At the minimum of sum CE + |V|^2 / 2 C over V = std * W the gradient is zero; the constant feature has no weight.
        std = features.std(0)
        error = probability - np.eye(4)[labels]
        gradient = ((features - features.mean(0)) / np.where(std > 0, std, 1)).T @ error + weights * std[:, None] / c
        # `_GRADIENT` is that of the mean over 60 images.
        assert abs(gradient).max() < 60 * 1e-8 and abs(error.sum(0)).max() < 60 * 1e-8
        assert not weights[5].any() and np.mean(np.argmax(scores, 1) == labels) > 0.8


def test_gaps_between_groups_by_hand():
    predicted, labels = np.array([0, 0, 1, 1, 1, 1, 0]), np.array([0, 1, 1, 0, 1, 1, 1])
    found = group_gaps(predicted, labels, ["a"] * 4 + ["b"] * 2 + ["c"], classes=3, min_images=2)
    assert found["acc1_a"] == 0.5 and found["acc1_b"] == 1 and found["n_c"] == 1
    assert found["acc1_worst_group"] == 0.5 and found["acc1_gap"] == 0.5  # c is too small to be the worst
    assert found["acc1_gap_se"] == pytest.approx(np.sqrt(0.25 / 4)) and found["demographic_parity_gap"] == 0.5
    assert found["acc1_worst_group_se"] == found["acc1_a_se"] == 0.25 and found["acc1_b_chance"] == 1 / 3
    with pytest.raises(ValueError, match="1 groups have 3 images or more"):
        group_gaps(predicted, labels, ["a"] * 4 + ["b"] * 2 + ["c"], classes=3, min_images=3)
