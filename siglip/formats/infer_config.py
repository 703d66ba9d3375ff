"""The architecture of a big_vision tree, inferred from the shapes of its arrays.

    img/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel (768, 3072)   ->   width 768, MLP 3072

Every array votes on the sizes of its axes. So an array that is missing, misnamed or of the wrong shape is found, and all
bad ones can be named at once.

The trap: five things cannot be inferred from shapes. A text tower may pool "last", "first", "mean" or "max", an image tower
"gap", "0" or not at all, a grid may be 2 x 8 as well as 4 x 4, fixed positions do not show the image size, and nothing shows how
images and texts are prepared. We assume what published models do: ViT's blocks and no narrow token table; a vocabulary of 256,000
pieces is Gemma's, which SigLIP 2 pads with 0. `big_vision.write` puts a config file beside an npz of another model.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping

from siglip.errors import UserError
from siglip.formats import key_maps
from siglip.formats.containers import Shape
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.models.variants import Variant
from siglip.trees import did_you_mean, flatten

_ATTENTION = "MultiHeadDotProductAttention_0/"
# The axes of every array: W width, H heads, D width of a head, F hidden width of the MLP, L layers, E embedding, P and Q height
# and width of a patch, N positions, V vocabulary.
_BLOCK_AXES = {
    r"LayerNorm_\d/\w+": "W",
    _ATTENTION + r"(query|key|value)/kernel": "WHD",
    _ATTENTION + r"(query|key|value)/bias": "HD",
    _ATTENTION + r"out/kernel": "HDW",
    _ATTENTION + r"out/bias": "W",
    r"MlpBlock_0/Dense_0/kernel": "WF",
    r"MlpBlock_0/Dense_0/bias": "F",
    r"MlpBlock_0/Dense_1/kernel": "FW",
    r"MlpBlock_0/Dense_1/bias": "W",
}
_AXES = {
    r"embedding/kernel": "PQcW",
    r"embedding/bias": "W",
    r"Embed_0/embedding": "VW",
    r"pos_embedding": "1NW",
    r"cls": "11W",
    r"head/kernel": "WE",
    r"head/bias": "E",
    r"MAPHead_0/probe": "11W",
    r"\w+/encoder_norm/\w+": "W",
    **{r"MAPHead_0/" + path: axes for path, axes in _BLOCK_AXES.items()},
    **{r"\w+/encoderblock_\d+/" + path: axes for path, axes in _BLOCK_AXES.items()},
    **{r"\w+/encoderblock/" + path: "L" + axes for path, axes in _BLOCK_AXES.items()},
}
_LAYER = re.compile(r"\w+/encoderblock_(\d+)/.+")
_ARRAYS_PER_LAYER = 16
GEMMA_PIECES = 256_000


@dataclasses.dataclass(frozen=True)
class Inferred:
    """What the shapes determine.

    Attributes:
        config: the architecture; where something is missing, any that fits the rest.
        unclear: arrays whose shape the file does not determine, with what is known of it, for an error message.
        problems: what the caller has to say because shapes do not, each the rest of a sentence that starts with "it".
    """

    config: ModelConfig
    unclear: dict[str, str]
    problems: list[str]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter by path, in the layout (loop or scan) of each tower."""
    return key_maps.flat_shapes(flatten(param_shapes(config)))


def infer_config(
    shapes: Mapping[str, Shape], *, image_size: tuple[int, int] | None = None, source: str = "the tree"
) -> Inferred:
    """The architecture behind the shapes of a flat tree ("img/…", "txt/…", "t", "b").

    Args:
        image_size: (height, width) in pixels, needed where shapes do not determine it, ignored elsewhere.

    Raises:
        UserError: there is no image tower, or the sizes fit no model.
    """
    towers = {tower: _sizes(shapes, tower) for tower in ("img", "txt")}
    if "W" not in towers["img"]:
        key = "img/embedding/kernel"
        raise UserError(
            f"{source} lacks {key}{did_you_mean(key, shapes)}; it holds {len(shapes)} arrays, none of a ViT"
        )
    has_text = any(path.startswith("txt/") for path in shapes)
    unclear: dict[str, str] = {}
    problems: list[str] = []
    try:
        image, out = _infer_image(
            towers["img"], shapes, has_text=has_text, hint=image_size, unclear=unclear, problems=problems
        )
        text, out_dim = _infer_text(towers["txt"], shapes, out=out, unclear=unclear) if has_text else (None, None)
        head = None if out == image.spec.width and not _any(shapes, "img/head/") else out
        return Inferred(ModelConfig(image, text, (head, out_dim)), unclear, problems)
    except ValueError as error:
        raise UserError(f"{source} has shapes of no model: {error}") from None


def _any(shapes: Mapping[str, Shape], prefix: str) -> bool:
    return any(path.startswith(prefix) for path in shapes)


