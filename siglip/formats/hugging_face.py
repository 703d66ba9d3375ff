"""Hugging Face SigLIP folders: config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

Written with the key names of transformers 4 (`vision_model.…`), which both 4.57 and 5.x load whole. Read in that
layout and in the one that transformers 5 writes for a lone vision tower, without the prefix; also from several
safetensors shards.

The trap: a vision tower in the version 5 layout loads into version 4 as random weights, with a warning only. So the
names are always version 4's, and an export is proved by loading it back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from siglip.formats import names
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.models.variants import Variant, name_of
from siglip.models.vit import sincos2d
from siglip.trees import flatten, unflatten

TOKENIZER_FILE = "spiece.model"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VISION_TYPE = "siglip_vision_model"
_TEXT_TYPE = "siglip_text_model"
# What config.json leaves out takes these values in transformers.
_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION_DEFAULTS = _SIZES | {"image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
_TEXT_DEFAULTS = _SIZES | {"vocab_size": 32_000, "max_position_embeddings": 64}
_FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_PIPELINE_LENGTH = 64


def read(folder: str | Path) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (nested dict of float32 arrays, loop layout) and the architecture of a SigLIP folder.

    Raises:
        FileNotFoundError: config.json or the safetensors weights are missing.
        ValueError: another kind of model, or weights that do not fit the config; every bad key is named.
    """
    folder = Path(folder)
    config = model_config(_read_json(folder / "config.json"), source=str(folder / "config.json"))
    state = _read_weights(folder)
    if config.text is None and not any(key.startswith("vision_model.") for key in state):
        state = {f"vision_model.{key}": array for key, array in state.items()}
    state = {key: array for key, array in state.items() if not key.endswith(".position_ids")}

    ours = names.flat_shapes(flatten(param_shapes(config)))
    names.check_shapes(names.flat_shapes(state), _their_shapes(ours), source=str(folder))
    flat = {}
    for path, shape in ours.items():
        key, kind, part = names.hugging_face_entry(path)
        array = state[key] if part is None else np.split(state[key], 3)[part]
        flat[path] = names.from_hugging_face(np.asarray(array, np.float32), kind, shape)
    return unflatten(flat), config


def write(folder: Path, params: Mapping[str, Any], config: ModelConfig, *, tokenizer: Path | None = None) -> None:
    """Writes a folder that `transformers` loads: both towers, or the vision tower alone when `config.text` is None.

    Args:
        tokenizer: SentencePiece model of the text tower; without one the folder has no tokenizer.

    Raises:
        ValueError: Hugging Face's SigLIP cannot express this model.
    """
    from safetensors.numpy import save_file

    check_expressible(config)
    flat = names.unstack_blocks({path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()})
    if config.image.posemb == "sincos2d":
        flat["img/pos_embedding"] = sincos2d(config.image.grid, config.image.spec.width)
    if config.text is not None and config.out_dim[1] is None:
        width = config.text.spec.width
        flat |= {"txt/head/kernel": np.eye(width, dtype=np.float32), "txt/head/bias": np.zeros(width, np.float32)}

    state, thirds = {}, {}
    for path, array in flat.items():
        key, kind, part = names.hugging_face_entry(path)
        array = np.ascontiguousarray(names.to_hugging_face(array, kind))
        if part is None:
            state[key] = array
        else:
            thirds.setdefault(key, {})[part] = array
    state |= {key: np.concatenate([parts[i] for i in range(3)]) for key, parts in thirds.items()}
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", config_json(config))
    _write_json(folder / "preprocessor_config.json", _preprocessor_json(config))
    if config.text is not None and tokenizer is not None:
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
        special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        _write_json(folder / "special_tokens_map.json", special)
        _write_json(folder / "tokenizer_config.json", _tokenizer_json(config.text) | special)


def check_expressible(config: ModelConfig) -> None:
    """Refuses what Hugging Face's SigLIP has no parameters for.

    Raises:
        ValueError: in one line, what it is and what to do instead.
    """
    image, text, instead = config.image, config.text, "export with --format bigvision"
    if config.out_dim[0] is not None:
        raise ValueError(f"Hugging Face's SigLIP has no linear image head (out_dim[0]={config.out_dim[0]}); {instead}")
    if image.pool not in ("map", "none"):
        raise ValueError(f"Hugging Face's SigLIP pools images with 'map' or not at all, not {image.pool!r}; {instead}")
    if image.image_size[0] != image.image_size[1] or image.patch[0] != image.patch[1]:
        raise ValueError(
            f"Hugging Face's SigLIP takes square images and patches, not {image.image_size} px in patches of "
            f"{image.patch}; {instead}"
        )
    if text is None:
        return
    if image.pool == "none":
        raise ValueError("image.pool='none' gives no image embedding to compare with texts; export with --tower image")
    if text.pool != "last":
        raise ValueError(
            f"Hugging Face's SigLIP pools texts at the last token, not {text.pool!r}; {instead} or --tower image"
        )


