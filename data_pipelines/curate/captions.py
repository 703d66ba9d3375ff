"""From a raw caption to its canonical form and language, and what is wrong with it.

The canonical form: wrongly decoded UTF-8 repaired (ftfy), HTML entities resolved, control and invisible characters removed,
runs of white space made one space, Unicode NFC. The language comes from CLD2, whose model ships in its wheel and takes 10 us
a caption. `boilerplate` and `markup` hold those two rules.

The trap: some invisible characters are spelling. Zero-width joiners shape Persian, Indic scripts and emoji, so they are kept
between such letters; bidirectional overrides, byte order marks and overlays that make text unreadable are removed. Others
pass for letters: to Unicode the Hangul fillers and the Braille blank are not white space.
"""

import html
import html.entities
import re
import unicodedata

import ftfy
import pycld2

from data_pipelines.curate.boilerplate import is_boilerplate
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.markup import has_markup

# With a semicolon any known entity; without one, those that cannot be part of a word or of an address: "R&eacutesum&eacute",
# "tom &amp jerry", "it&#39s", but not "cut&copy", "rock&region", "?a=1&lt=2".
_ENTITY = re.compile(
    r"&(?:(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});|"
    r"(#\d{2,5}(?!\d)|nbsp|(?:amp|quot|lt|gt)(?![\w=;])|(?<!\w&)(?:copy|reg)(?![a-zA-Z=;])|"
    r"[aeiouyAEIOUY](?:acute|grave|circ|uml)|[anoANO]tilde|[cC]cedil|[aA]ring|[oO]slash|szlig|a[eE]lig|AElig))"
)
_KEPT_JOINERS = "\u200c\u200d"
_OVERLAYS = {chr(code) for code in range(0x334, 0x339)}
_BLANKS = "\xa0\u2800\u3164\uffa0"  # no-break space, Braille blank, fillers of Hangul
_FILLERS = "\u115f\u1160"  # parts of old Hangul if a letter stands beside them
_OBJECT = "\ufffc"  # the placeholder of an embedded image
_MAX_CHARS = 1 << 16  # more is not looked at: a megabyte would take seconds
_MAX_MARKS = 30  # on one letter, as in Unicode's stream-safe text (UAX #15); NFC takes time quadratic in their number
_MAX_CONTROLS = 0.25  # share of a text; UTF-16 has more, and may be valid UTF-8 all the same
UNKNOWN = "un"


def canonical(text: str) -> tuple[str, tuple[str, ...]]:
    """The canonical form of a caption, and the rules found on the way: repairs, "markup", "invalid_utf8" or "too_long"."""
    found = []
    if len(text) > _MAX_CHARS:
        text, found = text[:_MAX_CHARS], ["too_long"]
    if not text.isascii():
        fixed = ftfy.fix_encoding(text)
        if fixed != text:
            text = fixed
            found.append("mojibake")
        if "\ufffd" in text:
            found.append("invalid_utf8")
    if "invalid_utf8" not in found and _is_binary(text):
        found.append("invalid_utf8")
    visible = _visible(text)
    if visible != text:
        text = visible
        found.append("control_chars")
    if "&" in text and (resolved := _ENTITY.sub(_character, text)) != text:
        found.append("html_entities")
        text = _ENTITY.sub(_character, resolved)
        if text != resolved:  # escaped twice, so it is the source of a page
            found.append("markup")
        text = _visible(text)
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if "markup" not in found and has_markup(text):
        found.append("markup")
    return text, tuple(found)


def text_faults(text: str, language: str, config: CurateConfig) -> list[str]:
    """The text rules that apply to a canonical caption, except those that need the whole corpus."""
    if not any(_says_something(character) for character in text):
        return ["empty_text"]
    faults = []
    if config.boilerplate and is_boilerplate(text):
        faults.append("boilerplate")
    width = sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
    if width < config.min_chars or len(text.split()) < config.min_words:
        faults.append("too_short")
    if config.max_chars and width > config.max_chars:
        faults.append("too_long")
    if config.languages and language not in config.languages:
        faults.append("language")
    return faults


def identify_language(text: str) -> str:
    """A language code such as "en", "zh" or "zh-Hant"; "un" if the language is unknown."""
    try:
        _, _, guesses = pycld2.detect(text.encode("utf-8", "ignore"), bestEffort=True)
    except pycld2.error:
        return UNKNOWN
    return guesses[0][1]


def _character(entity: re.Match) -> str:
    """The character that an entity stands for; the entity itself if there is none of its name."""
    name = entity[1] or entity[2]
    return html.unescape(f"&{name};") if name[0] == "#" or f"{name};" in html.entities.html5 else entity[0]


def _is_binary(text: str) -> bool:
    """Whether a string has too many control characters, NUL and line ends aside, to be text."""
    if text.isprintable():
        return False
    controls = sum(character < " " and character not in "\0\n\r" for character in text)
    return controls > 3 and controls > _MAX_CONTROLS * len(text)


def _visible(text: str) -> str:
    """The text without what cannot be seen: control, format and overlay characters, and too many marks on one letter.

    Tabs, blanks and Unicode's line ends become spaces.
    """
    if text.isascii() and text.isprintable():
        return text
    out, marks = [], 0
    for index, character in enumerate(text):
        category = unicodedata.category(character)
        if character in "\n\r":
            out.append(character)
        elif character in _BLANKS or category in ("Zl", "Zp") or (category == "Cc" and character.isspace()):
            out.append(" ")
        elif category in ("Cc", "Cs") or character in _OVERLAYS or character == _OBJECT:
            continue
        elif category == "Cf" and not _is_spelling(text, index):
            continue
        elif category == "Mn" and "\ufe00" <= character <= "\ufe0f" and not _is_varied(text[index - 1 : index]):
            continue
        elif category[0] == "M":
            marks += 1
            if marks <= _MAX_MARKS:
                out.append(character)
            continue
        else:
            out.append(character)
        marks = 0
    return "".join(out)


def _is_spelling(text: str, index: int) -> bool:
    """Whether a format character shapes its neighbours: joiners between letters outside ASCII, and emoji tags."""
    if 0xE0020 <= ord(text[index]) <= 0xE007F:
        return True
    around = text[index - 1 : index] + text[index + 1 : index + 2]
    return text[index] in _KEPT_JOINERS and len(around) == 2 and not any(c.isascii() or c.isspace() for c in around)


def _is_varied(before: str) -> bool:
    """Whether a variation selector may follow this character: an emoji, a keycap digit, a letter of another script."""
    return before != "" and not before.isspace() and (not before.isascii() or before in "#*0123456789")


def _says_something(character: str) -> bool:
    return (character.isalnum() and character not in _FILLERS) or unicodedata.category(character) in ("So", "Mc")
