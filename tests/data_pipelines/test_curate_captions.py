"""Captions: canonical form, what is noted on the way, thresholds, language."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.curate.captions import UNKNOWN, canonical, identify_language, text_faults
from data_pipelines.curate.config import CurateConfig


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
        ("x" + "\u0316" * 40 + " y", "x" + "\u0316" * 30 + " y", ("control_chars",)),
        ("\tfish cake\n\n", "fish cake", ("control_chars",)),
        ("می\u200cخواهم", "می\u200cخواهم", ()),  # a joiner that Persian needs
        ("👩\u200d🚀 in space", "👩\u200d🚀 in space", ()),
        ("a\u200dcat", "acat", ("control_chars",)),
        ("broken \ufffd text", "broken \ufffd text", ("invalid_utf8",)),
        ("a red\u2028fox", "a red fox", ("control_chars",)),
        ("a red fox\ufffc", "a red fox", ("control_chars",)),
        ("a red fox\ufe0f", "a red fox", ("control_chars",)),
        ("\ufe0fa fox", "a fox", ("control_chars",)),
        ("❤\ufe0f and 1\ufe0f⃣", "❤\ufe0f and 1\ufe0f⃣", ()),
        ("ℹ\ufe0f desk", "ℹ\ufe0f desk", ()),
        ("葛\U000e0100城", "葛\U000e0100城", ()),  # a variant of the character
        ("a\u3164fox\u2800", "a fox", ("control_chars",)),
        ("tom &amp jerry", "tom & jerry", ("html_entities",)),
        ("R&eacutesum&eacute", "Résumé", ("html_entities",)),
        ("it&#39s a dog&nbsphere", "it's a dog here", ("html_entities",)),
        ("&copy2020 &copy 2021", "©2020 © 2021", ("html_entities",)),
        ("cut&copy, rock&region, page?a=1&lt=2", "cut&copy, rock&region, page?a=1&lt=2", ()),
        ("rock&roll; black &white; red &notit;", "rock&roll; black &white; red &notit;", ()),
        ("R&D at AT&T; Q&A", "R&D at AT&T; Q&A", ()),
        ("A red house".encode("utf-16-le").decode(), "A red house", ("control_chars",)),
        ("a\tb\tc", "a b c", ("control_chars",)),
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
    "text", ["\u0316\u0301" * 20000, "&#790;&#769;" * 5000, "\u0301\u200b" * 20000, "&amp;" * 20000]
)
def test_no_caption_takes_long(text):
    began = time.thread_time()
    canonical(text)
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize("text", ["Красивая собака", "القط الجميل", "สวัสดีครับ"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_that_passes_for_utf_8_is_none(text, encoding):
    assert "invalid_utf8" in canonical(text.encode(encoding).decode("utf-8"))[1]


@pytest.mark.parametrize(
    "text",
    [
        "", "\u3164\u3164", "\u2800\u2800\u2800", "\u115f\u1160", "\uffa0", "\ufffc", "\ufe0f", "\u200b\u200e", "\u3000",
        "&nbsp;", "&#160", "\0\0", "…", "---", "\ue000", "\u034f", "\u2028",
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_empty(text):
    assert text_faults(canonical(text)[0], UNKNOWN, CurateConfig()) == ["empty_text"]


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


def test_an_endless_caption_is_too_long_whatever_the_limit():
    text, found = canonical("a dog " * 100_000)
    assert found == ("too_long",) and 60_000 < len(text) <= 1 << 16
