"""Images and captions for the captioner, from the toolkit's own pipeline.

    prompt = [begin] + pieces("caption en") + [newline];   suffix = (pieces(caption) + [end])[:l], padded with end

The decoder's tokenizer has nothing to do with the encoder's: here it is the one of the shipped sample, whatever the encoder
was trained with. PaliGemma's is Gemma's, SigLIP's was another.

The trap: SentencePiece drops a newline as white space, so the separator is put in by its id.
"""

import dataclasses
from pathlib import Path

import numpy as np
import sentencepiece

from data_pipelines import sample
from data_pipelines.augment import AugmentConfig
from data_pipelines.image_ops import Resample
from data_pipelines.loader import DataConfig, Loader, make_eval_batches, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.text_ops import captions_of
from data_pipelines.tokenizers import SentencePieceTokenizer
from examples.captioner.model import BEGIN, END
from siglip.errors import UserError

SAMPLE = Path(sample.__file__).parent
TOKENIZER = SAMPLE / "spiece.model"
FIELD = "captions.en"
# The longest English caption of the sample has 19 pieces.
CAPTION_LENGTH = 20

_AUGMENT = AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5)
_SEPARATOR = "<0x0A>"


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Images that are not trained on.

    Attributes:
        images: uint8 [m, h, w, 3].
        suffix: int32 [m, l].
        captions: what the suffixes say.
    """

    images: np.ndarray
    suffix: np.ndarray
    captions: list[str]


def prompt_tokens(prompt: str) -> np.ndarray:
    """int32 [p]: the tokens between the image and its caption."""
    processor = _processor()
    ids = [BEGIN, *processor.encode(prompt.lower()), processor.piece_to_id(_SEPARATOR)]
    return np.asarray(ids, np.int32)


def vocab_size() -> int:
    """How many token ids the decoder has."""
    return _processor().vocab_size()


def texts_of(tokens: np.ndarray) -> list[str]:
    """int [b, l] -> the text before the first end token of each row."""
    rows = [row[: row.index(END)] if END in row else row for row in tokens.tolist()]
    return _processor().decode(rows)


def training_batches(
    shards: str, *, image_size: tuple[int, int], batch_size: int, seed: int, resample: Resample = "bilinear"
) -> Loader:
    """An endless stream of {"image": uint8 [b, h, w, 3], "text": int32 [b, l], …}, slightly augmented."""
    source = SourceConfig(shards, captions=((FIELD, 1.0),))
    config = DataConfig(sources=(source,), tokenizer=str(TOKENIZER), augment=_AUGMENT, threads=1)
    settings = {"batch_size": batch_size, "image_size": image_size, "text_length": CAPTION_LENGTH, "seed": seed}
    return make_loader(config, **settings, resample=resample)


def read_heldout(
    shards: str, *, image_size: tuple[int, int], limit: int | None = None, resample: Resample = "bilinear"
) -> Heldout:
    """The images of some shards that have a caption, in order and unchanged.

    Raises:
        UserError: there is none.
    """
    tokenizer = SentencePieceTokenizer(str(TOKENIZER))
    images, suffix = [], []
    for batch in make_eval_batches(TarSource(shards), batch_size=64, image_size=image_size, resample=resample):
        for image, fields in zip(batch["image"], batch["fields"], strict=True):
            if caption := captions_of(fields, FIELD):
                images.append(image)
                suffix.append(tokenizer.encode(caption[0], CAPTION_LENGTH))
    if not images:
        raise UserError(f"{shards!r} holds no image with {FIELD}; name other shards")
    tokens = np.stack(suffix[:limit])
    return Heldout(np.stack(images[:limit]), tokens, texts_of(tokens))


def _processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
