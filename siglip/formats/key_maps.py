"""The key maps between checkpoint layouts, and the one check that nothing is lost on the way.

Our parameter paths are big_vision's: "img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel". A transformer's
blocks are kept either one by one (`encoderblock_0`, `encoderblock_1`, …: the loop layout) or stacked on a leading
layer axis (`encoderblock`: the scan layout). Hugging Face, timm and open_clip name the same tensors differently and store
matrices as [out, in].

The trap: torch's `MultiheadAttention` (in Hugging Face's pooling head and open_clip's text tower) keeps query, key and value in
one tensor, stacked by rows in that order, and so does timm; three of our paths share one key there, two in timm's pooling head.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from siglip.errors import UserError
from siglip.formats.containers import FLOATING, LazyArray, Shape, aligned_float32
from siglip.trees import did_you_mean

_STACKED = re.compile(r"(.*/)encoderblock/(.+)")
_SINGLE = re.compile(r"(.*/)encoderblock_(\d+)/(.+)")
_LAYER = re.compile(r"(.*(?:/encoderblock_|encoder\.layers\.|blocks\.))(\d+)[/.].+")
# A suggestion is a comparison with every key: a file in which every key is wrong would take long.
_MAX_SUGGESTIONS = 20


def unstack_blocks(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Scan layout -> loop layout, of numpy or jax arrays. Paths that are in neither stay as they are."""
    loop = {}
    for path, array in flat.items():
        if match := _STACKED.fullmatch(path):
            loop |= {f"{match[1]}encoderblock_{i}/{match[2]}": layer for i, layer in enumerate(array)}
        else:
            loop[path] = array
    return loop


def unstack_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """`unstack_blocks` of the arrays' shapes."""
    return {
        path: layer.shape
        for path, layer in unstack_blocks({p: np.broadcast_to(np.float32(0), s) for p, s in shapes.items()}).items()
    }


def stack_blocks(flat: Mapping[str, Any], *, stack: Callable[[list[Any]], Any] = np.stack) -> dict[str, Any]:
    """Loop layout -> scan layout; the inverse of `unstack_blocks`. `stack` puts the arrays of all layers into one."""
    scan, layers = {}, {}
    for path, array in flat.items():
        if match := _SINGLE.fullmatch(path):
            layers.setdefault(f"{match[1]}encoderblock/{match[3]}", {})[int(match[2])] = array
        else:
            scan[path] = array
    return scan | {path: stack([blocks[i] for i in sorted(blocks)]) for path, blocks in layers.items()}


def check_arrays(
    found: Mapping[str, LazyArray],
    expected: Mapping[str, Shape | str],
    *,
    source: str,
    problems: Iterable[str] = (),
) -> None:
    """Checks that a checkpoint holds exactly the arrays that the model has, and that they are numbers.

    Args:
        expected: shapes, or a description for those that are not known but are certainly not what was found.
        problems: what else is wrong, each the rest of a sentence that starts with "it".

    Raises:
        UserError: in one line, every key that is missing, left over or of the wrong shape or type, with suggestions.
    """
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    known = [key for key in expected if key in found]
    wrong = [key for key in known if found[key].shape != expected[key]]
    wrong_type = [key for key in known if found[key].dtype not in FLOATING]
    problems = list(problems)
    if missing:
        problems.append(f"lacks {_listing(_by_layer(missing, expected, of_how_many=True))}")
    if unknown:
        problems.append(f"has unknown {_listing(_unknown(unknown, missing, expected))}")
    if wrong:
        problems.append("has " + _listing([f"{k} of shape {found[k].shape} instead of {expected[k]}" for k in wrong]))
    if wrong_type:
        problems.append("has " + _listing([f"{k} of {_type(found[k].dtype)}" for k in wrong_type]))
    if problems:
        raise UserError(f"{source} does not fit the model it describes: it {'; it '.join(problems)}")


def _unknown(unknown: list[str], missing: list[str], expected: Mapping[str, Any]) -> list[str]:
    items, candidates = _by_layer(unknown, [*expected, *unknown]), missing or list(expected)
    hints = [did_you_mean(key, candidates) if key in unknown else "" for key in items[:_MAX_SUGGESTIONS]]
    return [item + hint for item, hint in itertools.zip_longest(items, hints, fillvalue="")]


