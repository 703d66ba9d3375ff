"""Every rule by name, its threshold, and the published recipes as presets.

A rule drops a pair, or (`MENDING`) mends or just notes something and lets it pass. `reason` of a pair is the first
dropping rule in the order of `RULES`; `reasons` are all that applied, the mending ones among them.

Presets: DataComp's basic filter and its CLIP-score filter (Gadre et al., arXiv 2304.14108), MetaCLIP's balance
(Xu et al., 2309.16671), PaLI's best tenth (Chen et al., 2209.06794).

The trap: a published recipe is only what it says. Presets switch every other text and picture rule off, so that
their numbers can be compared; what cannot be trained on at all (integrity) always goes.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

import pycld2

from data_pipelines.errors import UserError

INTEGRITY = (
    "unreadable",
    "missing_image",
    "empty_image",
    "not_an_image",
    "bomb",
    "truncated",
    "corrupt_image",
    "missing_text",
    "invalid_utf8",
    "animated",
)
TEXT = ("empty_text", "markup", "boilerplate", "too_short", "too_long", "language", "repeated_caption")
PICTURE = ("too_small", "extreme_aspect")
COPIES = ("duplicate_bytes", "duplicate_pixels", "near_duplicate")
LEAKS = ("eval_leak", "eval_leak_embedding")
ALIGNMENT = ("low_score", "crowded_concept")
MENDING = ("invalid_json", "missing_json", "mojibake", "html_entities", "control_chars")
RULES = (*INTEGRITY, *TEXT, *PICTURE, *COPIES, *LEAKS, *ALIGNMENT, *MENDING)
NO_IMAGE = frozenset(
    ("unreadable", "missing_image", "empty_image", "not_an_image", "bomb", "truncated", "corrupt_image")
)

_RANGES = {  # least, most, what to write
    "duplicate_error": (0.0, 1.0, "0.15 finds copies that were compressed again, 0 none"),
    "duplicate_spot": (0.0, 255.0, "40 allows for compression, less for fewer copies"),
    "leak_error": (0.0, 1.0, "0.25 finds copies with a mark or another contrast, 0 none"),
    "leak_spot": (0.0, 255.0, "60 allows for a mark, less for fewer leaks"),
    "leak_similarity": (-1.0, 2.0, "it is a cosine: 0.95 and the like, 2 to switch the rule off"),
    "min_score": (-1.0, 1.0, "it is a cosine: 0.1 and the like, or leave it out"),
}


@dataclass(frozen=True)
class CurateConfig:
    """The thresholds. None, 0 or () where that switches a rule off.

    Attributes:
      captions: fields to take the caption from, the first that a pair has.
      max_image_pixels: larger pictures are bombs, refused by their header.
      animated: drop pictures with more than one frame.
      min_side_px: least shorter side of a picture.
      max_aspect: largest ratio of the longer side to the shorter.
      min_chars: least length of the canonical caption; a wide character (漢) counts as two.
      max_chars: largest length; a text tower of 64 tokens sees about 256 characters.
      min_words: least number of words; in scripts without spaces a sentence is one.
      markup: drop captions that hold tags, templates, style sheets or scripts.
      boilerplate: drop captions that are a file name, a price, an address or what pages say of any picture ("click here").
      max_caption_pictures: a caption on more different pictures than this says nothing about them.
      languages: the ones to keep, as codes ("en", "zh"); without any all stay.
      duplicates: compare pictures, or pictures with their captions: copies with other captions stay.
      duplicate_bits: perceptual hashes closer than this are compared on pixels.
      duplicate_error: largest root mean square difference of aligned thumbnails, as a share of their contrast.
      duplicate_spot: largest difference (of 255) at any place but the worst 1 % of a thumbnail.
      leak_error: as duplicate_error, against evaluation pictures, without colour if one of the two has none.
      leak_spot: as duplicate_spot, against evaluation pictures, but for the worst 3 %.
      leak_similarity: cosine of embeddings above which a pair is compared with an evaluation picture on pixels.
      min_score: least image-text score, a cosine.
      top_share: keep this share of the pairs, the best by score.
      share_per: the best of each language, or of the whole corpus: then languages that the model knows less well lose more.
      concept_cap: keep about this many pairs of each concept (MetaCLIP's t).
    """

    captions: tuple[str, ...] = ("txt",)
    max_image_pixels: int = 1 << 26
    animated: bool = True
    min_side_px: int = 8
    max_aspect: float = 8.0
    min_chars: int = 2
    max_chars: int = 256
    min_words: int = 0
    markup: bool = True
    boilerplate: bool = True
    max_caption_pictures: int = 100
    languages: tuple[str, ...] = ()
    duplicates: Literal["picture", "pair", "off"] = "picture"
    duplicate_bits: int = 12
    duplicate_error: float = 0.15
    duplicate_spot: float = 40.0
    leak_error: float = 0.25
    leak_spot: float = 60.0
    leak_similarity: float = 0.9
    min_score: float | None = None
    top_share: float | None = None
    share_per: Literal["language", "corpus"] = "language"
    concept_cap: int | None = None

    def __post_init__(self):
        least = {"max_image_pixels": 1, "min_side_px": 0, "min_chars": 0, "max_chars": 0}
        least |= {"min_words": 0, "max_caption_pictures": 0, "duplicate_bits": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name}={getattr(self, name)} must be at least {value}")
        if not self.captions or not all(self.captions):
            raise UserError(f"captions={self.captions!r} names no field; use e.g. txt")
        unknown = set(self.languages) - {code for _, code in pycld2.LANGUAGES} - {"un"}
        if unknown:
            raise UserError(f"languages={sorted(unknown)} are no codes that CLD2 gives; write e.g. en, de, zh, zh-Hant")
        if self.max_image_pixels > 89_478_485:
            raise UserError(f"max_image_pixels={self.max_image_pixels} exceeds Pillow's limit, 89478485")
        if self.max_aspect and not 1 <= self.max_aspect < math.inf:
            raise UserError(f"max_aspect={self.max_aspect} is long side / short side, at least 1; 0 switches it off")
        for name, (lowest, highest, fix) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:  # NaN lies nowhere
                raise UserError(f"{name}={value} must lie in [{lowest:g}, {highest:g}]; {fix}")
        if self.max_chars and self.min_chars > self.max_chars:
            raise UserError(
                f"min_chars={self.min_chars} exceeds max_chars={self.max_chars}: no caption fits; 0 is no limit"
            )
        if self.duplicate_bits > 32:
            raise UserError(f"duplicate_bits={self.duplicate_bits} of 64 finds everything alike; use 0 to 16")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise UserError(f"top_share={self.top_share} must lie in (0, 1], e.g. 0.3 for the best 30 %")
        if self.concept_cap is not None and self.concept_cap < 1:
            raise UserError(f"concept_cap={self.concept_cap} must be at least 1; MetaCLIP takes 20000")

    @property
    def needs_scores(self) -> bool:
        return self.min_score is not None or self.top_share is not None

    def digest(self, fields: tuple[str, ...] | None = None) -> str:
        """Identifies the thresholds, or those named."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if fields is None or name in fields}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_PUBLISHED = CurateConfig(
    min_side_px=0,
    max_aspect=0.0,
    min_chars=0,
    max_chars=0,
    markup=False,
    boilerplate=False,
    max_caption_pictures=0,
    duplicates="off",
)


def datacomp_basic() -> CurateConfig:
    """English, more than 2 words, more than 5 characters, smallest side 200 px, aspect at most 3."""
    return dataclasses.replace(_PUBLISHED, languages=("en",), min_words=3, min_chars=6, min_side_px=200, max_aspect=3.0)


def clip_top_30() -> CurateConfig:
    """The best 30 % of the corpus by image-text score, whatever the language: DataComp's CLIP-score filter."""
    return dataclasses.replace(_PUBLISHED, top_share=0.3, share_per="corpus")


def metaclip_balance() -> CurateConfig:
    """Captions that name a concept of the list, the frequent concepts thinned to 20000 pairs each."""
    return dataclasses.replace(_PUBLISHED, concept_cap=20_000)


def pali_top_10() -> CurateConfig:
    """The best tenth by image-text score, without copies: of each language, so that the rare ones are not lost.

    The paper does not say of what its tenth is.
    """
    return dataclasses.replace(_PUBLISHED, duplicates="picture", top_share=0.1, share_per="language")


PRESETS = {
    "datacomp-basic": datacomp_basic,
    "clip-top-30": clip_top_30,
    "metaclip-balance": metaclip_balance,
    "pali-top-10": pali_top_10,
}
