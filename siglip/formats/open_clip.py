"""SigLIP as timm and open_clip keep it: a folder with their config and their safetensors. Read only.

    timm        config.json, "architecture": "vit_…_siglip_…"     model.safetensors               the image tower
                or "naflexvit_…_siglip"
    open_clip   open_clip_config.json                             open_clip_model.safetensors     both towers

Names of tensors: key_maps.OPEN_CLIP. What shows in the tensors (other norms, heads, class tokens) is found there; what does not
(masks, pooling, epsilons) is read from the config, and is an error where the towers here compute something else.

The trap: published SigLIP was trained with the tanh approximation of GELU, but timm and open_clip compute the exact one for most
of their SigLIP names (1e-3 apart). Here it is always the approximation, as in training. And timm resizes the positions of a
NaFlex tower bicubic unless told otherwise; here it is bilinear, as in training.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip.errors import UserError
from siglip.formats import key_maps
from siglip.formats.containers import open_safetensors
from siglip.formats.hf_inputs import read_tokens, tokenizer_file, with_tokens
from siglip.formats.infer_config import GEMMA_PIECES, expected_shapes
from siglip.models.naflex import NaflexConfig
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.models.variants import VARIANTS, Variant
from siglip.models.vit import PixelConfig
from siglip.trees import is_one_of, read_json, unflatten

logger = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
_TIMM_CONFIG = "config.json"
_NAME = re.compile(r"vit_(\w+)_patch(\d+)_siglip(_gap)?_(\d+)(?:\..+)?")
_NAFLEX_NAME = re.compile(r"naflexvit_(\w+)_patch(\d+)_siglip(?:\..+)?")
_SIZES = {"base": ("B", 4.0), "large": ("L", 4.0), "so400m": ("So400m", 3.7362), "giantopt": ("g-opt", 4.0)}
_POOLS = {"map": "map", "avg": "gap", "": "none"}
# Arguments of timm's models that we follow, and those that change nothing here or leave a trace in the tensors.
_FOLLOWED = {"embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "img_size", "global_pool", "act_layer"}
_NAFLEX_FOLLOWED = _FOLLOWED - {"img_size"} | {"pos_embed_grid_size", "pos_embed_interp_mode"}
_HARMLESS = re.compile(
    r".*drop(_path)?_rate|num_classes|in_chans|class_token|fc_norm|(dynamic|strict)_img_size|weight_init|fix_init"
)
# Arguments of open_clip's text tower: its default, and all that can be computed here.
_TEXT_ARGS = {"no_causal_mask": (False, True), "pool_type": ("argmax", "last"), "proj_bias": (False, True)}
_TEXT_SIZES = {"width": 512, "heads": 8, "layers": 12, "vocab_size": 49_408, "context_length": 77}
_CLEANED = {"canonicalize": ("text", "texts"), "lower": ("text", "none"), "whitespace": ("none", "none")}
_EXACT_GELU = (
    "%s: the exact GELU there; here it is the tanh approximation, which SigLIP was trained with (about 1e-3 apart)"
)


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a model of timm or of open_clip, and none of transformers."""
    config = folder / _TIMM_CONFIG
    tree = read_json(config, fix="copy it again") if config.is_file() else {}
    return "model_type" not in tree and ("architecture" in tree or (folder / CONFIG_FILE).is_file())


def read(folder: str | Path, *, only_image: bool = False) -> tuple[dict[str, Any], ModelConfig]:
    """Parameters (nested dict of float32 arrays, loop layout) and the architecture.

    Args:
        only_image: reads the arrays of the image tower alone; the others are only checked.

    Raises:
        FileNotFoundError: there are no safetensors.
        UserError: another model than SigLIP, or weights that do not fit the config; every bad key is named.
    """
    folder = Path(folder)
    config, is_timm = read_config(folder, with_texts=not only_image), not (folder / CONFIG_FILE).is_file()
    weights = folder / ("model.safetensors" if is_timm else "open_clip_model.safetensors")
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has no {weights.name}; only safetensors weights are read, pickled ones never"
        )
    prefixes = {"img": "" if is_timm else "visual.trunk.", "txt": "text."}

    def entry_of(path: str) -> key_maps.Entry:
        rules = key_maps.OPEN_CLIP if config.image.naflex is None else key_maps.OPEN_CLIP_NAFLEX
        return key_maps.entry(path, rules, prefixes)

    with open_safetensors([weights]) as stored:
        state = key_maps.unwrapped(stored)
        if is_timm:  # a classifier is not part of the tower
            state = {key: array for key, array in state.items() if not key.startswith("head.")}
        ours = expected_shapes(config)
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
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return _timm_config(Path(folder) / _TIMM_CONFIG)
    tree = read_json(path, fix="copy it again")
    model = _object(tree, "model_cfg", path)
    vision, words = _object(model, "vision_cfg", path), _object(model, "text_cfg", path)
    size, pool = vision.get("image_size", 224), vision.get("timm_pool", "avg")
    image = _image(str(vision.get("timm_model_name")), {"img_size": size, "global_pool": pool}, path)
    pixels = _object(tree, "preprocess_cfg", path)
    if (mode := pixels.get("resize_mode", "shortest")) != "squash":
        raise UserError(
            f"{path}: resize_mode={mode!r} cannot be done here, where the aspect ratio is not kept: only 'squash'"
        )
    image = dataclasses.replace(image, pixels=_pixels(pixels, path))
    text = _text(words, path)
    if with_texts:
        text = with_tokens(text, _tokens(words, path), path.parent)
    return _model(image, text, model.get("embed_dim"), path)


