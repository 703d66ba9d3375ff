"""Older checkpoints of big_vision: their names for arrays, translated to today's.

    Transformer/posembed_input/pos_embedding, Transformer/pos_embedding   ->  pos_embedding
    probe, MlpBlock_0/…, …                                                ->  MAPHead_0/…
    encoderblock_i/{LayerNorm_2, MultiHeadDotProductAttention_1, MlpBlock_3}, numbered across classes  ->  {LayerNorm_1, …_0, …_0}
    positions of the class token and the patches in one array             ->  the first is added to cls
    txt/Encoder_0/pos_embedding, positions that were added twice          ->  added to txt/pos_embedding

The names tell which is which, as in that project's own loaders (models/vit.py, text_transformer.py).

The trap: 10 positions are a class token and 3 x 3 patches in an old file, 2 x 5 patches in a new one. They are read as the
former only where there is a class token and the image size does not say otherwise.
"""

import math
import re
from collections.abc import Mapping

from siglip.errors import UserError
from siglip.formats.containers import LazyArray

_MOVED = (
    (r"img/Transformer/(?:posembed_input/)?pos_embedding", r"img/pos_embedding"),
    (r"img/(probe|MlpBlock_0/.+|MultiHeadDotProductAttention_0/.+|LayerNorm_0/.+)", r"img/MAPHead_0/\1"),
    (r"(.+/encoderblock(?:_\d+)?/)LayerNorm_2(/.+)", r"\1LayerNorm_1\2"),
    (r"(.+/encoderblock(?:_\d+)?/)MultiHeadDotProductAttention_1(/.+)", r"\1MultiHeadDotProductAttention_0\2"),
    (r"(.+/encoderblock(?:_\d+)?/)MlpBlock_3(/.+)", r"\1MlpBlock_0\2"),
)


def modernise(arrays: Mapping[str, LazyArray], *, patches: int | None, source: str) -> dict[str, LazyArray]:
    """The same arrays under today's paths.

    Args:
        patches: how many an image has, or None if that is unknown.

    Raises:
        UserError: an array is there under both its old and its new name.
    """
    moved: dict[str, LazyArray] = {}
    origin: dict[str, str] = {}
    for old, array in arrays.items():
        path = next((re.sub(pattern, new, old) for pattern, new in _MOVED if re.fullmatch(pattern, old)), old)
        if path in moved:
            raise UserError(f"{source} holds {path} twice, as {origin[path]} and as {old}; remove one of the two")
        moved[path], origin[path] = array, old
    _merge_text_positions(moved)
    _split_class_position(moved, patches)
    return moved


def _merge_text_positions(arrays: dict[str, LazyArray]) -> None:
    first, second = arrays.get("txt/pos_embedding"), arrays.get("txt/Encoder_0/pos_embedding")
    if first and second and first.shape == second.shape:
        del arrays["txt/Encoder_0/pos_embedding"]
        arrays["txt/pos_embedding"] = LazyArray(first.shape, lambda: first.read() + second.read(), first.dtype)


def _split_class_position(arrays: dict[str, LazyArray], patches: int | None) -> None:
    positions, cls = arrays.get("img/pos_embedding"), arrays.get("img/cls")
    if positions is None or cls is None or len(positions.shape) != 3 or positions.shape[1] == patches:
        return
    _, n, width = positions.shape
    if n < 2 or math.isqrt(n - 1) ** 2 != n - 1 or cls.shape != (1, 1, width):
        return
    arrays["img/pos_embedding"] = LazyArray((1, n - 1, width), lambda: positions.read()[:, 1:], positions.dtype)
    arrays["img/cls"] = LazyArray(cls.shape, lambda: cls.read() + positions.read()[:, :1], cls.dtype)
