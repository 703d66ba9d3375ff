"""From a raw caption to its canonical form and language, and what is wrong with it.

Canonical: mis-decoded UTF-8 put right (ftfy), HTML entities resolved, control and invisible characters taken out, white
space single, Unicode NFC. The language comes from CLD2, whose model ships in its wheel and takes 10 us a caption.

The trap: some invisible characters are spelling. Zero-width joiners shape Persian, Indic scripts and emoji, so they
stay between letters of these; the bidirectional overrides, byte order marks and overlays that make text unreadable go.
"""

import html
import re
import unicodedata

import ftfy
import pycld2

from data_pipelines.curate.config import CurateConfig

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_TAG = re.compile(
    r"</?[a-zA-Z][^<>]*>|<!--|<!\[CDATA|<(?:a|img|div|span|p|br|script|font|iframe)\s|"
    r"\[/?(?:url|img|b|i|u|quote|center|color|size)(?:=[^\]]*)?\]|\b(?:href|src|onclick)\s*=\s*[\"']",
    re.IGNORECASE,
)
_SUFFIX = r"(?:jpe?g|jpe|jfif|png|gif|webp|bmp|tiff?|svg|heic|avif|ico|pdf|mp4|mov|psd|eps)"
_PLACES = r"(?:facebook|twitter|x|instagram|pinterest|linkedin|whatsapp|youtube|tumblr|reddit|e-?mail)"
_PICTURE_WORDS = r"images?|photos?|photographs?|pictures?|pics?|img|graphic|illustrations?|thumbnails?|thumb"
_PICTURES = rf"(?:{_PICTURE_WORDS})"
_MAX_BOILERPLATE_CHARS = 240
# Each is matched against the whole caption, lower-cased and without the punctuation around it.
_BOILERPLATE = re.compile(
    "|".join(
        (
            rf"[^\n]{{0,120}}\.{_SUFFIX}",  # file names
            r"(?:img|dsc[a-z]?|dcim|pict?|pxl|mvi|sam|cimg|gopr|fb img|wp|screen ?shot|whatsapp image|scan|snapshot|"
            r"untitled|banner|slide|header|hero|icon|logo|bg|background|layer|frame|asset|artboard|image|photo|picture|"
            r"pic|page|figure|fig|item|gallery|thumb|thumbnail|product|attachment|file|screenshot)"
            r"[\s_#.:()/-]*\d[\d\s_x.:()/-]*(?:of[\s_]*\d+)?[a-z]?",
            r"[\d\s_x×.,:;/#%()+-]{3,}",  # numbers, dimensions, dates
            r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|(?=[a-z]*\d)[0-9a-f]{16,}",  # identifiers
            r"(?:https?://|www\.)\S+|\S+@\S+\.[a-z]{2,}",
            rf"(?:no |my |the |this |main |featured? |featured |default |cover |header |hero |blog |post |product |"
            rf"profile |user |stock |free |sample |related |article |feature |background |large |small |full |"
            rf"placeholder |loading |alt(?:ernate)? )*{_PICTURES}(?: (?:alt(?: text)?|placeholder|here|preview|"
            rf"gallery|description|title|name|caption|logo|not (?:available|found|loaded)|unavailable|missing|"
            rf"coming soon|for|of))?",
            r"(?:alt|alt text|alt tag|alternative text|logo|site logo|company logo|icon|avatar|banner|placeholder|spacer|"
            r"pixel|blank|untitled(?: design| document)?|undefined|null|none|nan|n/?a|unknown|no title|no name|"
            r"no description|unnamed|default|loading|please wait|lorem ipsum.{0,200}|advertisement|sponsored|ad|ads|"
            r"thumbnails?|featured|cover|preview|profile|attachment|file|description|title|caption|gallery|slideshow|"
            r"coming soon|screen ?shot|home ?page|read more|learn more|see more|show more|more info|more details|"
            r"view (?:all|more|details|profile|gallery|product)|back to top|skip to content|open menu|toggle navigation|"
            r"play video|watch (?:now|video)|download(?: now| here)?|free download|print this|rss(?: feed)?|"
            r"pin (?:it|this)|tweet(?: this)?|powered by .{1,40}|created with .{1,40}|made with .{1,40})",
            r"click (?:here|to|on|for|image|photo|picture|the|below)\b.{0,60}",
            rf"(?:view|see|show|open|enlarge|zoom)(?: in)?(?: a| the)? ?(?:larger|full|bigger|large|original|hi-?res)?"
            rf"(?: ?-?size)?(?: version)?(?: of)?(?: the| this)? ?{_PICTURES}",
            r"(?:view|see) (?:larger|full ?-?size|bigger)",
            r"(?:add(?:ed)?|move) to (?:cart|basket|bag|wish ?list|favou?rites)|(?:buy|shop|order|book|call|subscribe|"
            r"sign ?up|log ?in|register|join|donate|apply|contact us|get started)(?: it)? ?(?:now|today|online|here)",
            r"free (?:shipping|delivery|returns?)\b.{0,60}|(?:on )?sale(?: now)?[ !]*(?:\d+% off)?|\d+ ?% off.{0,30}",
            rf"(?:share|follow|find|like|join|connect|save)(?: this| us| me| it)?(?: (?:on|via|by|to|with))? {_PLACES}"
            r"(?: .{0,30})?",
            rf"{_PLACES}(?: (?:logo|icon|page|profile|share|button))?",
            r"(?:(?:©|\(c\)|copyright)\s*)+(?:(?:\d{4}|all rights|by\b|reserved).{0,100})?|.{0,60}\ball rights reserved",
            rf"(?:{_PICTURES}|posted|uploaded|submitted|added|written|source|credits?|courtesy|via)"
            rf"(?: (?:by|credits?|courtesy(?: of)?|source|from|via)\b|:).{{0,60}}",
            rf"(?:royalty[ -]?free|stock|vector|getty|shutterstock|istock|alamy|dreamstime|123rf|depositphotos)"
            rf"(?: (?:royalty[ -]?free|stock|vector|clip ?art|footage|{_PICTURE_WORDS}))*"
            r"(?:[ :#-]*(?:id|image|no|number)?[ :.#-]*\d{3,}.{0,20})?",
        )
    )
)
_KEPT_JOINERS = "\u200c\u200d"
_OVERLAYS = {chr(code) for code in range(0x334, 0x339)}
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
    visible = _visible(text)
    if visible != text:
        text = visible
        found.append("control_chars")
    if "&" in text and _ENTITY.search(text):
        text = html.unescape(text)
        found.append("html_entities")
        if _ENTITY.search(text):  # escaped twice: the source of a page, not its text
            text = html.unescape(text)
            found.append("markup")
        text = _visible(text)
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if ("<" in text or "[" in text or "=" in text) and _TAG.search(text) and "markup" not in found:
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


