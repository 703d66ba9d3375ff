"""StableHLO: the towers as compiled-ahead programs that any process with jax and numpy can call, without this package.

    image.stablehlo   (weights, float32 [b, h, w, 3] in [-1, 1]) -> {"image_tokens": [b, n, d], "image_embedding": [b, e]}
    text.stablehlo    (weights, int32 [b, l])                    -> {"text_embedding": [b, e]}
    of a NaFlex model (weights, float32 [b, n, p], int32 [b, 2]): patches and their grid -> "mask", bool [b, n], as well
    image.npz         the weights of the first, text.npz those of the second and the log-temperature `params/t` and `params/b`

    program = jax.export.deserialize(bytearray(open("image.stablehlo", "rb").read()))
    outputs = program.call(dict(numpy.load("image.npz")), images)

Embeddings are L2-normalised. Each program runs on CPU, CUDA and TPU and for any batch. Products are float32 ones everywhere, so
that every device gives the numbers that were verified (jax.export, and its promise of compatibility: programs can be called by
every jax of the six months after the one that wrote them).

The trap: a program that contained its weights would be a flatbuffer, which cannot exceed 2 GiB, and every process that calls it
would compile them in as constants. So the weights are an argument, in a file beside it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from siglip import trees
from siglip.formats.big_vision import image_only
from siglip.formats.export_format import ExportFormat, in_folder
from siglip.models.naflex import Patches
from siglip.models.two_tower import ModelConfig, batch_of, make_model

IMAGE, TEXT = "image", "text"
PLATFORMS = ("cpu", "cuda", "tpu")
_PREFIX = "params/"
Tower = Callable[..., dict[str, jax.Array]]  # (parameters, arrays)


def write(folder: Path, params: Mapping[str, Any], config: ModelConfig) -> None:
    """Writes the image tower, and the text tower where there is one."""
    (embed_images, image), (embed_texts, rest) = towers(params, config)
    if config.image.naflex is None:
        batch = (("b", *config.image.image_size, 3), jnp.float32)
        _write(folder, IMAGE, embed_images, image, [batch])
    else:
        patches, grid = ("b", "n", math.prod(config.image.patch) * 3), ("b", 2)
        embed_patches = lambda params, *arrays: embed_images(params, Patches(*arrays))  # noqa: E731
        _write(folder, IMAGE, embed_patches, image, [(patches, jnp.float32), (grid, jnp.int32)])
    if config.text is not None:
        _write(folder, TEXT, embed_texts, rest, [(("b", config.text.length), jnp.int32)])


def towers(params: Mapping[str, Any], config: ModelConfig) -> tuple[tuple[Tower, Any], tuple[Tower, Any]]:
    """(function, its parameters) of the image tower and of what is beside it: (parameters, batch) -> outputs by name."""
    image, both = make_model(image_only(config)), make_model(config)

    def embed_images(params: Any, images: jax.Array | Patches) -> dict[str, jax.Array]:
        zimg, _, out = image.apply({"params": params}, batch_of(images))
        found = {"image_tokens": out["img/encoded"]} | ({} if zimg is None else {"image_embedding": zimg})
        return found | ({"mask": out["img/mask"]} if "img/mask" in out else {})

    def embed_texts(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        return {"text_embedding": both.apply({"params": params}, {"text": tokens})[1]}

    rest = {name: tree for name, tree in params.items() if name != "img"}
    return (embed_images, {"img": params["img"]}), (embed_texts, rest)


def outputs(folder: Path, images: np.ndarray | Patches, tokens: np.ndarray | None) -> dict[str, np.ndarray]:
    """What the programs in a folder give for images and token ids, with the logits of every pair; zeros for padding."""
    found = (
        _call(folder, IMAGE, *map(np.asarray, images)) if isinstance(images, Patches) else _call(folder, IMAGE, images)
    )
    if (mask := found.pop("mask", None)) is not None:
        found["image_tokens"] = np.where(mask[..., None], found["image_tokens"], 0)
    if tokens is None:
        return found
    found |= _call(folder, TEXT, tokens)
    if "image_embedding" in found:
        with np.load(folder / f"{TEXT}.npz") as weights:
            t, b = weights[f"{_PREFIX}t"], weights[f"{_PREFIX}b"]
        found["logits"] = np.exp(t) * found["image_embedding"] @ found["text_embedding"].T + b
    return found


def _write(
    folder: Path,
    name: str,
    tower: Tower,
    params: Mapping[str, Any],
    inputs: Sequence[tuple[tuple[int | str, ...], Any]],
) -> None:
    """inputs: (shape, dtype) of each array after the weights; a letter stands for any number."""

    def program_of(weights: Mapping[str, jax.Array], *batch: jax.Array) -> dict[str, jax.Array]:
        return tower(trees.unflatten({p.removeprefix(_PREFIX): array for p, array in weights.items()}), *batch)

    weights = {f"{_PREFIX}{path}": np.asarray(leaf, np.float32) for path, leaf in trees.flatten(params).items()}
    shapes = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in weights.items()}
    sizes = dict(zip("bn", export.symbolic_shape("b, n"), strict=True))
    arrays = [jax.ShapeDtypeStruct([sizes.get(size, size) for size in shape], dtype) for shape, dtype in inputs]
    with jax.default_matmul_precision("highest"):
        program = export.export(jax.jit(program_of), platforms=PLATFORMS)(shapes, *arrays)
    (folder / f"{name}.stablehlo").write_bytes(program.serialize())
    np.savez(folder / f"{name}.npz", **weights)


def _call(folder: Path, name: str, *batch: np.ndarray) -> dict[str, np.ndarray]:
    program = export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
    with np.load(folder / f"{name}.npz") as weights:
        found = program.call(dict(weights), *batch)
    return {key: np.asarray(array) for key, array in found.items()}


_IMAGES = """
import jax.export
import numpy as np


def load(name):
    program = jax.export.deserialize(bytearray(open(f"{name}.stablehlo", "rb").read()))
    return program.call, dict(np.load(f"{name}.npz"))


embed_images, image_weights = load("image")
images = embed_images(image_weights, np.zeros((1, HEIGHT, WIDTH, 3), np.float32))
print(images["image_tokens"].shape)
"""
_ONE_SIZE = "np.zeros((1, HEIGHT, WIDTH, 3), np.float32)"
_OF_PATCHES = "np.zeros((1, 128, PATCH), np.float32), np.array([[8, 16]], np.int32)"
_TEXTS = """
embed_texts, text_weights = load("text")
texts = embed_texts(text_weights, np.ones((2, LENGTH), np.int32))
logits = np.exp(text_weights["params/t"]) * images["image_embedding"] @ texts["text_embedding"].T
print(1 / (1 + np.exp(-logits - text_weights["params/b"])))
"""


def _example(config: ModelConfig, has_tokenizer: bool) -> str:
    images = _IMAGES if config.image.naflex is None else _IMAGES.replace(_ONE_SIZE, _OF_PATCHES)
    code = images + ("" if config.text is None else _TEXTS.lstrip())
    return in_folder("jax numpy", code, note="; programs run on CPU, CUDA and TPU, for any number of rows")


EXPORT = ExportFormat(
    library="jax",
    write=lambda folder, params, config, *, tokenizer, layout: write(folder, params, config),
    example=_example,
    outputs=lambda folder, cases: [outputs(folder, case.images, case.tokens) for case in cases],
)
