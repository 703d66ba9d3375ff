"""The same embeddings in CLIP_benchmark, scikit-learn and here: tests/clip_benchmark.sh installs what is compared with.

Metrics are shares of a few hundred queries, so two that agree do so to float64's rounding, and two that do not differ by a whole
query at least: CLOSE is far from both. CLIP_benchmark's own sums are float32 means, off by at most 2^-24 of their value.
"""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from siglip.evaluation.fewshot import ridge_classes
from siglip.evaluation.groups import group_gaps
from siglip.evaluation.knn import knn_classes
from siglip.evaluation.linear_probe import fit_logistic, scores_of
from siglip.evaluation.metrics import (
    accuracies,
    average_precision,
    brier_score,
    calibration_error,
    mean_average_precision,
    roc_auc,
)
from siglip.evaluation.retrieval import retrieval
from siglip.evaluation.segmentation import counts_of, segmentation_metrics
from siglip.evaluation.selection import selection
from siglip.evaluation.zeroshot import class_embeddings, classification
from siglip.parallel import sharding
from tests.siglip.shapes import CLASSES, draw

HAS_BOTH = all(importlib.util.find_spec(name) for name in ("clip_benchmark", "sklearn", "torch"))
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not HAS_BOTH, reason="needs CLIP_benchmark and scikit-learn: tests/clip_benchmark.sh"),
]
CLOSE = {"rel": 0, "abs": 1e-6}


def unit(z):
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def near(centres, labels, rng, spread=1.0):
    return unit(centres[labels] + spread * rng.normal(size=(len(labels), centres.shape[1])))


class Stored:
    """A "model" of CLIP_benchmark that has computed its embeddings already: images and texts are their numbers."""

    def __init__(self, zimg, ztxt):
        import torch

        self.zimg, self.ztxt = torch.from_numpy(zimg), torch.from_numpy(ztxt)

    def encode_image(self, images):
        return self.zimg[images.long().reshape(-1)]

    def encode_text(self, numbers):
        return self.ztxt[numbers]


class Batches:
    """(images, targets) a few at a time, as a torch DataLoader gives them."""

    def __init__(self, targets, classes=()):
        self.targets, self.dataset = targets, SimpleNamespace(classes=classes)

    def __iter__(self):
        import torch

        for start in range(0, len(self.targets), 7):
            part = self.targets[start : start + 7]
            images = torch.arange(start, start + len(part)).reshape(-1, 1, 1, 1)
            yield images, part if isinstance(part, list) else torch.from_numpy(part)


def numbers_of(texts):
    import torch

    return torch.tensor([int(text) for text in texts])


@pytest.mark.parametrize("classes", [3, 40])
def test_zero_shot_classification(classes, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output, target, topk):
        """As theirs, whose `float(array of one)` numpy 2.4 refuses."""
        correct = output.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
        return [correct[:k].reshape(-1).float().sum().item() / len(target) for k in topk]

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, 16))
    labels = rng.permutation(np.arange(300) % (classes - 1))  # the last class has no image
    zimg, ztxt = near(centres, labels, rng), near(centres, np.repeat(np.arange(classes), 5), rng, spread=2.0)
    names = [str(k) for k in range(classes)]
    prompts = {name: [str(5 * k + m) for m in range(5)] for k, name in enumerate(names)}
    theirs = zeroshot_classification.evaluate(
        Stored(zimg, ztxt), Batches(labels, names), numbers_of, names, prompts, "cpu", amp=False
    )
    weights = class_embeddings(lambda texts: ztxt[[int(text) for text in texts]], list(prompts.values()))
    ours = classification(zimg, weights, labels)
    assert ours.pop("tied_fraction") == 0
    assert 0 < ours.pop("mean_per_class_recall_se") < 0.1  # theirs has none
    if classes < 5:
        assert np.isnan(theirs.pop("acc5"))  # ours leaves it out
    assert ours == pytest.approx(theirs, **CLOSE) and 0.2 < ours["acc1"] < 0.98


