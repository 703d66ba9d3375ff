"""Drawings by source: an SVG or an image file, an English name, keywords. What is left out is said at each source."""

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_pipelines.sample import packages
from data_pipelines.sample.ideas import Ideas, family

_SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>'
_LOSSY_QUALITY = 80
_DC, _RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
# Clip art of other things than one can name: file types, window parts, patterns, words, what was never sorted.
_NO_CLIP_ART = ("computer", "shapes", "signs_and_symbols", "special", "unsorted", "geography")


@dataclass(frozen=True)
class Drawing:
    """One drawing. image: an SVG or an image file; idea: code points if it is an emoji, see `ideas`."""

    key: str
    image: bytes
    name: str
    keywords: tuple[str, ...]
    idea: str | None = None


def to_webp(image: bytes, size: int) -> bytes | None:
    """The drawing in the middle of a white square of `size` px, as WebP: without loss where that is smaller.

    -> None if nothing can be drawn: no size, an empty drawing, a text that is not UTF-8.
    """
    try:
        image = image if _is_raster(image) else _render(image, size)
    except ValueError:
        return None
    drawn = Image.open(io.BytesIO(image)).convert("RGBA")
    drawn.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    rgb = square.convert("RGB")
    if all(low == high for low, high in rgb.getextrema()):
        return None
    lossy, lossless = io.BytesIO(), io.BytesIO()
    rgb.save(lossy, "WEBP", quality=_LOSSY_QUALITY, method=4)
    rgb.save(lossless, "WEBP", lossless=True, quality=60, method=4)
    return min(lossless.getvalue(), lossy.getvalue(), key=len)


def _is_raster(image: bytes) -> bool:
    return image[8:12] == b"WEBP" or image.startswith(b"\x89PNG")


def _render(svg: bytes, size: int) -> bytes:
    import resvg_py  # extra `sample`

    root = ElementTree.fromstring(svg)
    box = [float(part) for part in re.split("[ ,]+", (root.get("viewBox") or "0 0 1 1").strip())]
    side = {"width": size} if box[2] >= box[3] else {"height": size}
    return resvg_py.svg_to_bytes(svg_string=svg.decode(), skip_system_fonts=True, dpi=96, **side)


def emoji(package: str, folder: Path, ideas: Ideas) -> list[Drawing]:
    """An emoji set of Iconify without most skin tones: of each family, one."""
    return _few_tones(every_emoji(package, folder, ideas))


def every_emoji(package: str, folder: Path, ideas: Ideas) -> dict[str, Drawing]:
    """The drawings of an emoji set of Iconify by idea; what is not named like an emoji is left out."""
    found: dict[str, Drawing] = {}
    for name, svg, aliases in _iconify(package, folder):
        idea = next(filter(None, map(ideas.find, (name, *aliases))), None)
        if idea is not None and idea not in found:
            found[idea] = _of_idea(package, idea, svg, ideas)
    return found


def fluent_3d(folder: Path, ideas: Ideas) -> list[Drawing]:
    """Fluent emoji as rendered scenes: WebP, named by code points."""
    found: dict[str, Drawing] = {}
    with packages.opened("@lobehub/fluent-emoji-3d", folder) as files:
        for path in sorted(name for name in files.getnames() if name.endswith(".webp")):
            points = Path(path).stem.upper().split("-")
            idea = " ".join(point.zfill(4) for point in points if point != "FE0F")
            if idea in ideas.classes:
                found[idea] = _of_idea("fluent-emoji-3d", idea, files.extractfile(path).read(), ideas)
    return _few_tones(found)


def flags(package: str, folder: Path, ideas: Ideas) -> list[Drawing]:
    """A flag set of Iconify named by ISO codes; codes that have no emoji are left out."""
    found = []
    for name, svg, _ in _iconify(package, folder):
        idea = " ".join(f"{0x1F1E6 + ord(letter) - ord('a'):04X}" for letter in name) if len(name) == 2 else ""
        if idea in ideas.classes:
            found.append(_of_idea(package, idea, svg, ideas))
    return found


def colour_icons(package: str, folder: Path, *, ending: str = "") -> list[Drawing]:
    """A coloured icon set of Iconify: all of one ending, or the largest of sizes ("-16", "-24") where names end so."""
    largest: dict[str, tuple[int, bytes]] = {}
    for name, svg, _ in _iconify(package, folder):
        if not name.endswith(ending):
            continue
        base, _, size = name.removesuffix(ending).rpartition("-")
        base, size = (base, int(size)) if size.isdigit() and base else (name.removesuffix(ending), 0)
        if base not in largest or size > largest[base][0]:
            largest[base] = (size, svg)
    return [_icon(package, name, svg) for name, (_, svg) in sorted(largest.items())]


def tabler(folder: Path) -> list[Drawing]:
    """Outlines with tags, without brands."""
    with packages.opened("@tabler/icons", folder) as files:
        icons = json.load(files.extractfile("package/icons.json"))
        return [
            _icon(
                "tabler", name, files.extractfile(f"package/icons/outline/{name}.svg").read(), map(str, about["tags"])
            )
            for name, about in sorted(icons.items())
            if about["category"] != "Brand" and "outline" in about["styles"]
        ]


