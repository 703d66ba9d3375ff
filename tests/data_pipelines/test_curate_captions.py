"""Captions: canonical form, what is noted on the way, boilerplate and what only looks like it, thresholds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.curate.captions import UNKNOWN, canonical, identify_language, is_boilerplate, text_faults
from data_pipelines.curate.config import CurateConfig
from data_pipelines.sources.webdataset import TarSource


@pytest.mark.parametrize(
    "raw, text, found",
    [
        ("A dog.", "A dog.", ()),
        ("  two\n lines ", "two lines", ()),
        ("p\u00e8re", "père", ()),
        ("pe\u0300re", "père", ()),
        ("Bir kÃ¶pek.", "Bir köpek.", ("mojibake",)),
        ("drapeau\u202f: Île", "drapeau : Île", ()),
        ("Baden-W&uuml;rttemberg", "Baden-Württemberg", ("html_entities",)),
        ("A&nbsp;pecan &#8211; R&amp;D", "A pecan – R&D", ("html_entities",)),
        ("AT&T & sons", "AT&T & sons", ()),
        ("&lt;b&gt;bold&lt;/b&gt;", "<b>bold</b>", ("html_entities", "markup")),
        ("&amp;#39;HD&amp;#39;", "'HD'", ("html_entities", "markup")),
        ("<p>a fox</p>", "<p>a fox</p>", ("markup",)),
        ("[url=x]a fox[/url]", "[url=x]a fox[/url]", ("markup",)),
        ("3 < 5 and 7 > 5", "3 < 5 and 7 > 5", ()),
        ("I <3 cats", "I <3 cats", ()),
        ("a\x00 dog\x07", "a dog", ("control_chars",)),
        ("\u202ereversed", "reversed", ("control_chars",)),
        ("c\u0336a\u0336t\u0336", "cat", ("control_chars",)),
        ("a\xa0dog", "a dog", ("control_chars",)),
        ("\tfish cake\n\n", "fish cake", ("control_chars",)),
        ("می\u200cخواهم", "می\u200cخواهم", ()),  # a joiner that Persian needs
        ("👩\u200d🚀 in space", "👩\u200d🚀 in space", ()),
        ("a\u200dcat", "acat", ("control_chars",)),
        ("broken \ufffd text", "broken \ufffd text", ("invalid_utf8",)),
    ],
)  # fmt: skip
def test_canonical(raw, text, found):
    assert canonical(raw) == (text, found)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_canonical_is_final(text):
    once, _ = canonical(text)
    assert canonical(once)[0] in (once, canonical(canonical(once)[0])[0])
    assert "\n" not in once and once == once.strip()


@pytest.mark.parametrize(
    "text",
    [
        "IMG_0042.JPG", "DSC03349", "Screenshot_2021-03-11-9885.png", "image", "Image 3 of 25", "photo 12", "1920x1080",
        "100%", "banner_728x90", "Untitled", "undefined", "null", "N/A", "alt text", "logo", "Profile picture", "stock photo",
        "Royalty-free stock vector ID: 44894489", "Stock Photo - Image: 4711", "click here to buy", "Click to enlarge",
        "View larger image", "Add to cart", "Share on Facebook", "Pin it", "Photo by admin", "© All rights reserved",
        "Copyright 2019 Some Company", "Free shipping on orders over $50!", "image not available", "loading...", "thumbnail",
        "https://example.com/cat?id=3", "me@example.com", "placeholder.png", "d41d8cd98f00b204e9800998ecf8427e", "Read more »",
    ],
)  # fmt: skip
def test_boilerplate(text):
    assert is_boilerplate(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "a dog", "a picture of a dog", "photo of the old town at night", "camera", "house with garden", "copyright symbol",
        "shopping cart", "add salt to the soup", "people reading more books", "a file cabinet", "the number 4", "7 dwarfs",
        "free range hens", "shield", "facade", "decade", "a view of the larger house", "no entry sign", "sign for a mailbox",
        "page boy", "iconic building", "Image of a red car on a road", "Copyright, (c), symbol",
    ],
)  # fmt: skip
def test_no_boilerplate(text):
    assert not is_boilerplate(text)


def test_names_of_the_sample_are_no_boilerplate():
    from shards import SAMPLE

    faults = {}
    for pair in TarSource(SAMPLE / "emoji-train-00000.tar"):
        for text in (pair.fields["txt"], *pair.fields["captions"].values()):
            if found := text_faults(canonical(text)[0], UNKNOWN, CurateConfig()):
                faults[text] = found
    assert not faults


def test_thresholds():
    config = CurateConfig(min_chars=4, max_chars=10, min_words=2, languages=("en",))
    assert text_faults("a dog", "en", config) == []
    assert text_faults("dog", "en", config) == ["too_short"]
    assert text_faults("the dogs and cats", "en", config) == ["too_long"]
    assert text_faults("ein Hund", "de", config) == ["language"]
    assert text_faults("赤 犬", "en", config) == []  # wide characters count twice
    assert text_faults("…", "en", config) == ["empty_text"]
    assert text_faults("🐶", "en", CurateConfig()) == []


@pytest.mark.parametrize(
    "text, language",
    [
        ("A dog is running on the beach", "en"), ("Ein Hund läuft am Strand entlang", "de"), ("собака бежит по пляжу", "ru"),
        ("ビーチを走る犬", "ja"), ("", UNKNOWN),
    ],
)  # fmt: skip
def test_language(text, language):
    assert identify_language(text) == language


@pytest.mark.parametrize(
    "change, message",
    [
        ({"min_chars": -1}, "min_chars=-1 must be at least 0"),
        ({"captions": ()}, "names no field"),
        ({"languages": ("en", "english")}, "languages=..english.. are no codes"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"top_share": 1.5}, "top_share=1.5 must lie in"),
        ({"concept_cap": 0}, "concept_cap=0"),
        ({"duplicate_bits": 40}, "duplicate_bits=40"),
        ({"max_image_pixels": 1 << 27}, "exceeds Pillow's limit"),
    ],
)
def test_bad_thresholds(change, message):
    with pytest.raises(ValueError, match=message):
        CurateConfig(**change)
