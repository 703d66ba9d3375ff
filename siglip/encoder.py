"""A trained model as an object: images and token ids in, embeddings and tokens out.

    model = siglip.load(SRC)                              # both towers: embeddings, logits
    encoder = siglip.load_encoder(SRC, image_size=448)    # the image tower alone, as a vision-language model takes it
    tokens = encoder.tokens(images)                       # float32 [b, h, w, 3] in [-1, 1] -> [b, n, d]

    logits = exp(t) * zimg @ ztxt.T + b;   probability of a match = sigmoid(logits)      (SigLIP, arXiv:2303.15343)

An `ImageEncoder` is a pytree whose leaves are its parameters, so it goes through jit, grad, device_put and optax as it is: hand
it to a jitted step as an argument, lay its leaves out with `siglip.parallel.sharding.param_shardings`, and unfreeze it with
`encoder.unfrozen()`. PaLI-3 (arXiv:2310.09199) and PaliGemma (arXiv:2407.07726) read the tokens after the last LayerNorm and
before pooling: layer -1. Layers -2, -3, … are what earlier blocks return, without a LayerNorm, as LLaVA reads them
(`hidden_states[-2]` in transformers).

The traps: an array of images is float32 in [-1, 1], resized by the filter in `config.image.pixels` (lists of images are resized
here), and token ids are made as `config.text.tokens` says, exactly `config.text.length` of them. A model that gets something
else says nothing; its embeddings are only worse. And an encoder that is closed over instead of passed in becomes a constant of
the compiled program: neither its sharding nor its gradient is then what you asked for.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from siglip import trees
from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.formats import big_vision, key_maps
from siglip.inputs import Images, check_images, check_patches, check_tokens, to_pixels, tokenizer_of
from siglip.model_source import read_model
from siglip.models.attention import Attention, AttentionFn, attention_fn, choose_kernel
from siglip.models.layers import Remat
from siglip.models.naflex import Patches
from siglip.models.two_tower import ImageConfig, ModelConfig, batch_of, make_model
from siglip.models.vit import ViT, pool_each

PIXEL_RANGE = (-1.0, 1.0)
Tokens = Any  # [b, n, d]; of a NaFlex model with a mask, bool [b, n]


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
        return f"Encoder({_describe(self.config)})"

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

    def embed_texts(self, texts: ArrayLike | Sequence[str]) -> Float[Array, "b e"]:
        """A list of strings, or int32 [b, l] token ids -> float32 [b, e], L2-normalised.

        Raises:
            UserError: there is no text tower, or no tokenizer for strings; the length is not the model's, or an id is outside
                the vocabulary.
        """
        text = self.config.text
        if text is None:
            raise UserError("this model has only the image tower; load a source with both towers to embed texts")
        if isinstance(texts, str):
            raise UserError(f"embed_texts takes a list of texts, not one: pass [{texts[:20]!r}]")
        is_strings = isinstance(texts, list | tuple) and len(texts) > 0 and all(isinstance(one, str) for one in texts)
        tokens = self.tokenize(texts) if is_strings else texts
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
def _apply(config: ModelConfig, wanted: str, params: Any, batch: dict[str, Array]) -> Tokens:
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


def _describe(config: ModelConfig) -> str:
    image = config.image
    text = "" if config.text is None else f", texts of {config.text.length} tokens"
    if image.naflex is not None:
        return f"{image.variant}, images of any size in up to {image.naflex.patches} patches of {image.patch}{text}"
    return f"{image.variant}, {image.image_size[0]} x {image.image_size[1]} px in patches of {image.patch}{text}"


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


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What an encoder takes and gives.

    Attributes:
        tokens: n, tokens per image: down * across, and a class token before them where the tower has one. Of a NaFlex tower, as
            many as its longest images have where nothing else is said; `grid` and `image_size` are then those of its positions.
        width: d of the tokens.
        grid: patches (down, across), row by row.
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels.
        pixel_range: what the smallest and the largest pixel value become: 0 -> -1 and 255 -> 1.
        pooled_width: of `pooled`; None where the tower has no pooling, or tokens are read from an earlier layer.
        class_token: whether the first token is a class token, not a patch of the grid.
    """

    tokens: int
    width: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    pixel_range: tuple[float, float]
    pooled_width: int | None
    class_token: bool


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "head_dim", "layer", "frozen"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class ImageEncoder:
    """An image tower with its parameters; make one with `load_encoder`.

    Attributes:
        params: nested dict of float32 arrays under the published names, without the leading "img"; its leaves are the pytree's,
            and may also be gradients, shardings or shapes.
        config: the tower, at the resolution it was loaded for; `depth` counts the blocks up to the layer that is read.
        head_dim: width of the linear head behind the pooling, or None.
        layer: -1 where the source ends, which is after its last LayerNorm, -2 … the output of an earlier block.
        frozen: whether gradients stop here: those of the parameters and the images are zero.
    """

    params: Any
    config: ImageConfig
    head_dim: int | None
    layer: int = -1
    frozen: bool = True

    def __repr__(self) -> str:
        spec, state = self.spec, "frozen" if self.frozen else "unfrozen"
        what = _describe(ModelConfig(self.config, None, (None, None)))
        return f"ImageEncoder({what} -> {spec.tokens} tokens of width {spec.width}, layer {self.layer}, {state})"

    @property
    def spec(self) -> EncoderSpec:
        """Sizes of what goes in and comes out."""
        config, class_token = self.config, self.config.pool == "tok"
        pooled = None if config.pool == "none" or self.layer != -1 else self.head_dim or config.spec.width
        return EncoderSpec(
            tokens=(config.naflex.patches if config.naflex else config.grid[0] * config.grid[1]) + class_token,
            width=config.spec.width,
            grid=config.grid,
            image_size=config.image_size,
            patch_size=config.patch,
            pixel_range=PIXEL_RANGE,
            pooled_width=pooled,
            class_token=class_token,
        )

    def tokens(self, images: ArrayLike | Patches) -> Tokens:
        """float32 [b, h, w, 3] in [-1, 1] -> float32 [b, n, d]. A NaFlex tower takes `Patches` and gives (tokens, mask).

        Raises:
            UserError: the images have another size, integer pixels, or, unless they lie on a device, pixels outside [-1, 1].
        """
        out = self._forward(self._checked(images))[1]
        return (out["encoded"], out["mask"]) if "mask" in out else out["encoded"]

    def pooled(self, images: ArrayLike | Patches) -> Float[Array, "b e"]:
        """float32 [b, h, w, 3] in [-1, 1] -> float32 [b, e], one vector per image, not normalised; divided by its norm it is
        the embedding that texts are compared with.

        Raises:
            UserError: as for `tokens`, or the encoder has no pooling, or reads from an earlier layer.
        """
        if self.spec.pooled_width is None:
            raise UserError(
                f"this encoder (pool={self.config.pool!r}, layer={self.layer}) has no pooled output; use tokens, or load a "
                "tower with a pooling head at layer=-1"
            )
        return self._forward(self._checked(images))[0]

    def unfrozen(self) -> "ImageEncoder":
        """The same encoder, through which gradients flow."""
        return dataclasses.replace(self, frozen=False)

    def save(self, out: str | Path) -> None:
        """Writes the tower as it is now into FILE.npz: a SRC again, whose layer -1 is where this tower ends.

        Raises:
            UserError: `out` is not FILE.npz in a folder that exists, or its leaves are not the tower's; nothing is written.
        """
        out = Path(out).expanduser()
        if out.suffix != ".npz" or not out.parent.is_dir():
            raise UserError(f"{str(out)!r}: name a FILE.npz in a folder that exists")
        big_vision.write(out, {"img": self.params}, ModelConfig(self.config, None, (self.head_dim, None)))

    def _checked(self, images: ArrayLike | Patches) -> Array | Patches:
        return (check_images if self.config.naflex is None else check_patches)(images, self.config)

    @jax.jit
    def _forward(self, images: Array | Patches) -> tuple[Array | None, dict[str, Array]]:
        images, params = jax.lax.stop_gradient((images, self.params)) if self.frozen else (images, self.params)
        tower = ViT(self.config, self.head_dim, _attention_of(self.config))
        pooled, out = tower.apply({"params": params}, images)
        return pooled, {name: out[name] for name in ("encoded", "mask") if name in out}


