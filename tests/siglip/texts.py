"""Texts that tell tokenizers apart: the sample's captions in twelve languages, and everything that is easily got wrong."""

import functools
import io
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st

from data_pipelines import sample
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.text_ops import iter_captions
from siglip.formats.hf_tokenizer.convert import read_sentencepiece

SAMPLE = Path(sample.__file__).parent
SPIECE = SAMPLE / "spiece.model"

HAND_PICKED = [
    "", " ", "  ", "\n", " a  b ", "a\n\nb\tc\r\nd", "\u00a0a\u3000b\u2003", "▁", "▁▁ a ▁", "a dog's life, isn't it? (yes!)",
    # What looks like special pieces and bytes, but is text
    "</s>", "a</s>b <pad> <unk>", "<0x41>", "x <0x41> y<0x00>", "<0x4A>", "<s>", "<img> </ s >", "<<0x41>>",
    # Lower case: final sigma, dotted I, title case, letters of another Unicode
    "Σ", "ΑΣ", "ΑΣΣ ΑΣ", "ΣΑΣ.", "ΑΣ'Α ΑΣ'", "aΣ\u0301 b", "\u0345Σ", "İstanbul", "İ\u0301", "I\u0307", "Ǆ ǅ", "ẞ", "Ꙁ", "\u1c89",
    # Normalisation: composed, decomposed, compatibility, marks out of order, marks on what has none
    "é", "e\u0301", "E\u0301", "e\x01\u0301", "e\u200d\u0301", "Å\u0301\u0301", "a\u0323\u0307", "a\u0307\u0323", "ª\u0300",
    "\u0301", "ＡＢＣ", "ﬁ ①½ ㎏", "～", "¨ ¨", "ΐ ᾼ", "\u1112\u1161\u11ab 한국어 한국어", "ﾊﾟ が ｶﾞ",
    "ড় क़", "ㄱㅏ", "\ufb2c", "<\u0338",
    # Scripts, emoji, invisible and control characters, noncharacters
    "日本語のテキスト", "ภาษาไทย", "نص عربي ﷺ", "हिन्दी", "𓀀 ᚠᚢᚦ", "😀👨‍👩‍👧🏽🇸🇲", "\u200b\u200d\ufeff", "\x00", "a\x00b",
    "\x01\x02\x03\x07\x7f\x9f", "\ufffd", "\ufffe\uffff", "\U0010ffff",
    # Long, and repetitions that parse in several ways
    "a " * 700, "word" * 500, "!" * 90, "... .. ....", "aaaa aaaaa aaaaaaa", "0000000", "\u0301" * 50,
]  # fmt: skip

# The kinds of pieces that published models have: C4's and multilingual C4's, Gemma's, and what is left.
KINDS = {
    "c4": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "gemma": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "user_defined_symbols": ["\n", "\n\n", "▁▁", "▁▁▁", "<unused0>", "<img>", "<IMG>"],
    },
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    "spaces": {
        "model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf",
        "remove_extra_whitespaces": False, "user_defined_symbols": ["<img>", "ab"],
    },
}  # fmt: skip

_EASILY_WRONG = (
    "aAbzéÉ ΣσςΑİıß.'!0-<>/spadunkx41▁\n\t\r\x00\x01\x02\x07\u00ad\u200b\u200d\u00a0"
    "\u0301\u0308\u0323\u0345ª¨～ｶﾞ한\u1112\u1161\u11ab日😀"
)
STRINGS = st.text() | st.text(_EASILY_WRONG, max_size=30)


@functools.cache
def plain_pieces() -> bytes:
    """The shipped tokenizer without its table of 220 000 normalisations, which takes ten seconds to convert."""
    proto = read_sentencepiece(SPIECE.read_bytes(), source=str(SPIECE))
    proto.normalizer_spec.precompiled_charsmap = b""
    return proto.SerializeToString()


@functools.cache
def trained_pieces(kind: str) -> bytes:
    """A SentencePiece model of one of KINDS: 1500 pieces; pad 0, end 1."""
    texts = [text.lower() for text in captions(every=10)] + ["</s> <pad> <0x41> x < y", "!!! ... aaa aaaa"] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=1500, character_coverage=0.999, minloglevel=2,
        num_threads=1, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **KINDS[kind],
    )  # fmt: skip
    return model.getvalue()


def captions(*, every: int = 40) -> list[str]:
    """Captions of the sample, keywords among them."""
    found = [text for shard in sorted(SAMPLE.glob("*.tar")) for text in iter_captions(TarSource(str(shard)))]
    return found[::every]
