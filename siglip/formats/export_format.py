"""What an export has to know about a format. Each format describes itself in its own module, as `EXPORT`;
siglip/exporting/export.py lists them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from siglip.errors import RunFailed
from siglip.models.naflex import Patches
from siglip.models.two_tower import ModelConfig

TOKENIZER_FILE = "spiece.model"  # beside every model whose texts it encodes
Layout = Literal["loop", "scan"]
Dtype = Literal["float32", "bfloat16"]
Outputs = dict[str, np.ndarray]


class ExportMismatch(RunFailed):
    """What was written does not read back as its source."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the source and its export are both fed.

    Attributes:
        name: "random" or "sample".
        images: float32 [b, h, w, 3] in [-1, 1], as our pipeline prepares them; `Patches` of a NaFlex model.
        tokens: int32 [k, l], likewise, or None for an image tower alone.
        files: the images as encoded files, for a format that decodes them itself.
        texts: the texts, for a format that tokenizes them itself; () where there is no tokenizer.
    """

    name: str
    images: np.ndarray | Patches
    tokens: np.ndarray | None
    files: Sequence[bytes] = ()
    texts: Sequence[str] = ()


def in_folder(packages: str, code: str, *, note: str = "") -> str:
    """An example for the model card: code to run in the folder, once the packages are installed."""
    return f"Run in this folder, with `pip install {packages}`{note}.\n\n```python\n{code.strip()}\n```"


def _nothing(config: ModelConfig, has_tokenizer: bool) -> Sequence[str]:
    return ()


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """A format that describes itself.

    Attributes:
        library: what loads it, as model hubs call it.
        write: (folder, params, config, *, tokenizer: Path | None, layout) -> None: writes the model into an empty folder.
            Raises UserError, before all else, where the format cannot express it. With a choice of `dtypes` it takes `dtype` too,
            with `has_shards` shard_bytes.
        example: (config, has tokenizer) -> text and code for the model card, run in the folder; HEIGHT, WIDTH and LENGTH in it
            become the model's numbers.
        outputs: (folder, inputs) -> what the written model gives, through the reader that its users have; None where that is
            `siglip.load`. Raises ExportMismatch.
        needs: packages of that reader; without them `siglip.load` reads the export back, and the report says so.
        contract: (config, has tokenizer) -> further lines for the model card on what to feed.
        warnings: (config, has tokenizer) -> what whoever exports should know.
        takes_files: it takes encoded images and raw texts, so noise cannot be fed to it.
        layouts: of the transformer's blocks, one by one or stacked.
        dtypes: of the weights in the file.
        has_shards: the weights may be divided over several files.
    """

    library: str
    write: Callable[..., None]
    example: Callable[[ModelConfig, bool], str]
    outputs: Callable[[Path, Sequence[Inputs]], list[Outputs]] | None = None
    needs: Sequence[str] = ()
    contract: Callable[[ModelConfig, bool], Sequence[str]] = _nothing
    warnings: Callable[[ModelConfig, bool], Sequence[str]] = _nothing
    takes_files: bool = False
    layouts: tuple[Layout, ...] = ("loop",)
    dtypes: tuple[Dtype, ...] = ("float32",)
    has_shards: bool = False
