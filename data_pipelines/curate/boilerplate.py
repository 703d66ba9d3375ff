"""Captions that pages show beside any image: file names, buttons, notices, prices, "image not available".

A caption is boilerplate if it is nothing else. One that merely contains such words says something and is kept: "a picture of
a dog available in red", "logo of the Red Cross". Only notices that a page shows instead of a text (cookies, lorem ipsum) are
recognised by how they begin. The kinds (boilerplate_phrases.toml has the words):

    phrases    the whole caption is on a list, in twenty languages
    labels     the same, but only with a capital: "Menu" is a button, "menu" may lie on the table
    counted    a word that pages number, and a number: "Bild 1", "photo (3)", "IMG_0042", "Screenshot 2020-01-02 at 10.11"
    bags       only words of one language's bag, one of which means an image: "sorry, this image is no longer available"
    patterns   regular expressions

The trap: what an image can show is not boilerplate. "home", "5 stars", "Image may contain: dog" and "1984 calendar" tell
something; "next", "1 review" and "image" never do. So every rule but that for file names needs a word that is on a list.
"""

import importlib.resources
import re
import tomllib

_MAX_CHARS, _MAX_FILE_CHARS, _MAX_BAG_WORDS = 240, 125, 14
_AROUND = " \t.!?…:;,|-–—*·•«»‹›<>\"'“”„‘’()[]{}→←▶►✓×"
_BETWEEN = re.compile(r"[\s.,;:!?…|/()\[\]{}\"“”„«»→·•=~*#№°–—-]+")

_SUFFIX = (
    r"(?:jpe?g|jpe|jfif|png|apng|gif|webp|bmp|tiff?|svg|heic|heif|avif|ico|psd|eps|cdr|xcf|nef|nrw|cr2|cr3|crw|arw|sr2|dng|"
    r"orf|raf|rw2|pef|srw|tga|jp2|jxl|dcm|pdf|docx?|pptx?|xlsx?|mp4|mov|avi|webm|zip|php|aspx?|html?)"
)
_FILE = re.compile(rf"[\w)\]%~ -]\.{_SUFFIX}(?:[?#]\S*|[@:]\w+)?$")
_DIGIT, _FOUR_DIGITS = re.compile(r"\d"), re.compile(r"\d(?:[ ._-]*\d){3}")
# After the word: numbers, "of 25", "at 10.11 AM", and what editors and messengers append. Possessive, to avoid backtracking.
_COUNT = re.compile(
    r"\d(?:[\W\d_]|(?<![^\W\d_])(?:out of|a las|of|von|de|sur|di|van|из|от|at|um|à|alle|às|в|am|pm|wa|hdr|bw|mp|edited|edit|"
    r"copy|kopie|copia|копия|scaled|fotor|snapseed|cropped|crop|small|medium|large|thumb|thumbnail|final|new|low|high|res|hires|web|night|"
    r"portrait|pano|bokeh|collage|burst|cover|chrome|instagram|facebook|whatsapp|snapchat|com|android|[a-z])(?![^\W\d_]))*+"
)
_PLACES = (
    r"(?:facebook|twitter|instagram|pinterest|linkedin|whatsapp|youtube|tumblr|reddit|tiktok|snapchat|flickr|vimeo|"
    r"google ?(?:\+|plus)|vk|vkontakte|xing|weibo|wechat|digg|stumbleupon|flipboard|e-?mail)"
)
_IMAGES = r"(?:images?|photos?|photographs?|pictures?|pics?|img|graphic|illustrations?|thumbnails?|thumb)"
_AGENCIES = (
    r"(?:royalty[ -]?free|stock|vector|getty ?(?:images)?|shutterstock|istock(?:photo)?|alamy|dreamstime(?: [a-z]{1,3})?|123rf|"
    r"depositphotos|adobe ?stock|fotolia|bigstock|freepik|unsplash|pixabay|pexels|can stock)"
)
_BUILDERS = (
    r"(?:wordpress|wix|blogger|squarespace|shopify|joomla|drupal|gimp|canva|weebly|adobe|photoshop|typo3|prestashop|magento|"
    r"woocommerce|bigcommerce|opencart|hubspot|jimdo|webflow|godaddy|phpbb|vbulletin|xenforo|mediawiki|disqus|blogspot|tumblr|"
    r"smugmug|zenfolio|piwigo|zenphoto|inkscape|figma|sketch|raphaël|microsoft|google)"
)
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?)"
)
_DAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
_DATE = (
    rf"(?:(?:{_MONTH}|{_DAY}|\d+(?:st|nd|rd|th|h|m)?|am|pm|at|of|on|utc|gmt|e[sd]t|p[sd]t|ago|today|yesterday|"
    r"(?:second|minute|hour|day|week|month|year)s?)\b[\s.,:/-]*)++"
)
_AMOUNT = r"\d+(?:[., ]\d+)*(?:[.,]?[–-]+)?"
_SIGN = r"(?:[$€£¥₹₽₩₺₴฿₫]|(?:us|ca|au|nz|hk|a|c|r|s) ?\$)"
_CODE = (
    r"(?:usd|eur|gbp|cad|aud|chf|inr|jpy|cny|rub|pln|sek|nok|dkk|aed|sar|thb|sgd|hkd|nzd|mxn|brl|zar|rmb|rs\.|zł|руб|"
    r"円|元|원)"
)
_PRICE = rf"(?:(?:{_SIGN}|{_CODE}) ?{_AMOUNT}(?: ?{_CODE})?|{_AMOUNT} ?(?:{_SIGN}|{_CODE}))"
_SELLING = (
    r"(?:from|only|now|just|was|each|per|to|or|prices?|our|sale|regular|list|retail|rrp|msrp|save|off|buy|it|add|cart|order|shop|"
    r"sold|out|free|shipping|plus|incl|excl|vat|tax|mwst|inkl|zzgl|versand|ab|nur|preis|prix|precio|prezzo|preço|цена|ttc|ht|ea|"
    r"pcs?|pack|in|stock|current|original|starting|discount)\b"
)

