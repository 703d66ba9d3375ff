"""A trained model as an object: pictures and token ids in, embeddings and tokens out. `siglip.load` is `load` here.

    logits = exp(t) * zimg @ ztxt.T + b;   probability of a match = sigmoid(logits)      (SigLIP, arXiv:2303.15343)

Any source is read: a run's workdir, a checkpoint inside it, a big_vision npz, a Hugging Face folder, one of our
exports.

The trap: pictures are float32 in [-1, 1] and texts are lower-cased, then padded to exactly `config.text.length`.
Neither is checked by a model that was given something else; it only gets worse, quietly. What can be seen from the
outside raises here.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from siglip.formats import big_vision, hugging_face
from siglip.models.two_tower import ModelConfig, make_model
from siglip.models.vit import resample_positions
from siglip.shapes import Array, Float
from siglip.trees import build_dataclass

EXPORTED_NPZ = "model.npz"


class Encoder:
    """A model with its parameters, ready to call; every method is jitted and compiles once per batch size.

    Attributes:
        config: the architecture, at the resolution it was loaded for.
        params: nested dict of float32 arrays.
        tokenizer: path of the SentencePiece model that came with it, or None.
    """

    def __init__(self, params: Mapping[str, Any], config: ModelConfig, *, tokenizer: Path | None = None) -> None:
        self.config = config
        self.params = jax.tree.map(jnp.asarray, dict(params))
        self.tokenizer = tokenizer
        model = make_model(config)
        self._image = jax.jit(lambda p, images: model.apply({"params": p}, images, None)[0])
        self._text = jax.jit(lambda p, tokens: model.apply({"params": p}, None, tokens)[1])
        self._tokens = jax.jit(lambda p, images: model.apply({"params": p}, images, None)[2]["img/encoded"])

    def embed_images(self, images: ArrayLike) -> Float[Array, "b e"]:
        """float32 [b, h, w, 3] in [-1, 1] -> float32 [b, e], L2-normalised.

        Raises:
            ValueError: the size is not the model's, pixels are integers, or the image tower has no pooling.
        """
        if self.config.image.pool == "none":
            raise ValueError("this image tower has no pooling, so pictures have no embedding; use image_tokens")
        return self._image(self.params, self._check_images(images))

    def image_tokens(self, images: ArrayLike) -> Float[Array, "b n d"]:
        """float32 [b, h, w, 3] in [-1, 1] -> float32 [b, n, d], after the final LayerNorm and before pooling.

        That is what a vision-language model consumes. Patches come row by row; with pool "tok" the class token is
        first.

        Raises:
            ValueError: the size is not the model's, or pixels are integers.
        """
        return self._tokens(self.params, self._check_images(images))

    def embed_texts(self, tokens: ArrayLike) -> Float[Array, "b e"]:
        """int32 [b, l] token ids -> float32 [b, e], L2-normalised.

        Raises:
            ValueError: there is no text tower, the length is not the model's, or an id is outside the vocabulary.
        """
        text = self.config.text
        if text is None:
            raise ValueError("this model has only the image tower; load a source with both towers to embed texts")
        if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise ValueError(f"tokens are {jnp.result_type(tokens)}; pass token ids as int32 [b, {text.length}]")
        if jnp.ndim(tokens) != 2 or jnp.shape(tokens)[1] != text.length:
            raise ValueError(f"tokens have shape {jnp.shape(tokens)}; pad or cut them to [b, {text.length}]")
        # Looking at ids that are already on a device would wait for it; out there a wrong id becomes NaN instead.
        if not isinstance(tokens, jax.Array):
            ids = np.asarray(tokens)
            bad = ids[(ids < 0) | (ids >= text.vocab_size)]
            if bad.size:
                raise ValueError(
                    f"token id {bad[0]} is outside the vocabulary of {text.vocab_size}; is it another tokenizer's?"
                )
        return self._text(self.params, jnp.asarray(tokens, jnp.int32))

    def logits(self, zimg: ArrayLike, ztxt: ArrayLike) -> Float[Array, "b k"]:
        """[b, e], [k, e] -> exp(t) * zimg @ ztxt.T + b, [b, k]; the sigmoid of it is the probability that the pair
        belongs together.

        Raises:
            ValueError: there is no text tower, and so no temperature and no bias.
        """
        if self.config.text is None:
            raise ValueError(
                "this model has only the image tower, no temperature and bias; load a source with both towers"
            )
        return _logits(jnp.asarray(zimg), jnp.asarray(ztxt), self.params["t"], self.params["b"])

    def _check_images(self, images: ArrayLike) -> Float[Array, "b h w 3"]:
        height, width = self.config.image.image_size
        if not jnp.issubdtype(jnp.result_type(images), jnp.floating):
            raise ValueError(
                f"images are {jnp.result_type(images)}; pass float32 in [-1, 1], for 8-bit pixels x / 127.5 - 1"
            )
        if jnp.ndim(images) != 4 or jnp.shape(images)[1:] != (height, width, 3):
            raise ValueError(
                f"images have shape {jnp.shape(images)} but the model takes [b, {height}, {width}, 3]; "
                f"resize them, or load the model with image_size=(h, w)"
            )
        return jnp.asarray(images, jnp.float32)


@jax.jit
def _logits(zimg: Array, ztxt: Array, t: Array, b: Array) -> Float[Array, "b k"]:
    # Exact products: scores of one pair must not depend on the device's reduced-precision default.
    similarity = jnp.matmul(zimg, ztxt.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.exp(t).reshape(1, 1) * similarity + b.reshape(1, 1)


def load(src: str | Path, image_size: int | tuple[int, int] | None = None) -> Encoder:
    """Reads a model from any source.

    Args:
        src: a run's workdir, a checkpoint inside it, "FILE.npz", "FILE.npz:img", a Hugging Face folder, or an
            exported folder.
        image_size: pixels, one number or (height, width); learned positions are resampled when the grid changes. None
            keeps the size it was trained at.

    Raises:
        FileNotFoundError: there is nothing at `src`.
        ValueError: it is none of these, or damaged, or does not hold exactly one model's arrays.
    """
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    params, config, tokenizer = _read(src, image_size)
    params, config = resize(params, config, image_size or config.image.image_size)
    return Encoder(params, config, tokenizer=tokenizer if tokenizer and tokenizer.is_file() else None)


def resize(
    params: Mapping[str, Any], config: ModelConfig, image_size: tuple[int, int]
) -> tuple[dict[str, Any], ModelConfig]:
    """The same model for pictures of another (height, width); learned positions are resampled to the new grid.

    Raises:
        ValueError: the size does not hold one patch.
    """
    resized = dataclasses.replace(config, image=dataclasses.replace(config.image, image_size=tuple(image_size)))
    params = dict(params)
    if config.image.posemb == "learn" and resized.image.grid != config.image.grid:
        positions = resample_positions(
            np.asarray(params["img"]["pos_embedding"]), config.image.grid, resized.image.grid
        )
        params["img"] = {**params["img"], "pos_embedding": positions}
    return params, resized


def _read(src: str | Path, image_size: tuple[int, int] | None) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    file, _ = big_vision.split_subtree(src)
    if file.suffix == ".npz":
        return *big_vision.read(src, image_size=image_size), file.with_name(hugging_face.TOKENIZER_FILE)
    folder = Path(src)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{str(src)!r} is no model; a model is {_SOURCES}")
        raise FileNotFoundError(f"nothing at {str(src)!r}; a model is {_SOURCES}")
    if (folder / EXPORTED_NPZ).is_file():
        return *big_vision.read(folder / EXPORTED_NPZ, image_size=image_size), folder / hugging_face.TOKENIZER_FILE

    # Orbax is slow to import, and only runs need it.
    from siglip import checkpoint

    if checkpoint.is_run(folder):
        params, config, _ = checkpoint.read_run_params(folder)
        workdir = folder if (folder / checkpoint.CONFIG_FILE).is_file() else folder.resolve().parents[1]
        model = build_dataclass(ModelConfig, config["model"], where=f"{workdir / checkpoint.CONFIG_FILE}: model")
        return params, model, workdir / checkpoint.TOKENIZER_FILE
    if (folder / "config.json").is_file():
        return *hugging_face.read(folder), folder / hugging_face.TOKENIZER_FILE
    raise ValueError(f"folder {str(src)!r} is no model; a model is {_SOURCES}")


_SOURCES = "a run's workdir, a checkpoint inside it, FILE.npz, FILE.npz:img, or a Hugging Face folder"
