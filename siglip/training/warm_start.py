"""Starting a run from a trained model: which parameters are taken, and the model that they fit.

    the newest checkpoint of the workdir;  else init.src;  else fresh parameters

What the source has and the patterns do not exclude is taken, what it lacks starts fresh. Positions and the patch kernel are
resampled when the resolution or the patch differs (siglip/models/resample.py), blocks are stacked or unstacked as the
model's `scan` says. Only parameters are taken: step, schedule and moments start anew (LiT, arXiv:2111.07991; SigLIP,
arXiv:2303.15343, sections 4.2 and 4.5).

The trap: an array of the right shape is not always the right array. Heads, poolings and depths that differ would load in
part and train on, so the architectures are compared field by field before any array is.
"""

import dataclasses
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from siglip import model_source, trees
from siglip.errors import UserError
from siglip.formats import key_maps
from siglip.models.attention import Attention
from siglip.models.layers import Remat
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.workdir.files import CONFIG_FILE, TOKENIZER_FILE

logger = logging.getLogger(__name__)

_EMBEDDING_TABLE = "txt/Embed_0/embedding"
_MAX_NAMED = 12


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a run without a checkpoint starts from. Patterns match whole parameter paths.

    Attributes:
        src: a run's workdir, a checkpoint inside it, FILE.npz, FILE.npz:img, or a Hugging Face folder; None starts fresh.
        only: parameters of the source that match one of these are taken; each has to match some.
        skip: but not those that match one of these; they start fresh.
    """

    src: str | None = None
    only: tuple[str, ...] = (".*",)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.only:
            raise UserError(
                "init.only is empty, so nothing is taken; leave it out to take all, or set init.src to None"
            )


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """The source's image tower; what is None stays as it is there."""

    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    pool: Literal["map", "gap", "tok"] | None = None
    scan: bool | None = None
    unroll: bool | None = None
    remat: Remat | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    residual_dtype: Literal["float32", "bfloat16"] | None = None
    dropout: float | None = None
    patch_dropout: float | None = None
    attention: Attention | None = None
    naflex: NaflexConfig | None = None


@dataclasses.dataclass(frozen=True)
class SourceText:
    """The source's text tower; what is None stays as it is there."""

    scan: bool | None = None
    unroll: bool | None = None
    remat: Remat | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    residual_dtype: Literal["float32", "bfloat16"] | None = None
    dropout: float | None = None
    attention: Attention | None = None


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """In place of a ModelConfig: the architecture of `init.src`, whatever that is, with what may differ from it.

    Attributes:
        text: the source's text tower, or a new one.
        out_dim: widths of the (image, text) heads; None keeps the source's, and gives a new text tower a head as wide as the
            image embedding.
        temperature_init, bias_init: for `t` and `b` that start fresh; None takes the source's.
    """

    image: SourceImage = SourceImage()
    text: SourceText | TextConfig = SourceText()
    out_dim: tuple[int | None, int | None] | None = None
    temperature_init: float | None = None
    bias_init: float | None = None

    def of(self, base: ModelConfig, *, where: str) -> ModelConfig:
        """The whole architecture, on that of a source; `where` names the source in errors.

        Raises:
            UserError: if the source has no text tower and no new one is given, or the parts do not fit each other.
        """
        image = dataclasses.replace(base.image, **_given(self.image))
        if isinstance(self.text, TextConfig):
            text, out_dim = self.text, (base.out_dim[0], base.out_dim[0] or image.spec.width)
        elif base.text is None:
            raise UserError(f"{where} has no text tower; describe a new one in the recipe: model.text=TextConfig(…)")
        else:
            text, out_dim = dataclasses.replace(base.text, **_given(self.text)), base.out_dim
        starts = {name: value for name, value in _given(self).items() if name in ("temperature_init", "bias_init")}
        return dataclasses.replace(base, image=image, text=text, out_dim=self.out_dim or out_dim, **starts)


def _given(overrides: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(overrides).items() if value is not None}


