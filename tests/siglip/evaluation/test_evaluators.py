import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglip.evaluation.retrieval import mean_of, retrieval
from siglip.evaluation.zeroshot import canonicalize, class_embeddings, classification, make_prompts


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def reference_recall(queries, candidates, positives, k):
    """Straight from the definition: sort all candidates, hit if any positive is among the first k."""
    hits = []
    for query, wanted in zip(queries, positives, strict=True):
        order = np.argsort(-(candidates @ query), kind="stable")
        hits.append(bool(set(order[:k]) & set(wanted)))
    return np.mean(hits)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 14), st.integers(1, 3), st.integers(0, 10_000))
def test_retrieval_agrees_with_sorting_everything(images, captions, seed):
    rng = np.random.default_rng(seed)
    zimg, ztxt = unit(rng.normal(size=(images, 6))), unit(rng.normal(size=(images * captions, 6)))
    image_of_text = rng.permutation(np.repeat(np.arange(images), captions))
    metrics = retrieval(zimg, ztxt, image_of_text)
    texts_of_image = [np.flatnonzero(image_of_text == i) for i in range(images)]
    for k in (1, 5, 10):
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(reference_recall(zimg, ztxt, texts_of_image, k))
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(
            reference_recall(ztxt, zimg, image_of_text[:, None], k)
        )


def test_perfect_and_collapsed_encoders():
    eye = np.eye(12)
    perfect = retrieval(eye, eye, np.arange(12))
    assert perfect["text_retrieval_recall@1"] == perfect["image_retrieval_recall@1"] == 1
    assert perfect["image_retrieval_median_rank"] == 1
    same = np.ones((12, 3))
    collapsed = retrieval(same, same, np.arange(12))
    assert collapsed["image_retrieval_recall@10"] == 0 and collapsed["text_retrieval_median_rank"] == 12


def test_median_rank_by_hand():
    # Similarities of caption j to pictures 0, 1, 2: its own picture is first, second, third.
    ztxt = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    metrics = retrieval(np.eye(3), ztxt, np.arange(3))
    assert metrics["image_retrieval_median_rank"] == 2
    assert metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3)


def test_a_caption_without_a_picture_is_an_error():
    with pytest.raises(ValueError, match="must name one of 2 pictures"):
        retrieval(np.eye(2), np.eye(2), np.array([0, 2]))


def test_mean_over_languages():
    assert mean_of([{"a": 1.0, "b": 0.0}, {"a": 3.0, "b": 1.0}]) == {"a": 2.0, "b": 0.5}


def test_classification_by_hand():
    classes = np.eye(6)
    labels = np.array([0, 0, 0, 1])
    # Three of class 0: right, second best, worst; the one of class 1: right.
    zimg = np.array([
        [6.0, 5, 4, 3, 2, 1], [5, 6, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2], [5, 6, 4, 3, 2, 1],
    ])  # fmt: skip
    assert classification(zimg, classes, labels) == {
        "acc1": 0.5,
        "acc5": 0.75,
        "mean_per_class_recall": pytest.approx((1 / 3 + 1) / 2),
    }


def test_few_classes_have_no_acc5_and_bad_labels_are_named():
    assert "acc5" not in classification(np.eye(3), np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="labels reach from 0 to 3, but there are 3 classes"):
        classification(np.eye(3), np.eye(3), np.array([0, 1, 3]))


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts():
    seen = []

    def embed(prompts):
        seen.extend(prompts)
        return np.array([[3.0, 0], [0, 1], [2, 0], [5, 0]])

    classes = class_embeddings(embed, ["Cat", "polar_bear"], ["{}", "a photo of a {}."])
    assert seen == ["cat", "a photo of a cat", "polar bear", "a photo of a polar bear"]
    np.testing.assert_allclose(classes, [[np.sqrt(0.5), np.sqrt(0.5)], [1, 0]], atol=1e-6)


def test_canonical_text_and_templates():
    assert canonicalize("  Polar_Bear's,  (big)! ") == "polar bears big"
    assert make_prompts("dog", ["a {c}"]) == ["a dog"]
    with pytest.raises(ValueError, match="has no {}"):
        make_prompts("dog", ["a photo"])


def test_a_diverged_encoder_has_no_score():
    broken = np.full((3, 3), np.nan)
    with pytest.raises(ValueError, match="not finite"):
        retrieval(broken, np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        classification(np.eye(3), broken, np.arange(3))