def pipeline_length_warning(config: ModelConfig) -> str:
    """A warning where the zero-shot pipeline of transformers, which pads texts to 64 tokens, cannot run; else empty."""
    if config.text is None or config.text.length >= _PIPELINE_LENGTH:
        return ""
    return (
        f"texts have {config.text.length} tokens, but pipeline('zero-shot-image-classification') pads to "
        f"{_PIPELINE_LENGTH}; call the processor and the model directly"
    )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What goes into config.json."""
    image, text = config.image, config.text
    vision = {
        "model_type": _VISION_TYPE,
        **_sizes_json(image.spec),
        "num_channels": 3,
        "image_size": image.image_size[0],
        "patch_size": image.patch[0],
        **_FIXED,
        "vision_use_head": image.pool == "map",
    }
    if text is None:
        return {"architectures": ["SiglipVisionModel"], "torch_dtype": "float32", **vision}
    text_json = {
        "model_type": _TEXT_TYPE,
        **_sizes_json(text.spec),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.length,
        "projection_size": config.embedding_dims[1],
        **_FIXED,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "torch_dtype": "float32",
        "vision_config": vision,
        "text_config": text_json,
    }


def model_config(tree: Mapping[str, Any], *, source: str) -> ModelConfig:
    """The architecture that a config.json describes.

    Raises:
        ValueError: it is no fixed-resolution SigLIP, or one with other activations or norms than the published ones.
    """
    kind = tree.get("model_type")
    if kind not in ("siglip", _VISION_TYPE):
        raise ValueError(f"{source}: model_type={kind!r} cannot be read; 'siglip' and {_VISION_TYPE!r} can")
    vision = _VISION_DEFAULTS | dict(tree.get("vision_config", {}) if kind == "siglip" else tree)
    text = _TEXT_DEFAULTS | dict(tree.get("text_config", {})) if kind == "siglip" else None
    for part in filter(None, (vision, text)):
        for field, only in (*_FIXED.items(), ("num_channels", 3)):
            if part.get(field, only) != only:
                raise ValueError(f"{source}: {field}={part[field]!r} is not supported, only {only!r}")
    size, spec = vision["image_size"], _spec(vision)
    name = name_of(spec)
    image = ImageConfig(
        variant=f"{name or 'B'}/{vision['patch_size']}",
        **_overrides(spec),
        image_size=(size, size),
        pool="map" if vision["vision_use_head"] else "none",
    )
    if text is None:
        return ModelConfig(image=image, text=None, out_dim=(None, None))
    spec = _spec(text)
    text_config = TextConfig(
        variant=name_of(spec) or "B",
        **_overrides(spec),
        vocab_size=text["vocab_size"],
        length=text["max_position_embeddings"],
    )
    return ModelConfig(image=image, text=text_config, out_dim=(None, text.get("projection_size") or spec.width))


def _spec(part: Mapping[str, Any]) -> Variant:
    return Variant(
        part["hidden_size"], part["num_hidden_layers"], part["intermediate_size"], part["num_attention_heads"]
    )


def _overrides(spec: Variant) -> dict[str, int]:
    return {} if name_of(spec) else vars(spec)


def _sizes_json(spec: Variant) -> dict[str, int]:
    return {
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
    }


def _preprocessor_json(config: ModelConfig) -> dict[str, Any]:
    height, width = config.image.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        **({} if config.text is None else {"processor_class": "SiglipProcessor"}),
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # PIL's BILINEAR, antialiased, as our data pipeline resizes; the class default is bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


def _tokenizer_json(text: TextConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "SiglipTokenizer",
        "processor_class": "SiglipProcessor",
        "model_max_length": text.length,
        "do_lower_case": True,
        "padding_side": "right",
        # The class default has an attention mask; the towers attend to pads, as in training.
        "model_input_names": ["input_ids"],
    }


def _their_shapes(ours: Mapping[str, names.Shape]) -> dict[str, names.Shape]:
    shapes = {}
    for path, shape in ours.items():
        key, kind, part = names.hugging_face_entry(path)
        rows, *rest = names.hugging_face_shape(shape, kind)
        shapes[key] = (rows, *rest) if part is None else (3 * rows, *rest)
    return shapes


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if (folder / _INDEX).is_file():
        files = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    else:
        files = [_WEIGHTS]
    state = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; only safetensors weights are read, pickled ones never")
        try:
            state |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({error}); copy it again") from None
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}; is it a Hugging Face model folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no JSON object")
    return tree


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
