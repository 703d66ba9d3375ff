"""A SentencePiece model, behind what a TokenConfig says, as the tokenizer.json of Hugging Face's `tokenizers`.

    ids = pieces(lower(text))[:length - 1] + [eos] + [pad] * ...

Lower-casing, the removal of punctuation and SentencePiece's own normalisation become a sequence of normalisers, the pieces a
Unigram or BPE model, the end token a post-processor. The class that reads the folder is `PreTrainedTokenizerFast`.

The traps: `Lowercase` of the library knows no final sigma and follows another version of Unicode, `Precompiled` reads
the normalisation table differently (see charsmap.py), and a Unigram model matches `</s>` and `<0x41>` in texts
where SentencePiece does not. Hence the separators below: they make every character a grapheme cluster of its own,
and tell `NFC` which characters the table composes.
"""

import base64
import dataclasses
import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from siglip.errors import UserError
from siglip.formats.hf_tokenizer.charsmap import read_charsmap, write_charsmap
from siglip.formats.hf_tokenizer.lower_case import (
    PUNCTUATION,
    WHITE_SPACE,
    character_class,
    escape,
    lower_case_rules,
)
from siglip.models.text import TokenConfig
from siglip.trees import regular

OUR_TOKENS = "siglip_tokens"
_SPACE = "\u2581"
_ANY = r"[\s\S]"
_NORMAL, _USER_DEFINED = 1, 4
_UNIGRAM, _BPE = 1, 2
# Where the table drops no control characters, these stand in: no text for interchange holds them (Unicode 23.7).
_NONCHARACTERS = ("\ufdd0", "\ufdd1", "\ufdd2")


def tokenizer_json(model: bytes, tokens: TokenConfig, *, source: str) -> dict[str, Any]:
    """The content of tokenizer.json that gives the ids of a SentencePiece model on texts that are prepared as `tokens` says.

    Args:
        model: a serialized ModelProto, unigram or BPE.
        source: its name, for errors.

    Raises:
        UserError: it is not such a model, or `tokenizers` cannot express it.
    """
    proto = read_sentencepiece(model, source=source)
    pieces, normalizer, trainer = proto.pieces, proto.normalizer_spec, proto.trainer_spec
    table = read_charsmap(normalizer.precompiled_charsmap)
    lowers = tokens.lower != "none"
    symbols = _symbols(proto, lowers)
    _check_supported(proto, table, symbols, source=source)
    special = [i for i, piece in enumerate(pieces) if piece.type not in (_NORMAL, _USER_DEFINED)]
    special = [i for i in special if not re.fullmatch("<0x[0-9A-F]{2}>", pieces[i].piece)]
    eos = pieces[trainer.eos_id].piece
    unigram = trainer.model_type == _UNIGRAM
    added = [i for i, piece in enumerate(pieces) if piece.type == _USER_DEFINED and piece.piece in symbols]
    prepare = [*(_lower(final_sigma=tokens.lower == "text") if lowers else []), *_canonical(tokens)]
    steps = [*prepare, *_apply(normalizer.precompiled_charsmap, tuple(symbols)), *_spaces(normalizer)]
    if normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces:
        steps = [steps.pop(), *steps]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, pieces[i].piece, special=i in special) for i in sorted(special + ([] if unigram else added))
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": _cuts(pieces, lowers, source=source) if unigram else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_sequence("A"), _special(eos)],
            "pair": [_sequence("A"), _special(eos), _sequence("B"), _special(eos)],
            "special_tokens": {eos: {"id": eos, "ids": [trainer.eos_id], "tokens": [eos]}},
        }
        if tokens.end
        else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normalizer.add_dummy_prefix else []),
            ],
        },
        "model": _unigram(proto) if unigram else _bpe(proto),
    }


def tokenizer_config(model: bytes, tokens: TokenConfig, *, length: int, source: str, processor: str) -> dict[str, Any]:
    """The content of tokenizer_config.json; OUR_TOKENS in it is for our own reader, which tokenizer.json's steps tell little.

    Raises:
        UserError: the pad is a piece that texts hold.
    """
    proto = read_sentencepiece(model, source=source)
    pad_id = proto.trainer_spec.eos_id if tokens.pad_id is None else tokens.pad_id
    ids = (proto.trainer_spec.eos_id, proto.trainer_spec.unk_id, min(pad_id, len(proto.pieces) - 1))
    eos, unk, pad = (proto.pieces[i].piece for i in ids)
    if pad_id >= len(proto.pieces) or proto.pieces[pad_id].type in (_NORMAL, _USER_DEFINED):
        raise UserError(
            f"model.text.tokens.pad_id={pad_id} is not a special piece of tokenizer {source!r}; put its own there"
        )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor,
        "model_max_length": length,
        "padding_side": "right",
        "truncation_side": "right",
        # The class default has an attention mask; the towers attend to pads, as in training.
        "model_input_names": ["input_ids"],
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        OUR_TOKENS: dataclasses.asdict(tokens),
    }


