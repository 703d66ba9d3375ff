"""A trained model as an object: images and texts in, embeddings, tokens and probabilities out.

    model = siglip.load(SRC)                              # both towers: embeddings, logits
    logits = exp(t) * zimg @ ztxt.T + b;   probability of a match = sigmoid(logits)      (SigLIP, arXiv:2303.15343)

The traps: an array of images is float32 in [-1, 1], resized by the filter in `config.image.pixels` (lists of images are resized
here), and token ids are made as `config.text.tokens` says, exactly `config.text.length` of them. A model that gets something
else says nothing; its embeddings are only worse.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.inputs import Images, check_tokens, describe_inputs, to_pixels, tokenizer_of
from siglip.model_source import read_model
from siglip.models.naflex import Patches, Tokens
from siglip.models.two_tower import ModelConfig, batch_of, make_model
from siglip.models.vit import pool_each


class Encoder:
    """A model with its parameters, ready to call; every method is jitted and compiles once per batch size.

    Attributes:
        config: the architecture, at the resolution it was loaded for.
        params: nested dict of float32 arrays; numpy ones given to it may be used where they lie, so leave them as they are.
        tokenizer: path of the SentencePiece model that came with it, or None.
    """

    def __init__(self, params: Mapping[str, Any], config: ModelConfig, *, tokenizer: Path | None = None) -> None:
        self.config = config
        self.params = jax.device_put(dict(params))
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"Encoder({describe_inputs(self.config)})"

    def embed_images(self, images: Images, *, max_patches: int | None = None) -> Float[Array, "b e"]:
        """float32 [b, h, w, 3] in [-1, 1], or a list of images -> float32 [b, e], L2-normalised.

        Args:
            images: those of a list are Pillow's, or uint8 [h, w, 3] in RGB, of any size; they are resized as the model was
                trained. A NaFlex model takes `Patches` too.
            max_patches: of an image of a list, for a NaFlex model; None for its own number.

        Raises:
            UserError: images that the tower does not take, pixels outside [-1, 1] unless they lie on a device, an entry of a list
                that is not an image; or the tower has no pooling.
        """
        self._check_pooling()
        return _apply(self.config, "zimg", self.params, batch_of(self.pixels(images, max_patches=max_patches)))

    def image_tokens(self, images: Images, *, max_patches: int | None = None) -> Tokens:
        """Images as for `embed_images` -> float32 [b, n, d], after the final LayerNorm and before pooling.

        That is what a vision-language model consumes. Patches come row by row; with pool "tok" the class token is first. A
        NaFlex model gives (tokens, mask): bool [b, n], False where a token is padding and means nothing.

        Raises:
            UserError: as `embed_images`, but no pooling is needed.
        """
        return _apply(self.config, "image_tokens", self.params, batch_of(self.pixels(images, max_patches=max_patches)))

    def embed_patches(self, images: Images, *, max_patches: int | None = None) -> Tokens:
        """Images as for `embed_images` -> float32 [b, n, e], L2-normalised: each patch as if it were all that is pooled.

        A patch times a text's embedding says where in an image the text is (MaskCLIP, arXiv:2112.01071). A NaFlex model gives
        (embeddings, mask), as for `image_tokens`.

        Raises:
            UserError: as `embed_images`.
        """
        self._check_pooling()
        return _patches(self.config, self.params, self.pixels(images, max_patches=max_patches))

    def _check_pooling(self) -> None:
        if self.config.image.pool == "none":
            raise UserError("this image tower has no pooling, so an image has no embedding; use image_tokens")

    def pixels(self, images: Images, *, max_patches: int | None = None) -> Float[Array, "b h w 3"] | Patches:
        """Images as for `embed_images` -> float32 [b, h, w, 3] in [-1, 1], at the model's size; `Patches` for a NaFlex model.

        Raises:
            UserError: as `embed_images`, but no pooling is needed.
        """
        return to_pixels(images, self.config.image, max_patches=max_patches)

    def embed_texts(self, texts: Any) -> Float[Array, "b e"]:
        """A list (or array) of strings, or int32 [b, l] token ids -> float32 [b, e], L2-normalised.

        Raises:
            UserError: there is no text tower, or no tokenizer for strings; the length is not the model's, or an id is outside
                the vocabulary.
        """
        text = self.config.text
        if text is None:
            raise UserError("this model has only the image tower; load a source with both towers to embed texts")
        if isinstance(texts, str):
            raise UserError(f"embed_texts takes a list of texts, not one: pass [{texts[:20]!r}]")
        if getattr(getattr(texts, "dtype", None), "kind", "") in tuple("OSTU"):  # strings of numpy or pandas
            texts = list(texts)
        is_list = isinstance(texts, list | tuple)
        bad = [type(one).__name__ for one in texts if not isinstance(one, str)] if is_list else []
        if bad or (is_list and not texts):
            told = f"has an entry that is {bad[0]}" if bad else "is empty"
            raise UserError(f"the list of texts {told}; pass strings, or token ids as one int32 array [b, l]")
        if not is_list and not hasattr(texts, "shape"):
            raise UserError(f"texts is {type(texts).__name__}; pass a list of strings, or token ids as one int32 array")
        tokens = self.tokenize(texts) if is_list else texts
        check_tokens(tokens, text)
        return _apply(self.config, "ztxt", self.params, {"text": jnp.asarray(tokens, jnp.int32)})

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        """Strings -> int32 [b, l] token ids, as the model was trained on them.

        Raises:
            UserError: the model has no text tower, or came without a tokenizer.
        """
        if self.config.text is None or self.tokenizer is None:
            raise UserError(
                "this model came without a tokenizer (spiece.model beside its files); put it there, or pass token ids"
            )
        length = self.config.text.length
        return np.stack([self._pieces.encode(text, length) for text in texts]).astype(np.int32)

    @functools.cached_property
    def _pieces(self) -> Any:
        return tokenizer_of(self.tokenizer, self.config.text)

    def logits(self, zimg: ArrayLike, ztxt: ArrayLike) -> Float[Array, "b k"]:
        """[b, e], [k, e] -> exp(t) * zimg @ ztxt.T + b, [b, k]; its sigmoid is the probability that the pair belongs together.

        Raises:
            UserError: there is no text tower, and so no temperature and no bias.
        """
        if self.config.text is None:
            raise UserError("this model has only the image tower, so it has no logits; load a source with both towers")
        return _logits(jnp.asarray(zimg), jnp.asarray(ztxt), self.params["t"], self.params["b"])

    def probabilities(self, images: Images, texts: ArrayLike | Sequence[str]) -> Float[Array, "images texts"]:
        """Images as for `embed_images`, texts as for `embed_texts` -> sigmoid(logits), float32 [images, texts].

        Each is the probability that this image and this text belong together, on its own: a row does not sum to 1. The model
        has learned it among pairs of which one in a batch matches; `siglip.losses.prior_shift` moves it to another share.

        Raises:
            UserError: as these two and `logits`.
        """
        return jax.nn.sigmoid(self.logits(self.embed_images(images), self.embed_texts(texts)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: ModelConfig, wanted: str, params: Any, batch: dict[str, Array]) -> Float[Array, "b e"] | Tokens:
    zimg, ztxt, out = make_model(config).apply({"params": params}, batch)
    tokens = out.get("img/encoded")
    tokens = (tokens, out["img/mask"]) if "img/mask" in out else tokens
    return {"zimg": zimg, "ztxt": ztxt, "image_tokens": tokens}[wanted]


@functools.partial(jax.jit, static_argnums=0)
def _patches(config: ModelConfig, params: Any, images: Array | Patches) -> Tokens:
    tokens = _apply(config, "image_tokens", params, batch_of(images))
    tokens, mask = tokens if isinstance(tokens, tuple) else (tokens, None)
    z = pool_each(config.image, config.out_dim[0], params["img"], tokens)
    z = z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
    return z if mask is None else (z, mask[:, tokens.shape[1] - z.shape[1] :])


@jax.jit
def _logits(zimg: Array, ztxt: Array, t: Array, b: Array) -> Float[Array, "b k"]:
    # Exact products: scores of one pair must not depend on the device's reduced-precision default.
    similarity = jnp.matmul(zimg, ztxt.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.exp(t).reshape(1, 1) * similarity + b.reshape(1, 1)


def load(
    src: str | Path, image_size: int | tuple[int, int] | None = None, *, patch_size: int | tuple[int, int] | None = None
) -> Encoder:
    """Reads a model from any source.

    Args:
        src: a run's workdir, a checkpoint inside it, "FILE.npz", "FILE.npz:img", a Hugging Face folder, or an
            exported folder.
        image_size: pixels, one number or (height, width); learned positions are resampled when the grid changes. None
            keeps the size it was trained at.
        patch_size: pixels, likewise; the patch kernel is resampled (FlexiViT). None keeps it.

    Raises:
        FileNotFoundError: there is nothing at `src`.
        UserError: it is none of these, or damaged, or does not hold exactly one model's arrays.
    """
    params, config, tokenizer = read_model(src, image_size, patch_size=patch_size)
    return Encoder(params, config, tokenizer=tokenizer)