def _by_layer(keys: list[str], everything: Iterable[str], *, of_how_many: bool = False) -> list[str]:
    """The keys one by one; layers all of whose keys are in `keys` become one item: "layer 3 of 12 (…)"."""
    layers: dict[str, dict[int, list[str]]] = {}
    for key in everything:
        if match := _LAYER.fullmatch(key):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), []).append(key)
    items, rest = [], set(keys)
    for stem, blocks in layers.items():
        whole = [i for i, block in sorted(blocks.items()) if len(block) > 1 and rest.issuperset(block)]
        rest.difference_update(key for i in whole for key in blocks[i])
        for first, last in _runs(whole):
            count = sum(len(blocks[i]) for i in range(first, last + 1))
            which = f"layer {first}" if first == last else f"layers {first} to {last}"
            total = f" of {max(blocks) + 1}" if of_how_many else ""
            items.append(f"{which}{total} ({count} arrays, {stem}{first}{'' if first == last else ' …'})")
    return items + [key for key in keys if key in rest]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as (first, last) of runs without a gap."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs


def _type(dtype: str) -> str:
    if dtype == "object":
        return "Python objects, which may run code when they are unpickled; save it as plain numbers"
    return f"type {dtype}, and parameters are floating-point"


def _listing(items: list[str]) -> str:
    return (f"{len(items)} keys: " if len(items) > 1 else "") + ", ".join(items)


class Entry(NamedTuple):
    """Where one of our arrays lives in a state dict of torch.

    `kind` is its layout there; `part` is (which, of how many) of several that are stacked by rows, None for a whole tensor.
    """

    key: str
    kind: Literal["same", "matrix", "heads_out", "flat", "conv", "first"]
    part: tuple[int, int] | None = None