def read_sentencepiece(model: bytes, *, source: str) -> Any:
    """The ModelProto in the bytes of a .model file.

    Raises:
        UserError: they do not hold one, or it has no end token.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"tokenizer {source!r} is not a SentencePiece model; use a spiece.model")
    if not 0 <= proto.trainer_spec.eos_id < len(proto.pieces):
        raise UserError(f"tokenizer {source!r} has no end token </s>; train it with an eos_id")
    return proto


def read_pieces(tokenizer: Path, *, room: int) -> bytes:
    """The bytes of a SentencePiece file for a text tower with `room` embeddings.

    Raises:
        UserError: it is not a SentencePiece model, or has more pieces than the tower has embeddings.
    """
    model = regular(tokenizer).read_bytes()
    count = len(read_sentencepiece(model, source=str(tokenizer)).pieces)
    if count > room:
        raise UserError(f"tokenizer {tokenizer} has {count} pieces, the text tower room for {room}; put its own there")
    return model


def _check_supported(proto: Any, table: Mapping[str, str], symbols: Collection[str], *, source: str) -> None:
    trainer, instead = proto.trainer_spec, "leave the tokenizer out, or export with --format savedmodel"
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise UserError(f"tokenizer {source!r} is neither unigram nor BPE (type {trainer.model_type}); {instead}")
    if trainer.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise UserError(f"tokenizer {source!r} does not put its spaces before words as {_SPACE!r}; {instead}")
    for symbol in symbols:
        if any(c in table for c in symbol) or (" " in symbol):
            raise UserError(f"tokenizer {source!r} keeps {symbol!r} out of its own normalisation; {instead}")
    if trainer.model_type == _BPE and proto.normalizer_spec.add_dummy_prefix:
        if symbols:
            raise UserError(f"tokenizer {source!r} has user-defined symbols and a dummy prefix; {instead}")


def _symbols(proto: Any, lowers: bool) -> list[str]:
    """The user-defined symbols that a text may hold, lower-cased or not, the longest first."""
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    return sorted((text for text in symbols if not lowers or text == text.lower()), key=len, reverse=True)


def _canonical(tokens: TokenConfig) -> list[dict[str, Any]]:
    """Without punctuation and extra white space, where all texts are so."""
    if tokens.canonical != "texts":
        return []
    spaces = f"[{WHITE_SPACE}]+"
    return [_replace(f"[{PUNCTUATION}]", ""), _replace(spaces, " "), _replace("\\A | \\z", "")]


@functools.cache
def _lower(*, final_sigma: bool) -> list[dict[str, Any]]:
    """Python's `str.lower`: a map of single characters, except for the final sigma."""
    rules = lower_case_rules()
    between, pairs = "\x01", {c: low for c, low in rules.mapping.items() if len(low) > 1}
    single = {c: low for c, low in rules.mapping.items() if len(low) == 1}
    final = _replace(f"[{rules.cased}][{rules.skipped}]*\\KΣ(?![{rules.skipped}]*[{rules.cased}])", "ς")
    return [
        *([final] if final_sigma else []),
        *(_replace(escape(c), low) for c, low in pairs.items()),
        # Every second character is now the separator, so those of the text itself survive its removal.
        _replace(f"(?<={_ANY})(?={_ANY})", between),
        _precompiled(single),
        _replace(f"{_ANY}\\K{between}", ""),
    ]


