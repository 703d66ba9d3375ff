"""Hugging Face SigLIP folders: config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

model_type "siglip" is a tower for images of one size, "siglip2" a NaFlex tower: the same arrays, but that the patch embedding is
a matrix and `num_patches`, a square, is the number of learned positions.

Written with the key names of transformers 4 (`vision_model.…`), which both 4.57 and 5.x load whole. Read in that
layout and in the one that transformers 5 writes for a lone vision tower, without the prefix; also from several
safetensors shards, and from folders of vision-language models and of classifiers (the image tower alone; the rest is not
read).

The trap: a vision tower in the version 5 layout loads into version 4 as random weights, with a warning only. So the
names are always version 4's, and every export is loaded back.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from siglip.errors import UserError
from siglip.formats import key_maps, pali_gemma
from siglip.formats.containers import LazyArray, open_safetensors, write_safetensors, written_bytes
from siglip.formats.export_format import TOKENIZER_FILE, Dtype
from siglip.formats.hf_inputs import preprocessor_json, read_naflex_pixels, read_pixels, read_tokens, with_tokens
from siglip.formats.hf_tokenizer import convert
from siglip.formats.infer_config import expected_shapes
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.models.variants import VARIANTS, BlockConfig, Variant
from siglip.models.vit import sincos2d
from siglip.trees import flatten, read_json, unflatten

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_VISION_TYPE = "siglip_vision_model"
_TEXT_TYPE = "siglip_text_model"
_NAFLEX = {
    "siglip": "siglip2",
    "siglip_vision_model": "siglip2_vision_model",
    "siglip_text_model": "siglip2_text_model",
}
# Our own field: transformers has a default, max_num_patches in preprocessor_config.json, but no limit.
_LIMIT = "siglip_max_patches"
_NAFLEX_TYPES = ("siglip2", "siglip2_vision_model")
_SIZES = {
    "hidden_size": "width", "intermediate_size": "mlp_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
}  # fmt: skip
# What config.json leaves out takes these values in transformers.
_VARIANT = {theirs: getattr(VARIANTS["B"], ours) for theirs, ours in _SIZES.items()}
_VISION_DEFAULTS = _VARIANT | {"image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
_NAFLEX_DEFAULTS = _VARIANT | {"num_patches": 256, "patch_size": 16, "num_channels": 3, "vision_use_head": True}
_NAFLEX_DEFAULTS |= {_LIMIT: NaflexConfig.max_patches}
_TEXT_DEFAULTS = _VARIANT | {"vocab_size": 32_000, "max_position_embeddings": 64}
_FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}


def read(folder: str | Path, *, only_image: bool = False) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (nested dict of float32 arrays, loop layout) and the architecture of a SigLIP folder.

    From a vision-language model it reads the vision tower only, without the language model and the connector to it, and from a
    SiglipForImageClassification the image tower without the classifier.

    Args:
        only_image: reads the arrays of the image tower alone; the others are only checked.

    Raises:
        FileNotFoundError: config.json or the safetensors weights are missing.
        UserError: another kind of model, or weights that do not fit the config; every bad key is named.
    """
    folder, config = Path(folder), read_config(folder, with_texts=not only_image)
    tree = _read_json(folder / "config.json")
    with open_safetensors(_weight_files(folder)) as stored:
        state = {k: array for k, array in key_maps.unwrapped(stored).items() if not k.endswith(".position_ids")}
        if pali_gemma.has_tower(tree):
            state = pali_gemma.hugging_face_tower(state, with_head=config.image.pool == "map", source=str(folder))
        elif _is_classifier(tree):
            state = {key: array for key, array in state.items() if not key.startswith("classifier.")}
        elif config.text is None and not any(key.startswith("vision_model.") for key in state):
            state = {f"vision_model.{key}": array for key, array in state.items()}
        depth = max(tower.spec.depth for tower in (config.image, config.text) if tower)
        if depth > len(state):
            raise UserError(f"{folder}/config.json says {depth} layers, but the weights are {len(state)} arrays in all")
        ours = expected_shapes(config)
        entry_of = _entries(config)
        key_maps.check_arrays(state, key_maps.torch_shapes(ours, entry_of), source=str(folder))
        if only_image:
            ours = {path: shape for path, shape in ours.items() if path.startswith("img/")}
            config = dataclasses.replace(config, text=None, out_dim=(None, None))
        return unflatten({path: key_maps.from_torch(state, entry_of(path), ours[path]) for path in ours}), config


