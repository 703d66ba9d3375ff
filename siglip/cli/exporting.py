"""`siglip export`: any source to a format that others load, verified before it is called done."""

import dataclasses
from typing import Literal

import tyro

from siglip.cli.arguments import parse
from siglip.export import export


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Export an encoder, read it back and compare.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        format: hf (folder for transformers) or bigvision (npz under the published names).
        out: folder to make; must not exist.
        tower: the image tower alone, or both with the tokenizer.
        image_size: resample the position embedding to this side in pixels.
    """

    src: tyro.conf.Positional[str]
    format: Literal["hf", "bigvision"]
    out: str
    tower: Literal["image", "both"] = "image"
    image_size: int | None = None


def export_command(args: list[str]) -> None:
    """Prints the largest difference of every output."""
    options = parse(ExportArgs, args, prog="siglip export")
    report = export(
        options.src, format=options.format, out=options.out, tower=options.tower, image_size=options.image_size
    )
    for name, difference in report.differences.items():
        print(f"{name:<16} max |difference| {difference:.1e}")
    print(report.message)