# Each is matched with the whole caption, in lower case, underscores as spaces, without the punctuation around it.
_PATTERNS = {
    "numbers, dimensions, dates": r"[\d\s_x×.,:;/#%()+-]{3,}",
    "sizes": r"\d+ ?[x×] ?\d+ ?(?:px|pixels?)|\d+(?:\.\d+)? ?(?:px|pixels?|kb|mb|dpi)",
    "hashes, UUIDs": r"[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}|(?=[a-z]*\d)[0-9a-f]{16,}(?: [a-z])?",
    "article numbers": r"(?:sku|isbn(?:-1[03])?|asin|ean|upc|mpn|(?:item|product|model|part|article|style|order|image|photo|"
    r"stock) (?:no|nr|number|code|id|#)|art(?:ikel)?[. -]*n[ro]|ref(?:erence)?|id)[\s.:#-]+[a-z-]{0,6}\d[\w-]*",
    "camera files with few letters": r"[plr][0-9a-c]\d{6}|kodak\d+|\d{3}msdcf|img e\d{4}|g[xhp]\d{6}|img\d{4,}|"
    r"\d{8} ?\d{6}(?: \w{1,9})?|\d{6,}(?: \d{6,})+ [nobsqta]|(?:premium )?photo-\d{9,}-[0-9a-f]{6,}|screencapture-\S+|"
    r"\d{4,8}[ -]+(?:img|dsc[nf]?|pxl|mg)[ -]?\d{3,}[\d -]*",
    "sizes and stamps that a blog appends": r"\S+-\d{2,4}x\d{2,4}(?:-\d+)?(?:@2x)?|\S+-e1\d{9,12}",
    "kinds of files": r"(?:image/)?(?:jpe?g|png|gif|webp|svg|bmp)(?: (?:file|image))?",
    "addresses": r"(?:https?://|www\.)\S+|\S+@\S+\.[a-z]{2,}|[a-z0-9][a-z0-9-]*(?:\.[a-z0-9-]+)*\.(?:com|org|net|info|biz|co\.uk)(?:/\S*)?|"
    r"(?:e-?mail|mail|tel|phone|fax|call|mobile|whatsapp)(?: us)?[\s.:]*(?:\S+@\S+|\+?\d[\d\s().+/-]{4,})",
    "prices": rf"(?:{_SELLING}[\s:]*)*+{_PRICE}(?:[\s,/:|()*+–-]++(?:{_PRICE}|{_SELLING}))*+[\s)*+]*",
    "dates of a post": r"(?:last )?(?:posted|published|submitted|uploaded|updated|modified|created|added|date|taken)(?: on)?"
    rf"[\s:]+{_DATE}",
    "whole dates": rf"(?:{_DAY},? )?(?:{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?|\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}),? "
    r"(?:19|20)\d\d(?: .{0,3}\d.{0,12})?",
    "counts": r"\d[\d.,]* ?[km]?\+? (?:(?:customer|new|more|total) )*(?:reviews?|comments?|views?|likes?|shares?|votes?|ratings?|"
    r"followers?|results?|items?|photos?|images?|pictures?|pics|replies|responses|thoughts|downloads?|sold|(?:left )?in stock)|"
    r"only \d+ left(?: in stock)?|(?:page )?\d+ ?(?:of|/|von|sur|di|из) ?\d+|(?:rated )?\d(?:[.,]\d+)? out of 5"
    r"(?: stars?)?(?: .{0,20})?|"
    r"(?:see|view|show|load) (?:all )?\d* ?(?:more )?(?:reviews?|comments?|replies|photos?|images?|pictures?|items|products|"
    r"results)",
    "click here": r"click (?:here|to|on|for|image|photo|picture|the|below|thumbnail|any|each)\b.{0,60}|"
    r"(?:view|see) (?:larger|full ?-?size|bigger)(?: (?:version|size|map))?|"
    r"(?:view|see|show|open|enlarge|zoom)(?: in)?(?: a| the)? ?(?:larger|full|bigger|large|original|hi-?res)?(?: ?-?size)?"
    rf"(?: version)?(?: of)?(?: the| this)? ?{_IMAGES}",
    "buttons": r"(?:add(?:ed)?|move) to (?:cart|basket|bag|wish ?list|favou?rites)|"
    r"(?:buy|shop|order|book|call|subscribe|sign ?up|log ?in|register|join|donate|apply|contact us|get started|watch|play|listen|"
    r"download|try|enrol?l)(?: it| us)? ?(?:now|today|online|here|free|for free)",
    "offers": r"free (?:shipping|delivery|returns?)\b.{0,60}|(?:on )?sale(?: now)?[ !]*(?:\d+% off)?|"
    r"(?:save |up to )*\d+ ?% (?:off|discount)\b.{0,30}",
    "networks": r"(?:share|follow|find|like|join|connect|save|visit|see|watch|tweet|pin|post|send)"
    rf"(?: (?:this|us|me|it|our|page|post|article))* (?:on|via|by|to|with|in) (?:{_PLACES}|x)\b.{{0,30}}|"
    rf"(?:share|follow|find|like|join|connect|save)(?: (?:this|us|me|it))* {_PLACES}|"
    rf"(?:(?:icon|logo|social|share|btn)[ -])?{_PLACES}(?:[ -](?:logo|icon|page|profile|share|button|link))*",
    "rights": r"(?:(?:©|\(?c\)|copyright)\s*)++(?:(?:\d{4}|all rights|by\b|reserved).{0,100})?|©.{0,60}|"
    r".{0,60}\ball rights reserved",
    "credits": rf"(?:{_IMAGES}|posted|uploaded|submitted|added|written|published|source|credits?|courtesy|via)"
    r"(?: (?:by|credits?|courtesy(?: of)?|source|from|via)\b|:).{0,60}|"
    rf"(?:{_IMAGES}|foto|bild|фото|写真) ?[©/:] ?(?:©.{{0,60}}|"
    rf"(?:dpa|ap|afp|epa|efe|ansa|reuters|imago|picture alliance|{_AGENCIES})\b.{{0,40}})|"
    rf"{_IMAGES} © .{{0,60}}|by (?:admin|administrator|guest|editor|staff|user)(?: .{{0,20}})?",
    "watermarks": rf"{_AGENCIES}(?: (?:royalty[ -]?free|stock|vector|clip ?art|footage|photography|{_IMAGES}))*"
    r"(?:[ :#-]*(?:id|image|no|number|of)?[ :.#-]*(?:\d{3,}.{0,20})?)?",
    "made with": rf"(?:powered|created|made|built|designed|developed) (?:by|with|in|using) {_BUILDERS}\b.{{0,20}}",
}  # fmt: skip
_PATTERN = re.compile("|".join(_PATTERNS.values()))
# Matched with the caption as it is written, with its capitals and underscores.
_NAME = re.compile(
    r"_(?:MG|DSC|IMG|D[0-9A-Z]{2}|[A-Z]{3})_?\d{4}\w{0,3}|"  # of cameras set to Adobe RGB
    r"(?=\S*[a-z])(?=\S*[A-Z])(?=\S{20})\d*(?:[A-Za-z_+/=-]+\d+){3,}+[A-Za-z_+/=-]*"  # base64: digits in three places
)
# How notices begin; what follows does not matter.
_NOTICE = re.compile(
    r"lorem ipsum|data:image/|(?:this|our|the) (?:web ?)?(?:site|page) uses cookies|we (?:and our partners )?use cookies|"
    r"by (?:continuing|using|browsing|clicking) .{0,60}\byou (?:agree|accept|consent)|by continuing to (?:use|browse)|"
    r"diese (?:web)?seite (?:verwendet|nutzt) cookies|"
    r"(?:wir|diese website) (?:verwenden|verwendet|nutzen) cookies|ce site utilise des cookies|este sitio utiliza cookies|"
    r"este sitio web utiliza cookies|questo sito utilizza (?:i )?cookie|этот сайт использует cookie|"
    r"(?:please )?enable javascript|javascript is (?:disabled|required)|your browser does not support|"
    r"you need to (?:enable|log ?in|sign ?in)|(?:please )?(?:log ?in|sign ?in) to (?:view|see|continue)|"
    r"this (?:video|content|page|post|product|item|listing) (?:is|was|has been|isn't) "
    r"(?:unavailable|no |not |removed|deleted|available)"
)


