"""Remakes the sample's shards from packages of public registries, byte for byte.

    pip install -e '.[sample]' && make sample           # in a checkout; 110 MB are downloaded, ten minutes of two cores
    python -m data_pipelines.sample.build --out DIR --size 256     # larger images; the shipped ones have 64 px

    emoji-STYLE.parquet      training pairs, uncurated: siglip data curate makes the manifest. Names in twelve languages
    icons-STYLE.parquet      more training pairs: icons and clip art with English names and tags
    unseen-style.parquet     every Noto emoji whose idea is seen in training in other styles
    unseen-ideas.parquet     312 emoji of ideas that no training pair shows, in any style (`unseen_ideas.txt`)
    flags.parquet            flags in a style that is not in training, of ideas that are
    digits.parquet           handwritten digits: nothing like them is in training

A pair has `image` (WebP), `key`, `txt` (English name), `keywords`; what is an emoji has `captions` (names by language) and `idea`
(its code points); evaluation pairs have the class names `group` and `subgroup`, or `label`.
"""

import argparse
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_pipelines.atomic import new_file
from data_pipelines.errors import UserError
from data_pipelines.sample import LANGUAGES, drawings
from data_pipelines.sample.drawings import Drawing
from data_pipelines.sample.ideas import EVALUATION_LANGUAGES, Ideas, family, unseen, words

HELD_STYLE, HELD_FLAGS = "noto", "flagpack"
_ROWS_PER_GROUP = 500
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def train_sources(folder: Path, ideas: Ideas) -> dict[str, Callable[[], list[Drawing]]]:
    """The sources of training pairs by the names of their files."""
    styles = ("noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat")
    colours = {"icon-park": "", "flat-color-icons": "", "fluent-color": "", "marketeq": "", "meteocons": "-fill"}
    return {
        **{f"emoji-{style}": partial(drawings.emoji, style, folder, ideas) for style in styles},
        "emoji-fluent-emoji-3d": partial(drawings.fluent_3d, folder, ideas),
        "emoji-circle-flags": partial(drawings.flags, "circle-flags", folder, ideas),
        **{f"icons-{name}": partial(drawings.colour_icons, name, folder, ending=end) for name, end in colours.items()},
        "icons-tabler": partial(drawings.tabler, folder),
        "icons-mdi": partial(drawings.mdi, folder),
        "icons-lucide": partial(drawings.lucide, folder),
        "icons-carbon": partial(drawings.carbon, folder),
        "icons-openclipart": partial(drawings.clip_art, folder),
    }


class _Unseen:
    """Whether a drawing shows an idea that is kept out of training."""

    def __init__(self, ideas: Ideas):
        self._families = {family(idea) for idea in unseen()}
        names = {words(ideas.name(idea).partition(":")[0]) for idea in unseen() if not idea.startswith("1F1")}
        self._names = [name for name in names if name]

    def __contains__(self, drawing: Drawing) -> bool:
        if drawing.idea is not None:
            return family(drawing.idea) in self._families
        told = words(" ".join((drawing.name, *drawing.keywords)))
        return any(name <= told for name in self._names)


def main(args: Sequence[str] | None = None) -> int:
    """The command. -> exit code"""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.sample.build", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--packages", type=Path, default=Path("~/.cache/siglip/sample").expanduser(), help="downloads")
    given = parser.parse_args(args)
    if given.size < 1:
        parser.error(f"--size {given.size} must be at least 1 pixel")
    try:
        _build(given.out, given.size, given.packages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _build(out: Path, size: int, folder: Path) -> None:
    ideas = Ideas.read(folder)
    held, seen = _Unseen(ideas), set()
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 16)) as pool:
        write = partial(_write, out, size, pool)
        for name, make in train_sources(folder, ideas).items():
            drawn = [drawing for drawing in make() if drawing not in held]
            seen |= {drawing.idea for drawing in drawn if drawing.idea}
            write(name, drawn, ideas, LANGUAGES)
        noto = drawings.every_emoji(HELD_STYLE, folder, ideas)
        flags = {drawing.idea: drawing for drawing in drawings.flags(HELD_FLAGS, folder, ideas)}
        write("unseen-style", [noto[idea] for idea in sorted(noto) if idea in seen], ideas, EVALUATION_LANGUAGES)
        write("unseen-ideas", [(noto | flags)[idea] for idea in unseen()], ideas, EVALUATION_LANGUAGES)
        write("flags", [flags[idea] for idea in sorted(flags) if idea in seen], ideas, EVALUATION_LANGUAGES)
    _write_digits(out)


def _write(out: Path, size: int, pool, name: str, drawn: list[Drawing], ideas: Ideas, languages: Sequence[str]) -> None:
    images = pool.imap(partial(drawings.to_webp, size=size), [drawing.image for drawing in drawn], chunksize=32)
    pairs = [(drawing, image) for drawing, image in zip(drawn, images, strict=True) if image is not None]
    evaluation = not name.startswith(("emoji-", "icons-"))
    rows = [_row(drawing, image, ideas, languages, evaluation) for drawing, image in pairs]
    schema = [("key", pa.string()), ("image", pa.binary()), ("txt", pa.string()), ("keywords", pa.string())]
    if any(drawing.idea for drawing in drawn):
        schema += [("idea", pa.string()), ("captions", pa.struct([(language, pa.string()) for language in languages]))]
    if evaluation:
        schema += [("group", pa.string()), ("subgroup", pa.string())]
    _write_parquet(out / f"{name}.parquet", pa.Table.from_pylist(rows, pa.schema(schema)))
    print(f"{name}: {len(rows)} pairs, {len(drawn) - len(rows)} blank", flush=True)


def _row(drawing: Drawing, image: bytes, ideas: Ideas, languages: Sequence[str], evaluation: bool) -> dict:
    row = {"key": drawing.key, "image": image, "txt": drawing.name, "keywords": ", ".join(drawing.keywords) or None}
    if drawing.idea:
        row |= {"idea": drawing.idea, "captions": ideas.captions(drawing.idea, languages)}
    if evaluation:
        row |= dict(zip(("group", "subgroup"), ideas.classes[drawing.idea], strict=True))
    return row


def _write_parquet(path: Path, table: pa.Table) -> None:
    repeated = [name for name in table.column_names if name in ("group", "subgroup", "label")]
    options = {"compression": "zstd", "compression_level": 19, "write_statistics": False, "use_dictionary": repeated}
    with new_file(path) as partial_path:
        pq.write_table(table, partial_path, row_group_size=_ROWS_PER_GROUP, **options)


def _write_digits(out: Path) -> None:
    from sklearn.datasets import load_digits  # extra `sample`

    digits, rows = load_digits(), []
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = io.BytesIO()
        Image.fromarray((255 - pixels * (255 / 16)).round().astype("uint8")).save(file, "PNG", optimize=True)
        rows.append({"key": f"digits/{number:04}", "image": file.getvalue(), "label": _DIGITS[digit]})
    schema = pa.schema([("key", pa.string()), ("image", pa.binary()), ("label", pa.string())])
    _write_parquet(out / "digits.parquet", pa.Table.from_pylist(rows, schema))


if __name__ == "__main__":
    sys.exit(main())
