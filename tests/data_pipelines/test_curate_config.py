"""Thresholds: what is refused, in one line that says what to write instead; the presets."""

import math

import pytest

from data_pipelines.curate.config import PRESETS, RULES, CurateConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "change, message",
    [
        ({"min_chars": -1}, "min_chars=-1 must be at least 0"),
        ({"min_chars": 50, "max_chars": 10}, "min_chars=50 exceeds max_chars=10"),
        ({"captions": ()}, "names no field"),
        ({"languages": ("en", "english")}, "languages=..english.. are not language codes"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"max_aspect": NAN}, "max_aspect=nan"),
        ({"max_aspect": INF}, "max_aspect=inf"),
        ({"max_aspect": -1.0}, "max_aspect=-1.0"),
        ({"duplicate_bits": 40}, "duplicate_bits=40"),
        ({"duplicate_error": -1.0}, "duplicate_error=-1.0 must lie in .0, 1."),
        ({"duplicate_error": NAN}, "duplicate_error=nan"),
        ({"duplicate_spot": 256.0}, "duplicate_spot=256.0 must lie in .0, 255."),
        ({"duplicate_spot": NAN}, "duplicate_spot=nan"),
        ({"leak_error": NAN}, "leak_error=nan"),
        ({"leak_spot": -1.0}, "leak_spot=-1.0"),
        ({"leak_similarity": NAN}, "leak_similarity=nan must lie in .-1, 2."),
        ({"leak_similarity": INF}, "leak_similarity=inf"),
        ({"min_score": NAN}, "min_score=nan must lie in .-1, 1."),
        ({"min_score": 1.5}, "min_score=1.5"),
        ({"top_share": 1.5}, "top_share=1.5 must lie in"),
        ({"top_share": NAN}, "top_share=nan"),
        ({"concept_cap": 0}, "concept_cap=0"),
        ({"max_image_pixels": 1 << 27}, "exceeds Pillow's limit"),
    ],
)
def test_bad_thresholds(change, message):
    with pytest.raises(ValueError, match=message) as error:
        CurateConfig(**change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"max_aspect": 0.0}, {"max_aspect": 1.0}, {"min_chars": 9, "max_chars": 0}, {"min_chars": 9, "max_chars": 9},
        {"leak_similarity": 2.0}, {"min_score": -1.0}, {"min_score": None}, {"duplicate_error": 0.0}, {"top_share": 1.0},
    ],
)  # fmt: skip
def test_thresholds_at_their_ends(change):
    CurateConfig(**change)


def test_presets_switch_everything_else_off():
    for name, preset in PRESETS.items():
        config = preset()
        assert (
            not config.markup and not config.boilerplate and not config.max_chars and not config.max_caption_pictures
        ), name
        assert config.digest() != CurateConfig().digest()
    assert PRESETS["clip-top-30"]().share_per == "corpus" and PRESETS["pali-top-10"]().share_per == "language"


def test_rules_have_one_place_each():
    assert len(set(RULES)) == len(RULES)