def test_several_labels():
    from clip_benchmark.metrics import zeroshot_classification
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    zimg, weights, positive = (
        unit(rng.normal(size=(150, 12))),
        unit(rng.normal(size=(37, 12))),
        rng.random((150, 37)) < 0.2,
    )
    positive[:, 5] = False
    names = [str(k) for k in range(37)]
    theirs = zeroshot_classification.evaluate(
        Stored(zimg, weights), Batches(positive.astype(int), names), numbers_of, names, {n: [n] for n in names}, "cpu",
        amp=False,
    )  # fmt: skip
    ours = mean_average_precision(zimg, weights, positive)
    assert {"mean_average_precision": ours} == pytest.approx(theirs, **CLOSE)
    with pytest.warns(UserWarning, match="No positive class"):
        assert ours == pytest.approx(average_precision_score(positive, zimg @ weights.T, average="macro"), **CLOSE)


def test_several_labels_and_equal_scores_are_a_decision():
    import torch
    from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
    from sklearn.metrics import average_precision_score

    positive, scores = np.arange(20) < 2, np.zeros(20)
    assert average_precision(scores, positive) == average_precision_score(positive, scores) == 0.1
    for order in (slice(None), slice(None, None, -1)):  # theirs is whatever torch's sort does: .0954 and another
        truth = torch.from_numpy(positive[order].copy())[:, None]
        theirs = float(average_precision_per_class(torch.zeros(20, 1), truth))
        assert theirs != pytest.approx(0.1, abs=1e-3)


def test_retrieval_with_several_captions():
    from clip_benchmark.metrics import zeroshot_retrieval

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 8))
    captions = [1 + n % 4 for n in range(60)]
    image_of_text = np.repeat(np.arange(60), captions)
    zimg, ztxt = near(centres, np.arange(60), rng), near(centres, image_of_text, rng)
    numbers = iter(range(len(image_of_text)))
    texts = [[str(next(numbers)) for _ in range(count)] for count in captions]
    theirs = zeroshot_retrieval.evaluate(
        Stored(zimg, ztxt), Batches(texts), numbers_of, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = retrieval(zimg, ztxt, image_of_text)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, **CLOSE)
    assert len(theirs) == 6 and 0.2 < ours["text_retrieval_recall@1"] < 0.98


def test_caption_selection_and_ties_are_a_decision():
    from clip_benchmark.metrics import image_caption_selection

    def theirs(zimg, ztxt, captions):
        numbers = [[str(captions * n + k) for k in range(captions)] for n in range(len(ztxt) // captions)]
        return image_caption_selection.evaluate(Stored(zimg, ztxt), Batches(numbers), numbers_of, "cpu", amp=False)

    rng = np.random.default_rng(0)
    zimg, ztxt = unit(rng.normal(size=(90, 8))), unit(rng.normal(size=(180, 8)))
    scores = np.einsum("ne,nce->nc", zimg, ztxt.reshape(90, 2, 8))[:, None]
    found = theirs(zimg, ztxt, 2)
    assert found.pop("image_acc") == 1 and found["acc"] == found["text_acc"]  # one image has nothing to choose from
    assert selection(list(scores))["text_acc"] == pytest.approx(found["text_acc"], **CLOSE)
    same = np.ones_like(zimg)
    assert theirs(same, np.ones_like(ztxt), 2)["text_acc"] == 1
    assert selection([np.ones((1, 2))] * 90)["text_acc"] == 0
    assert selection([np.ones((1, 2))] * 90, strict=False)["text_acc"] == 1


def test_scores_and_probabilities():
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    rng = np.random.default_rng(0)
    positive, weights = rng.random(500) < 0.2, rng.random(500)
    scores = np.round(rng.normal(size=500) + positive, 1)  # many are equal
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores), **CLOSE)
    weighted = {"sample_weight": weights}
    theirs = average_precision_score(positive, scores, **weighted)
    assert average_precision(scores, positive, weights) == pytest.approx(theirs, **CLOSE)
    assert roc_auc(scores, positive, weights) == pytest.approx(roc_auc_score(positive, scores, **weighted), **CLOSE)
    probability = 1 / (1 + np.exp(-scores))
    theirs = brier_score_loss(positive, probability, **weighted)
    assert brier_score(probability, positive, weights) == pytest.approx(theirs, **CLOSE)


def test_calibration_error_of_scikit_learns_curve():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    probability = rng.random(400)
    positive = rng.random(400) < probability**1.5
    shares, means = calibration_curve(positive, probability, n_bins=15)
    counts = np.histogram(probability, np.linspace(0, 1, 16))[0]
    theirs = np.sum(counts * abs(shares - means)) / 400
    assert calibration_error(probability, positive, np.ones(400))[0] == pytest.approx(theirs, **CLOSE)


