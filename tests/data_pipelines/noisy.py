"""A small noisy corpus with its truth, made from the shipped sample: one fault a pair, a few pairs of each."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import SAMPLE, encode, write_tar

PAIRS_PER_SHARD = 60
PER_FAULT = 4
BOILERPLATE = ("IMG_0042.JPG", "click here to buy", "Untitled", "1920x1080")
MOJIBAKE = ("un château", "eine Brücke", "собака", "猫が好き")
CONTROL = ("a \u202edog", "\ufeffa cat", "a\u200b \u200bhorse", "b\u0336i\u0336r\u0336d\u0336")
MARKUP = (
    "<p>a cat</p>",
    "<img src='x.jpg' alt=\"a dog\" />",
    "&lt;b&gt;a bird&lt;/b&gt;",
    "a &amp;#39;fine&amp;#39; cow",
)
ENTITIES = ("salt &amp; pepper", "caf&eacute; table", "A&nbsp;pecan", "cats &#8211; dogs")


@dataclass(frozen=True)
class Corpus:
    """shards: patterns to curate; against: an evaluation set; truth: key -> (fault, key of the original or None)."""

    shards: list[str]
    against: str
    truth: dict[str, tuple[str, str | None]]


def make_corpus(folder: Path) -> Corpus:
    """Whole shards, one cut, one without members, one of no bytes."""
    sample = _distinct(TarSource(SAMPLE / "emoji-train-00000.tar"))
    held = _distinct(TarSource(SAMPLE / "emoji-heldout-00000.tar"))
    pairs: list[tuple[dict[str, bytes], str, str | None]] = []
    clean = [_members(image, caption) for image, caption in sample[:70]]
    pairs += [(members, "clean", None) for members in clean]
    rest = iter(sample[70:])
    for fault, spoil in _SPOILED.items():
        pairs += [(spoil(*next(rest), n), fault, None) for n in range(PER_FAULT)]
    for number in range(12):
        pairs.append((_copy(*sample[number], number), _COPIES[number % 4], f"{number:06d}"))
    for number in range(12):
        pairs.append((_copy(*held[number], number + 1), "eval_leak", None))
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    names = {before: f"{after:06d}" for after, before in enumerate(order)}
    shards = []
    for start in range(0, len(order), PAIRS_PER_SHARD):
        members = {}
        for before in order[start : start + PAIRS_PER_SHARD]:
            members |= {f"{names[before]}.{extension}": data for extension, data in pairs[before][0].items()}
        shards.append(str(write_tar(folder / f"noisy-{len(shards):05d}.tar", members)))
    cut = folder / "noisy-cut.tar"
    last = {f"90000{n}.{ext}": data for n in range(3) for ext, data in _members(*sample[-1 - n]).items()}
    cut.write_bytes(write_tar(cut, last).read_bytes()[:-12_000])
    empty, zero = write_tar(folder / "noisy-empty.tar", {}), folder / "noisy-zero.tar"
    zero.write_bytes(b"")
    protected = {f"h{n:05d}.{ext}": data for n in range(40) for ext, data in _members(*held[n]).items()}
    write_tar(folder / "held.tar", protected)
    truth = {names[n]: (fault, of and names[int(of)]) for n, (_, fault, of) in enumerate(pairs)}
    return Corpus([*shards, str(cut), str(empty), str(zero)], str(folder / "held.tar"), truth)


def _distinct(source: TarSource) -> list[tuple[Image.Image, str]]:
    """One image of every group of look-alikes: no skin tones, and no flags, of which some differ by a star."""
    found = {}
    for pair in source:
        if not pair.fields["txt"].startswith("flag") and "clock" not in pair.fields["txt"]:
            found.setdefault(
                pair.fields["group"], (Image.open(io.BytesIO(pair.image)).convert("RGB"), pair.fields["txt"])
            )
    return list(found.values())


def _members(image: Image.Image, caption: str) -> dict[str, bytes]:
    return {
        "jpg": encode(image, "JPEG", quality=92),
        "json": json.dumps({"caption": caption}).encode(),
        "txt": caption.encode(),
    }


_COPIES = ("duplicate_bytes", "rescaled", "rejpeg", "cropped")


def _copy(image: Image.Image, caption: str, number: int) -> dict[str, bytes]:
    """A copy as the web makes them: the same bytes, smaller, compressed again, or cut."""
    members = _members(image, caption)
    way = _COPIES[number % 4]
    if way == "rescaled":
        members["jpg"] = encode(image.resize((51, 55), Image.Resampling.BICUBIC), "JPEG", quality=85)
    elif way == "rejpeg":
        members["jpg"] = encode(image, "JPEG", quality=45)
    elif way == "cropped":
        left, top = number % 5, (number + 3) % 5
        members["jpg"] = encode(image.crop((left, top, 68 + number % 4, 69)), "JPEG", quality=85)
    return members


def _with(**changed):
    """A way to spoil a pair: members replaced, or left out where None."""

    def spoil(image: Image.Image, caption: str, number: int) -> dict[str, bytes]:
        members = _members(image, caption)
        for name, value in changed.items():
            value = value(members, image, number) if callable(value) else value
            members[name] = value
        return {name: data for name, data in members.items() if data is not None}

    return spoil


def _text(choices: tuple[str, ...]):
    return _with(txt=lambda members, image, n: choices[n % len(choices)].encode())


def _gif(members: dict, image: Image.Image, number: int) -> bytes:
    return encode(image, "GIF", save_all=True, append_images=[image.rotate(90)])


def _bomb(members: dict, image: Image.Image, number: int) -> bytes:
    return encode(Image.new("1", (9000 + 4000 * number, 9000)), "PNG")


_SPOILED = {
    "empty_image": _with(jpg=b""),
    "not_an_image": _with(jpg=b"<!DOCTYPE html><title>403 Forbidden</title>"),
    "truncated": _with(jpg=lambda members, image, n: members["jpg"][: len(members["jpg"]) * (5 + n) // 10]),
    "bomb": _with(jpg=_bomb),
    "animated": _with(jpg=_gif),
    "missing_image": _with(jpg=None),
    "missing_text": _with(txt=None),
    "missing_json": _with(json=None),
    "invalid_json": _with(json=b'{"caption": "cu'),
    "invalid_utf8": _with(txt="котёнок и щенок".encode("cp1251")),
    "empty_text": _text(("", " \n", "\u3000", "...")),
    "boilerplate": _text(BOILERPLATE),
    "markup": _text(MARKUP),
    "html_entities": _text(ENTITIES),
    "control_chars": _text(CONTROL),
    "mojibake": _text(tuple(text.encode().decode("latin-1") for text in MOJIBAKE)),
    "too_long": _text(("a dog and a cat and " * 20,)),
    "too_short": _text(("a",)),
    "too_small": _with(jpg=lambda members, image, n: encode(image.resize((1 + n, 1)), "PNG")),
    "extreme_aspect": _with(jpg=lambda members, image, n: encode(image.resize((400, 12 + n)), "JPEG")),
}