def read_config(folder: str | Path, *, with_texts: bool = True) -> ModelConfig:
    """The architecture, and how inputs are prepared. Raises as `read`, but for the weights, which it does not open.

    Args:
        with_texts: False takes no look at the tokenizer.
    """
    path = Path(folder) / "config.json"
    tree = _read_json(path)
    config = model_config(tree, source=str(path))
    image, text = config.image, config.text
    if image.naflex is None:
        pixels = read_pixels(path.parent, image_size=image.image_size, inside=pali_gemma.has_tower(tree))
        image = dataclasses.replace(image, pixels=pixels)
    else:
        pixels, patches = read_naflex_pixels(
            path.parent, patch_px=image.patch[0], patches=image.naflex.patches, inside=pali_gemma.has_tower(tree)
        )
        naflex = NaflexConfig(patches, max(patches, image.naflex.max_patches))
        image = dataclasses.replace(image, pixels=pixels, naflex=naflex)
    if with_texts and text is not None:
        text = with_tokens(text, read_tokens(path.parent), path.parent)
    return dataclasses.replace(config, image=image, text=text)


def write(
    folder: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    tokenizer: Path | None = None,
    dtype: Dtype = "float32",
    shard_bytes: int | None = None,
) -> None:
    """Writes a folder that `transformers` loads: both towers, or the vision tower alone when `config.text` is None.

    Args:
        tokenizer: SentencePiece model of the text tower; without one the folder has no tokenizer.
        dtype: of the weights; temperature, bias and fixed positions are float32 in either.
        shard_bytes: the weights become several files of at most so many bytes, with an index; None: one file.

    Raises:
        UserError: Hugging Face's SigLIP cannot express this model.
    """
    check_expressible(config)
    exact = {"t", "b"}
    flat = key_maps.unstack_blocks({path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()})
    if config.image.posemb == "sincos2d":
        flat["img/pos_embedding"] = sincos2d(config.image.grid, config.image.spec.width)
        exact.add("img/pos_embedding")
    if config.text is not None and config.out_dim[1] is None:
        width = config.text.spec.width
        flat |= {"txt/head/kernel": np.eye(width, dtype=np.float32), "txt/head/bias": np.zeros(width, np.float32)}

    dtypes = {path: "float32" if path in exact else dtype for path in flat}
    _write_weights(folder, key_maps.torch_arrays(flat, dtypes, _entries(config)), shard_bytes)
    _write_json(folder / "config.json", config_json(config, dtype))
    image, text = config.image, config.text
    preprocessor = preprocessor_json(image, with_texts=text is not None)
    _write_json(folder / "preprocessor_config.json", preprocessor)
    if text is not None and tokenizer is not None:
        model, source = tokenizer.read_bytes(), str(tokenizer)
        options = {"length": text.length, "processor": preprocessor["processor_class"]}
        settings = convert.tokenizer_config(model, text.tokens, source=source, **options)
        _write_json(folder / "tokenizer.json", convert.tokenizer_json(model, text.tokens, source=source))
        _write_json(folder / "tokenizer_config.json", settings)
        (folder / TOKENIZER_FILE).write_bytes(model)


