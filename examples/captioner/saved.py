"""A captioner on disk.

    encoder.npz           the image tower under the published names: any SRC of the toolkit, for a stage 3 or another decoder
    decoder.safetensors   "decoder/…" and "connector/…"
    captioner.json        the decoder's sizes, the prompt, and what was measured

Stage 2 changes the encoder, so it is saved with the captioner.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from examples.captioner.decoder import DecoderConfig
from examples.captioner.model import Captioner
from siglip.atomic import new_folder
from siglip.image_encoder import load_encoder
from siglip.trees import flatten, unflatten

ENCODER, _DECODER, _CONFIG = "encoder.npz", "decoder.safetensors", "captioner.json"


def save_captioner(folder: Path, captioner: Captioner, *, prompt: str, metrics: Mapping[str, Any]) -> None:
    """Writes a new folder, whole or not at all.

    Raises:
        FileExistsError: the folder exists.
    """
    captioner = jax.device_get(captioner)
    with new_folder(folder) as partial:
        captioner.encoder.save(partial / ENCODER)
        learned = flatten({"connector": captioner.connector, "decoder": captioner.decoder})
        save_file({path: np.ascontiguousarray(leaf) for path, leaf in learned.items()}, partial / _DECODER)
        about = {"decoder": dataclasses.asdict(captioner.config), "prompt": prompt, "metrics": metrics}
        about["image_size"] = captioner.encoder.spec.image_size
        (partial / _CONFIG).write_text(json.dumps(about, indent=1) + "\n")


def load_captioner(folder: str | Path) -> tuple[Captioner, str]:
    """A captioner with its encoder frozen, and the prompt that it was trained with.

    Raises:
        FileNotFoundError: there is none in the folder.
        UserError: its encoder is damaged.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {_CONFIG}; make one: python -m examples.captioner SRC --out DIR"
        )
    about = json.loads((folder / _CONFIG).read_text())
    encoder = load_encoder(folder / ENCODER, tuple(about["image_size"]))
    learned = jax.tree.map(jax.numpy.asarray, unflatten(load_file(folder / _DECODER)))
    return Captioner(encoder, learned["connector"], learned["decoder"], DecoderConfig(**about["decoder"])), about[
        "prompt"
    ]
