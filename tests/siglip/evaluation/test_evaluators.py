import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglip.evaluation.class_files import canonicalize, make_prompts, read_classes, read_names, read_templates
from siglip.evaluation.ranking import rank_right_candidates
from siglip.evaluation.results import Result
from siglip.evaluation.retrieval import Retrieval, mean_of, retrieval
from siglip.evaluation.zeroshot import ZeroShot, class_embeddings, classification


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
    assert perfect["tied_fraction"] == 0 and collapsed["tied_fraction"] == 1
    for side in ("text", "image"):  # chance: the right one is the first of twelve once, among the first ten ten times
        assert collapsed[f"{side}_retrieval_recall@1"] == pytest.approx(1 / 12)
        assert collapsed[f"{side}_retrieval_recall@10"] == pytest.approx(10 / 12)


def test_median_rank_by_hand():
    # Similarities of caption j to images 0, 1, 2: its own image is first, second, third.
    ztxt = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    metrics = retrieval(np.eye(3), ztxt, np.arange(3))
    assert metrics["image_retrieval_median_rank"] == 2
    assert metrics["image_retrieval_recall@1"] == pytest.approx(1 / 3)


def test_a_caption_without_an_image_is_an_error():
    with pytest.raises(ValueError, match="must name one of 2 images"):
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
        "mean_per_class_recall_se": pytest.approx(np.sqrt(2 / 9 / 3) / 2),
        "tied_fraction": 0.0,
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

    classes = class_embeddings(embed, make_prompts(["Cat", "polar_bear"], ["{}", "a photo of a {}."]))
    assert seen == ["cat", "a photo of a cat", "polar bear", "a photo of a polar bear"]
    np.testing.assert_allclose(classes, [[np.sqrt(0.5), np.sqrt(0.5)], [1, 0]], atol=1e-6)


def test_canonical_text_and_templates():
    assert canonicalize("  Polar_Bear's,  (big)! ") == "polar bears big"
    assert make_prompts(["dog", "T-shirt"], ["a {c}"]) == [["a dog"], ["a tshirt"]]
    with pytest.raises(ValueError, match="has no {}"):
        make_prompts(["dog"], ["a photo"])
    with pytest.raises(ValueError, match="class '!' is all punctuation"):
        make_prompts(["dog", "!"], ["a photo of a {}."])
    assert make_prompts(["!"], ["{}"], canonical=False) == [["!"]]


