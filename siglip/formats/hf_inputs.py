"""What a Hugging Face folder says of its inputs: preprocessor_config.json, and the tokenizer's files.

    pixels = (x * rescale_factor - image_mean) / image_std        x: 0 … 255, resized by the filter `resample`
    ids = bos? pieces(normalise(text)) eos? pad …                 normaliser and special tokens: see TokenConfig

Pieces are read from a SentencePiece file, or else from tokenizer.json. What changes pixels or ids in a way that the models here
cannot follow is an error that names it.

The trap: what a file leaves out has the default of the class it names, and these differ: a SiglipTokenizer lower-cases and
removes punctuation, a GemmaTokenizer does neither and pads on the left.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from siglip.atomic import write_atomically
from siglip.errors import UserError
from siglip.formats.export_format import TOKENIZER_FILE
from siglip.formats.hf_tokenizer.convert import OUR_TOKENS, read_sentencepiece
from siglip.formats.hf_tokenizer.from_json import MALFORMED, sentencepiece_model, steps_of
from siglip.models.naflex import NaflexConfig
from siglip.models.text import TextConfig, TokenConfig
from siglip.models.vit import ImageConfig, PixelConfig
from siglip.trees import build_dataclass, is_one_of, read_json, regular

logger = logging.getLogger(__name__)

_PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_JSON = "tokenizer.json"
_FILTERS = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them
_DEFAULT_FILTERS = {"SiglipImageProcessor": 3, "SiglipFeatureExtractor": 3, "ViTImageProcessor": 2}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_PADS_LEFT = ("GemmaTokenizer", "Siglip2Tokenizer")  # unless the file says otherwise


def read_pixels(folder: Path, *, image_size: tuple[int, int], inside: bool = False) -> PixelConfig:
    """How the folder's preprocessor makes pixels; that of our own pipeline where the folder has none.

    Args:
        inside: the tower is inside of another model, whose preprocessor may split and pad images before the tower sees them. What
            cannot be followed is then told in the log.

    Raises:
        UserError: it does something that cannot be done here, or makes images of another size than the tower takes.
    """
    path, tree = _processor(folder)
    if not tree:
        return PixelConfig()
    size = tree.get("size", {"height": 224, "width": 224})
    size = {"height": size, "width": size} if type(size) is int else size
    problems = []
    if not isinstance(size, Mapping) or (size.get("height"), size.get("width")) != image_size:
        problems.append(f"size={size!r}, but config.json has image_size={image_size[0]}")
    to = f"images resized to {image_size[0]} px (bilinear) and scaled to [-1, 1]"
    return _pixel_config(path, tree, _DEFAULT_FILTERS, problems, to=to, inside=inside)


def read_naflex_pixels(folder: Path, *, patch_px: int, patches: int, inside: bool = False) -> tuple[PixelConfig, int]:
    """The same for a NaFlex tower, and the most patches of an image: `patches` where the folder has no preprocessor.

    Raises:
        UserError: as `read_pixels`, or its patches are not the tower's.
    """
    path, tree = _processor(folder)
    if not tree:
        return PixelConfig(), patches
    told, problems = tree.get("max_num_patches", NaflexConfig.patches), []
    if tree.get("patch_size", 16) != patch_px:
        problems.append(f"patch_size={tree.get('patch_size', 16)!r}, but config.json has patch_size={patch_px}")
    if type(told) is not int or told < 1:
        problems.append(f"max_num_patches={told!r} is not a positive number")
    else:
        patches = told
    to = f"images in at most {patches} patches (bilinear), scaled to [-1, 1]"
    return _pixel_config(path, tree, {"Siglip2ImageProcessor": 2}, problems, to=to, inside=inside), patches


def _processor(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file with the folder's preprocessor, and what it says of it; {} where the folder has none."""
    path, tree = folder / _PREPROCESSOR, _optional(folder / _PREPROCESSOR)
    if not tree:
        path = folder / _PROCESSOR
        tree = _optional(path).get("image_processor")
    return path, tree if isinstance(tree, Mapping) else {}


