"""big_vision's `.npz`: flat arrays named "params/img/Transformer/encoderblock_0/…", the layout SigLIP was published in.

A NaFlex tower has the same arrays, but the patch kernel is [p * p * 3, d] and the positions are [rows, columns, d].

Reads the loop and the scan layout, keys with and without `params/`, the old `opt/target/` prefix, still older names,
bfloat16 kept as raw 2-byte values, `FILE.npz:img`, one tower of a file, and the vision tower of a PaliGemma. Anything
else in the file, such as an optimizer's state, is ignored.

The trap: shapes are all that an npz says about its model, and some models share their shapes (infer_config.py has the
list). For these `write` puts a config file beside the npz, and `read` looks for it. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from siglip.atomic import new_file, write_atomically
from siglip.errors import UserError
from siglip.formats import key_maps, old_names, pali_gemma
from siglip.formats.containers import LazyArray, open_npz, write_npz
from siglip.formats.export_format import TOKENIZER_FILE, ExportFormat, Layout
from siglip.formats.hf_tokenizer.convert import read_pieces
from siglip.formats.infer_config import Inferred, expected_shapes, infer_config
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ModelConfig
from siglip.trees import build_dataclass, flatten, read_json, unflatten

EXPORTED_NPZ = "model.npz"
_PREFIXES = ("params/", "opt/target/")
_TOWERS = ("img/", "txt/", "llm/")


def read(
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    image_size: tuple[int, int] | None = None,
    only_image: bool = False,
) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (nested dict of float32 arrays, in the layout of the file) and their architecture.

    From a PaliGemma it reads the vision tower only, without the language model and the connector to it (img/head).

    Args:
        path: "FILE.npz", or "FILE.npz:img" for its image tower alone.
        config: the architecture; None takes it from the config file beside the npz, or else from the shapes.
        image_size: (height, width) in pixels, needed where shapes do not determine it, ignored elsewhere.
        only_image: reads the arrays of the image tower alone; the others are only checked.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is damaged, or does not hold exactly the arrays of one model; every bad key is named.
    """
    with _opened(path, config, image_size) as (arrays, config):
        if only_image:
            arrays, config = {k: a for k, a in arrays.items() if k.startswith("img/")}, image_only(config)
        return unflatten({key: array.read() for key, array in arrays.items()}), config


def read_config(path: str | Path, *, image_size: tuple[int, int] | None = None) -> ModelConfig:
    """The architecture alone, from the headers of the arrays. Args, Raises: as `read`."""
    with _opened(path, None, image_size) as (_, config):
        return config


@contextlib.contextmanager
def _opened(
    path: str | Path, config: ModelConfig | None, image_size: tuple[int, int] | None
) -> Iterator[tuple[dict[str, LazyArray], ModelConfig]]:
    file, subtree = split_subtree(path)
    source = str(path)
    if config is None and sidecar(file).is_file():
        config = _read_sidecar(sidecar(file))
    with open_npz(file) as stored:
        arrays = _only_subtree(_parameters(stored, source), subtree, source)
        arrays, naflex_size = _from_naflex(arrays, config, source)
        image_size = naflex_size or image_size
        patches = _patches(arrays, config, image_size)
        arrays = old_names.modernise(arrays, patches=patches, source=source)
        _refuse_other_models(arrays, source)
        shapes = key_maps.flat_shapes(arrays)
        inferred = _given(config, shapes) if config else infer_config(shapes, image_size=image_size, source=source)
        config = _in_layout_of(inferred.config, arrays, source)
        if naflex_size and config.image.naflex is None:
            image = dataclasses.replace(config.image, image_size=naflex_size, naflex=NaflexConfig())
            config = dataclasses.replace(config, image=image)
        expected = expected_shapes(config) | inferred.unclear
        key_maps.check_arrays(arrays, expected, source=source, problems=inferred.problems)
        yield arrays, config