def test_prompts_of_each_class():
    own = {"dog": ["A {} barks.", "man's best friend"], "cat": ["It purrs"]}
    assert make_prompts(["cat", "dog"], own) == [["it purrs"], ["a dog barks", "mans best friend"]]
    with pytest.raises(ValueError, match="no prompts for class 'cats'; did you mean 'cat'"):
        make_prompts(["cats"], own)
    for empty in ([], ["", " "]):
        with pytest.raises(ValueError, match="no prompts for class 'cat'$"):
            make_prompts(["cat"], {"cat": empty, "dog": ["a dog"]})
    classes = class_embeddings(lambda prompts: np.eye(3), make_prompts(["cat", "dog"], own))
    np.testing.assert_allclose(classes, [[1, 0, 0], [0, np.sqrt(0.5), np.sqrt(0.5)]], atol=1e-6)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a {}\n\n the {c} \n", ["a {}", "the {c}"]),
        ('["a {}", "the {}"]', ["a {}", "the {}"]),
        ('{"cat": ["a {}"]}', {"cat": ["a {}"]}),
        ('{\n "imagenet1k": {"cat": ["a {}"]}}', {"cat": ["a {}"]}),
        ("lambda c: f'a photo of a {c}.',", "is Python code; write the template alone"),
        ('{"a": {"cat": ["x"]}, "b": {"cat": ["y"]}}', "templates of 2 data sets: a, b"),
        ('["a {}"', "starts like JSON but is not"),
        ('{"cat": ["a {}"], "cat": ["b {}"]}', "the key 'cat' is there more than once"),
        ("[]", "holds no templates"),
        ('{"cat": [3]}', "holds no templates"),
        ('{"cat": "a {}"}', "holds no templates"),
        ('{"cat": 3}', "holds no templates"),
        ('"a {}"', ['"a {}"']),
        ('"a {}",\n"the {}",', "is a table or code"),
        ("- a {}\n- the {}", "is a table or code"),
        ("{} at night\n{c} by day", ["{} at night", "{c} by day"]),
        ('\ufeff["a {}"]', ["a {}"]),
        ("{'cat': ['a {c}']}", "starts like JSON but is not"),
        ("templates = lambda c: f'a {c}'", "is Python code"),
        ("[" * 100_000, "starts like JSON but is not"),
        ("a \0{}", "is not text"),
        (b"un caf\xe9 {}", "is not UTF-8 text"),
    ],
)
def test_files_of_templates(tmp_path, content, expected):
    path = tmp_path / "templates"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if not isinstance(expected, str):
        assert read_templates(str(path)) == expected
        return
    with pytest.raises(ValueError, match=expected):
        read_templates(str(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("tabby, tabby cat\npolar_bear\n", ["tabby, tabby cat", "polar_bear"]),
        ('{"0": "tabby", "1": "bear"}', ["tabby", "bear"]),
        ('{"1": "tabby", "2": "bear"}', 'must have the keys "0" to "1"'),
        ('["a", 3]', "holds no class names"),
        ("\n", "holds no class names"),
        ("cat\n\ndog\n", r"class no. 1 \(from 0\) has no name"),
        ("cat\ndog\n\n \n", ["cat", "dog"]),
        ('["cat", " "]', r"class no. 1 \(from 0\) has no name"),
        ('{"0": "", "1": "cat"}', r"class no. 0 \(from 0\) has no name"),
        ('{"0": "cat", "1": "dog", "0": "cow"}', "the key '0' is there more than once"),
        ("{'0': 'tabby'}", "starts like JSON but is not"),
        ('["a \\ud83d", "b"]', ["a ", "b"]),
        (b"caf\xe9", "is not UTF-8 text"),
        ('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', ["tench", "goldfish"]),
        ('{"n01443537": "goldfish", "n01440764": "tench"}', ["tench", "goldfish"]),
        ("n01443537 goldfish, Carassius\nn01440764 tench, Tinca tinca", ["tench", "goldfish"]),
        ("n01443537 1 gold_fish\nn01440764 2 tench", "is a table or code"),
        ('["n01443537", "n01440764"]', "is a table or code"),
        ("0,tench\n1,goldfish", "is a table or code"),
        ("0: 'tench',\n1: 'goldfish'", "is a table or code"),
        ("0 tench\n1 goldfish", "is a table or code"),
        ("1. tench\n2. goldfish", "is a table or code"),
        ("/a/airfield 0\n/b/beach 1", "is a table or code"),
        ("name,id\ntench,1\ngoldfish,0", "is a table or code"),
        ("id\tname\n7\ttench\n9\tgoldfish", "is a table or code"),
        ("0\n1\n2", ["0", "1", "2"]),
        ("1 cube\n2 cubes\n3 cubes\n4 cubes", ["1 cube", "2 cubes", "3 cubes", "4 cubes"]),
        ("Audi A5 2012\nBMW M3 2012", ["Audi A5 2012", "BMW M3 2012"]),
        ("polar\u2028bear\r\nsnow\x85owl\n", ["polar\u2028bear", "snow\x85owl"]),  # two lines, not four
        ("2012 Audi A5\n2012 BMW M3", ["2012 Audi A5", "2012 BMW M3"]),
    ],
)
def test_files_of_class_names(tmp_path, content, expected):
    path = tmp_path / "classes"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if not isinstance(expected, str):
        assert read_names(str(path)) == expected
        return
    with pytest.raises(ValueError, match=expected):
        read_names(str(path))