def mdi(folder: Path) -> list[Drawing]:
    """Material Design Icons with their other names, without brands."""
    with packages.opened("@mdi/svg", folder) as files:
        icons = json.load(files.extractfile("package/meta.json"))
        return [
            _icon(
                "mdi",
                it["name"],
                files.extractfile(f"package/svg/{it['name']}.svg").read(),
                map(_spaced, it["aliases"]),
            )
            for it in icons
            if not it["deprecated"] and "Brand / Logo" not in it["tags"]
        ]


def lucide(folder: Path) -> list[Drawing]:
    """Outlined icons with tags."""
    with packages.opened("lucide-static", folder) as files:
        tags = json.load(files.extractfile("package/tags.json"))
        return [
            _icon("lucide", name, files.extractfile(f"package/icons/{name}.svg").read(), words)
            for name, words in sorted(tags.items())
        ]


def carbon(folder: Path) -> list[Drawing]:
    """Outlined pictograms with other names of theirs."""
    with packages.opened("@carbon/pictograms", folder) as files:
        icons = json.load(files.extractfile("package/metadata.json"))["icons"]
        here = set(files.getnames())
        paths = {it["name"]: f"package/svg/{it['name']}.svg" for it in icons}
        return [
            _icon("carbon", it["name"], files.extractfile(paths[it["name"]]).read(), it.get("aliases", ()))
            for it in icons
            if paths[it["name"]] in here
        ]


def clip_art(folder: Path) -> list[Drawing]:
    """Open Clip Art that has a title; of several with one title the first."""
    found: dict[str, Drawing] = {}
    with packages.opened("openclipart-svg", folder) as files:
        for path in sorted(name for name in files.getnames() if name.endswith(".svg")):
            _, _, place = path.partition("/openclipart/svg/")
            member = files.getmember(path)
            if place.startswith(_NO_CLIP_ART) or not member.isfile() or member.size > 1 << 20:
                continue
            svg = files.extractfile(member).read()
            title, keywords = _described(svg)
            if title and title.lower() not in found:
                key = f"openclipart/{place.removesuffix('.svg')}"
                found[title.lower()] = Drawing(key, svg, title, keywords)
    return list(found.values())


def _described(svg: bytes) -> tuple[str, tuple[str, ...]]:
    """Title and keywords in the metadata of an SVG, ("", ()) if it cannot be parsed."""
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError:
        return "", ()
    titles = [" ".join((node.text or "").split()) for node in root.iter(f"{_DC}title")]
    subjects = (entry.text or "" for node in root.iter(f"{_DC}subject") for entry in node.iter(f"{_RDF}li"))
    keywords = dict.fromkeys(" ".join(word.split()) for word in subjects)
    return next(filter(None, titles), ""), tuple(word for word in keywords if word and word != "unsorted")


def _iconify(package: str, folder: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    """(name, SVG, other names) of the icons of a set that are not marked as hidden."""
    with packages.opened(f"@iconify-json/{package}", folder) as files:
        icons = json.load(files.extractfile("package/icons.json"))
    aliases: dict[str, list[str]] = {}
    for alias, about in icons.get("aliases", {}).items():
        aliases.setdefault(about["parent"], []).append(alias)
    for name, icon in sorted(icons["icons"].items()):
        if not icon.get("hidden"):
            shape = {side: icon.get(side, icons.get(side, default)) for side, default in _SIDES.items()}
            svg = _SVG.format(box="{left} {top} {width} {height}".format(**shape), body=icon["body"])
            yield name, svg.encode(), aliases.get(name, [])


_SIDES = {"left": 0, "top": 0, "width": 16, "height": 16}


def _of_idea(style: str, idea: str, image: bytes, ideas: Ideas) -> Drawing:
    return Drawing(f"{style}/{idea.replace(' ', '-')}", image, ideas.name(idea), tuple(ideas.keywords(idea)), idea)


def _few_tones(found: dict[str, Drawing]) -> list[Drawing]:
    """All without a skin tone, and of each family one with, chosen by its code points."""
    toned: dict[str, str] = {}
    for idea in sorted(found, key=lambda idea: idea[::-1]):
        if _has_tone(idea):
            toned.setdefault(family(idea), idea)
    kept = set(toned.values())
    return [drawing for idea, drawing in sorted(found.items()) if not _has_tone(idea) or idea in kept]


def _has_tone(idea: str) -> bool:
    return any(f"1F3F{digit}" in idea.split() for digit in "BCDEF")


def _spaced(name: str) -> str:
    return " ".join(name.replace("-", " ").split())


def _icon(style: str, name: str, svg: bytes, keywords=()) -> Drawing:
    return Drawing(f"{style}/{name}", svg, _spaced(name), tuple(dict.fromkeys(filter(None, keywords))))
