"""The vision tower of a PaliGemma: a SigLIP image tower without pooling, inside a model twenty times its size.

    tokens = LN(blocks(patches));   what the language model reads = tokens @ kernel + bias        (PaliGemma, arXiv:2407.07726)

In big_vision's npz the tower is img/…, beside llm/…; in Hugging Face's folder it is `vision_tower.vision_model.…` (as
transformers 4 writes it) or `vision_tower.…` (version 5), beside `language_model.…`.

The trap: the connector after the tower (img/head in the npz, `multi_modal_projector` in the folder) maps the tokens into one
particular language model. It is not part of the tower and is left out: the tokens are those before it.
"""

import re
from collections.abc import Mapping
from typing import Any

from siglip.errors import UserError
from siglip.formats.containers import LazyArray

MODEL_TYPE = "paligemma"

_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")


def is_pali_gemma(arrays: Mapping[str, LazyArray]) -> bool:
    """Whether a flat big_vision tree is a PaliGemma."""
    return any(path.startswith("llm/") for path in arrays)


def image_tower(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The vision tower of a flat big_vision tree, under img/."""
    tower = {path: array for path, array in arrays.items() if path.startswith("img/")}
    return {path: array for path, array in tower.items() if not path.startswith("img/head/")}


def hugging_face_tower(state: Mapping[str, LazyArray], *, source: str) -> dict[str, LazyArray]:
    """The vision tower of a Hugging Face state dict, under `vision_model.`

    Raises:
        UserError: an array of the tower is there twice.
    """
    tower: dict[str, LazyArray] = {}
    for key, array in state.items():
        if match := _TOWER.fullmatch(key):
            name = f"vision_model.{match[1]}"
            if name in tower:
                raise UserError(
                    f"{source} holds the vision tower's {match[1]} under two names, one of them {key}; remove one"
                )
            tower[name] = array
    return tower


def vision_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A `siglip_vision_model` config from a PaliGemma's: without a pooling head unless the config says otherwise.

    Raises:
        UserError: the config is damaged.
    """
    vision = tree.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise UserError("vision_config is not an object in this PaliGemma's config.json; copy it again")
    return {"vision_use_head": False} | vision | {"model_type": "siglip_vision_model"}