def write(path: Path, params: Mapping[str, Any], config: ModelConfig, *, layout: Layout = "loop") -> None:
    """Writes `params` (both towers or one) under `params/`, as the published files are.

    A config file goes beside it when the shapes alone would be read as another model.

    Args:
        layout: "loop", as SigLIP was published, or "scan", as PaliGemma was. The reference's image tower loads both
            into either, its text tower only its own.

    Raises:
        UserError: `params` are not exactly those of `config`; every bad key is named, and nothing is written.
    """
    flat = key_maps.unstack_blocks({key: np.asarray(leaf, np.float32) for key, leaf in flatten(params).items()})
    shapes = key_maps.flat_shapes(flat)
    arrays = {key: LazyArray(array.shape, functools.partial(np.asarray, array)) for key, array in flat.items()}
    key_maps.check_arrays(arrays, key_maps.unstack_shapes(expected_shapes(config)), source=f"the tree for {path}")
    if layout == "scan":
        arrays = key_maps.stack_blocks(arrays, stack=_lazily_stacked)
    with new_file(path) as whole:
        write_npz(whole, {f"params/{key}": array for key, array in _to_naflex(arrays, config).items()})
        # The config file is there first: without it, or beside another model's, the npz would be read as what it is not.
        sidecar(path).unlink(missing_ok=True)
        if not _shapes_tell(shapes, config):
            write_atomically(sidecar(path), json.dumps({"model": dataclasses.asdict(config)}, indent=1) + "\n")


def image_only(config: ModelConfig) -> ModelConfig:
    """The same image tower without a text tower."""
    return dataclasses.replace(config, text=None, out_dim=(config.out_dim[0], None))


