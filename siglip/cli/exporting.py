"""`siglip export`: any source to a format that others load, verified before it is called done."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from data_pipelines import sample
from data_pipelines.image_ops import decode_image
from data_pipelines.records import Pair
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import iter_captions
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.cli.arguments import parse
from siglip.export import export
from siglip.models.two_tower import ModelConfig
from siglip.verification import ROWS, Inputs

_MAX_PIXELS = 1 << 26


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Export an encoder, read it back and compare.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        format: hf (folder for transformers), bigvision (npz under the published names), stablehlo (programs that jax calls
            without this package) or savedmodel (TensorFlow: encoded pictures and raw texts in).
        out: folder to make; must not exist.
        tower: the image tower alone, or both with the tokenizer.
        image_size: side in pixels, or height and width; positions are resampled to it.
        patch_size: likewise; the patch kernel is resampled.
        head: no-head leaves the pooling head away, as vision-language models take the tower.
        layout: of bigvision: blocks one by one (loop), or stacked (scan).
        licence: of the weights, for the model card.
        samples: tar shards whose first pictures and texts are compared too; the shipped sample by default.
    """

    src: tyro.conf.Positional[str]
    format: Literal["hf", "bigvision", "stablehlo", "savedmodel"]
    out: str
    tower: Literal["image", "both"] = "image"
    image_size: tuple[int, ...] = ()
    patch_size: tuple[int, ...] = ()
    head: bool = True
    layout: Literal["loop", "scan"] = "loop"
    licence: str | None = None
    samples: str = f"{Path(sample.__file__).parent}/emoji-heldout-*.tar"


def export_command(args: list[str]) -> None:
    """Prints the largest difference of every output, on noise and on real pictures."""
    options = parse(ExportArgs, args, prog="siglip export")
    report = export(
        options.src,
        format=options.format,
        out=options.out,
        tower=options.tower,
        image_size=_height_width(options.image_size, "--image-size"),
        patch_size=_height_width(options.patch_size, "--patch-size"),
        head=options.head,
        layout=options.layout,
        licence=options.licence,
        samples=lambda config, tokenizer: sample_inputs(open_source(options.samples), config, tokenizer),
    )
    outputs = list(dict.fromkeys(name for found in report.differences.values() for name in found))
    print(f"{'max |difference|':<20}" + "".join(f"{name:>10}" for name in report.differences))
    for output in outputs:
        values = [found.get(output) for found in report.differences.values()]
        print(f"{output:<20}" + "".join(f"{'-' if value is None else f'{value:.1e}':>10}" for value in values))
    print(report.message)


def sample_inputs(pairs: Iterable[Pair], config: ModelConfig, tokenizer: Path | None) -> Inputs:
    """The first pictures and texts of a source, raw and as training prepares them.

    Raises:
        ValueError: none of the pairs has a picture.
    """
    chosen = [pair for pair, _ in zip(pairs, range(ROWS), strict=False) if pair.image]
    if not chosen:
        raise ValueError("--samples: none of the first pairs has a picture; name other shards")
    files = [pair.image for pair in chosen]
    # By Pillow itself: training may take a faster resize that is 1/255 off here and there, consumers do not.
    (height, width), bilinear = config.image.image_size, Image.Resampling.BILINEAR
    pictures = [decode_image(file, max_pixels=_MAX_PIXELS).resize((width, height), bilinear) for file in files]
    images = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / np.float32(127.5) - 1
    if config.text is None or tokenizer is None:
        return Inputs("sample", images, None, files)
    texts = list(dict.fromkeys(iter_captions(chosen)))[:ROWS]
    encode = SentencePieceTokenizer(str(tokenizer)).encode
    tokens = np.stack([encode(text, config.text.length) for text in texts])
    return Inputs("sample", images, tokens.astype(np.int32), files, texts)


def _height_width(sides: tuple[int, ...], flag: str) -> tuple[int, int] | None:
    if len(sides) > 2 or any(side < 1 for side in sides):
        raise ValueError(f"{flag} {' '.join(map(str, sides))}: give one side in pixels, or height and width")
    return (sides[0], sides[-1]) if sides else None