def read_base(src: str, *, workdir: Path, image_size: tuple[int, int] | None) -> tuple[ModelConfig, Path | None, str]:
    """(architecture, tokenizer or None, where they are from) that a recipe with open ends builds on.

    A workdir that has been opened knows both, so a run goes on when its source is gone; else they are the source's.

    Raises:
        FileNotFoundError, UserError: as for `siglip.load`.
    """
    if (workdir / CONFIG_FILE).is_file():
        tokenizer = workdir / TOKENIZER_FILE
        model = model_source.config_of_run(workdir)
        return model, tokenizer if tokenizer.is_file() else None, str(workdir / CONFIG_FILE)
    return *model_source.read_config(src, image_size), f"init.src={src!r}"


def read_initial(init: InitConfig, model: ModelConfig, *, tokenizer: bytes | None = None) -> dict[str, np.ndarray]:
    """The parameters that `init.src` gives a run of `model`, by path and in its layout; all others start fresh.

    Args:
        tokenizer: content of the SentencePiece model that the run trains with.

    Raises:
        FileNotFoundError: there is nothing at `init.src`.
        UserError: it is not a model; its architecture differs; an array that is to be taken is left over or has another shape
            (all of them are named); a pattern takes nothing; or its token embeddings belong to another tokenizer.
    """
    assert init.src is not None
    image = model.image
    theirs, _ = model_source.read_config(init.src, image.image_size)
    # The size of the images is a hint for files that do not tell theirs; together with a patch size it would not be one.
    patch_size = None if theirs.image.patch == image.patch else image.patch
    params, theirs, their_tokenizer = model_source.read_model(init.src, image.image_size, patch_size=patch_size)
    found = _in_layout_of(model, trees.flatten(params))
    shapes = key_maps.flat_shapes(trees.flatten(param_shapes(model)))
    taken, excluded = _select(init, found, shapes)
    _check_architecture(init, theirs, model, taken, excluded)
    _check_arrays(init, {path: found[path] for path in taken}, shapes)
    if _EMBEDDING_TABLE in taken and tokenizer is not None:
        if their_tokenizer is None:
            logger.warning(
                "init.src=%r does not say which tokenizer its token embeddings are of: with another than data.tokenizer they "
                "are those of other pieces; a new text tower is --init.only 'img/.*' t b",
                init.src,
            )
        elif their_tokenizer.read_bytes() != tokenizer:
            raise UserError(
                f"the text tower of init.src={init.src!r} was trained with another tokenizer than data.tokenizer; "
                f"use --data.tokenizer {their_tokenizer}, or a new text tower: --init.only 'img/.*'"
            )
    _tell(init, {path: shapes[path] for path in taken}, shapes)
    return {path: found[path] for path in taken}


