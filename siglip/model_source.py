"""Any source of a model to its parameters: what every command calls SRC.

    a run's workdir | a checkpoint inside it | FILE.npz | FILE.npz:img | a Hugging Face folder | one of timm or open_clip
    | one of our exports

The trap: a folder can look like several of these. Our own exports are looked for first, then runs, then timm's and Hugging Face's
config.json, which a run has as well.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from siglip import trees
from siglip.errors import UserError
from siglip.formats import big_vision, hf_inputs, hugging_face, key_maps, open_clip
from siglip.formats.containers import LazyArray
from siglip.formats.infer_config import expected_shapes
from siglip.models.resample import resample
from siglip.models.two_tower import MODEL_PARTS, ModelConfig
from siglip.parallel.launch import check_backend
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE
from siglip.workdir.files import read_config as read_run_config

Size = tuple[int, int]

# What lies in folders of other kinds: what it is, and what to do.
_OTHERS = {
    "adapter_config.json": ("a LoRA adapter", "merge it into its model, merge_and_unload() in peft, and save that"),
    "saved_model.pb": ("an exported program", "name the model that it was exported from"),
    "image.stablehlo": ("an exported program", "name the model that it was exported from"),
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

SOURCES = (
    "a run's workdir, a checkpoint inside it, FILE.npz, FILE.npz:img, a folder of transformers, timm or open_clip, or an "
    "exported folder"
)


class _Source(NamedTuple):
    """How one source is read. Both take the (height, width) that its images have where the files do not tell; `read` also
    whether only the image tower's arrays are."""

    read: Callable[[Size | None, bool], tuple[dict[str, Any], ModelConfig]]
    read_config: Callable[[Size | None], ModelConfig]
    tokenizer: Callable[[], Path | None]


def read_model(
    src: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    patch_size: int | tuple[int, int] | None = None,
    only_image: bool = False,
) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    """(params, config, SentencePiece file or None) of any source, as for `load`; the arrays are numpy, on no device.

    Args:
        only_image: reads the image tower alone; nothing of a text tower is read then.
    """
    check_backend()
    image_size, patch_size, source = _height_width(image_size), _height_width(patch_size), _locate(src)
    # The size of the images is also a hint for files that do not tell theirs; at another patch size it is not.
    params, config = source.read(image_size if patch_size is None else None, only_image)
    params, config = resample(params, config, image_size=image_size, patch_size=patch_size)
    return params, config, None if only_image else source.tokenizer()


def read_config(src: str | Path, image_size: tuple[int, int] | None = None) -> tuple[ModelConfig, Path | None]:
    """The (config, SentencePiece file or None) that `read_model` gives, without reading an array."""
    source = _locate(src)
    config = source.read_config(image_size)
    if image_size is not None:
        image = dataclasses.replace(config.image, image_size=image_size, naflex=None)
        config = dataclasses.replace(config, image=image)
    return config, source.tokenizer()


def _height_width(size: int | tuple[int, int] | None) -> Size | None:
    if size is None or isinstance(size, int):
        return size if size is None else (size, size)
    if len(size) not in (1, 2):
        raise UserError(f"size {tuple(size)}: give one side in pixels, or (height, width)")
    return size[0], size[-1]


def _locate(src: str | Path) -> _Source:
    if "://" in str(src):
        raise UserError(
            f"{str(src)!r} is a URL; a model is read from local files: copy it here first and name the copy"
        )
    file, _ = big_vision.split_subtree(src)
    if file.suffix == ".npz":
        return _npz(src, file.parent)
    folder = Path(src).expanduser()
    if not folder.is_dir():
        raise _no_folder(folder, str(src))
    if (folder / big_vision.EXPORTED_NPZ).is_file():
        return _npz(folder / big_vision.EXPORTED_NPZ, folder)

    # Orbax is slow to import, and only runs need it.
    from siglip.workdir import checkpoint

    if run := checkpoint.run_of(folder):

        def read(only_image: bool) -> tuple[dict[str, Any], ModelConfig]:
            config = config_of_run(run[0])
            config = big_vision.image_only(config) if only_image else config
            # A term's own parameters are not the model's.
            params, *_ = checkpoint.read_run_params(folder, parts=("img",) if only_image else MODEL_PARTS)
            _check_shapes(params, config, source=str(folder))
            return params, config

        tokenizer = run[0] / TOKENIZER_FILE
        return _Source(
            lambda _, only: read(only),
            lambda size: config_of_run(run[0]),
            lambda: tokenizer if tokenizer.is_file() else None,
        )
    module = open_clip if open_clip.is_folder(folder) else hugging_face
    if module is open_clip or (folder / "config.json").is_file():
        return _Source(
            lambda _, only: module.read(folder, only_image=only),
            lambda size: module.read_config(folder),
            lambda: hf_inputs.tokenizer_file(folder),
        )
    other = next((f"{is_a}: {fix}" for name, (is_a, fix) in _OTHERS.items() if (folder / name).exists()), None)
    raise UserError(f"folder {str(src)!r} is {other or f'not a model; a model is {SOURCES}'}")


def _no_folder(path: Path, src: str) -> Exception:
    """What is wrong with a source that is neither a folder nor an npz."""
    if path.suffix == ".safetensors":
        return UserError(
            f"{src!r} is one file of a Hugging Face model; name the folder that has its config.json as well"
        )
    if path.suffix in _PICKLED and (path.exists() or path.parent.is_dir()):
        return UserError(
            f"{src!r} is a file of torch, which may run code when it is read; save the model with save_pretrained(FOLDER) of "
            f"transformers, which writes safetensors, and name that folder"
        )
    if path.exists():
        return UserError(f"{src!r} is not a model; a model is {SOURCES}")
    if _HUB_ID.fullmatch(src) and not path.parent.exists():
        return FileNotFoundError(
            f"nothing at {src!r}; if it is a model on the Hugging Face hub, download it and name the folder: "
            f"hf download {src} --local-dir DIR"
        )
    return FileNotFoundError(f"nothing at {src!r}; a model is {SOURCES}")


def _check_shapes(params: dict[str, Any], config: ModelConfig, *, source: str) -> None:
    """Raises UserError if a run's config.json describes another model than its checkpoint holds."""
    flat = trees.flatten(params)
    found = {path: LazyArray(leaf.shape, lambda leaf=leaf: leaf, leaf.dtype.name) for path, leaf in flat.items()}
    key_maps.check_arrays(found, expected_shapes(config), source=source)


def _npz(src: str | Path, folder: Path) -> _Source:
    return _Source(
        lambda size, only: big_vision.read(src, image_size=size, only_image=only),
        lambda size: big_vision.read_config(src, image_size=size),
        lambda: hf_inputs.sentencepiece_file(folder),
    )


def config_of_run(workdir: Path) -> ModelConfig:
    """The architecture in a workdir's config.json."""
    tree = read_run_config(workdir, fields=("model",))["model"]
    return trees.build_dataclass(ModelConfig, tree, where=f"{workdir / CONFIG_FILE}: model")