def _pixel_config(
    path: Path,
    tree: Mapping[str, Any],
    filters: Mapping[str, int],
    problems: list[str],
    *,
    to: str,
    inside: bool = False,
) -> PixelConfig:
    """What all preprocessors have in common.

    Args:
        filters: the classes that are known, and the resize of each where the file names none.
        problems: found before; to: what is done where there is no preprocessor.
    """
    kind = str(tree.get("image_processor_type") or tree.get("feature_extractor_type") or next(iter(filters)))
    default = filters.get(kind.removesuffix("Fast").removesuffix("Pil"))
    resample = tree.get("resample", default)
    found = [
        f"{name}={value!r}" for name, value in tree.items() if name.startswith("do_") and value and name not in _STEPS
    ]
    found += [] if default else [f"image_processor_type={kind!r}"]
    found += [] if is_one_of(resample, _FILTERS) else [f"resample={resample!r} (only 2, bilinear, and 3, bicubic)"]
    found += [] if tree.get("do_resize", True) else ["do_resize=false"]
    problems = found + problems
    numbers = {
        "image_mean": _three(tree.get("image_mean", 0.5)) if tree.get("do_normalize", True) else (0.0,) * 3,
        "image_std": _three(tree.get("image_std", 0.5)) if tree.get("do_normalize", True) else (1.0,) * 3,
        "rescale_factor": _three(tree.get("rescale_factor", 1 / 255)) if tree.get("do_rescale", True) else (1.0,) * 3,
    }
    problems += [f"{name}={tree[name]!r}" for name, values in numbers.items() if values is None]
    problems += [
        f"{name}={tree[name]!r}" for name in ("image_std", "rescale_factor") if min(numbers[name] or (1,)) <= 0
    ]
    if inside and problems and None not in numbers.values():
        logger.warning("%s: not followed: %s; %s", path, "; ".join(problems), to)
        problems, resample = [], resample if is_one_of(resample, _FILTERS) else 2
    if problems:
        raise UserError(
            f"{path}: {'; '.join(problems)}: this preprocessing cannot be done here; correct the file, or remove it to have {to}"
        )
    mean, std = numbers["image_mean"], numbers["image_std"]
    scale = 255 * numbers["rescale_factor"][0]
    if not math.isclose(scale, 1):
        mean, std = (tuple(value / scale for value in values) for values in (mean, std))
    return PixelConfig(mean=mean, std=std, resample=_FILTERS[resample])


def _three(value: Any) -> tuple[float, float, float] | None:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    if len(values) != 3 or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        return None
    return tuple(map(float, values))


def preprocessor_json(image: ImageConfig, *, with_texts: bool) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    kind, pixels, (height, width) = "Siglip", image.pixels, image.image_size
    size: dict[str, Any] = {"size": {"height": height, "width": width}}
    if image.naflex is not None:
        kind, size = "Siglip2", {"patch_size": image.patch[0], "max_num_patches": image.naflex.patches}
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        **({"processor_class": f"{kind}Processor"} if with_texts else {}),
        "do_resize": True,
        **size,
        # Antialiased, as our data pipeline resizes; the class default of a SiglipImageProcessor is bicubic.
        "resample": next(number for number, name in _FILTERS.items() if name == pixels.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "do_convert_rgb": True,
    }


def sentencepiece_file(folder: Path) -> Path | None:
    """The SentencePiece file in a folder, under either of its two usual names."""
    paths = (folder / name for name in (TOKENIZER_FILE, "tokenizer.model"))
    return next((path for path in paths if path.is_file()), None)


def tokenizer_file(folder: Path) -> Path | None:
    """A SentencePiece file with the folder's pieces, or None where it has no tokenizer.

    One made from tokenizer.json lies in the user's cache, under the name of its content.

    Raises:
        UserError: tokenizer.json is not a tokenizer of that kind.
    """
    if (path := sentencepiece_file(folder)) or not (folder / _TOKENIZER_JSON).is_file():
        return path
    settings, source = _tokenizer_config(folder), folder / _TOKENIZER_JSON
    specials = {name: _content(settings.get(f"{name}_token")) for name in ("unk", "bos", "eos", "pad")}
    content = source.read_bytes() + json.dumps(specials).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siglip" / "tokenizers"
    path = cache / f"{sha256(content).hexdigest()[:24]}.model"
    if not path.is_file():
        model = sentencepiece_model(_optional(source), specials, source=str(source))
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, model)
    return path


def read_tokens(folder: Path, *, cleaned: bool = False) -> TokenConfig:
    """How the folder's tokenizer makes ids of texts, pieces aside.

    Args:
        cleaned: texts are lower-cased before they come to this tokenizer.

    Raises:
        UserError: it does something that cannot be done here, its settings are named; or its files are damaged.
    """
    try:
        return _read_tokens(folder, cleaned=cleaned)
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(
            f"{folder}: {_TOKENIZER_CONFIG} or {_TOKENIZER_JSON} is not as Hugging Face writes it ({error!r}); copy it again"
        ) from None