@functools.lru_cache(maxsize=4)  # it takes seconds, and most tokenizers have the same table
def _apply(charsmap: bytes, symbols: tuple[str, ...]) -> list[dict[str, Any]]:
    """A SentencePiece normalisation table: the longest key at each place, left to right, and none inside a symbol.

    A key of several characters composes what its characters become alone. So: mark where keys end, map single characters,
    compose between the marks. What `NFC` does not compose (characters newer than its Unicode) is replaced one by one.
    """
    if not (table := read_charsmap(charsmap)):
        return []
    single = {key: value for key, value in table.items() if len(key) == 1}
    several = {key: value for key, value in table.items() if len(key) > 1}
    dropped = [c for c, value in single.items() if not value and c != _SPACE]
    end, inside, other = dropped[:3] if len(dropped) >= 3 else _NONCHARACTERS
    replaced = {c: value or end for c, value in single.items() if c not in (end, inside)}
    unit = "|".join([*map(escape, symbols), _longest(several)])
    steps = [
        _replace(f"[{character_class((end, inside))}]", other),
        _replace(f"(?:{unit})\\K", end),
        _replace(f"(?<=[^{escape(end)}])(?=[^{escape(end)}])", inside),
        _precompiled(replaced),
    ]
    if several:
        steps.append(_replace(escape(inside), ""))
        apart = {"".join(single.get(c, c) for c in key): value for key, value in several.items()}
        by_hand = {key: value for key, value in apart.items() if not _composes(key, value)}
        steps += [_replace(escape(key), by_hand[key]) for key in sorted(by_hand, key=len, reverse=True)]
        steps.append({"type": "NFC"})
    return [*steps, _replace(f"[{character_class((end, inside))}]", "")]


def _composes(apart: str, composed: str) -> bool:
    """Whether NFC composes it in the oldest Unicode at hand and in the newest: then it does in every version between."""
    return all(form.normalize("NFC", apart) == composed for form in (unicodedata, unicodedata.ucd_3_2_0))


def _longest(keys: Collection[str]) -> str:
    """An expression for the longest of these keys that starts here, or else for one character."""
    trie: dict = {}
    for key in keys:
        node = trie
        for c in key:
            node = node.setdefault(c, {})
        node[""] = {}
    later = set().union(*(key[1:] for key in keys))
    if not later:
        return _ANY
    # The first alternative is nearly every character's; the others are tried where it may be the start of a key.
    return f"{_ANY}(?![{character_class(later)}])|{_trie(trie)}|{_ANY}"


def _trie(node: Mapping[str, Mapping]) -> str:
    """An expression for the longest path in a trie; characters with the same continuations share a class."""
    classes = defaultdict(list)
    for c, child in node.items():
        if c:
            classes[_trie(child)].append(c)
    branches = [f"[{character_class(chars)}]{rest}" for rest, chars in classes.items()]
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}" if branches else ""


def _spaces(normalizer: Any) -> list[dict[str, Any]]:
    """Spaces as SentencePiece treats them; the dummy prefix comes last."""
    trim = normalizer.remove_extra_whitespaces
    steps = [_replace("\\A +", ""), _replace(" {2,}", " ")] if trim else []
    steps.append(_replace(" ", _SPACE))
    steps += [_replace(f"{_SPACE}+\\z", "")] if trim else []
    return steps + ([{"type": "Prepend", "prepend": _SPACE}] if normalizer.add_dummy_prefix else [])


def _cuts(pieces: Any, lowers: bool, *, source: str) -> dict[str, Any] | None:
    """Splits texts inside every piece that no text may contain, at a place that no other piece spans.

    Raises:
        UserError: one of these pieces has no such place.
    """
    spelt = [piece.piece for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    spanned = {pair for piece in spelt for pair in zip(piece, piece[1:], strict=False)}
    ways = defaultdict(list)
    for text in (piece.piece for piece in pieces if piece.type not in (_NORMAL, _USER_DEFINED)):
        if (lowers and text != text.lower()) or " " in text:
            continue
        free = [i for i in range(1, len(text)) if (text[i - 1], text[i]) not in spanned]
        if not free:
            raise UserError(
                f"tokenizer {source!r}: its pieces leave no place to part a typed {text!r}; "
                "leave the tokenizer out, or export with --format savedmodel"
            )
        ways[text[: free[0]]].append(text[free[0] :])
    if not ways:
        return None
    either = "|".join(
        f"(?<={escape(before)})(?=(?:{'|'.join(map(escape, after))}))" for before, after in sorted(ways.items())
    )
    return {"type": "Split", "pattern": {"Regex": either}, "behavior": "Isolated", "invert": False}


def _unigram(proto: Any) -> dict[str, Any]:
    def score(piece: Any) -> float:
        # SentencePiece's own -0.1: user-defined symbols win over any other way of reading the same bytes.
        return piece.score if piece.type == _NORMAL else -0.1 if piece.type == _USER_DEFINED else 0.0

    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, score(piece)] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any) -> dict[str, Any]:
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == _NORMAL]
    known = {piece.piece for piece in normal}
    merges = [
        (piece.piece[:i], piece.piece[i:])
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in known and piece.piece[i:] in known
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _precompiled(mapping: Mapping[str, str]) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(write_charsmap(mapping)).decode()}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": content, **flags}