def check_expressible(config: ModelConfig) -> None:
    """Raises UserError, with what to do instead, for a model that Hugging Face's SigLIP has no parameters for."""
    image, text, instead = config.image, config.text, "export with --format bigvision"
    if config.out_dim[0] is not None:
        raise UserError(f"Hugging Face's SigLIP has no linear image head (out_dim[0]={config.out_dim[0]}); {instead}")
    if image.pool not in ("map", "none"):
        raise UserError(f"Hugging Face's SigLIP pools images with 'map' or not at all, not {image.pool!r}; {instead}")
    if not image.final_norm:
        raise UserError(
            f"Hugging Face's SigLIP ends in a LayerNorm, which a tower that was cut at an earlier layer lacks; {instead}"
        )
    if image.grid[0] != image.grid[1] and image.naflex is not None:
        raise UserError(f"Hugging Face's SigLIP 2 has a square of learned positions, not {image.grid}; {instead}")
    if image.image_size[0] != image.image_size[1] or image.patch[0] != image.patch[1]:
        raise UserError(
            f"Hugging Face's SigLIP takes square images and patches, not {image.image_size} px in patches of "
            f"{image.patch}; {instead}"
        )
    standard = BlockConfig()
    if image.block != standard or (text is not None and (text.block != standard or text.embed_bottleneck is not None)):
        raise UserError(
            f"Hugging Face's SigLIP has ViT's blocks and no narrow token embeddings, not image.block={image.block}"
            + ("" if text is None else f", text.block={text.block}, text.embed_bottleneck={text.embed_bottleneck}")
            + f"; {instead}"
        )
    if text is None:
        return
    if image.pool == "none":
        raise UserError("image.pool='none' gives no image embedding to compare with texts; export with --tower image")
    if text.pool != "last":
        raise UserError(
            f"Hugging Face's SigLIP pools texts at the last token, not {text.pool!r}; {instead} or --tower image"
        )