def _sizes(shapes: Mapping[str, Shape], tower: str) -> dict[str, int]:
    """The size of every axis in the tower's arrays: the one that most arrays have."""
    votes: dict[str, Counter[int]] = {}
    layers: Counter[int] = Counter()
    for path, shape in shapes.items():
        if not path.startswith(f"{tower}/"):
            continue
        path = path.removeprefix(f"{tower}/")
        if match := _LAYER.fullmatch(path):
            layers[int(match[1])] += 1
        axes = next((axes for pattern, axes in _AXES.items() if re.fullmatch(pattern, path)), "")
        if len(axes) == len(shape):
            for axis, size in zip(axes, shape, strict=True):
                votes.setdefault(axis, Counter())[size] += 1
    sizes = {axis: counter.most_common(1)[0][0] for axis, counter in votes.items()}
    # A few arrays with a layer number far too high are misnamed; half a layer is a layer that lost arrays.
    whole = [index for index, arrays in layers.items() if 2 * arrays >= _ARRAYS_PER_LAYER]
    return sizes | ({"L": 1 + max(whole)} if whole else {})


def _spec(sizes: Mapping[str, int]) -> Variant:
    heads = sizes.get("H") or (sizes["W"] // sizes["D"] if sizes.get("D") else 1)
    return Variant(sizes["W"], sizes.get("L", 1), sizes.get("F", 1), heads)


def _infer_image(
    sizes: Mapping[str, int],
    shapes: Mapping[str, Shape],
    *,
    has_text: bool,
    hint: tuple[int, int] | None,
    unclear: dict[str, str],
    problems: list[str],
) -> tuple[ImageConfig, int | None]:
    """The image tower, and the width of what it pools to (None where it does not pool)."""
    spec = _spec(sizes)
    patch = (sizes.get("P", 1), sizes.get("Q", 1))
    if "P" not in sizes:
        unclear["img/embedding/kernel"] = f"(height, width, 3, {spec.width})"
    has_head = _any(shapes, "img/head/")
    pool = "map" if _any(shapes, "img/MAPHead_0/") else "tok" if "img/cls" in shapes else None
    # A tower that has no embedding to train would be pointless beside a text tower; alone it is what a VLM reads.
    pool = pool or ("gap" if has_text or has_head else "none")
    # A width that 4 does not divide has no fixed positions, so the learned ones are lost.
    learned = "img/pos_embedding" in shapes or spec.width % 4 != 0
    if learned and "N" not in sizes:
        unclear["img/pos_embedding"] = f"(1, patches, {spec.width})"
    positions = sizes.get("N") if learned else None
    image = ImageConfig(
        **spec.fields(patch=patch[0]),
        patch_size=None if patch[0] == patch[1] else patch,
        image_size=_infer_image_size(positions, patch, learned=learned, hint=hint, problems=problems),
        pool=pool,
        posemb="learn" if learned else "sincos2d",
    )
    return image, None if pool == "none" else sizes.get("E", spec.width) if has_head else spec.width


def _infer_image_size(
    positions: int | None, patch: tuple[int, int], *, learned: bool, hint: tuple[int, int] | None, problems: list[str]
) -> tuple[int, int]:
    side = math.isqrt(positions or 0)
    if positions and side * side == positions:
        return side * patch[0], side * patch[1]
    if hint and (positions is None or (hint[0] // patch[0]) * (hint[1] // patch[1]) == positions):
        return hint
    if positions:
        what = f"has img/pos_embedding with {positions} positions, no square grid"
    else:
        what = "lacks img/pos_embedding (or its positions are fixed)"
    given = f"; image_size={hint} does not give that many patches of {patch} px" if hint else ""
    if positions or not learned:
        problems.append(f"{what}{given}; pass image_size=(height, width) of the images it was trained on")
    return patch[0], patch[1] * (positions or 1)


def _infer_text(
    sizes: Mapping[str, int], shapes: Mapping[str, Shape], *, out: int | None, unclear: dict[str, str]
) -> tuple[TextConfig, int | None]:
    """The text tower, and the width of its linear head (None for no head)."""
    if "W" not in sizes:
        raise UserError("no array of the text tower (txt/…) tells its width")
    spec = _spec(sizes)
    for axis, path, shape in (
        ("V", "txt/Embed_0/embedding", f"(vocabulary, {spec.width})"),
        ("N", "txt/pos_embedding", f"(1, length, {spec.width})"),
    ):
        if axis not in sizes:
            unclear[path] = shape
    text = TextConfig(
        **spec.fields(),
        vocab_size=sizes.get("V", 1),
        length=sizes.get("N", 1),
        tokens=TokenConfig(pad_id=0) if sizes.get("V") == GEMMA_PIECES else TokenConfig(),
        pool="map" if _any(shapes, "txt/MAPHead_0/") else "last",
    )
    # Without a head the widths are equal, or the head is lost.
    has_head = _any(shapes, "txt/head/") or out not in (None, spec.width)
    return text, (out or sizes.get("E", spec.width)) if has_head else None