def _read_tokens(folder: Path, *, cleaned: bool) -> TokenConfig:
    file, settings, path = tokenizer_file(folder), _tokenizer_config(folder), folder / _TOKENIZER_CONFIG
    if OUR_TOKENS in settings:
        return build_dataclass(TokenConfig, settings[OUR_TOKENS], where=f"{path}: {OUR_TOKENS}")
    if file is None or (not settings and file.name == TOKENIZER_FILE):
        return TokenConfig()
    proto = read_sentencepiece(regular(file).read_bytes(), source=str(file))
    kind = str(settings.get("tokenizer_class") or "SiglipTokenizer").removesuffix("Fast")
    if not settings:  # Gemma's tokenizer without a word on it: as big_vision uses it
        return TokenConfig(pad_id=proto.trainer_spec.pad_id if proto.trainer_spec.pad_id >= 0 else None)
    is_siglip = kind == "SiglipTokenizer"
    tree = {} if is_siglip else _optional(folder / _TOKENIZER_JSON)
    before, after = _around(tree, settings, kind)
    default_pad = "</s>" if is_siglip else "<pad>"
    tokens = {"pad_token": _content(settings.get("pad_token")) or default_pad}
    tokens["eos_token"] = _content(settings.get("eos_token")) or ("<eos>" if kind in _PADS_LEFT else "</s>")
    # Hugging Face's names of special pieces need not be SentencePiece's: `<eos>` there may be `</s>` here.
    numbers = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    numbers |= {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
    numbers |= {_content(token): int(i) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    ids = {name: numbers.get(token) for name, token in tokens.items()}
    problems = [f"{name}={tokens[name]!r} is not one of its pieces" for name, number in ids.items() if number is None]
    problems += [f"it puts {', '.join(before)} before a text"] if before else []
    if after and (after != [tokens["eos_token"]] or ids["eos_token"] != proto.trainer_spec.eos_id):
        problems.append(f"it puts {', '.join(after)} after a text")
    for name, default in (("padding_side", "left" if kind in _PADS_LEFT else "right"), ("truncation_side", "right")):
        if settings.get(name, default) != "right":
            problems.append(f"{name}={settings.get(name, default)!r}")
    if problems:
        raise UserError(
            f"{path}: {'; '.join(problems)}: this cannot be done here, where texts are cut and padded on the right, with at most "
            f"the end token {proto.pieces[proto.trainer_spec.eos_id].piece!r} after them; correct the file"
        )
    lowers = kind == "Siglip2Tokenizer" or settings.get("do_lower_case", is_siglip) or _lower_cases(tree)
    if not (lowers or is_siglip or cleaned):
        logger.warning(
            "texts keep their capitals, as %s says; SigLIP 2 was trained on lower case: for it write "
            '"tokenizer_class": "Siglip2Tokenizer"',
            path,
        )
    return TokenConfig(
        pad_id=None if ids["pad_token"] == proto.trainer_spec.eos_id else ids["pad_token"],
        end=bool(after),
        lower="none" if not lowers else "text" if is_siglip else "character",
        canonical="texts" if is_siglip else "none",
    )


def with_tokens(text: TextConfig, tokens: TokenConfig, folder: Path) -> TextConfig:
    """A text tower with the tokens that a folder says. Raises UserError: they are not the tower's."""
    try:
        return dataclasses.replace(text, tokens=tokens)
    except UserError as error:
        raise UserError(f"{folder / _TOKENIZER_CONFIG}: {error}") from None


def _around(tree: Mapping[str, Any], settings: Mapping[str, Any], kind: str) -> tuple[list[str], list[str]]:
    """The special tokens before and after a text."""
    if kind == "SiglipTokenizer":
        return [], [_content(settings.get("eos_token")) or "</s>"]
    post = tree.get("post_processor") or {}
    single = post.get("single") if post.get("type") == "TemplateProcessing" else None
    found: tuple[list[str], list[str]] = ([], [])
    seen = False
    for part in single or []:
        seen = seen or "Sequence" in part
        if "SpecialToken" in part:
            found[seen].append(part["SpecialToken"]["id"])
    for side, name, default in ((0, "bos", kind in _PADS_LEFT), (1, "eos", False)):
        adds = settings.get(f"add_{name}_token")
        if adds is False:
            found[side].clear()
        elif (adds or (single is None and default)) and not found[side]:
            found[side].append(_content(settings.get(f"{name}_token")) or f"<{name}>")
    return found


def _lower_cases(tree: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "Lowercase" for step in steps_of(tree.get("normalizer")))


def _content(token: Any) -> str | None:
    """A special token, which may be written with its settings."""
    return token.get("content") if isinstance(token, Mapping) else token


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens that older folders have in a file of their own."""
    settings = _optional(folder / _TOKENIZER_CONFIG)
    return _optional(folder / "special_tokens_map.json") | settings if settings else {}


def _optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none."""
    return read_json(path, fix="copy it again") if path.is_file() else {}