def is_boilerplate(text: str) -> bool:
    """Whether a canonical caption says nothing about its image."""
    core = text.lower().replace("_", " ").replace("’", "'").strip(_AROUND)
    if not core:
        return False
    if _NOTICE.match(core):
        return True
    if len(core) > _MAX_CHARS:
        return False
    words, bare = _words(core), text.strip(_AROUND)
    return (
        " ".join(words) in _PHRASES
        or bare in _LABELS
        or _is_counted(core)
        or _is_from_a_bag(words)
        or (len(core) <= _MAX_FILE_CHARS and _FILE.search(core) is not None)
        or _PATTERN.fullmatch(core) is not None
        or _NAME.fullmatch(bare) is not None
    )


def _is_counted(core: str) -> bool:
    digit = _DIGIT.search(core)
    if digit is None:
        return False
    words, count = _words(core[: digit.start()]), core[digit.start() :]
    if _COUNT.fullmatch(count) is None:
        return False
    what = " ".join(words)
    return what in _COUNTED or (what in _CAMERAS and _FOUR_DIGITS.match(count) is not None) or _is_from_a_bag(words)


def _is_from_a_bag(words: list[str]) -> bool:
    if len(words) > _MAX_BAG_WORDS or _HEADS.isdisjoint(words):
        return False
    return any(bag.issuperset(words) and not heads.isdisjoint(words) for heads, bag in _BAGS)


def _words(text: str) -> list[str]:
    return _BETWEEN.sub(" ", text).split()


def _listed(text: str) -> frozenset[str]:
    """Comma-separated phrases in the form in which `is_boilerplate` looks them up."""
    return frozenset(" ".join(_words(phrase.lower())) for phrase in text.replace("\n", " ").split(",")) - {""}


_WORDS = tomllib.loads(
    (importlib.resources.files(__package__) / "boilerplate_phrases.toml").read_text(encoding="utf-8")
)
_PHRASES = frozenset().union(*map(_listed, _WORDS["phrases"].values()))
_LABELS = frozenset(label.strip() for label in _WORDS["labels"].split(","))
_BAGS = [
    (frozenset(bag["image"].split()), frozenset((bag["image"] + bag["around"]).split()))
    for bag in _WORDS["bags"].values()
]
_HEADS = frozenset().union(*(heads for heads, _ in _BAGS))
_COUNTED = _listed(_WORDS["counted"])
_CAMERAS = frozenset(_WORDS["cameras"].split())