def is_boilerplate(text: str) -> bool:
    """Whether a caption is a file name, a number, an address or what pages say about any picture."""
    core = text.lower().replace("_", " ").strip(" \t.!?…:;,|-–—*»«>›<\"'“”‘’()[]{}")
    return 0 < len(core) <= _MAX_BOILERPLATE_CHARS and _BOILERPLATE.fullmatch(core) is not None


def identify_language(text: str) -> str:
    """A language code such as "en", "zh" or "zh-Hant"; "un" when the text does not say."""
    try:
        _, _, guesses = pycld2.detect(text.encode("utf-8", "ignore"), bestEffort=True)
    except pycld2.error:
        return UNKNOWN
    return guesses[0][1]


def _visible(text: str) -> str:
    """The text without control, format and overlay characters; tabs and no-break spaces become spaces."""
    if text.isascii() and text.isprintable():
        return text
    out = []
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if character in "\n\r":
            out.append(character)
        elif character == "\xa0" or (category == "Cc" and character.isspace()):
            out.append(" ")
        elif category in ("Cc", "Cs") or character in _OVERLAYS:
            continue
        elif category == "Cf" and not _is_spelling(text, place):
            continue
        else:
            out.append(character)
    return "".join(out)


def _is_spelling(text: str, place: int) -> bool:
    """Whether a format character shapes its neighbours: joiners between letters that are not ASCII, and emoji tags."""
    if 0xE0020 <= ord(text[place]) <= 0xE007F:
        return True
    around = text[place - 1 : place] + text[place + 1 : place + 2]
    return text[place] in _KEPT_JOINERS and len(around) == 2 and not any(c.isascii() or c.isspace() for c in around)


def _says_something(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character) in ("So", "Lo", "Mc")
