"""The vision tower of a PaliGemma or its like: a SigLIP image tower without pooling, in a model twenty times its size.

    tokens = LN(blocks(patches));   what the language model reads = tokens @ kernel + bias        (PaliGemma, arXiv:2407.07726)

In big_vision's npz the tower is img/…, beside llm/…; in Hugging Face's folders (PaliGemma, Gemma 3, LLaVA) it is
`vision_tower.vision_model.…` (as transformers 4 writes it) or `vision_tower.…` (version 5), in Idefics3 and SmolVLM
`vision_model.…`, beside the language model.

The trap: the connector after the tower (img/head in the npz, `multi_modal_projector` in the folder) maps the tokens into one
particular language model. It is not part of the tower and is left out: the tokens are those before it. And transformers
4.57 gives the patches of Idefics3 and SmolVLM other positions than earlier versions (by rounding, the first two of a row share
one); here they have those of the grid.
"""

import re
from collections.abc import Mapping
from typing import Any

from siglip.errors import UserError
from siglip.formats.containers import LazyArray
from siglip.trees import is_one_of

MODEL_TYPE = "paligemma"

_TOWER = re.compile(r"(?:model\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?(.+)")
# Vision towers that are SigLIP's, by their model_type, with what their config leaves out where that is not SigLIP's own.
_IDEFICS = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
_IDEFICS |= {"image_size": 224, "patch_size": 32}
_TOWERS: dict[str, dict[str, int]] = {"siglip_vision_model": {}, "siglip2_vision_model": {}}
_TOWERS |= dict.fromkeys(("idefics3", "idefics3_vision", "smolvlm_vision"), _IDEFICS)


def has_tower(tree: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model around a SigLIP image tower."""
    vision = tree.get("vision_config")
    kind = tree.get("model_type")
    around = (
        isinstance(vision, Mapping)
        and is_one_of(vision.get("model_type"), _TOWERS)
        and kind not in ("siglip", "siglip2")
    )
    return around or kind == MODEL_TYPE


def is_pali_gemma(arrays: Mapping[str, LazyArray]) -> bool:
    """Whether a flat big_vision tree is a PaliGemma."""
    return any(path.startswith("llm/") for path in arrays)


def image_tower(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The vision tower of a flat big_vision tree, under img/."""
    tower = {path: array for path, array in arrays.items() if path.startswith("img/")}
    return {path: array for path, array in tower.items() if not path.startswith("img/head/")}


def hugging_face_tower(state: Mapping[str, LazyArray], *, with_head: bool, source: str) -> dict[str, LazyArray]:
    """The vision tower of a Hugging Face state dict, under `vision_model.`; some files have a head that their model does not use.

    Raises:
        UserError: an array of the tower is there twice.
    """
    tower: dict[str, LazyArray] = {}
    for key, array in state.items():
        match = _TOWER.fullmatch(key)
        if match and (with_head or not match[1].startswith("head.")):
            name = f"vision_model.{match[1]}"
            if name in tower:
                raise UserError(
                    f"{source} holds the vision tower's {match[1]} under two names, one of them {key}; remove one"
                )
            tower[name] = array
    return tower


def vision_config(tree: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """A `siglip_vision_model` config, or a `siglip2_vision_model`'s, from the whole model's: without a pooling head unless the
    config says otherwise.

    Raises:
        UserError: the config is damaged.
    """
    vision = tree.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise UserError(f"{source}: vision_config={vision!r} is not an object; copy it again")
    kind = str(vision.get("model_type"))
    own = kind if kind == "siglip2_vision_model" else "siglip_vision_model"
    return {"vision_use_head": False} | _TOWERS.get(kind, {}) | vision | {"model_type": own}