def test_imagenet_is_shipped_and_classes_go_through_json():
    classes, templates = read_classes("imagenet"), read_templates("imagenet")
    assert len(classes.names) == len(set(classes.ids)) == 1000 and len(templates) == 80
    assert classes.names[0] == "tench" and classes.ids[207] == "n02099601" and classes.names[207] == "Golden Retriever"
    numbers = classes.numbers()
    assert numbers["n02099601"] == numbers["Golden Retriever"] == 207
    assert [k for k, name in enumerate(classes.names) if name == "missile"] == [657, 744] and numbers["missile"] == 657
    assert read_classes(classes.to_json()) == classes and read_classes('["a", "b"]').to_json() == '["a", "b"]'
    with pytest.raises(ValueError, match="bring no class names"):
        read_classes(None)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_the_first_of_equal_scores_wins_as_in_a_stable_sort(seed):
    rng = np.random.default_rng(seed)
    # Whole numbers: products are exact, so that equal scores are equal in any order of summation.
    zimg, ztxt = rng.integers(-1, 2, (9, 2)).astype(float), rng.integers(-1, 2, (18, 2)).astype(float)
    image_of_text = rng.permutation(np.repeat(np.arange(9), 2))
    metrics = retrieval(zimg, ztxt, image_of_text)
    texts_of_image = [np.flatnonzero(image_of_text == i) for i in range(9)]
    for k in (1, 5, 10):
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(reference_recall(zimg, ztxt, texts_of_image, k))
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(
            reference_recall(ztxt, zimg, image_of_text[:, None], k)
        )
    labels, classes = image_of_text, zimg
    right = np.argmax(ztxt @ classes.T, axis=1) == labels
    assert classification(ztxt, classes, labels)["acc1"] == pytest.approx(np.mean(right))


def test_equal_captions_and_class_names_are_no_tie_of_the_encoders():
    # Two images with one caption: the first of the two captions wins, right for one image of the two.
    eye = np.eye(6)
    ztxt, texts = eye[[0, 0, 2, 3, 4, 5]], ["cat", "cat", "dog", "cow", "hen", "pig"]
    zimg = eye[[0, 0, 2, 3, 4, 5]] + 0.1 * eye[[1, 5, 1, 1, 1, 1]]
    metrics = retrieval(zimg, ztxt, np.arange(6), texts=texts)
    assert metrics["text_retrieval_recall@1"] == pytest.approx(5 / 6) and metrics["text_retrieval_recall@5"] == 1
    assert metrics["tied_fraction"] == pytest.approx(2 / 12)  # both captions, between two different images
    assert retrieval(zimg, ztxt, np.arange(6))["tied_fraction"] == pytest.approx(4 / 12)  # and as texts that differ

    names = ["missile", "sunglass", "missile", "dog", "cat"]
    classes = np.eye(5)[[0, 1, 0, 3, 4]]
    result = classification(classes, classes, np.arange(5), texts=names)
    assert result["acc1"] == 0.8 and result["acc5"] == 1 and result["tied_fraction"] == 0
    assert classification(classes, classes, np.arange(5))["tied_fraction"] == 0.4


def test_equal_candidates_score_alike_wherever_they_stand():
    # Columns at the edge of a block of a matrix product may be rounded otherwise: whatever the shape, equal rows must tie.
    rng = np.random.default_rng(0)
    for count in (3, 7, 13, 37, 101):
        queries, candidate = (unit(rng.normal(size=(n, 97))).astype(np.float32) for n in (count, 1))
        ranks, tied = rank_right_candidates(queries, np.repeat(candidate, count, 0), np.arange(count), np.arange(count))
        np.testing.assert_array_equal(ranks, 1 + np.arange(count))
        assert tied.all()


def test_a_result_is_json_also_where_a_number_is_not_known():
    record = Result(Retrieval("a.tar"), "a", "", {"acc1": 0.5, "acc1_se": float("nan")}).to_clip_benchmark("m")
    assert json.loads(json.dumps(record, allow_nan=False))["metrics"] == {"acc1": 0.5, "acc1_se": None}


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("sets/coco-test-{000..009}.tar", "coco-test"),
        ("emoji-heldout-*.tar", "emoji-heldout"),
        ("sets/cifar10/00000.tar", "cifar10"),
        ("imagenet2012/5.1.0", "imagenet2012"),
        ("https://host/x/toy_00000.tar?token=1", "toy"),
        ("x/cars.v2-00000.parquet", "cars"),
        ("vtab/stl10-train.tfrecord-00000-of-00010", "stl10-train"),
        ("0000.tar", "data"),
    ],
)
def test_the_name_of_a_data_set_follows_its_shards(data, name):
    assert Retrieval(data).dataset == ZeroShot(data, "classes.txt").dataset == name
    assert Retrieval(data, name="mine").dataset == "mine"


def test_a_diverged_encoder_has_no_score():
    broken = np.full((3, 3), np.nan)
    with pytest.raises(ValueError, match="not finite"):
        retrieval(broken, np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        classification(np.eye(3), broken, np.arange(3))
