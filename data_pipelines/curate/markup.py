"""Captions that are the source of a page, not its text: tags, templates, wiki and BBCode, style sheets, scripts, escapes.

One sign anywhere is enough: if half a tag was cut out of a page by a machine, so was the rest of the caption. A pattern is
tried only on captions that contain its character, which few do. A caption may be a megabyte, so no pattern starts at many
places and reads on to the end from each.

The trap: angle and square brackets also hold titles ("<Parasite>", "Portrait [1885]", "cat falls [video]"). So a tag counts
only with an element's name, an attribute or an end tag, and a shortcode that is a word only with an attribute or an end tag.
"""

import re

# Without names that are words too (<main>, <title>, <map>): those need an attribute or an end tag.
_ELEMENTS = (
    r"(?:a|abbr|b|big|blockquote|body|br|center|code|dd|del|div|dl|dt|em|embed|font|form|h[1-6]|head|hr|html|i|iframe|img|input|ins|li|"
    r"meta|noscript|ol|option|p|param|pre|q|s|script|small|span|strike|strong|style|sub|sup|svg|tbody|td|textarea|tfoot|th|thead|tr|tt|u|ul|xml)"
)
_ATTRIBUTES = (
    r"(?:href|src|srcset|alt|title|class|style|id|width|height|align|border|target|rel|lang|name|type|value|content|color|size|face|"
    r"bgcolor|on(?:click|load|error|mouseover)|data-[\w-]+|aria-[\w-]+)"
)
_SHORTCODES = (
    r"(?:url|img|quote|code|colou?r|size|font|center|list|email|video|youtube|media|attach(?:ment)?|spoiler|table)"
)
_STYLES = (
    r"(?:font-(?:size|family|weight|style)|background-(?:color|image)|text-(?:align|decoration|transform)|line-height|border-\w+|margin-\w+|"
    r"padding-\w+|z-index|box-shadow|list-style|vertical-align|white-space)"
)

# (the character that a caption must contain, patterns)
_SIGNS = (
    ("<", (
        rf"</?{_ELEMENTS}(?:\s[^<>]*)?/?>",
        r"<\s*/\s*[a-z][\w:-]*\s*>",  # any end tag
        r"<[a-z][\w:-]*\s+[\w:-]+\s*=",  # any tag with an attribute, whole or cut
        r"<\s+[a-z]+\s+[\w:-]+\s*=\s*[\"'“]",
        r"<[a-z][\w-]*\s*/>|</?[a-z]+:[a-z]+(?:\s[^<>]*)?/?>",  # <o:p>
        r"<(?:img|div|span|br|script|font|iframe|td|li)\s",  # cut before the first attribute
        r"<!--|<!\[CDATA|<!doctype|<\?(?:php|xml|=)|<%",
    )),
    (">", (r"[\"'”\w]\s*/>", r"[\"']\s*>\s*\w")),  # the end of a tag whose start was cut
    ("=", (rf"(?<![\w-]){_ATTRIBUTES}\s*=\s*[\"'“”]", r"\b(?:var|const)\s+\w+\s*=", r"&\w+=\w*&\w+=")),
    ("[", (
        rf"\[/[a-z][\w-]*\]|\[{_SHORTCODES}=[^\]]*\]?|\[(?:url|img)\]|^\[[biu]\]",
        r"\[[a-z][\w-]*\s+(?:[\w-]+=[^\]]*)\]?",  # [caption id="attachment_1" …
        r"\[\[[^\[\]]+\]\]?",  # wiki links
        r"\[[^\[\]]*\]\(\s*(?:https?:|www\.|mailto:|[/#.]|[\w/-]+\.\w)",  # Markdown links
    )),
    ("{", (
        r"\{\{.+|\{%.+|^(?:(?!\{#).)*+\{#.+#\}|[$#@%]\{\s*\w",  # Jinja, Handlebars, Angular, shells
        r"^\s*+(?:\[\s*+)?\{\s*[\"'“]?[\w$-]+[\"'”]?\s*:",  # JSON
        r"[\w\])*]\s*\{\s*[\w-]+\s*:[^{}]*\}?",  # rules of a style sheet
        r"\)\s*\{|=>\s*\{|@(?:media|font-face|keyframes|import)\b",
    )),
    ("(", (
        r"\bfunction\(|\bfunction\s+\w*\([^()]*\)\s*\{|\b(?:document|window|console|jquery|math|json)\.\w++(?:\.\w++){0,7}+\s*\(|(?<!\w)\$\(|\bjquery\s*\(",
        r"\.(?:getElement\w+|querySelector\w*|addEventListener|addClass|innerHTML|toString|forEach|ready|css|html)\s*\(|%\(\w+\)[sd]",
        r"javascript:|\brgba?\(\s*\d|\burl\(\s*[\"'/]|\bvoid\(0\)",
    )),
    (":", (rf"(?<![\w-]){_STYLES}\s*:\s*[\w#'\"-]|(?<![\w-])(?:float|display|position)\s*:\s*[a-z-]+\s*;",)),
    ("%", (r"%3C/?[a-z!]|%(?:22|27|20|2F)[^%\s]*%[0-9A-F]{2}|[a-z]%20[a-z]|%s\b.*%s\b",)),
    ("\\", (r"\\u[0-9a-f]{4}|\\x[0-9a-f]{2}|\\[a-z]{2,}\{",)),  # JSON, C and TeX
    ("**", (r"(?<![\w*])\*\*(?=[^\s*])[^*]+(?<=\S)\*\*(?![\w*])",)),
    ("'''", (r"'''[^']+'''",)),
    ("```", ("```",)),
    ("##", (r"^\s*#{2,6}\s+\w",)),
    ("$", (r"<\?|\$\{\w|\becho \$\w|\$_(?:GET|POST|SERVER)|\$this->|^\$\w+\s*=\s*\S",)),
)  # fmt: skip
_PATTERNS = tuple((sign, re.compile("|".join(patterns), re.IGNORECASE)) for sign, patterns in _SIGNS)


def has_markup(text: str) -> bool:
    """Whether a caption, its entities resolved, holds markup."""
    return any(sign in text and pattern.search(text) is not None for sign, pattern in _PATTERNS)