def config_json(config: ModelConfig, dtype: Dtype = "float32") -> dict[str, Any]:
    """The content of config.json."""
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
    model, alone, kind = "SiglipModel", "SiglipVisionModel", str
    if image.naflex is not None:
        model, alone, kind = "Siglip2Model", "Siglip2VisionModel", _NAFLEX.__getitem__
        del vision["image_size"]
        vision |= {"model_type": kind(_VISION_TYPE), "num_patches": image.grid[0] * image.grid[1]}
        vision |= {_LIMIT: image.naflex.max_patches} if image.naflex.max_patches != NaflexConfig.max_patches else {}
    if text is None:
        return {"architectures": [alone], "torch_dtype": dtype, **vision}
    text_json = {
        "model_type": kind(_TEXT_TYPE),
        **_sizes_json(text.spec),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.length,
        "projection_size": config.embedding_dims[1],
        **_FIXED,
        "pad_token_id": 1 if text.tokens.pad_id is None else text.tokens.pad_id,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return {
        "architectures": [model],
        "model_type": kind("siglip"),
        "torch_dtype": dtype,
        "vision_config": vision,
        "text_config": text_json,
    }


def model_config(tree: Mapping[str, Any], *, source: str) -> ModelConfig:
    """The architecture that a config.json describes; for a PaliGemma, its vision tower's.

    Raises:
        UserError: it is not a SigLIP, or its activations or norms are not the published ones.
    """
    vision, text = _parts(tree, source)
    _check_fields(vision, text, source)
    try:
        naflex = "num_patches" in vision
        size = math.isqrt(vision["num_patches"]) * vision["patch_size"] if naflex else vision["image_size"]
        if naflex and (size // vision["patch_size"]) ** 2 != vision["num_patches"]:
            raise UserError(
                f"num_patches={vision['num_patches']} is not a square; the learned positions need a square grid"
            )
        image = ImageConfig(
            **_spec(vision).fields(patch=vision["patch_size"]),
            image_size=(size, size),
            pool="map" if vision["vision_use_head"] else "none",
            naflex=NaflexConfig(min(NaflexConfig.patches, vision[_LIMIT]), vision[_LIMIT]) if naflex else None,
        )
        if text is None:
            return ModelConfig(image=image, text=None, out_dim=(None, None))
        spec = _spec(text)
        text_config = TextConfig(**spec.fields(), vocab_size=text["vocab_size"], length=text["max_position_embeddings"])
        return ModelConfig(image=image, text=text_config, out_dim=(None, text.get("projection_size") or spec.width))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _parts(tree: Mapping[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(vision config, text config or None), with transformers' defaults for what config.json leaves out."""
    kind = tree.get("model_type")
    if kind in ("siglip", "siglip2"):
        vision, text = (tree.get(name) or {} for name in ("vision_config", "text_config"))
        if not isinstance(vision, dict) or not isinstance(text, dict):
            raise UserError(f"{source}: vision_config and text_config are objects in a SigLIP's config; copy it again")
        return _vision(vision, kind, source), None if _is_classifier(tree) else _TEXT_DEFAULTS | text
    if kind in (_VISION_TYPE, _NAFLEX[_VISION_TYPE]):
        return _vision(dict(tree), kind, source), None
    if pali_gemma.has_tower(tree):
        vision = pali_gemma.vision_config(tree, source=source)
        return _vision(vision, vision["model_type"], source), None
    fix = (
        f"'siglip', {_VISION_TYPE!r} and {pali_gemma.MODEL_TYPE!r} can, also as 'siglip2', and models whose vision_config is a "
        f"{_VISION_TYPE!r} or a {_NAFLEX[_VISION_TYPE]!r}"
    )
    if kind in (_TEXT_TYPE, _NAFLEX[_TEXT_TYPE]):
        fix = "it is a text tower alone; take the folder of the whole model, model_type 'siglip' or 'siglip2'"
    raise UserError(f"{source}: model_type={kind!r} cannot be read: {fix}")


def _vision(vision: dict[str, Any], kind: str, source: str) -> dict[str, Any]:
    """The vision config of a `kind` of model, with its defaults. Raises UserError if it is the other kind's."""
    own, other, defaults = "image_size", "num_patches", _VISION_DEFAULTS
    if kind in _NAFLEX_TYPES:
        own, other, defaults = other, own, _NAFLEX_DEFAULTS
    if other in vision and own not in vision:
        raise UserError(
            f"{source}: model_type={kind!r} with {other}={vision[other]!r} mixes images of one size and NaFlex: 'siglip' has "
            "image_size, 'siglip2' has num_patches"
        )
    return defaults | {name: value for name, value in vision.items() if name != other}


def _is_classifier(tree: Mapping[str, Any]) -> bool:
    """Whether it is an image tower with a linear classifier, whose config still describes a text tower that it does not have."""
    return tree.get("architectures") in (["SiglipForImageClassification"], ["Siglip2ForImageClassification"])


def _check_fields(vision: Mapping[str, Any], text: Mapping[str, Any] | None, source: str) -> None:
    bad = []
    vision_defaults = _NAFLEX_DEFAULTS if "num_patches" in vision else _VISION_DEFAULTS
    for part, defaults in ((vision, vision_defaults), (text, _TEXT_DEFAULTS)):
        if part is None:
            continue
        kind = "vision" if part is vision else "text"
        for field, only in (*_FIXED.items(), ("num_channels", 3)):
            if part.get(field, only) != only:
                bad.append(f"{kind} {field}={part[field]!r} is not supported, only {only!r}")
        sizes = [field for field, default in defaults.items() if type(default) is int]
        sizes += ["projection_size"] if part.get("projection_size") is not None else []
        bad += [
            f"{kind} {f}={part[f]!r} is not a positive number" for f in sizes if type(part[f]) is not int or part[f] < 1
        ]
    if type(vision["vision_use_head"]) is not bool:
        bad.append(f"vision vision_use_head={vision['vision_use_head']!r} is neither true nor false")
    if bad:
        raise UserError(f"{source}: {'; '.join(bad)}")


def _spec(part: Mapping[str, Any]) -> Variant:
    return Variant(**{ours: part[theirs] for theirs, ours in _SIZES.items()})


def _sizes_json(spec: Variant) -> dict[str, int]:
    return {theirs: getattr(spec, ours) for theirs, ours in _SIZES.items()}


def _entries(config: ModelConfig) -> Callable[[str], key_maps.Entry]:
    return functools.partial(key_maps.hugging_face_entry, naflex=config.image.naflex is not None)


def _write_weights(folder: Path, arrays: Mapping[str, LazyArray], shard_bytes: int | None) -> None:
    """One file, or several with an index, as transformers divides them: in order, a larger array alone in its file."""
    shards: list[dict[str, LazyArray]] = [{}]
    room: float = shard_bytes or math.inf
    for key, array in arrays.items():
        if shards[-1] and written_bytes(array) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = array
        room -= written_bytes(array)
    if len(shards) == 1:
        write_safetensors(folder / _WEIGHTS, arrays)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(map(written_bytes, arrays.values()))
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _weight_files(folder: Path) -> list[Path]:
    files = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{folder / _INDEX} has no weight_map {{key: file}}; copy it again")
        files = sorted(set(shards.values()))
    # A name with a path in it would read files outside the folder.
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}; only safetensors weights are read, pickled ones never"
        )
    return [folder / name for name in files]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; is it a Hugging Face model folder?")
    return read_json(path, fix="copy it again")


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
