"""Captions are drawn by the stated probabilities, from what a pair has."""

import collections
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.counter_rng import Draws
from data_pipelines.text_ops import CaptionError, captions_of, check_spec, draw_caption, iter_captions, lookup

FIELDS = {
    "txt": "a dog",
    "caption": "the dog",
    "captions": {"en": "dog", "de": "Hund", "fr": " ", "es": None},
    "keywords": "animal, pet , ,puppy",
}


def draw(*spec, fields=FIELDS, seed=0):
    return draw_caption(fields, spec, Draws(seed))


@pytest.mark.parametrize(
    "field, text", [("txt", "a dog"), ("caption", "the dog"), ("captions.en", "dog"), ("captions.de", "Hund")]
)
def test_fields(field, text):
    assert draw((field, 1.0)) == text


def test_any_language_is_uniform_over_those_with_text():
    counts = collections.Counter(draw(("captions.*", 1.0), seed=seed) for seed in range(2000))
    assert set(counts) == {"dog", "Hund"} and abs(counts["dog"] - 1000) < 120


def test_probabilities_are_weights():
    counts = collections.Counter(draw(("txt", 3.0), ("caption", 1.0), seed=seed) for seed in range(2000))
    assert abs(counts["a dog"] - 1500) < 100


def test_keywords_are_a_few_in_any_order():
    texts = {draw(("keywords", 1.0), seed=seed) for seed in range(500)}
    assert {"animal", "puppy, pet", "pet, animal, puppy"} <= texts
    assert all(set(text.split(", ")) <= {"animal", "pet", "puppy"} for text in texts)
    assert all(len(set(text.split(", "))) == len(text.split(", ")) for text in texts)


def test_joined_fields():
    assert draw(("captions.en+keywords", 1.0)).startswith("dog, ")
    assert draw(("captions.en+keywords", 1.0), fields={"captions": {"en": "dog"}}) == "dog"


@pytest.mark.parametrize(
    "field", ["captions.sw", "captions.fr", "captions.es", "missing.*", "captions", "captions.sw+txt"]
)
def test_a_missing_field_is_drawn_again_among_the_others(field):
    assert all(draw((field, 100.0), ("txt", 0.1), seed=seed) == "a dog" for seed in range(20))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, "missing_text"),
        ({"txt": 3}, "empty_text"),
        ({"txt": " \n"}, "empty_text"),
        ({"other": "x"}, "missing_text"),
    ],
)
def test_no_caption(fields, reason):
    with pytest.raises(CaptionError) as error:
        draw(("txt", 1.0), ("captions.*", 1.0), fields=fields)
    assert error.value.reason == reason


@given(st.integers(0, 2**64), st.integers(-5, 2**63))
def test_draws_depend_on_the_key_alone(seed, position):
    fields = dict(FIELDS)
    spec = (("captions.*", 0.3), ("captions.en+keywords", 0.7))
    assert draw_caption(fields, spec, Draws(seed, position)) == draw_caption(fields, spec, Draws(seed, position))


@pytest.mark.parametrize(
    "spec, message",
    [
        ((), "names no caption field"),
        ((("txt", 0.0),), "probability 0.0"),
        ((("txt", -1.0),), "probability -1.0"),
        ((("txt", float("nan")),), "probability nan"),
        ((("", 1.0),), "is empty"),
        ((("txt+", 1.0),), "is empty"),
    ],
)
def test_nonsense_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        check_spec(spec)


@pytest.mark.parametrize(
    "field, texts",
    [
        ("txt", ["a dog"]),
        ("captions.*", ["dog", "Hund"]),
        ("captions.de", ["Hund"]),
        ("captions.fr", []),
        ("captions", []),
        ("keywords", ["animal, pet, puppy"]),
        ("five", ["a", "b"]),
        ("five.*", ["a", "b"]),
        ("a.b", ["dotted"]),
        ("lines", ["one\n two"]),
        ("lines.*", ["one", "two"]),
    ],
)
def test_captions_of(field, texts):
    assert captions_of(FIELDS | {"five": ["a", " ", "b", 3], "a.b": "dotted", "lines": "one\n two\n"}, field) == texts


def test_a_list_of_captions_is_drawn_from():
    assert {draw(("five", 1.0), fields={"five": ["a", "b"]}, seed=seed) for seed in range(50)} == {"a", "b"}


def test_iter_captions():
    pair = types.SimpleNamespace(fields=FIELDS | {"caption": "a dog"})
    assert list(iter_captions([pair, pair])) == ["a dog", "dog", "Hund", "animal, pet, puppy"] * 2


def test_lookup():
    assert lookup({"cls": 0, "a": {"b": {"c": 3}}}, "cls") == 0
    assert lookup({"a": {"b": {"c": 3}}}, "a.b.c") == 3
    assert lookup({"a": {"b": {"c": 3}}}, "a.b") is None and lookup({"a": {"b": {"c": 3}}}, "a.b.*") == {"c": 3}
    assert lookup({"a": "text"}, "a.b") is None and lookup({}, "a") is None
