"""Any source of a model to its parameters: what every command calls SRC.

    a run's workdir | a checkpoint inside it | FILE.npz | FILE.npz:img | a Hugging Face folder | one of our exports

The trap: a folder can look like several of these. Our own exports are looked for first, then runs, then Hugging Face's
config.json, which a run has as well.
"""

from pathlib import Path
from typing import Any

from siglip.errors import UserError
from siglip.formats import big_vision, hugging_face
from siglip.models.resample import resample
from siglip.models.two_tower import ModelConfig
from siglip.trees import build_dataclass
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE

SOURCES = (
    "a run's workdir, a checkpoint inside it, FILE.npz, FILE.npz:img, a Hugging Face folder, or an exported folder"
)


def read_model(
    src: str | Path, image_size: int | tuple[int, int] | None = None, *, patch_size: int | tuple[int, int] | None = None
) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    """(params, config, SentencePiece file or None) of any source, as for `load`; the arrays are numpy, on no device."""
    image_size, patch_size = _height_width(image_size), _height_width(patch_size)
    # The size of the pictures is also a hint for files that do not tell theirs; at another patch size it is no such hint.
    params, config, tokenizer = _read(src, image_size if patch_size is None else None)
    params, config = resample(params, config, image_size=image_size, patch_size=patch_size)
    return params, config, tokenizer if tokenizer and tokenizer.is_file() else None


def _height_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None or isinstance(size, int):
        return size if size is None else (size, size)
    if len(size) not in (1, 2):
        raise UserError(f"size {tuple(size)}: give one side in pixels, or (height, width)")
    return size[0], size[-1]


def _read(src: str | Path, image_size: tuple[int, int] | None) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    file, _ = big_vision.split_subtree(src)
    if file.suffix == ".npz":
        return *big_vision.read(src, image_size=image_size), file.with_name(hugging_face.TOKENIZER_FILE)
    folder = Path(src)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{str(src)!r} is not a model; a model is {SOURCES}")
        raise FileNotFoundError(f"nothing at {str(src)!r}; a model is {SOURCES}")
    if (folder / big_vision.EXPORTED_NPZ).is_file():
        return *big_vision.read(
            folder / big_vision.EXPORTED_NPZ, image_size=image_size
        ), folder / hugging_face.TOKENIZER_FILE

    # Orbax is slow to import, and only runs need it.
    from siglip.workdir import checkpoint

    if checkpoint.is_run(folder):
        params, config, _ = checkpoint.read_run_params(folder)
        workdir = folder if (folder / CONFIG_FILE).is_file() else folder.resolve().parents[1]
        model = build_dataclass(ModelConfig, config["model"], where=f"{workdir / CONFIG_FILE}: model")
        return params, model, workdir / TOKENIZER_FILE
    if (folder / "config.json").is_file():
        return *hugging_face.read(folder), folder / hugging_face.TOKENIZER_FILE
    raise UserError(f"folder {str(src)!r} is not a model; a model is {SOURCES}")
