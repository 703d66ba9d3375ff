"""Any source of a model to its parameters: what every command calls SRC.

    a run's workdir | a checkpoint inside it | FILE.npz | FILE.npz:img | a Hugging Face folder | one of our exports

The trap: a folder can look like several of these. Our own exports are looked for first, then runs, then Hugging Face's
config.json, which a run has as well.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from siglip.errors import UserError
from siglip.formats import big_vision, hugging_face
from siglip.models.resample import resample
from siglip.models.two_tower import MODEL_PARTS, ModelConfig
from siglip.trees import build_dataclass
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE
from siglip.workdir.files import read_config as read_run_config

Size = tuple[int, int]

SOURCES = (
    "a run's workdir, a checkpoint inside it, FILE.npz, FILE.npz:img, a Hugging Face folder, or an exported folder"
)


class _Source(NamedTuple):
    """How one source is read. Both take the (height, width) that its images have where the files do not tell."""

    read: Callable[[Size | None], tuple[dict[str, Any], ModelConfig]]
    read_config: Callable[[Size | None], ModelConfig]
    tokenizer: Path


def read_model(
    src: str | Path, image_size: int | tuple[int, int] | None = None, *, patch_size: int | tuple[int, int] | None = None
) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    """(params, config, SentencePiece file or None) of any source, as for `load`; the arrays are numpy, on no device."""
    image_size, patch_size, source = _height_width(image_size), _height_width(patch_size), _locate(src)
    # The size of the images is also a hint for files that do not tell theirs; at another patch size it is not.
    params, config = source.read(image_size if patch_size is None else None)
    params, config = resample(params, config, image_size=image_size, patch_size=patch_size)
    return params, config, source.tokenizer if source.tokenizer.is_file() else None


def read_config(src: str | Path, image_size: tuple[int, int] | None = None) -> tuple[ModelConfig, Path | None]:
    """The (config, SentencePiece file or None) that `read_model` gives, without reading an array."""
    source = _locate(src)
    config = source.read_config(image_size)
    if image_size is not None:
        config = dataclasses.replace(config, image=dataclasses.replace(config.image, image_size=image_size))
    return config, source.tokenizer if source.tokenizer.is_file() else None


def _height_width(size: int | tuple[int, int] | None) -> Size | None:
    if size is None or isinstance(size, int):
        return size if size is None else (size, size)
    if len(size) not in (1, 2):
        raise UserError(f"size {tuple(size)}: give one side in pixels, or (height, width)")
    return size[0], size[-1]


def _locate(src: str | Path) -> _Source:
    file, _ = big_vision.split_subtree(src)
    if file.suffix == ".npz":
        return _npz(src, file.with_name(hugging_face.TOKENIZER_FILE))
    folder = Path(src)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{str(src)!r} is not a model; a model is {SOURCES}")
        raise FileNotFoundError(f"nothing at {str(src)!r}; a model is {SOURCES}")
    if (folder / big_vision.EXPORTED_NPZ).is_file():
        return _npz(folder / big_vision.EXPORTED_NPZ, folder / hugging_face.TOKENIZER_FILE)

    # Orbax is slow to import, and only runs need it.
    from siglip.workdir import checkpoint

    if run := checkpoint.run_of(folder):

        def read() -> tuple[dict[str, Any], ModelConfig]:
            params, *_ = checkpoint.read_run_params(folder)  # a term's own parameters are not the model's
            return {name: params[name] for name in MODEL_PARTS if name in params}, config_of_run(run[0])

        return _Source(lambda size: read(), lambda size: config_of_run(run[0]), run[0] / TOKENIZER_FILE)
    if (folder / "config.json").is_file():
        return _Source(
            lambda size: hugging_face.read(folder),
            lambda size: hugging_face.read_config(folder),
            folder / hugging_face.TOKENIZER_FILE,
        )
    raise UserError(f"folder {str(src)!r} is not a model; a model is {SOURCES}")


def _npz(src: str | Path, tokenizer: Path) -> _Source:
    return _Source(
        lambda size: big_vision.read(src, image_size=size),
        lambda size: big_vision.read_config(src, image_size=size),
        tokenizer,
    )


def config_of_run(workdir: Path) -> ModelConfig:
    """The architecture in a workdir's config.json."""
    tree = read_run_config(workdir, fields=("model",))["model"]
    return build_dataclass(ModelConfig, tree, where=f"{workdir / CONFIG_FILE}: model")
