"""Texts to the token ids of training, in TensorFlow ops: lower case, SentencePiece, cut, the end token, filled up with pads.

    ids = pieces(lower(text))[:length - 1] + [eos] + [pad] * ...

The trap: `tf.strings.lower` follows the locale of the machine it runs on, stops at a zero byte, and knows another Unicode than
the Python that trained. The lower case here is a table (siglip.formats.hf_tokenizer.lower_case).
"""

from typing import TYPE_CHECKING

import numpy as np

from siglip.formats.hf_tokenizer.lower_case import PUNCTUATION, WHITE_SPACE, lower_case_rules
from siglip.models.text import TextConfig

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_text as tf_text


def tokens(
    texts: "tf.Tensor", sentencepiece: "tf_text.SentencepieceTokenizer", config: TextConfig, *, eos: int
) -> "tf.Tensor":
    """UTF-8 strings [k] -> int32 [k, l]. eos: id of the end token."""
    import tensorflow as tf

    rules, length = config.tokens, config.length
    if rules.lower != "none":
        texts = lower(texts, final_sigma=rules.lower == "text")
    if rules.canonical == "texts":
        texts = tf.strings.regex_replace(texts, f"[{PUNCTUATION}]", "")
        texts = tf.strings.regex_replace(tf.strings.regex_replace(texts, f"[{WHITE_SPACE}]+", " "), "^ | $", "")
    pieces = sentencepiece.tokenize(texts)[:, : length - rules.end]
    if rules.end:
        pieces = tf.concat([pieces, tf.fill((tf.shape(texts)[0], 1), eos)], axis=1)
    return pieces.to_tensor(default_value=eos if rules.pad_id is None else rules.pad_id, shape=(None, length))


def lower(texts: "tf.Tensor", *, final_sigma: bool = True) -> "tf.Tensor":
    """Python's `str.lower` of UTF-8 strings [k], or of each of their characters; what is not UTF-8 becomes U+FFFD."""
    import tensorflow as tf

    rules = lower_case_rules()
    if final_sigma:
        # A sigma before a cased letter is none at an end; those that follow each other overlap, and every second is left.
        for _ in range(2):
            texts = tf.strings.regex_replace(texts, f"Σ([{rules.skipped}]*[{rules.cased}])", r"σ\1")
        texts = tf.strings.regex_replace(texts, f"([{rules.cased}][{rules.skipped}]*)Σ", r"\1ς")
    for c, several in rules.mapping.items():
        if len(several) > 1:
            texts = tf.strings.regex_replace(texts, c, several)
    single = {ord(c): ord(low) for c, low in rules.mapping.items() if len(low) == 1}
    table = np.arange(max(single) + 1, dtype=np.int32)
    table[list(single)] = list(single.values())
    codes = tf.strings.unicode_decode(texts, "UTF-8")
    inside = tf.gather(table, tf.minimum(codes.flat_values, len(table) - 1))
    lowered = tf.where(codes.flat_values < len(table), inside, codes.flat_values)
    return tf.strings.unicode_encode(codes.with_flat_values(lowered), "UTF-8")
