"""SentencePiece tokenizers: training one, and text to token ids of a fixed length with a sticky end.

    ids = pieces[:length - 1] + [eos] + [pad] * ...            big_vision's tokenize(eos="sticky")

Text is lower-cased, then tokenized. SigLIP's texts are padded with the end token itself (id 1), those of SigLIP 2,
whose tokenizer is Gemma's, with `<pad>` (id 0). SentencePiece: Kudo and Richardson 2018, arXiv:1808.06226.

The trap: SigLIP's tokenizer has a `<pad>` at 0 as well, and never uses it. The text tower's "last" pooling reads
whatever stands at the last position, so the wrong pad gives it a token that it never saw.
"""

import io
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from data_pipelines.atomic import new_file
from data_pipelines.errors import UserError, check_fetched
from data_pipelines.text_ops import without_surrogates

_MAX_CHARS_PER_TOKEN = 1024  # what comes later changes none of the ids that are kept
_MAX_KEY_BYTES = 256

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SentencePieceTokenizer:
    """Text to ids with a SentencePiece model; safe to call from several threads, and picklable.

    Args:
      path: the model's file.
      pad_id: fills a text up to its length; None is the end token, "own" the pad token of a tokenizer that also has one for the
        beginning, as Gemma's, and otherwise the end token.
      end: whether the end token follows the pieces.
      lower: of the whole "text", where a sigma at the end of a word is a final one; of each "character" alone; or "none".
      canonical: "texts" removes punctuation and extra white space; everything else is left to the caller.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the file is not a SentencePiece model, or the model has no end token.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        pad_id: int | Literal["own"] | None = "own",
        end: bool = True,
        lower: Literal["text", "character", "none"] = "text",
        canonical: Literal["texts", "prompts", "none"] = "prompts",
    ):
        self.path = os.fspath(path)
        self._pad_id, self._end, self._lower, self._canonical = pad_id, end, lower, canonical
        try:
            self._model = Path(path).read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise FileNotFoundError(
                f"no tokenizer at {self.path!r}; train one: siglip data tokenizer SHARDS --out FILE"
            ) from error
        except PermissionError as error:
            raise PermissionError(f"no permission to read tokenizer {self.path!r}; chmod a+r it") from error
        check_fetched(self.path, self._model)
        self._load()

    def _load(self) -> None:
        try:
            if not self._model:
                raise UserError("0 bytes")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            proto = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        except (RuntimeError, ValueError, DecodeError) as error:
            raise UserError(f"tokenizer {self.path!r} is not a SentencePiece model; use a spiece.model") from error
        if fault := _table_fault(proto.normalizer_spec.precompiled_charsmap):
            raise UserError(f"tokenizer {self.path!r} is damaged: its normalisation table {fault}; fetch it again")
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {self.path!r} has no end token </s>; train it with an eos_id")
        self.pad_id = self.eos_id if self._pad_id is None else self._pad_id
        if self.pad_id == "own":
            is_gemma = self._processor.bos_id() >= 0 and self._processor.pad_id() >= 0
            self.pad_id = self._processor.pad_id() if is_gemma else self.eos_id

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_processor"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._load()

    def encode(self, text: str, length: int) -> np.ndarray:
        """Ids of a text, cut or padded to `length`. -> int32 [l]"""
        return self.padded(self._processor.encode(self._prepared(text[: _MAX_CHARS_PER_TOKEN * length])), length)

    def padded(self, ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Ids of pieces, with the end token after them, cut or padded to `length`. -> int32 [l]"""
        tokens = np.full(length, self.pad_id, np.int32)
        kept = min(len(ids), length - self._end)
        tokens[:kept] = ids[:kept]
        tokens[kept : kept + self._end] = self.eos_id
        return tokens

    def _prepared(self, text: str) -> str:
        text = without_surrogates(text)
        if self._lower != "none":
            text = text.lower() if self._lower == "text" else "".join(map(str.lower, text))
        return " ".join(text.translate(_PUNCTUATION).split()) if self._canonical == "texts" else text


def _table_fault(charsmap: bytes) -> str | None:
    """What makes SentencePiece's text normalisation endless: a key or a text in its place that is longer than any character's.

    The table is a double array of Darts-clone: from a node at p, byte c leads to the unit at p ^ c, and on to its node.
    """
    size = int.from_bytes(charsmap[:4], "little") // 4 * 4
    units = np.frombuffer(charsmap[4 : 4 + size], "<u4").astype(np.int64)
    if not len(units):
        return None
    if max(map(len, charsmap[4 + size :].split(b"\0"))) > _MAX_KEY_BYTES:
        return f"has a text of more than {_MAX_KEY_BYTES} bytes"
    nodes = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    places = np.flatnonzero((units >> 31 == 0) & (units & 0xFF != 0))
    parents, children = places ^ (units[places] & 0xFF), nodes[places]
    reached = np.zeros(len(units) + 256, bool)
    reached[nodes[:1] % len(reached)] = True
    for _ in range(_MAX_KEY_BYTES):
        found = children[reached[parents] & (children < len(reached))]
        if not len(found):
            return None
        reached[:] = False
        reached[found] = True
    return "runs in circles"


def train_tokenizer(
    texts: Iterable[str], out: str | os.PathLike, *, vocab_size: int, max_texts: int = 2_000_000, threads: int = 1
) -> None:
    """Trains a unigram SentencePiece model with byte fallback on lower-cased texts and writes it to `out`.

    Ids as in the published models: `<pad>` 0, `</s>` 1, `<unk>` 2, then the 256 bytes. The same texts in the same order and
    the same number of threads give the same file with the same version of sentencepiece.

    Args:
      texts: passed through once; of more than `max_texts`, so many are drawn, each as likely as any other.
      threads: more are faster, and add up in another order: scores differ in their last digits.

    Raises:
      UserError: no texts, or a vocabulary that these texts cannot fill or that cannot hold their characters.
    """
    count, failures = 0, []

    def lowered() -> Iterator[str]:
        nonlocal count
        try:
            for text in texts:
                count += 1
                yield without_surrogates(text).lower()
        except Exception as error:  # sentencepiece would make one of its own of it
            failures.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lowered(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc",
            byte_fallback=True,
            character_coverage=0.9995,
            input_sentence_size=max_texts,
            num_threads=threads,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        if not count:
            raise UserError("no texts to train a tokenizer on; the shards hold no captions in these fields") from None
        reason = str(error).rpartition("] ")[2]  # behind the place in its source and the condition
        raise UserError(f"vocab_size={vocab_size} does not fit {count} texts: {reason}") from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    if count <= max_texts:  # a limit that was not reached does not change the file
        proto.trainer_spec.ClearField("input_sentence_size")
    with new_file(Path(out)) as partial:
        partial.write_bytes(proto.SerializeToString())
