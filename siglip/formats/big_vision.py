"""big_vision's `.npz`: flat arrays named "params/img/Transformer/encoderblock_0/…", the layout SigLIP was published in.

Reads the loop and the scan layout, keys with and without `params/`, the old `opt/target/` prefix, bfloat16 kept as
raw 2-byte values, and `FILE.npz:img`, one tower of a file. An npz says nothing about its model but the shapes, and
those tell nearly all.

The trap: four things cannot be read from shapes: text pool "last" or "mean", image pool "gap" or "none", a grid that
is not square, and the image size behind fixed positions. `write` puts a config file beside such an npz, and `read`
looks for it. Untrusted files are never unpickled.
"""

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from siglip.formats import names
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.models.variants import Variant, name_of
from siglip.trees import build_dataclass, did_you_mean, flatten, unflatten

Flat = dict[str, np.ndarray]


def read(
    path: str | Path, *, config: ModelConfig | None = None, image_size: tuple[int, int] | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (nested dict of float32 arrays, in the layout of the file) and the architecture they belong to.

    Args:
        path: "FILE.npz", or "FILE.npz:img" for its image tower alone.
        config: the architecture, when it is known; else it comes from the config file beside the npz, else from the
            shapes.
        image_size: (height, width) in pixels, for files from which it cannot be inferred; ignored where it can.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds pickled objects, or does not hold exactly the arrays of one model.
    """
    file, subtree = split_subtree(path)
    flat = _only_subtree(_parameters(_load(file)), subtree, str(path))
    if config is None and sidecar(file).is_file():
        config = _read_sidecar(sidecar(file))
    if config is not None and not any(key.startswith("txt/") for key in flat):
        config = image_only(config)
    if config is None:
        config = infer_config(flat, image_size=image_size, source=str(path))
    scanned = {tower: any(f"{tower}/" in k and "/encoderblock/" in k for k in flat) for tower in ("img", "txt")}
    text = config.text and dataclasses.replace(config.text, scan=scanned["txt"])
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, scan=scanned["img"]), text=text)
    expected = names.flat_shapes(flatten(param_shapes(config)))
    names.check_shapes(names.flat_shapes(flat), expected, source=str(path))
    return unflatten(flat), config


def write(path: Path, params: Mapping[str, Any], config: ModelConfig) -> None:
    """Writes `params` (both towers or one) in the loop layout under `params/`, as the published files are.

    A config file goes beside it when the shapes alone would be read as another model.
    """
    flat = names.unstack_blocks({key: np.asarray(leaf, np.float32) for key, leaf in flatten(params).items()})
    with path.open("wb") as file:
        np.savez(file, **{f"params/{key}": array for key, array in flat.items()})
    if not _shapes_tell(flat, config):
        sidecar(path).write_text(json.dumps({"model": dataclasses.asdict(config)}, indent=1) + "\n")


def image_only(config: ModelConfig) -> ModelConfig:
    """The same image tower without a text tower."""
    return dataclasses.replace(config, text=None, out_dim=(config.out_dim[0], None))


def split_subtree(path: str | Path) -> tuple[Path, str | None]:
    """Splits "FILE.npz:img" into (FILE.npz, "img"); a path without a colon after .npz has no sub-tree."""
    file, separator, subtree = str(path).rpartition(".npz:")
    return (Path(file + ".npz"), subtree) if separator else (Path(path), None)


def sidecar(path: Path) -> Path:
    """The config file that may lie beside an npz: model.npz -> model.config.json."""
    return path.with_suffix(".config.json")


def infer_config(flat: Mapping[str, np.ndarray], *, image_size: tuple[int, int] | None, source: str) -> ModelConfig:
    """The architecture behind the shapes of a flat tree ("img/…", "txt/…", "t", "b").

    Raises:
        ValueError: an array that is needed for this is missing, or the grid is not square and `image_size` not given.
    """
    flat = names.unstack_blocks(flat)

    def shape(key: str, ndim: int) -> names.Shape:
        if key not in flat:
            raise ValueError(f"{source} lacks {key}{did_you_mean(key, flat)}; it holds {len(flat)} arrays")
        if flat[key].ndim != ndim:
            raise ValueError(f"{source}: {key} has shape {flat[key].shape} where {ndim} axes were expected")
        return flat[key].shape

    patch_h, patch_w, _, width = shape("img/embedding/kernel", 4)
    spec = _infer_spec(flat, "img/Transformer/", width, shape)
    has_text = any(key.startswith("txt/") for key in flat)
    has_head = "img/head/kernel" in flat
    pool = "map" if "img/MAPHead_0/probe" in flat else "tok" if "img/cls" in flat else None
    # A tower that has no embedding to train would be pointless beside a text tower; alone it is what a VLM reads.
    pool = pool or ("gap" if has_text or has_head else "none")
    learned = "img/pos_embedding" in flat
    positions = shape("img/pos_embedding", 3)[1] if learned else None
    name = name_of(spec)
    image = ImageConfig(
        variant=f"{name or 'B'}/{patch_h}",
        **({} if name else dataclasses.asdict(spec)),
        patch_size=None if patch_h == patch_w else (patch_h, patch_w),
        image_size=_infer_image_size(positions, (patch_h, patch_w), image_size, source),
        pool=pool,
        posemb="learn" if learned else "sincos2d",
    )
    text = _infer_text(flat, shape) if has_text else None
    out_dim = tuple(flat[key].shape[-1] if key in flat else None for key in ("img/head/kernel", "txt/head/kernel"))
    return ModelConfig(image=image, text=text, out_dim=out_dim)


def _infer_text(flat: Mapping[str, np.ndarray], shape: Any) -> TextConfig:
    vocab_size, width = shape("txt/Embed_0/embedding", 2)
    spec = _infer_spec(flat, "txt/Encoder_0/", width, shape)
    name = name_of(spec)
    return TextConfig(
        variant=name or "B",
        **({} if name else dataclasses.asdict(spec)),
        vocab_size=vocab_size,
        length=shape("txt/pos_embedding", 3)[1],
        pool="map" if "txt/MAPHead_0/probe" in flat else "last",
    )


def _infer_spec(flat: Mapping[str, np.ndarray], encoder: str, width: int, shape: Any) -> Variant:
    indices = [
        int(key.split("encoderblock_")[1].split("/")[0]) for key in flat if key.startswith(f"{encoder}encoderblock_")
    ]
    block = f"{encoder}encoderblock_{min(indices, default=0)}/"
    return Variant(
        width=width,
        depth=max(indices, default=0) + 1,
        mlp_dim=shape(f"{block}MlpBlock_0/Dense_0/kernel", 2)[1],
        num_heads=shape(f"{block}MultiHeadDotProductAttention_0/query/kernel", 3)[1],
    )


def _infer_image_size(
    positions: int | None, patch: tuple[int, int], hint: tuple[int, int] | None, source: str
) -> tuple[int, int]:
    side = math.isqrt(positions or 0)
    if positions and side * side == positions:
        return side * patch[0], side * patch[1]
    if positions is None and hint:
        return hint
    if hint and (hint[0] // patch[0]) * (hint[1] // patch[1]) == positions:
        return hint
    what = f"{positions} positions, no square grid" if positions else "no img/pos_embedding (fixed positions)"
    given = f"; image_size={hint} does not give that many patches of {patch} px" if hint else ""
    raise ValueError(f"{source} has {what}{given}; pass image_size=(height, width) of the pictures it was trained on")


def _shapes_tell(flat: Mapping[str, np.ndarray], config: ModelConfig) -> bool:
    """Whether `infer_config` finds the same function again."""
    try:
        found = infer_config(flat, image_size=None, source="")
    except ValueError:
        return False

    def key(c: ModelConfig) -> tuple:
        image = (c.image.spec, c.image.patch, c.image.image_size, c.image.pool, c.image.posemb)
        return image, c.text and (c.text.spec, c.text.vocab_size, c.text.length, c.text.pool), c.out_dim

    return key(found) == key(config)


def _load(file: Path) -> Flat:
    """All numeric arrays of an npz, floats as float32."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    flat = {}
    key = "its index"
    try:
        with np.load(file, allow_pickle=False) as archive:
            for key in archive.files:
                flat[key] = archive[key]
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        hint = (
            "it holds a pickled object, which may run code when read" if "pickle" in str(error) else "is it cut short?"
        )
        raise ValueError(f"{file} cannot be read at {key}: {hint} ({error})".replace("\n", " ")) from None
    return flat


def _as_float32(key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):
        array = array.view(jnp.bfloat16)
    if array.dtype.kind != "f" and array.dtype != jnp.bfloat16:
        raise ValueError(f"{key} has type {array.dtype}; parameters are floating-point")
    return np.asarray(array, np.float32)


def _parameters(flat: Flat) -> Flat:
    """The parameters of a checkpoint that may hold an optimizer state and more beside them."""
    for prefix in ("params/", "opt/target/"):
        if any(key.startswith(prefix) for key in flat):
            flat = {key.removeprefix(prefix): array for key, array in flat.items() if key.startswith(prefix)}
            break
    return {key: _as_float32(key, array) for key, array in flat.items()}


def _only_subtree(flat: Flat, subtree: str | None, source: str) -> Flat:
    if subtree is None:
        # An image model saved on its own has the tower's paths at the top.
        return {f"img/{key}": array for key, array in flat.items()} if "embedding/kernel" in flat else flat
    if subtree != "img":
        raise ValueError(f"{source}: only the sub-tree ':img' can be read on its own, not ':{subtree}'")
    image = {key: array for key, array in flat.items() if key.startswith("img/")}
    if not image:
        raise ValueError(f"{source}: the file has no img/…; leave ':img' away to read an image tower saved on its own")
    return image


def _read_sidecar(path: Path) -> ModelConfig:
    try:
        return build_dataclass(ModelConfig, json.loads(path.read_text())["model"], where=f"{path}: model")
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a model's config: {error!r}; remove it to infer the model from the shapes"
        ) from None