def _timm_config(path: Path) -> ModelConfig:
    tree = read_json(path, fix="copy it again")
    args, settings = _object(tree, "model_args", path, {}), _object(tree, "pretrained_cfg", path, tree)
    pool = {"global_pool": tree["global_pool"]} if "global_pool" in tree else {}
    if _NAFLEX_NAME.fullmatch(str(tree["architecture"])):
        image = _naflex_image(str(tree["architecture"]), pool | args, path)
        return _model(dataclasses.replace(image, pixels=_pixels(settings, path)), None, None, path)
    if isinstance(channels_first := settings.get("input_size"), list) and len(channels_first) == 3:
        args = {"img_size": channels_first[1:], **args}
    image = _image(str(tree["architecture"]), pool | args, path)
    crop = settings.get("crop_pct", 1.0)
    if crop != 1 or settings.get("crop_mode", "center") != "center":
        logger.warning("%s: not followed: crop_pct=%s; images are resized whole, as SigLIP was trained", path, crop)
    return _model(dataclasses.replace(image, pixels=_pixels(settings, path)), None, None, path)


def _model(image: ImageConfig, text: TextConfig | None, width: Any, path: Path) -> ModelConfig:
    try:
        return ModelConfig(image, text, (None, None if text is None else _size(width, "embed_dim", path)))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _image(name: str, args: Mapping[str, Any], path: Path) -> ImageConfig:
    """The image tower of a name of timm, with the arguments that were given beside it."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in _SIZES:
        raise UserError(
            f"{path}: {name!r} cannot be read; of timm's models only vit_{{{','.join(_SIZES)}}}_patch…_siglip_… and "
            f"naflexvit_…_siglip can"
        )
    _check_arguments(args, _FOLLOWED, path)
    fields, _ = _fields(match[1], args, path, gap=bool(match[3]), patch=int(match[2]))
    size = _height_width(args.get("img_size", int(match[4])), "img_size", path)
    try:
        return ImageConfig(**fields, image_size=size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _naflex_image(name: str, args: Mapping[str, Any], path: Path) -> ImageConfig:
    match = _NAFLEX_NAME.fullmatch(name)
    if match is None or match[1] not in _SIZES:
        raise UserError(
            f"{path}: {name!r} cannot be read; of timm's NaFlex models only those of {', '.join(_SIZES)} can"
        )
    _check_arguments(args, _NAFLEX_FOLLOWED, path)
    if args.get("pos_embed_interp_mode", "bicubic") != "bilinear":
        logger.warning("%s: positions are resized bicubic there; here bilinear, as SigLIP 2 was trained", path)
    fields, (height, width) = _fields(match[1], args, path, gap=False, patch=int(match[2]))
    down, across = _height_width(args.get("pos_embed_grid_size", [16, 16]), "pos_embed_grid_size", path)
    if down != across:
        raise UserError(f"{path}: pos_embed_grid_size={[down, across]} is not square, as SigLIP 2's positions are")
    try:
        return ImageConfig(**fields, image_size=(down * height, across * width), naflex=NaflexConfig())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _check_arguments(args: Mapping[str, Any], followed: set[str], path: Path) -> None:
    if unknown := sorted(key for key in args if key not in followed and not _HARMLESS.fullmatch(key)):
        raise UserError(
            f"{path}: {', '.join(f'{key}={args[key]!r}' for key in unknown)} cannot be followed here; remove it if you can"
        )


def _fields(
    size: str, args: Mapping[str, Any], path: Path, *, gap: bool, patch: int
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Sizes, patch and pooling of an image tower of a size of timm, as arguments of ImageConfig; and its patch in pixels."""
    variant, ratio = _SIZES[size]
    base = VARIANTS[variant]
    pool, act = args.get("global_pool", "avg" if gap else "map"), args.get("act_layer", "gelu")
    if not is_one_of(pool, _POOLS):
        raise UserError(f"{path}: images pooled by {pool!r} cannot be read, only by {', '.join(map(repr, _POOLS))}")
    if act not in ("gelu", "gelu_tanh"):
        raise UserError(f"{path}: act_layer={act!r} cannot be computed here, only 'gelu_tanh'")
    if "act_layer" in args and act == "gelu":
        logger.warning(_EXACT_GELU, path)
    width = _size(args.get("embed_dim", base.width), "embed_dim", path)
    spec = Variant(
        width,
        _size(args.get("depth", base.depth), "depth", path),
        int(width * _number(args.get("mlp_ratio", ratio), "mlp_ratio", path)),
        _size(args.get("num_heads", base.num_heads), "num_heads", path),
    )
    height, width = _height_width(args.get("patch_size", patch), "patch_size", path)
    sides = {"patch_size": None if height == width else (height, width)}
    return spec.fields(patch=height) | sides | {"pool": _POOLS[pool]}, (height, width)


