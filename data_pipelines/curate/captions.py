"""From a raw caption to its canonical form and language, and what is wrong with it.

Canonical: mis-decoded UTF-8 put right (ftfy), HTML entities resolved, control and invisible characters taken out, white
space single, Unicode NFC. The language comes from CLD2, whose model ships in its wheel and takes 10 us a caption.
`boilerplate` and `markup` hold those two rules.

The trap: some invisible characters are spelling. Zero-width joiners shape Persian, Indic scripts and emoji, so they
stay between letters of these; the bidirectional overrides, byte order marks and overlays that make text unreadable go.
Others pass for letters: fillers of Hangul and the Braille blank are in no way white space to Unicode.
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

# With a semicolon any entity that there is; without, those that cannot be part of a word or of an address: "R&eacutesum&eacute",
# "tom &amp jerry", "it&#39s", but not "cut&copy", "rock&region", "?a=1&lt=2".
_ENTITY = re.compile(
    r"&(?:(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});|"
    r"(#\d{2,5}(?!\d)|nbsp|(?:amp|quot|lt|gt)(?![\w=;])|(?<!\w&)(?:copy|reg)(?![a-zA-Z=;])|"
    r"[aeiouyAEIOUY](?:acute|grave|circ|uml)|[anoANO]tilde|[cC]cedil|[aA]ring|[oO]slash|szlig|a[eE]lig|AElig))"
)
_KEPT_JOINERS = "\u200c\u200d"
_OVERLAYS = {chr(code) for code in range(0x334, 0x339)}
_BLANKS = "\xa0\u2800\u3164\uffa0"  # no-break space, Braille blank, fillers of Hangul
_FILLERS = "\u115f\u1160"  # parts of old Hangul, where a letter stands beside them
_OBJECT = "\ufffc"  # stands for a picture
_MOST_MARKS = 30  # on one letter, as in Unicode's stream-safe text (UAX #15): NFC takes the square of their number
_MOST_CONTROLS = 0.25  # of a text; UTF-16 of other scripts has more, and is valid UTF-8 all the same
UNKNOWN = "un"


def canonical(text: str) -> tuple[str, tuple[str, ...]]:
    """The canonical form of a caption, and which of the mending rules applied to it (or "markup", "invalid_utf8")."""
    found = []
    if not text.isascii():
        fixed = ftfy.fix_encoding(text)
        if fixed != text:
            text, found = fixed, ["mojibake"]
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
        if text != resolved:  # escaped twice: the source of a page, not its text
            found.append("markup")
        text = _visible(text)
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if "markup" not in found and has_markup(text):
        found.append("markup")
    return text, tuple(found)


def text_faults(text: str, language: str, config: CurateConfig) -> list[str]:
    """The text rules that a canonical caption breaks, but for those that need the whole corpus."""
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
    """A language code such as "en", "zh" or "zh-Hant"; "un" when the text does not say."""
    try:
        _, _, guesses = pycld2.detect(text.encode("utf-8", "ignore"), bestEffort=True)
    except pycld2.error:
        return UNKNOWN
    return guesses[0][1]


def _character(entity: re.Match) -> str:
    """What an entity stands for; itself where there is none of its name."""
    name = entity[1] or entity[2]
    return html.unescape(f"&{name};") if name[0] == "#" or f"{name};" in html.entities.html5 else entity[0]


def _is_binary(text: str) -> bool:
    """Whether control characters, but for NUL and line ends, are too many for a text."""
    if text.isprintable():
        return False
    controls = sum(character < " " and character not in "\0\n\r" for character in text)
    return controls > 3 and controls > _MOST_CONTROLS * len(text)


def _visible(text: str) -> str:
    """The text without control, format and overlay characters, and marks heaped on a letter; tabs, blanks and Unicode's line
    ends become spaces.
    """
    if text.isascii() and text.isprintable():
        return text
    out, marks = [], 0
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if character in "\n\r":
            out.append(character)
        elif character in _BLANKS or category in ("Zl", "Zp") or (category == "Cc" and character.isspace()):
            out.append(" ")
        elif category in ("Cc", "Cs") or character in _OVERLAYS or character == _OBJECT:
            continue
        elif category == "Cf" and not _is_spelling(text, place):
            continue
        elif category == "Mn" and "\ufe00" <= character <= "\ufe0f" and not _is_varied(text[place - 1 : place]):
            continue
        elif category[0] == "M":
            marks += 1
            if marks <= _MOST_MARKS:
                out.append(character)
            continue
        else:
            out.append(character)
        marks = 0
    return "".join(out)


def _is_spelling(text: str, place: int) -> bool:
    """Whether a format character shapes its neighbours: joiners between letters that are not ASCII, and emoji tags."""
    if 0xE0020 <= ord(text[place]) <= 0xE007F:
        return True
    around = text[place - 1 : place] + text[place + 1 : place + 2]
    return text[place] in _KEPT_JOINERS and len(around) == 2 and not any(c.isascii() or c.isspace() for c in around)


def _is_varied(before: str) -> bool:
    """Whether a variation selector has a character to select of: an emoji, a digit of a keycap, a letter of some script."""
    return before != "" and not before.isspace() and (not before.isascii() or before in "#*0123456789")


def _says_something(character: str) -> bool:
    return (character.isalnum() and character not in _FILLERS) or unicodedata.category(character) in ("So", "Mc")