def load_encoder(
    src: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    patch_size: int | tuple[int, int] | None = None,
    layer: int = -1,
    frozen: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Remat = "none",
    attention: Attention = "xla",
    scan: bool | None = None,
) -> ImageEncoder:
    """The image tower of any source that `siglip.load` reads.

    Args:
        image_size: pixels, one number or (height, width); learned positions are resampled to its grid.
        patch_size: pixels, likewise; the patch kernel is resampled (FlexiViT, arXiv:2212.08013).
        layer: -1 reads after the last LayerNorm, -2 what the second-last block returns, and so on down to -depth.
        frozen: whether gradients stop: those of the parameters and the images are zero then.
        dtype: of the matrix products; parameters, LayerNorms and the tokens stay float32.
        remat: what the backward pass of an unfrozen encoder computes again to save memory: "full" keeps each block's input alone,
            "dots" the results of its matrix products and its attention as well, "dots+gelu" also those of GELU.
        attention: the kernel: "xla" runs anywhere; "cudnn" (GPU, bfloat16) and "splash" (TPU) never store tokens x tokens
            weights; "auto" takes the one that suits the devices.
        scan: True stacks the parameters of all blocks and compiles one block for all, False keeps them one by one; None is as in
            the source.

    Raises:
        FileNotFoundError: there is nothing at `src`.
        UserError: it is not a model, the size holds no patch, the tower has no such layer, or the kernel does not run here.
    """
    params, config, _ = read_model(src, image_size, patch_size=patch_size, only_image=True)
    image, depth = config.image, config.image.spec.depth
    if not -depth <= layer <= -1:
        raise UserError(f"layer={layer}: the tower has {depth} blocks; count them from the end, -1 to -{depth}")
    options = {"dtype": dtype, "remat": remat, "attention": attention, "scan": image.scan if scan is None else scan}
    options |= {"residual_dtype": "float32", "dropout": 0.0, "patch_dropout": 0.0}
    image = dataclasses.replace(image, **options)
    _attention_of(image)  # raises now where it cannot run
    params, head_dim = params["img"], config.out_dim[0]
    if image.scan != config.image.scan:
        change = key_maps.stack_blocks if image.scan else key_maps.unstack_blocks
        params = trees.unflatten(change(trees.flatten(params)))
    if layer != -1:
        params, head_dim = _cut(params, depth + layer + 1), None
        # The class token is part of the sequence: a tower that has one keeps it.
        kept = {"depth": depth + layer + 1, "pool": "tok" if image.pool == "tok" else "none", "final_norm": False}
        image = dataclasses.replace(image, **kept)
    return ImageEncoder(jax.device_put(params), image, head_dim, layer, frozen)


def _attention_of(config: ImageConfig) -> AttentionFn:
    """The kernel for this process's devices; on several TPUs it needs `jax.set_mesh` with the mesh of siglip.parallel."""
    sizes = {
        "tokens": config.train_tokens,
        "head_dim": config.spec.width // config.spec.num_heads,
        "dtype": config.dtype,
    }
    kernel, mesh = choose_kernel(config.attention, device=jax.devices()[0], **sizes), jax.sharding.get_abstract_mesh()
    return functools.partial(attention_fn, kernel=kernel, mesh=mesh if {"data", "fsdp"} <= {*mesh.axis_names} else None)


def _cut(params: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The parameters that `depth` blocks need, with nothing after them."""
    blocks = params["Transformer"]
    if "encoderblock" in blocks:
        kept = {"encoderblock": jax.tree.map(lambda leaf: leaf[:depth], blocks["encoderblock"])}
    else:
        kept = {f"encoderblock_{n}": blocks[f"encoderblock_{n}"] for n in range(depth)}
    before = ("embedding", "pos_embedding", "cls")
    return {name: params[name] for name in before if name in params} | {"Transformer": kept}