_BLOCK = r"(img|txt)/(?:Transformer|Encoder_0)/encoderblock_(\d+)/"
_IMAGE_BLOCK, _TEXT_BLOCK = _BLOCK.replace("|txt", ""), _BLOCK.replace("img|", "")
_MHA = "MultiHeadDotProductAttention_0/"
_POOL = r"(img)/MAPHead_0/"
# (our path, their key after the tower's prefix, its layout)
Rules = tuple[tuple[str, str, str], ...]
HUGGING_FACE: Rules = (
    (r"(t)", r"logit_scale", "same"),
    (r"(b)", r"logit_bias", "same"),
    (r"(img)/embedding/kernel", r"embeddings.patch_embedding.weight", "conv"),
    (r"(img)/embedding/bias", r"embeddings.patch_embedding.bias", "same"),
    (r"(img|txt)/pos_embedding", r"embeddings.position_embedding.weight", "first"),
    (r"(txt)/Embed_0/embedding", r"embeddings.token_embedding.weight", "same"),
    (_BLOCK + r"LayerNorm_0/(\w+)", r"encoder.layers.\2.layer_norm1.\3", "same"),
    (_BLOCK + r"LayerNorm_1/(\w+)", r"encoder.layers.\2.layer_norm2.\3", "same"),
    (_BLOCK + _MHA + r"([qkv])\w+/kernel", r"encoder.layers.\2.self_attn.\3_proj.weight", "matrix"),
    (_BLOCK + _MHA + r"([qkv])\w+/bias", r"encoder.layers.\2.self_attn.\3_proj.bias", "flat"),
    (_BLOCK + _MHA + r"out/kernel", r"encoder.layers.\2.self_attn.out_proj.weight", "heads_out"),
    (_BLOCK + _MHA + r"out/bias", r"encoder.layers.\2.self_attn.out_proj.bias", "same"),
    (_BLOCK + r"MlpBlock_0/Dense_0/(\w+)", r"encoder.layers.\2.mlp.fc1.\3", "matrix"),
    (_BLOCK + r"MlpBlock_0/Dense_1/(\w+)", r"encoder.layers.\2.mlp.fc2.\3", "matrix"),
    (r"(img)/Transformer/encoder_norm/(\w+)", r"post_layernorm.\2", "same"),
    (r"(txt)/Encoder_0/encoder_norm/(\w+)", r"final_layer_norm.\2", "same"),
    (_POOL + r"probe", r"head.probe", "same"),
    (_POOL + _MHA + r"[qkv]\w+/kernel", r"head.attention.in_proj_weight", "matrix"),
    (_POOL + _MHA + r"[qkv]\w+/bias", r"head.attention.in_proj_bias", "flat"),
    (_POOL + _MHA + r"out/kernel", r"head.attention.out_proj.weight", "heads_out"),
    (_POOL + _MHA + r"out/bias", r"head.attention.out_proj.bias", "same"),
    (r"(img)/MAPHead_0/LayerNorm_0/(\w+)", r"head.layernorm.\2", "same"),
    (r"(img)/MAPHead_0/MlpBlock_0/Dense_0/(\w+)", r"head.mlp.fc1.\2", "matrix"),
    (r"(img)/MAPHead_0/MlpBlock_0/Dense_1/(\w+)", r"head.mlp.fc2.\2", "matrix"),
    (r"(txt)/head/(\w+)", r"head.\2", "matrix"),
)
# timm's names of the image tower, and open_clip's of the text tower.
OPEN_CLIP: Rules = (
    (r"(t)", r"logit_scale", "first"),
    (r"(b)", r"logit_bias", "first"),
    (r"(img)/embedding/kernel", r"patch_embed.proj.weight", "conv"),
    (r"(img)/embedding/bias", r"patch_embed.proj.bias", "same"),
    (r"(img)/pos_embedding", r"pos_embed", "same"),
    (_IMAGE_BLOCK + r"LayerNorm_0/(\w+)", r"blocks.\2.norm1.\3", "same"),
    (_IMAGE_BLOCK + r"LayerNorm_1/(\w+)", r"blocks.\2.norm2.\3", "same"),
    (_IMAGE_BLOCK + _MHA + r"[qkv]\w+/kernel", r"blocks.\2.attn.qkv.weight", "matrix"),
    (_IMAGE_BLOCK + _MHA + r"[qkv]\w+/bias", r"blocks.\2.attn.qkv.bias", "flat"),
    (_IMAGE_BLOCK + _MHA + r"out/kernel", r"blocks.\2.attn.proj.weight", "heads_out"),
    (_IMAGE_BLOCK + _MHA + r"out/bias", r"blocks.\2.attn.proj.bias", "same"),
    (_IMAGE_BLOCK + r"MlpBlock_0/Dense_0/(\w+)", r"blocks.\2.mlp.fc1.\3", "matrix"),
    (_IMAGE_BLOCK + r"MlpBlock_0/Dense_1/(\w+)", r"blocks.\2.mlp.fc2.\3", "matrix"),
    (r"(img)/Transformer/encoder_norm/(\w+)", r"norm.\2", "same"),
    (_POOL + r"probe", r"attn_pool.latent", "same"),
    (_POOL + _MHA + r"query/kernel", r"attn_pool.q.weight", "matrix"),
    (_POOL + _MHA + r"query/bias", r"attn_pool.q.bias", "flat"),
    (_POOL + _MHA + r"[kv]\w+/kernel", r"attn_pool.kv.weight", "matrix"),
    (_POOL + _MHA + r"[kv]\w+/bias", r"attn_pool.kv.bias", "flat"),
    (_POOL + _MHA + r"out/kernel", r"attn_pool.proj.weight", "heads_out"),
    (_POOL + _MHA + r"out/bias", r"attn_pool.proj.bias", "same"),
    (_POOL + r"LayerNorm_0/(\w+)", r"attn_pool.norm.\2", "same"),
    (_POOL + r"MlpBlock_0/Dense_0/(\w+)", r"attn_pool.mlp.fc1.\2", "matrix"),
    (_POOL + r"MlpBlock_0/Dense_1/(\w+)", r"attn_pool.mlp.fc2.\2", "matrix"),
    (r"(txt)/Embed_0/embedding", r"token_embedding.weight", "same"),
    (r"(txt)/pos_embedding", r"positional_embedding", "first"),
    (_TEXT_BLOCK + r"LayerNorm_0/(\w+)", r"transformer.resblocks.\2.ln_1.\3", "same"),
    (_TEXT_BLOCK + r"LayerNorm_1/(\w+)", r"transformer.resblocks.\2.ln_2.\3", "same"),
    (_TEXT_BLOCK + _MHA + r"[qkv]\w+/kernel", r"transformer.resblocks.\2.attn.in_proj_weight", "matrix"),
    (_TEXT_BLOCK + _MHA + r"[qkv]\w+/bias", r"transformer.resblocks.\2.attn.in_proj_bias", "flat"),
    (_TEXT_BLOCK + _MHA + r"out/kernel", r"transformer.resblocks.\2.attn.out_proj.weight", "heads_out"),
    (_TEXT_BLOCK + _MHA + r"out/bias", r"transformer.resblocks.\2.attn.out_proj.bias", "same"),
    (_TEXT_BLOCK + r"MlpBlock_0/Dense_0/(\w+)", r"transformer.resblocks.\2.mlp.c_fc.\3", "matrix"),
    (_TEXT_BLOCK + r"MlpBlock_0/Dense_1/(\w+)", r"transformer.resblocks.\2.mlp.c_proj.\3", "matrix"),
    (r"(txt)/Encoder_0/encoder_norm/(\w+)", r"ln_final.\2", "same"),
    (r"(txt)/head/(\w+)", r"text_projection.\2", "matrix"),
)
# A NaFlex tower of timm: the patch embedding is a matrix, positions are a grid.
OPEN_CLIP_NAFLEX: Rules = (
    (r"(img)/embedding/kernel", r"embeds.proj.weight", "heads_out"),
    (r"(img)/embedding/bias", r"embeds.proj.bias", "same"),
    (r"(img)/pos_embedding", r"embeds.pos_embed", "grid"),
    *OPEN_CLIP,
)
# Tensors that are stacked by rows: what their key contains -> the initials of ours, in order.
_STACKED_ROWS = {"in_proj": "qkv", ".qkv.": "qkv", ".kv.": "kv"}