def put(params: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Parameters by path on the devices, as the leaves of the tree `like` are laid out: none holds more than its part."""

    def put_leaf(array: np.ndarray, leaf: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: np.asarray(array[i], leaf.dtype))

    where = trees.flatten(like)
    return {path: put_leaf(array, where[path]) for path, array in params.items()}


def digest(params: Mapping[str, np.ndarray]) -> str:
    """Equal in processes that start from the same parameters, wherever each has read them."""
    total = hashlib.sha256()
    for path in sorted(params):
        total.update(path.encode())
        total.update(np.ascontiguousarray(params[path]))
    return total.hexdigest()[:16]


def _in_layout_of(model: ModelConfig, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    loop = key_maps.unstack_blocks(flat)
    towers = {"img": model.image, "txt": model.text}
    scanned = tuple(f"{name}/" for name, tower in towers.items() if tower is not None and tower.scan)
    stacked = key_maps.stack_blocks({path: array for path, array in loop.items() if path.startswith(scanned)})
    return stacked | {path: array for path, array in loop.items() if not path.startswith(scanned)}


def _select(init: InitConfig, found: Mapping[str, Any], shapes: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """(the source's paths that are taken, the paths on either side that the patterns leave out)."""
    trees.first_matches(init.only, found, what=f"init.only, of init.src={init.src!r}")
    paths = sorted(found.keys() | shapes.keys())
    wanted = trees.first_matches(init.only, paths, what="init.only")
    unwanted = trees.first_matches(init.skip, paths, what="init.skip")
    excluded = {path for path in paths if wanted[path] is None or unwanted[path] is not None}
    taken = [path for path in found if path not in excluded]
    if not taken:
        raise UserError(
            f"init.only={init.only} and init.skip={init.skip} take nothing of init.src={init.src!r}; "
            f"leave one of them out, or set init.src to None"
        )
    return taken, excluded


def _check_architecture(
    init: InitConfig, theirs: ModelConfig, ours: ModelConfig, taken: list[str], excluded: set[str]
) -> None:
    """Raises UserError with every field that makes a tower another function of the parameters that are taken."""
    towers = {path.partition("/")[0] for path in taken}
    different: dict[str, tuple[Any, Any]] = {}

    def compare(name: str, there: Any, here: Any, *, unless_excluded: str | None = None) -> None:
        """`unless_excluded`: a difference is allowed if init.only or init.skip leave out parameters with this prefix."""
        meant = unless_excluded is not None and any(path.startswith(unless_excluded) for path in excluded)
        if there != here and not meant:
            different[f"model.{name}"] = (there, here)

    def compare_specs(name: str, there: ImageConfig | TextConfig, here: ImageConfig | TextConfig) -> None:
        for size, value in vars(there.spec).items():
            compare(f"{name}.{size}", value, getattr(here.spec, size))
        compare(f"{name}.block", there.block, here.block)

    if "img" in towers:
        there, here = theirs.image, ours.image
        compare_specs("image", there, here)
        compare("image.pixels", there.pixels, here.pixels)
        compare("image.posemb", there.posemb, here.posemb, unless_excluded="img/pos_embedding")
        if there.pool != "none":  # such a tower is there to be built upon
            new = "img/cls" if "tok" in (there.pool, here.pool) else "img/MAPHead_0/"
            compare("image.pool", there.pool, here.pool, unless_excluded=new)
    if "txt" in towers:
        assert theirs.text is not None and ours.text is not None
        compare_specs("text", theirs.text, ours.text)
        compare("text.vocab_size", theirs.text.vocab_size, ours.text.vocab_size, unless_excluded="txt/Embed_0/")
        compare("text.tokens", theirs.text.tokens, ours.text.tokens, unless_excluded="txt/Embed_0/")
        compare("text.length", theirs.text.length, ours.text.length, unless_excluded="txt/pos_embedding")
        compare("text.pool", theirs.text.pool, ours.text.pool, unless_excluded="txt/MAPHead_0/")
    if different:
        told = [f"{name} is {there!r} there and {here!r} here" for name, (there, here) in different.items()]
        raise UserError(
            f"init.src={init.src!r} is of another architecture: {'; '.join(told)}; take over the source's with "
            f"model=SourceModel() in the recipe, or leave the tower out, as --init.only 'img/.*' does"
        )


def _check_arrays(init: InitConfig, taken: Mapping[str, np.ndarray], shapes: Mapping[str, key_maps.Shape]) -> None:
    left_over = [path for path in taken if path not in shapes]
    other = [path for path in taken if path in shapes and tuple(taken[path].shape) != shapes[path]]
    if not left_over and not other:
        return
    problems = [f"{path} {taken[path].shape} is not in the model" for path in left_over]
    problems += [f"{path} is {taken[path].shape} there and {shapes[path]} here" for path in other]
    patterns = sorted({f"{path.rpartition('/')[0]}/.*" if "/" in path else path for path in (*left_over, *other)})
    raise UserError(
        f"init.src={init.src!r} does not fit the model: {'; '.join(problems)}; change the model, or leave them out: "
        f"--init.skip {' '.join(map(repr, (*init.skip, *patterns)))}"
    )


def _tell(init: InitConfig, taken: Mapping[str, key_maps.Shape], shapes: Mapping[str, key_maps.Shape]) -> None:
    fresh = [path for path in shapes if path not in taken]
    whole = Counter(path.partition("/")[0] for path in shapes)
    count = Counter(path.partition("/")[0] for path in fresh)
    told = [top for top in count if count[top] == whole[top]]
    told += [path for path in fresh if path.partition("/")[0] not in told]
    more = f" and {len(told) - _MAX_NAMED} more" if len(told) > _MAX_NAMED else ""
    numbers = sum(math.prod(shape) for shape in taken.values()) / 1e6
    logger.info(
        "%.1f M parameters from %s; fresh: %s%s", numbers, init.src, ", ".join(told[:_MAX_NAMED]) or "none", more
    )
