"""One caption of a sample as token ids: which one is drawn, see `data_pipelines/text_ops.py`."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipelines import text_ops
from data_pipelines.counter_rng import Rng
from data_pipelines.samples.pairs import BrokenPair, SamplePair
from data_pipelines.tokenizers import SentencePieceTokenizer


@dataclass(frozen=True)
class Tokens:
    """text: int32 [l]; several_lines, which is counted: the caption has line breaks. captions: one spec per source."""

    tokenizer: SentencePieceTokenizer
    length: int
    captions: tuple[text_ops.CaptionSpec, ...]
    reads_pixels = False

    @cached_property
    def arrays(self) -> dict:
        return {"text": ((self.length,), np.int32)}

    def make(self, pair: SamplePair, rng: Rng) -> dict[str, np.ndarray | bool]:
        """Raises BrokenPair: "missing_text" and "empty_text", or what kept the texts from being read."""
        try:
            caption = text_ops.draw_caption(pair.fields, self.captions[pair.source], rng)
        except text_ops.CaptionError as error:
            raise BrokenPair(pair.problems[0] if pair.problems else error.reason) from error
        return {"text": self.tokenizer.encode(caption, self.length), "several_lines": "\n" in caption}