def without_head(params: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The same model whose image tower ends at its last LayerNorm, with neither pooling nor a linear head.

    Raises:
        UserError: it pools by a class token: the other tokens were trained with that one in the sequence.
    """
    if config.image.pool == "tok":
        raise UserError(
            "image.pool='tok': the tokens were trained beside the class token, so it cannot go; keep the head"
        )
    image = {name: leaf for name, leaf in params["img"].items() if name not in ("MAPHead_0", "head")}
    config = dataclasses.replace(
        config, image=dataclasses.replace(config.image, pool="none"), out_dim=(None, config.out_dim[1])
    )
    return {**params, "img": image}, config


def split_subtree(path: str | Path) -> tuple[Path, str | None]:
    """Splits "FILE.npz:img" into (FILE.npz, "img"); a path without a colon after .npz has no sub-tree."""
    file, separator, subtree = str(path).rpartition(".npz:")
    return (Path(file + ".npz").expanduser(), subtree) if separator else (Path(path).expanduser(), None)


def sidecar(path: Path) -> Path:
    """The config file that may lie beside an npz: model.npz -> model.config.json."""
    return path.with_suffix(".config.json")


def _parameters(stored: Mapping[str, LazyArray], source: str) -> dict[str, LazyArray]:
    """The parameters in a checkpoint that may also hold an optimizer state and more."""
    prefixes = [prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in stored)]
    bare = next((key for key in stored if key.startswith(_TOWERS)), None)
    models = [*prefixes, *([bare] if bare else [])]
    if len(models) > 1:
        raise UserError(f"{source} holds two models, under {' and '.join(models)}; save the one that is meant alone")
    if not prefixes:
        return dict(stored)
    return {key.removeprefix(prefixes[0]): array for key, array in stored.items() if key.startswith(prefixes[0])}


def _only_subtree(arrays: dict[str, LazyArray], subtree: str | None, source: str) -> dict[str, LazyArray]:
    if subtree not in (None, "img"):
        raise UserError(f"{source}: only the sub-tree ':img' can be read on its own, not ':{subtree}'")
    if pali_gemma.is_pali_gemma(arrays):
        return pali_gemma.image_tower(arrays)
    has_towers = any(key.startswith(_TOWERS) for key in arrays)
    if subtree is None:
        # An image model saved on its own has the tower's paths at the top.
        bare = not has_towers and any(key.startswith(("Transformer/", "embedding/")) for key in arrays)
        return {f"img/{key}": array for key, array in arrays.items()} if bare else arrays
    image = {key: array for key, array in arrays.items() if key.startswith("img/")}
    if not image:
        raise UserError(f"{source}: the file has no img/…; leave ':img' away to read an image tower saved on its own")
    return image


def _patches(
    arrays: Mapping[str, LazyArray], config: ModelConfig | None, image_size: tuple[int, int] | None
) -> int | None:
    """How many patches an image has, or None if neither the caller nor the config file says so."""
    if config is not None:
        return config.image.grid[0] * config.image.grid[1]
    kernel = arrays.get("img/embedding/kernel")
    if image_size is None or kernel is None or len(kernel.shape) != 4 or 0 in kernel.shape:
        return None
    return (image_size[0] // kernel.shape[0]) * (image_size[1] // kernel.shape[1])


def _refuse_other_models(arrays: Mapping[str, LazyArray], source: str) -> None:
    if torch := sorted(key for key in arrays if key.endswith((".weight", ".bias"))):
        raise UserError(
            f"{source} has keys of torch ({torch[0]}, …); save the model with save_pretrained(FOLDER) of transformers and name "
            f"that folder"
        )
    pickled = sorted(key for key, array in arrays.items() if array.dtype == "object")
    if pickled and not any(key.startswith("img/") for key in arrays):
        raise UserError(
            f"{source} holds no arrays of an image tower (img/…) but Python objects ({', '.join(pickled)}), which may run code "
            f"when they are unpickled; save its arrays one by one, as plain numbers"
        )
    if layer := sorted(key for key in arrays if key.startswith("img/pre_logits/")):
        raise UserError(
            f"{source} has {', '.join(layer)}: a tanh layer before the head (rep_size), which no SigLIP has; read an encoder "
            f"without it, or remove these arrays and img/head"
        )


def _from_naflex(
    arrays: Mapping[str, LazyArray], config: ModelConfig | None, source: str
) -> tuple[dict[str, LazyArray], tuple[int, int] | None]:
    """The arrays as those of a tower for images of one size; and of a NaFlex tower the size whose grid its positions have."""
    kernel, positions = arrays.get("img/embedding/kernel"), arrays.get("img/pos_embedding")
    is_naflex = kernel is not None and len(kernel.shape) == 2
    if config is not None and kernel is not None and is_naflex != (config.image.naflex is not None):
        kinds = ("is a NaFlex tower's", "is of a tower for images of one size")
        found, told = kinds if is_naflex else kinds[::-1]
        raise UserError(
            f"{source}: img/embedding/kernel {kernel.shape} {found}, but its config {told}: a mixture; copy both files again"
        )
    if not is_naflex:
        return dict(arrays), None
    inputs, width = kernel.shape
    side = math.isqrt(inputs // 3)
    patch = (side, side) if config is None else config.image.patch
    told = f"{source}: img/embedding/kernel {kernel.shape} is a NaFlex tower's"
    if 3 * math.prod(patch) != inputs:
        raise UserError(f"{told}, but not of patches of {patch} px in three colours")
    if positions is None or len(positions.shape) != 3 or (1 in positions.shape[:2] and config is None):
        shape = "absent" if positions is None else positions.shape
        raise UserError(
            f"{told}, and img/pos_embedding {shape} is not (rows, columns, width) as its positions are; is it of another model?"
        )
    rows, columns, depth = positions.shape
    if config is not None and (rows, columns) != config.image.grid:
        raise UserError(
            f"{source}: img/pos_embedding {positions.shape} has {rows} x {columns} positions, but the config's image has "
            f"{config.image.grid[0]} x {config.image.grid[1]} patches; copy both files again"
        )
    shapes = {"img/embedding/kernel": (*patch, 3, width), "img/pos_embedding": (1, rows * columns, depth)}
    return _reshaped(arrays, shapes), (rows * patch[0], columns * patch[1])


def _to_naflex(arrays: Mapping[str, LazyArray], config: ModelConfig) -> dict[str, LazyArray]:
    """The inverse of `_from_naflex`; arrays of a tower for images of one size stay as they are."""
    image, width = config.image, config.image.spec.width
    if image.naflex is None:
        return dict(arrays)
    shapes = {"img/embedding/kernel": (math.prod(image.patch) * 3, width), "img/pos_embedding": (*image.grid, width)}
    return _reshaped(arrays, shapes)


def _reshaped(arrays: Mapping[str, LazyArray], shapes: Mapping[str, key_maps.Shape]) -> dict[str, LazyArray]:
    def reshape(array: LazyArray, shape: key_maps.Shape) -> LazyArray:
        return LazyArray(shape, lambda: array.read().reshape(shape), array.dtype)

    return {**arrays, **{key: reshape(arrays[key], shape) for key, shape in shapes.items()}}


def _given(config: ModelConfig, shapes: Mapping[str, key_maps.Shape]) -> Inferred:
    """The config that the caller or the config file gave, without the text tower if the file has none."""
    if not any(key.startswith("txt/") for key in shapes):
        config = image_only(config)
    return Inferred(config, unclear={}, problems=[])


def _in_layout_of(config: ModelConfig, arrays: Mapping[str, LazyArray], source: str) -> ModelConfig:
    scan = {}
    for tower in ("img", "txt"):
        stacked = [key for key in arrays if re.match(rf"{tower}/\w+/encoderblock/", key)]
        single = [key for key in arrays if re.match(rf"{tower}/\w+/encoderblock_\d+/", key)]
        if stacked and single:
            raise UserError(
                f"{source} holds two models: blocks one by one ({single[0]}) and stacked ({stacked[0]}); keep one"
            )
        scan[tower] = bool(stacked)
    text = config.text and dataclasses.replace(config.text, scan=scan["txt"])
    return dataclasses.replace(config, image=dataclasses.replace(config.image, scan=scan["img"]), text=text)


def _lazily_stacked(layers: list[LazyArray]) -> LazyArray:
    return LazyArray((len(layers), *layers[0].shape), lambda: np.stack([layer.read() for layer in layers]))


def _shapes_tell(shapes: Mapping[str, key_maps.Shape], config: ModelConfig) -> bool:
    """Whether `infer_config` finds the same architecture from the shapes alone."""
    inferred, naflex = infer_config(shapes), config.image.naflex
    if naflex is not None and (naflex != NaflexConfig() or config.image.patch[0] != config.image.patch[1]):
        return False

    def key(c: ModelConfig) -> tuple:
        (i, t), text = (c.image, c.text), None
        image = (i.spec, i.block, i.patch, i.image_size, i.pixels, i.pool, i.posemb, i.final_norm)
        if t is not None:
            text = (t.spec, t.block, t.embed_bottleneck, t.vocab_size, t.length, t.tokens, t.pool)
        return image, text, c.out_dim

    return not inferred.problems and key(inferred.config) == key(config)


def _read_sidecar(path: Path) -> ModelConfig:
    fix = "remove it to infer the model from the shapes"
    tree = read_json(path, fix=fix)
    if "model" not in tree:
        raise UserError(f"{path} is not a model's config: it lacks 'model'; {fix}")
    return build_dataclass(ModelConfig, tree["model"], where=f"{path}: model")


def _export(
    folder: Path, params: Mapping[str, Any], config: ModelConfig, *, tokenizer: Path | None, layout: Layout
) -> None:
    if tokenizer is not None:
        (folder / TOKENIZER_FILE).write_bytes(read_pieces(tokenizer, room=config.text.vocab_size))
    write(folder / EXPORTED_NPZ, params, config, layout=layout)


_EXAMPLE = """
Run in this folder; `model.npz` also loads in big_vision, as `model.npz` or `model.npz:img`.

```python
import numpy as np
import siglip

model = siglip.load("model.npz")
images = np.zeros((1, HEIGHT, WIDTH, 3), np.float32)
print(model.image_tokens(images).shape)
```
"""
_ONE_SIZE = """images = np.zeros((1, HEIGHT, WIDTH, 3), np.float32)
print(model.image_tokens(images).shape)"""
_ANY_SIZE = """images = [np.zeros((40, 90, 3), np.uint8)]  # of any size; Pillow's images too
tokens, mask = model.image_tokens(images)  # mask: False where a token is padding
print(tokens.shape, mask.sum())"""


def _warnings(config: ModelConfig, has_tokenizer: bool) -> list[str]:
    if config.image.pixels.has_default_range:
        return []
    mean, std = config.image.pixels.mean, config.image.pixels.std
    return [
        f"big_vision itself scales pixels to [-1, 1]: feed it (x / 255 - {mean}) / {std}, as model.config.json says"
    ]


def _example(config: ModelConfig, has_tokenizer: bool) -> str:
    return _EXAMPLE if config.image.naflex is None else _EXAMPLE.replace(_ONE_SIZE, _ANY_SIZE)


EXPORT = ExportFormat(
    library="big_vision",
    write=_export,
    warnings=_warnings,
    example=_example,
    layouts=("loop", "scan"),
)
