"""Every rule by name, its threshold, and the published recipes as presets.

A rule drops a pair, or (`REPAIRS`) repairs or notes something and keeps it. A pair's `reason` is the first dropping rule
in the order of `RULES`; `reasons` are all rules that apply, repairs among them.

Presets: DataComp's basic filter and its CLIP-score filter (Gadre et al., arXiv 2304.14108), MetaCLIP's balancing
(Xu et al., 2309.16671), PaLI's best tenth (Chen et al., 2209.06794). A preset switches off every other text and image rule,
so that its numbers can be compared with the paper's; the integrity rules stay on, since what they drop cannot be trained on.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pycld2

from data_pipelines.errors import UserError

NO_IMAGE = ("unreadable", "missing_image", "empty_image", "not_an_image", "bomb", "truncated", "corrupt_image")
INTEGRITY = ("invalid_csv", *NO_IMAGE, "missing_text", "invalid_utf8", "animated")
TEXT = ("empty_text", "markup", "boilerplate", "too_short", "too_long", "language", "repeated_caption")
IMAGE = ("too_small", "extreme_aspect")
DUPLICATES = ("duplicate_bytes", "duplicate_pixels", "near_duplicate")
LEAKS = ("eval_leak", "eval_leak_embedding")
ALIGNMENT = ("low_score", "crowded_concept")
REPAIRS = ("invalid_json", "invalid_cls", "missing_json", "mojibake", "html_entities", "control_chars")
RULES = (*INTEGRITY, *TEXT, *IMAGE, *DUPLICATES, *LEAKS, *ALIGNMENT, *REPAIRS)
_ORDER = {rule: number for number, rule in enumerate(RULES)}
_RANGES = {  # minimum, maximum, what to write
    "duplicate_error": (0.0, 1.0, "0.15 finds recompressed copies, 0 finds none"),
    "duplicate_spot": (0.0, 255.0, "40 allows for compression; a lower value finds fewer duplicates"),
    "leak_error": (0.0, 1.0, "0.25 finds copies with a watermark or another contrast, 0 finds none"),
    "leak_spot": (0.0, 255.0, "60 allows for a watermark; a lower value finds fewer leaks"),
    "leak_similarity": (-1.0, 2.0, "it is a cosine, e.g. 0.95; 2 switches the rule off"),
    "min_score": (-1.0, 1.0, "it is a cosine, e.g. 0.1; leave it out to switch the rule off"),
}
_MINIMA = {"max_image_pixels": 1} | dict.fromkeys(
    ("min_side_px", "min_chars", "max_chars", "min_words", "max_caption_pictures", "duplicate_bits"), 0
)


@dataclass(frozen=True)
class CurateConfig:
    """The thresholds. None, 0 or () switches a rule off.

    Attributes:
      captions: the fields to take the caption from; the first that a pair has is used.
      image_column: the column that holds the image, or its path, in the shards and evaluation sets that have it; None finds it.
      max_image_pixels: larger images are decompression bombs, refused by their header.
      animated: drop images with more than one frame.
      min_side_px: minimum shorter side of an image.
      max_aspect: maximum ratio of the longer side to the shorter.
      min_chars: minimum length of the canonical caption; a wide character (漢) counts as two.
      max_chars: maximum length; a text tower of 64 tokens sees about 256 characters.
      min_words: minimum number of words; in scripts without spaces a sentence is one word.
      markup: drop captions that hold tags, templates, style sheets or scripts.
      boilerplate: drop captions that are a file name, a price, an address, or what pages say about any image ("click here").
      max_caption_pictures: drop captions that stand under more different images than this.
      languages: keep only these, by code ("en", "zh"); none given keeps all.
      duplicates: "picture" drops duplicate images, "pair" only those whose caption is the same as well.
      duplicate_bits: images whose perceptual hashes differ in at most this many bits are compared by pixels.
      duplicate_error: maximum root mean square difference of the aligned thumbnails, as a share of their contrast.
      duplicate_spot: maximum difference (of 255) at any pixel of a thumbnail, the worst 1 % aside.
      leak_error: as duplicate_error, against evaluation images; in grey if one of the two has no colour.
      leak_spot: as duplicate_spot, against evaluation images, the worst 3 % aside.
      leak_similarity: compare a pair by pixels with its closest evaluation image if their embeddings' cosine is above this.
      min_score: minimum image-text score, a cosine.
      top_share: keep this share of the pairs, those with the best scores.
      share_per: take that share of each language, or of the whole corpus; then languages the model knows less well lose more.
      concept_cap: keep about this many pairs of each concept (MetaCLIP's t).
    """

    captions: tuple[str, ...] = ("txt",)
    image_column: str | None = None
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
        for name, minimum in _MINIMA.items():
            if getattr(self, name) < minimum:
                raise UserError(f"{name}={getattr(self, name)} must be at least {minimum}")
        if not self.captions or not all(self.captions):
            raise UserError(f"captions={self.captions!r} names no field; use e.g. txt")
        unknown = set(self.languages) - {code for _, code in pycld2.LANGUAGES} - {"un"}
        if unknown:
            raise UserError(
                f"languages={sorted(unknown)} are not language codes of CLD2; write e.g. en, de, zh, zh-Hant"
            )
        if self.max_image_pixels > 89_478_485:
            raise UserError(f"max_image_pixels={self.max_image_pixels} exceeds Pillow's limit, 89478485")
        if self.max_aspect and not 1 <= self.max_aspect < math.inf:
            raise UserError(
                f"max_aspect={self.max_aspect} is long side / short side: at least 1, or 0 to switch it off"
            )
        for name, (lowest, highest, fix) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:  # NaN lies nowhere
                raise UserError(f"{name}={value} must lie in [{lowest:g}, {highest:g}]; {fix}")
        if self.max_chars and self.min_chars > self.max_chars:
            raise UserError(
                f"min_chars={self.min_chars} exceeds max_chars={self.max_chars}: no caption fits; max_chars=0 is no limit"
            )
        if self.duplicate_bits > 32:
            raise UserError(f"duplicate_bits={self.duplicate_bits} of 64 matches almost any two images; use 0 to 16")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise UserError(f"top_share={self.top_share} must lie in (0, 1], e.g. 0.3 for the best 30 %")
        if self.concept_cap is not None and self.concept_cap < 1:
            raise UserError(f"concept_cap={self.concept_cap} must be at least 1; MetaCLIP uses 20000")

    @property
    def needs_scores(self) -> bool:
        return self.min_score is not None or self.top_share is not None

    def digest(self, fields: tuple[str, ...] | None = None) -> str:
        """Identifies the values of all thresholds, or of the named ones."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if fields is None or name in fields}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def in_order(rules: Iterable[str]) -> list[str]:
    """Rules in the order of `RULES`."""
    return sorted(rules, key=_ORDER.__getitem__)


_PUBLISHED = CurateConfig(
    **dict.fromkeys(("min_side_px", "max_aspect", "min_chars", "max_chars", "max_caption_pictures"), 0),
    **dict.fromkeys(("markup", "boilerplate"), False),
    duplicates="off",
)


PRESETS: dict[str, Callable[[], CurateConfig]] = {
    # English, at least 3 words and 6 characters, shorter side at least 200 px, aspect ratio at most 3.
    "datacomp-basic": partial(
        dataclasses.replace, _PUBLISHED, languages=("en",), min_words=3, min_chars=6, min_side_px=200, max_aspect=3.0
    ),
    # The best 30 % of the corpus by image-text score, whatever the language: DataComp's CLIP-score filter.
    "clip-top-30": partial(dataclasses.replace, _PUBLISHED, top_share=0.3, share_per="corpus"),
    # Captions that name a concept of the list; frequent concepts are thinned to about 20000 pairs each.
    "metaclip-balance": partial(dataclasses.replace, _PUBLISHED, concept_cap=20_000),
    # The best tenth of each language by image-text score, after duplicates are removed. The paper does not say what the
    # 10 % is taken from; taken per language, no language is lost.
    "pali-top-10": partial(dataclasses.replace, _PUBLISHED, duplicates="picture", top_share=0.1, share_per="language"),
}
