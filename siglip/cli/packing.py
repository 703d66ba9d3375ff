"""`siglip data pack`: folders of images, COCO's and Karpathy's JSON, CSV and any other source to tar shards."""

import dataclasses
import sys
import time
from pathlib import Path

import tyro

from data_pipelines.sources.described import describe
from data_pipelines.sources.opening import open_source
from data_pipelines.sources.packing import pack, told
from data_pipelines.text_ops import lookup
from siglip.atomic import new_folder
from siglip.cli.arguments import parse
from siglip.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class PackArgs:
    """Write tar shards of images and what is known of them; the folder appears when all is written.

    Attributes:
        data: a folder of images (a folder per class, or with a list), COCO's or Karpathy's JSON (FILE.json#SPLIT), a CSV, TSV or
            JSONL list, Flickr's text file, or any shards.
        out: required; the folder to write. It must not exist.
        captions: field or column with the captions; without it the usual names are looked for.
        label: field or column with the labels; without it the usual names are looked for.
        image_column: column with the image or its path; without it the usual names are looked for.
        shard_pairs: pairs in each shard.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    out: str = ""
    captions: str | None = None
    label: str | None = None
    image_column: str | None = None
    shard_pairs: int = 10_000


def pack_command(args: list[str]) -> None:
    """Prints what was written, and what was skipped and why."""
    options = parse(PackArgs, args, prog="siglip data pack")
    if not options.data or not options.out:
        raise UserError("name the data and a folder to write: siglip data pack DATA --out DIR")
    if options.shard_pairs < 1:
        raise UserError(f"--shard-pairs {options.shard_pairs} must be at least 1; 10000 is usual")
    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"--out {options.out} exists; name a folder that does not")
    named = [name for name in (options.captions, options.label) if name]
    # Of named columns all must be there; the usual ones may be missing.
    open_source(
        options.data,
        image=options.image_column,
        fields={name.partition(".")[0] for name in named},
        required=bool(named),
    )
    source = open_source(options.data, image=options.image_column, required=False)
    about = describe(source)
    label = options.label or about.label
    classes = about.classes.get(label or "")
    found = about.captions[0] if len(about.captions) == 1 else None  # several languages stay in the json member
    captions = options.captions or (found if _has_some(source, found) else None)
    start = last = time.monotonic()

    def progress(pairs: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{pairs} of {len(source)} pairs, {pairs / (last - start):.0f} per s", file=sys.stderr)

    with new_folder(out) as partial:
        settings = {"captions": captions, "label": label, "classes": classes, "shard_pairs": options.shard_pairs}
        packed = pack(source, partial, **settings, progress=progress)
    print(f"{packed.pairs} pairs in {packed.shards} shards -> {out}")
    fields = [
        f"txt: {captions or 'none'}",
        f"cls: {label or 'none'}" + (f", {len(classes)} classes" if classes else ""),
    ]
    print("; ".join(fields))
    if packed.skipped:
        print(f"skipped {packed.skipped.total()}: {told(packed)}")


def _has_some(source, field: str | None, looked_at: int = 100) -> bool:
    """Whether one of the first pairs has a caption there; of tars only the pairs tell."""
    if field is None or source.columns is not None:
        return field is not None
    return any(lookup(source[index].fields, field) for index in range(min(looked_at, len(source))))
