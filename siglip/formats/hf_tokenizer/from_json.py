"""The pieces in a tokenizer.json of Hugging Face's `tokenizers` as a SentencePiece model: how Gemma's came to be, backwards.

    vocab -> pieces;   merges in order -> falling scores;   added tokens -> control pieces and user-defined symbols

SentencePiece merges whatever gives a piece, the best score first; `tokenizers` merges the pairs in its list, the first ones
first. The two agree if the list has every pair that makes a piece, all pairs of one piece together. Lists that were made from a
SentencePiece model have; any other is refused, as is every step of normalisation that SentencePiece has not.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

from siglip.errors import UserError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# What comes of JSON whose values are of other types than they should be.
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError)
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def sentencepiece_model(tree: Mapping[str, Any], specials: Mapping[str, str | None], *, source: str) -> bytes:
    """The serialized ModelProto.

    Args:
        specials: "unk", "bos", "eos" and "pad" -> the token, or None.

    Raises:
        UserError: the file does something that SentencePiece cannot; that is named.
    """
    from sentencepiece import sentencepiece_model_pb2

    try:
        model, proto = tree["model"], sentencepiece_model_pb2.ModelProto()
        if model.get("type") not in ("BPE", "Unigram"):
            raise UserError(f"{source}: model type {model.get('type')!r} is neither BPE nor Unigram; {_INSTEAD}")
        added = {token["content"]: token for token in tree.get("added_tokens") or []}
        # No text holds a special token, so those that the model's vocabulary has not are not needed.
        own = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"]
        added = {c: token for c, token in added.items() if c in own or c in specials.values() or not token["special"]}
        scores = _unigram_scores(model) if model["type"] == "Unigram" else _bpe_scores(model, added, source)
        ids = _unigram_ids(model) if model["type"] == "Unigram" else dict(model["vocab"])
        ids |= {content: token["id"] for content, token in added.items()}
        _normalise(tree, proto.normalizer_spec, source)
        trainer = proto.trainer_spec
        trainer.model_type = 1 if model["type"] == "Unigram" else 2
        trainer.byte_fallback = bool(model.get("byte_fallback"))
        if trainer.byte_fallback and "<0x09>" not in ids and "\t" in ids:  # transformers renames that one
            ids["<0x09>"] = ids.pop("\t")
        unknown = model["vocab"][model["unk_id"]][0] if trainer.model_type == 1 else model["unk_token"]
        for name in ("unk", "bos", "eos", "pad"):
            token = unknown if name == "unk" else specials.get(name)
            setattr(trainer, f"{name}_id", ids.get(token, -1))
            if token is not None:
                setattr(trainer, f"{name}_piece", token)
        if sorted(ids.values()) != list(range(len(ids))):
            raise UserError(f"{source}: its ids have gaps, or two pieces share one; {_INSTEAD}")
        for piece in sorted(ids, key=ids.get):
            kind = _NORMAL
            if piece == unknown:
                kind = _UNKNOWN
            elif piece in added:
                kind = _CONTROL if added[piece].get("special") else _USER_DEFINED
            elif trainer.byte_fallback and _BYTE_PIECE.fullmatch(piece):
                kind = _BYTE
            proto.pieces.add(piece=piece, score=scores.get(piece, 0.0), type=kind)
        trainer.vocab_size = len(proto.pieces)
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{source} is not a tokenizer as Hugging Face writes it ({error!r}); copy it again") from None
    return proto.SerializeToString()


_INSTEAD = "put the SentencePiece file that it was made from beside it, as tokenizer.model or spiece.model"


def steps_of(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, sequences taken apart."""
    if part is not None:
        inner = part.get("normalizers", part.get("pretokenizers"))
        for step in [part] if inner is None else inner:
            yield from [step] if inner is None else steps_of(step)


def _unigram_ids(model: Mapping[str, Any]) -> dict[str, int]:
    return {piece: i for i, (piece, _) in enumerate(model["vocab"])}


def _unigram_scores(model: Mapping[str, Any]) -> dict[str, float]:
    return dict(map(tuple, model["vocab"]))


def _bpe_scores(model: Mapping[str, Any], added: Mapping[str, Any], source: str) -> dict[str, float]:
    """Falling with the place of a piece in the list of merges; pieces that are not made are single characters, or added."""
    bad = [f for f in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges") if model.get(f)]
    if bad:
        raise UserError(f"{source}: {bad[0]}={model[bad[0]]!r} is not SentencePiece's way; {_INSTEAD}")
    vocab, pairs = model["vocab"], set()
    scores: dict[str, float] = {}
    last = None
    for merge in model["merges"]:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        piece = "".join(pair)
        pairs.add(pair)
        if piece in added:
            continue
        if piece in scores and piece != last:
            raise UserError(
                f"{source}: its merges are not in the order of a SentencePiece model ({piece!r}); {_INSTEAD}"
            )
        scores.setdefault(piece, -float(len(scores)))
        last = piece
    for piece in vocab:
        if piece in added or _BYTE_PIECE.fullmatch(piece):
            continue
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        lost = next((s for s in splits if s not in pairs and s[0] in vocab and s[1] in vocab), None)
        if lost:
            raise UserError(
                f"{source}: it does not merge {lost[0]!r} and {lost[1]!r}, as SentencePiece would; {_INSTEAD}"
            )
    return {piece: scores.get(piece, -float(len(scores))) for piece in vocab}


def _normalise(tree: Mapping[str, Any], spec: Any, source: str) -> None:
    """Fills in SentencePiece's normalisation. Lower-casing is TokenConfig's."""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    spec.escape_whitespaces = True
    for step in [*steps_of(tree.get("normalizer")), *steps_of(tree.get("pre_tokenizer"))]:
        kind, pattern, content = step["type"], step.get("pattern") or {}, step.get("content")
        space = (pattern.get("String"), content) == (" ", _SPACE)
        split = kind == "Split" and pattern.get("String") == " "  # there are no spaces left to split at
        squeeze = pattern.get("Regex") == " {2,}" and content in (" ", _SPACE)
        if kind == "Lowercase" or (kind == "Replace" and space) or split:
            continue
        if kind == "Precompiled":
            spec.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif (kind == "Replace" and squeeze) or kind in ("Strip", "WhitespaceSplit"):
            spec.remove_extra_whitespaces = True
        elif kind == "Prepend" and step.get("prepend") == _SPACE:
            spec.add_dummy_prefix = True
        elif kind == "Metaspace" and step.get("replacement") == _SPACE:
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            spec.add_dummy_prefix = spec.add_dummy_prefix or scheme != "never"
        else:
            raise UserError(f"{source}: {_shown(step)} is not a step of SentencePiece; {_INSTEAD}")


def _shown(step: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in step.items() if name != "precompiled_charsmap"}
    return repr(shown)[:120]