def _text(words: Mapping[str, Any], path: Path) -> TextConfig:
    problems = [
        f"{key}={words.get(key, default)!r} (only {only!r})"
        for key, (default, only) in _TEXT_ARGS.items()
        if words.get(key, default) != only
    ]
    norm = _object(words, "norm_kwargs", path, {})
    problems += [f"norm_kwargs={norm} (only an eps of 1e-6)"] if norm.get("eps", 1e-5) != 1e-6 else []
    problems += [f"hf_model_name={words['hf_model_name']!r}"] if words.get("hf_model_name") else []
    if problems:
        raise UserError(
            f"{path}: this text tower is not SigLIP's: {'; '.join(problems)}; use the image tower of such a model in timm"
        )
    if _object(words, "act_kwargs", path, {}).get("approximate") != "tanh":
        logger.warning(_EXACT_GELU, path)
    width, heads, layers, pieces, length = (
        _size(words.get(key, default), key, path) for key, default in _TEXT_SIZES.items()
    )
    spec = Variant(width, layers, int(width * _number(words.get("mlp_ratio", 4.0), "mlp_ratio", path)), heads)
    tokens = TokenConfig(pad_id=0 if pieces == GEMMA_PIECES else None)
    try:
        return TextConfig(**spec.fields(), vocab_size=pieces, length=length, tokens=tokens)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _tokens(words: Mapping[str, Any], path: Path) -> TokenConfig:
    """How texts become ids: the tokenizer's own settings, after what open_clip does to a text before it."""
    clean = _object(words, "tokenizer_kwargs", path, {}).get("clean", "whitespace")
    if not is_one_of(clean, _CLEANED):
        raise UserError(f"{path}: texts cleaned by {clean!r} cannot be read, only by {', '.join(map(repr, _CLEANED))}")
    lower, canonical = _CLEANED[clean]
    tokens = TokenConfig(pad_id=0 if words.get("vocab_size") == GEMMA_PIECES else None)
    if tokenizer_file(path.parent) is not None:
        tokens = read_tokens(path.parent, cleaned=clean != "whitespace")
    if clean == "whitespace":
        return tokens
    return dataclasses.replace(tokens, lower=lower, canonical=canonical)


def _pixels(tree: Mapping[str, Any], path: Path) -> PixelConfig:
    mean, std, resample = tree.get("mean"), tree.get("std"), tree.get("interpolation", "bicubic")
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not (numbers and len(values) == 3 and (name == "mean" or min(values) > 0)):
            raise UserError(
                f"{path}: {name}={values!r} is not three {'' if name == 'mean' else 'positive '}numbers; copy it again"
            )
    if resample not in ("bilinear", "bicubic"):
        raise UserError(f"{path}: interpolation={resample!r} cannot be done here, only 'bilinear' and 'bicubic'")
    return PixelConfig(mean=tuple(map(float, mean)), std=tuple(map(float, std)), resample=resample)


def _object(
    tree: Mapping[str, Any], key: str, path: Path, default: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    value = tree.get(key)
    value = default if value is None and default is not None else value
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {key}={value!r} is not an object; copy it again")
    return value


def _size(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: {name}={value!r} is not a positive number")
    return value


def _number(value: Any, name: str, path: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e4:
        raise UserError(f"{path}: {name}={value!r} is not a positive number")
    return value


def _height_width(value: Any, name: str, path: Path) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise UserError(f"{path}: {name}={value!r} is not (height, width)")
    return _size(sides[0], name, path), _size(sides[1], name, path)