def digits():
    """1797 scanned digits of 8 x 8 pixels, as features: (train, labels, test, labels)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def test_neighbours_of_digits():
    from sklearn.neighbors import KNeighborsClassifier

    train, labels, test, wanted = digits()
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07)).fit(train, labels)
    found = accuracies(knn_classes(train, labels, test), wanted)
    assert found["acc1"] == pytest.approx(theirs.score(test, wanted), **CLOSE) and found["acc1"] > 0.9


@pytest.mark.parametrize("count", [40, 1200])
def test_ridge_on_digits(count):
    from sklearn.linear_model import Ridge

    train, labels, test, wanted = digits()
    train, labels = train[:count], labels[:count]
    mean, scale = train.mean(0), train.std(0) + 1e-5
    x, z = (np.pad((own - mean) / scale, [(0, 0), (0, 1)], constant_values=100) for own in (train, test))
    fitted = Ridge(1024, fit_intercept=False).fit(x, np.where(labels[:, None] == np.arange(10), 1, -1))
    theirs = np.argmax(fitted.predict(z), 1)
    np.testing.assert_array_equal(ridge_classes(train, labels, test, classes=10), theirs)
    assert 0.3 < np.mean(theirs == wanted) < 1


def test_logistic_regression_on_digits():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.preprocessing import StandardScaler

    train, labels, test, wanted = digits()
    mesh, sweep = sharding.make_mesh(sharding.MeshConfig()), [0.001, 0.1]
    scaler = StandardScaler().fit(train)
    for c, probe in zip(sweep, fit_logistic(train, labels, sweep, classes=10, mesh=mesh), strict=True):
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(scaler.transform(train), labels)
        scores = scores_of(probe, test)
        probability = np.exp(scores - scores.max(1, keepdims=True))
        probability /= probability.sum(1, keepdims=True)
        np.testing.assert_allclose(probability, theirs.predict_proba(scaler.transform(test)), atol=1e-6)
        found = accuracies(np.argmax(scores, 1), wanted)
        predicted = theirs.predict(scaler.transform(test))
        expected = {
            "acc1": np.mean(predicted == wanted),
            "mean_per_class_recall": balanced_accuracy_score(wanted, predicted),
        }
        assert found == pytest.approx(expected, **CLOSE) and found["acc1"] > 0.85


def test_segmentation_of_shapes():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, jaccard_score

    rng = np.random.default_rng(0)
    drawn = [draw(*CLASSES[n % len(CLASSES)].split(), rng) for n in range(12)]
    pixels, masks = (np.stack(own) for own in zip(*drawn, strict=True))
    known = masks != 255
    model = LogisticRegression(max_iter=1000).fit(pixels[:6][known[:6]] / 255, masks[:6][known[:6]])
    predicted = model.predict(pixels[6:].reshape(-1, 3) / 255).reshape(masks[6:].shape)
    predicted = np.where(rng.random(predicted.shape) < 0.1, rng.integers(0, 4, predicted.shape), predicted)
    pairs = zip(predicted.astype(np.uint8), masks[6:], strict=True)
    found = segmentation_metrics(np.stack([counts_of(*pair, classes=4) for pair in pairs]))
    truth, guess = masks[6:][known[6:]], predicted[known[6:]]
    assert found["mean_iou_tokens"] == pytest.approx(jaccard_score(truth, guess, average="macro"), **CLOSE)
    assert found["pixel_acc_tokens"] == pytest.approx(accuracy_score(truth, guess), **CLOSE)
    assert 0.5 < found["mean_iou_tokens"] < 1


def test_accuracy_of_groups():
    from sklearn.metrics import accuracy_score

    rng = np.random.default_rng(0)
    predicted, labels, groups = rng.integers(0, 3, 90), rng.integers(0, 3, 90), rng.choice(["a", "b"], 90)
    found = group_gaps(predicted, labels, groups.tolist(), classes=3)
    each = [accuracy_score(labels[groups == group], predicted[groups == group]) for group in "ab"]
    assert [found["acc1_a"], found["acc1_b"]] == pytest.approx(each, **CLOSE)
    assert found["acc1_gap"] == pytest.approx(abs(each[0] - each[1]), **CLOSE)
