"""`siglip export`: any source to a format that others load, verified before it is called done."""

import dataclasses
import io
import signal
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from PIL import Image

from data_pipelines import sample
from data_pipelines.image_ops import DecodeError, decode_image
from data_pipelines.records import Source
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import iter_captions
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.cli.arguments import parse
from siglip.errors import UserError
from siglip.exporting.export import FORMATS, export
from siglip.exporting.verification import ROWS, random_inputs
from siglip.formats.export_format import Inputs
from siglip.inputs import to_pixels
from siglip.models.two_tower import ModelConfig

_MAX_PIXELS = 1 << 26
_ORIENTATION_TAG = 0x0112


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Export an encoder, read it back and compare.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        format: hf (folder for transformers), bigvision (npz under the published names), stablehlo (programs that jax calls
            without this package) or savedmodel (TensorFlow: encoded images and raw texts in).
        out: folder to make; must not exist.
        tower: the image tower alone, or both with the tokenizer.
        image_size: side in pixels, or height and width; positions are resampled to it.
        patch_size: likewise; the patch kernel is resampled.
        head: False leaves the pooling head away: vision-language models do not use it.
        layout: for bigvision: blocks one by one (loop), or stacked (scan).
        dtype: for hf: type of the weights in the file; bfloat16 is half the size.
        shard_bytes: for hf: the weights in several files of at most so many bytes, with an index, as 5000000000.
        licence: licence of the weights, for the model card.
        samples: shards whose first images and texts are compared as well; the shipped sample by default.
    """

    src: tyro.conf.Positional[str]
    format: Literal[*FORMATS]
    out: str
    tower: Literal["image", "both"] = "image"
    image_size: tuple[int, ...] = ()
    patch_size: tuple[int, ...] = ()
    head: bool = True
    layout: Literal["loop", "scan"] = "loop"
    dtype: Literal["float32", "bfloat16"] = "float32"
    shard_bytes: int | None = None
    licence: str | None = None
    samples: str = f"{Path(sample.__file__).parent}/emoji-heldout-*.tar"


def export_command(args: list[str]) -> None:
    """Prints the largest difference of every output, on noise and on real images. The flags are what `export` takes."""
    options = parse(ExportArgs, args, prog="siglip export")
    # Ended from outside, it leaves nothing behind either.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    settings = {name: None if value == () else value for name, value in dataclasses.asdict(options).items()}
    settings["samples"] = lambda config, tokenizer: sample_inputs(open_source(options.samples), config, tokenizer)
    report = export(**settings)
    outputs = list(dict.fromkeys(name for found in report.differences.values() for name in found))
    print(f"{'max |difference|':<20}" + "".join(f"{name:>10}" for name in report.differences))
    for output in outputs:
        values = [found.get(output) for found in report.differences.values()]
        print(f"{output:<20}" + "".join(f"{'-' if value is None else f'{value:.1e}':>10}" for value in values))
    print(report.message)


def sample_inputs(pairs: Source, config: ModelConfig, tokenizer: Path | None) -> Inputs:
    """The first images and texts of a source that every format's own preprocessing treats as ours does, raw and prepared.

    Raises:
        UserError: no pair has such an image, or such a text.
    """
    files, shown, texts = [], [], []
    for index in range(len(pairs)):
        if len(files) == ROWS:
            break
        try:
            pair = pairs[index]
            if pair.image is None or not _is_plain(pair.image):
                continue
            image = decode_image(pair.image, max_pixels=_MAX_PIXELS)
        except (DecodeError, OSError):
            continue
        files.append(pair.image)
        shown.append(image)
        texts += iter_captions([pair])
    if not files:
        raise UserError("--samples: no pair has an upright, opaque image that can be decoded; name other shards")
    images = jax.device_get(to_pixels(shown, config.image))
    if config.text is None:
        return Inputs("sample", images, None, files)
    if tokenizer is None:
        return Inputs("sample", images, random_inputs(config).tokens, files)
    texts = list(dict.fromkeys(texts))[:ROWS]
    if not texts:
        raise UserError("--samples: the pairs have images but no captions; name other shards, or use --tower image")
    encode = SentencePieceTokenizer(str(tokenizer), **vars(config.text.tokens)).encode
    tokens = np.stack([encode(text, config.text.length) for text in texts])
    return Inputs("sample", images, tokens.astype(np.int32), files, texts)


def _is_plain(file: bytes) -> bool:
    """Whether it is an upright, opaque 8-bit image: the others must be prepared by the caller of a consumer's preprocessor."""
    try:
        image = Image.open(io.BytesIO(file), formats=("JPEG", "PNG"))
        upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1
    except Exception:  # decoders raise anything on damaged files
        return False
    return upright and image.mode in ("RGB", "L") and not image.has_transparency_data