def entry(path: str, rules: Rules, prefixes: Mapping[str, str]) -> Entry:
    """Where one of our paths (loop layout) lives there; every path of a model that the format can express has an entry.

    Args:
        prefixes: of the image and the text tower's keys, {"img": …, "txt": …}.
    """
    for pattern, template, kind in rules:
        if match := re.fullmatch(pattern, path):
            key = re.sub(r"\.(kernel|scale)$", ".weight", match.expand(template))
            parts = next((parts for stem, parts in _STACKED_ROWS.items() if stem in key), "")
            part = (parts.index(path.split("/")[-2][0]), len(parts)) if parts else None
            kind = "same" if kind == "matrix" and key.endswith("bias") else kind
            return Entry(prefixes.get(match[1], "") + key, kind, part)
    raise AssertionError(f"no key for {path}: the writer should have refused this model")


def hugging_face_entry(path: str, *, naflex: bool = False) -> Entry:
    """`entry` in a Hugging Face state dict. naflex: the patch embedding of model_type "siglip2" is a matrix."""
    found = entry(path, HUGGING_FACE, {"img": "vision_model.", "txt": "text_model."})
    return found._replace(kind="heads_out") if naflex and found.kind == "conv" else found


def from_torch(state: Mapping[str, LazyArray], entry: Entry, shape: Shape) -> np.ndarray:
    """Our array of that shape, float32, out of a state dict of torch."""
    array = state[entry.key].read()
    if entry.part is not None:
        array = np.split(array, entry.part[1])[entry.part[0]]
    return aligned_float32(from_hugging_face(array, entry.kind, shape))


def torch_shapes(ours: Mapping[str, Shape], entry_of: Callable[[str], Entry]) -> dict[str, Shape]:
    """The shapes of a state dict's tensors, by key, from those of our arrays."""
    shapes = {}
    for path, shape in ours.items():
        key, kind, part = entry_of(path)
        theirs = hugging_face_shape(shape, kind)
        shapes[key] = theirs if part is None else (part[1] * theirs[0], *theirs[1:])
    return shapes


def torch_arrays(
    flat: Mapping[str, np.ndarray], dtypes: Mapping[str, str], entry_of: Callable[[str], Entry]
) -> dict[str, LazyArray]:
    """Our arrays under torch's keys, each made when it is read; `dtypes` are those of the file, by our path."""
    theirs: dict[str, str] = {}
    sources: dict[str, list[tuple[tuple[int, int], np.ndarray, str]]] = {}
    for path, array in flat.items():
        key, kind, part = entry_of(path)
        sources.setdefault(key, []).append((part or (0, 1), array, kind))
        theirs[key] = dtypes[path]

    def make(parts: list[tuple[tuple[int, int], np.ndarray, str]]) -> np.ndarray:
        arrays = [to_hugging_face(array, kind) for _, array, kind in sorted(parts, key=lambda part: part[0])]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    shapes = torch_shapes(flat_shapes(flat), entry_of)
    return {key: LazyArray(shapes[key], functools.partial(make, parts), theirs[key]) for key, parts in sources.items()}


def unwrapped(stored: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Without what torch.compile puts into keys, and what DistributedDataParallel and trainers put before all of them."""
    state = {key.replace("_orig_mod.", ""): array for key, array in stored.items()}
    while wrapper := next(
        (w for w in ("module.", "model.") if state and all(key.startswith(w) for key in state)), None
    ):
        state = {key.removeprefix(wrapper): array for key, array in state.items()}
    return state


def to_hugging_face(array: np.ndarray, kind: str) -> np.ndarray:
    """One of our arrays as torch lays it out; a query, key or value is one third of its tensor."""
    match kind:
        case "matrix":
            return array.reshape(array.shape[0], -1).T
        case "heads_out":
            return array.reshape(-1, array.shape[-1]).T
        case "flat":
            return array.reshape(-1)
        case "conv":
            return array.transpose(3, 2, 0, 1)
        case "first":
            return array[0, ...]
        case "grid":
            side = math.isqrt(array.shape[1])
            return array.reshape(1, side, -1, array.shape[2])
    return array


def from_hugging_face(array: np.ndarray, kind: str, shape: Shape) -> np.ndarray:
    """The inverse of `to_hugging_face`, for an array of ours of that shape."""
    if kind in ("matrix", "heads_out"):
        return array.T.reshape(shape)
    return array.transpose(2, 3, 1, 0) if kind == "conv" else array.reshape(shape)


def hugging_face_shape(shape: Shape, kind: str) -> Shape:
    """The shape that an array of ours has there, without touching data."""
    return to_hugging_face(np.broadcast_to(np.float32(0), shape), kind).shape


def flat_shapes(flat: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of arrays or shape structs by path."""
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}
