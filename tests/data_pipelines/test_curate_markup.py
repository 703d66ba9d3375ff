"""Markup: the source of a page in a caption, whole or cut; brackets that are none."""

import re
import time

import pytest

from data_pipelines.curate.captions import canonical
from data_pipelines.curate.markup import _SIGNS, has_markup

SOURCES = [
    "<b>bold cat", "a dog</p>", "a cat <br> on a mat", "a cat<br/>", "<div class='x'>a house</div>",
    '< a href="x">link</ a>', '<img alt="a boat"', '<unclosed attr="a dog in the', 'a boat" />', 'fish"> and chips',
    "<o:p></o:p>house", "<h1>Title</h1>", "<!-- caption --> a tree", "<![CDATA[rose]]>", "&lt;p&gt;a horse&lt;/p&gt;",
    "&amp;lt;b&amp;gt;", 'alt="a boat"', "title='Sea' width=\"3\"", "a cat style=“color:red”", "<?php echo $title; ?>",
    "<%= title %>", "{{ product.title }}", "{{Infobox animal}}", "{% if image %}", "${title}", "#{title}",
    '{"caption": "a cat"}', '[{"id": 3}]', "body { color: red; font-size: 12px }", ".header{background:#fff}",
    "@media screen { .a { width: 1px } }", "font-size: 12px; a cat", "var x = document.getElementById('a');",
    "function(){return 1;}", "$(document).ready(function(){", "jQuery('a').hide()", "javascript:void(0)",
    "window.open('x')", "(e) => { go() }", "[url=http://x.com]a car[/url]", "[b]a bird[/b]", "[b]a bird",
    "[img]http://x.com/a.jpg", "[size=3]big", '[caption id="attachment_1" width="300"]a beach', '[gallery ids="1,2"]',
    "[[File:Cat.jpg|thumb|A cat]]", "[[cat]]", "![a cat](http://x.com/cat.png)", "[a cat](cat.html)", "[a cat](/cat)",
    "**bold** cat", "'''bold''' ''italic''", "## A cat", "```cat```", "%3Cb%3Ecat%3C/b%3E", "red%20cat",
    "\\u003cb\\u003ecat", "\\x3cb", "\\textbf{cat}", "$this->title", "echo $title", "page?id=1&cat=2&x=3",
]  # fmt: skip
TEXTS = [
    "3 < 5 and 7 > 5", "I <3 cats", "a <-> b", "a --> b", "<Parasite> poster", "<별이 빛나는 밤>", "Portrait [1885]",
    "a [broken] vase", "cat falls [video]", "[Audio] birds", "Elizabeth [I]", "cat[b]", "[a] (b)", "x = 5", "let x = 5",
    "e=mc^2", "rose = love", "f(x) = 2x", "set {a, b}", "{smile}", "50% off", "100 % wool", "5%20", "f**k s**t", "* dog *",
    "5 ** 3", "12'' pizza", "''Sunflowers''", "#cat", "# 1 dad", "$5 (used)", "A$AP Rocky", "C:\\Users", "¯\\_(ツ)_/¯",
    "scale 1:100", "time: 5; place: sea", "color: red; size: M", "width: 30 cm", "and/or", "w/o sugar", ":/", ">_<",
    "(c) cat", "window (open)", "document of 1885 (copy)", "a function (mathematics)", "AT&T", "R&D", "5 > 3",
    '"cat" > "dog"', "rock&roll; jazz", "black &white; red", "Mercedes-Benz W123 (1976)", "title = none", "class=A",
    "math (book)", "import/export",
]  # fmt: skip


@pytest.mark.parametrize("text", SOURCES)
def test_markup(text):
    assert "markup" in canonical(text)[1]


@pytest.mark.parametrize("text", TEXTS)
def test_no_markup(text):
    assert canonical(text) == (text, ())


@pytest.mark.parametrize("sign, patterns", _SIGNS)
def test_every_pattern_has_its_example(sign, patterns):
    told = [text for text in SOURCES if sign in text] + ["<p>a horse</p>"]
    for pattern in patterns:
        assert any(re.search(pattern, text, re.IGNORECASE) for text in told), pattern


@pytest.mark.parametrize(
    "text",
    [
        "<a " * 20000, "[[" * 20000, "{#" * 20000, "%s " * 20000, "(" * 20000, "a=" * 20000, "\\u" * 9999, "** a" * 9999,
        "(" + "document." * 20000, " " * 20000 + "{", "[" + " " * 20000 + "{", "{{" * 20000, "function (" * 20000,
        "[a](" * 20000, "<a a=" * 20000, "data-" * 20000 + "=", "&a=" * 20000, "border-" * 20000 + ":", "%22" * 20000,
    ],
)  # fmt: skip
def test_no_caption_takes_long(text):
    began = time.thread_time()
    has_markup(text)
    assert time.thread_time() - began < 0.5
