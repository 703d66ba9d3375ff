"""The captioner: an encoder's tokens, a linear connector that starts at zero, a prefix language model.

    [ image tokens W + b | begin | prompt | separator ] suffix … end        full attention | causal
    loss = mean over suffix tokens, the end token included, of -log p(token | image, prompt, tokens before it)

PaliGemma (arXiv:2407.07726): W = b = 0 at the start, so the decoder starts as the language model it was and learns to use the
image.

A `Captioner` holds the encoder's parameters as leaves, and is an argument of every jitted function here. The encoder's
`frozen` and the optimizer decide whether they are trained.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from examples.captioner import decoder
from examples.captioner.decoder import DecoderConfig
from siglip.array_types import Array, Float, Int, UInt8
from siglip.image_encoder import ImageEncoder
from siglip.models.vit import normalize_pixels

# Of the shipped tokenizer. Its <pad> is used nowhere else, and begins every text here; texts are padded with the end token.
BEGIN, END = 0, 1


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["encoder", "connector", "decoder"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True)
class Captioner:
    """A pytree of parameters.

    Attributes:
        encoder: its tokens are [b, n, e].
        connector: {"kernel": [e, d], "bias": [d]}.
        decoder: as `init_decoder` makes it.
        config: sizes of the decoder.
    """

    encoder: ImageEncoder
    connector: dict[str, Any]
    decoder: dict[str, Any]
    config: DecoderConfig


def init_captioner(encoder: ImageEncoder, config: DecoderConfig, *, seed: int) -> Captioner:
    """An encoder before a new decoder."""
    connector = {"kernel": jnp.zeros((encoder.spec.width, config.width)), "bias": jnp.zeros(config.width)}
    return Captioner(encoder, connector, decoder.init_decoder(config, jax.random.key(seed)), config)


def read_prefix(
    captioner: Captioner, images: UInt8[Array, "b h w 3"] | None, prompt: Int[Array, " p"], *, batch: int
) -> Float[Array, "b m d"]:
    """What the decoder reads before it writes: n image tokens, none where `images` is None, and the prompt."""
    words = decoder.embed(captioner.decoder, prompt)
    words = jnp.broadcast_to(words, (batch, *words.shape))
    if images is None:
        return words
    tokens = captioner.encoder.tokens(normalize_pixels(images))
    tokens = tokens @ captioner.connector["kernel"] + captioner.connector["bias"]
    return jnp.concatenate([tokens, words], axis=1)


def suffix_logits(
    captioner: Captioner,
    images: UInt8[Array, "b h w 3"] | None,
    prompt: Int[Array, " p"],
    suffix: Int[Array, "b l"],
) -> Float[Array, "b l v"]:
    """Scores of every suffix token's successors, given the right tokens before it (teacher forcing)."""
    prefix = read_prefix(captioner, images, prompt, batch=len(suffix))
    x = jnp.concatenate([prefix, decoder.embed(captioner.decoder, suffix[:, :-1])], axis=1)
    x, _ = decoder.run_blocks(captioner.decoder, x, decoder.prefix_mask(prefix.shape[1], x.shape[1]))
    # The prefix's last token predicts the suffix's first.
    return decoder.logits(captioner.decoder, x[:, prefix.shape[1] - 1 :])


def caption_losses(
    captioner: Captioner,
    images: UInt8[Array, "b h w 3"] | None,
    prompt: Int[Array, " p"],
    suffix: Int[Array, "b l"],
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """Nats of each caption, and its tokens: up to the first end token, with it."""
    scores = jax.nn.log_softmax(suffix_logits(captioner, images, prompt, suffix))
    nats = -jnp.take_along_axis(scores, suffix[..., None], axis=-1)[..., 0]
    ended_before = jnp.cumsum(suffix == END, axis=1) - (suffix == END) > 0
    return jnp.where(ended_before, 0, nats).sum(axis=1), jnp.sum(~ended_before, axis=1)


def caption_loss(captioner: Captioner, images: Any, prompt: Array, suffix: Array) -> Float[Array, ""]:
    """The mean over the batch's tokens: the loss that is minimised."""
    nats, tokens = caption_losses(captioner, images, prompt, suffix)
    return nats.sum() / tokens.sum()


@functools.partial(jax.jit, static_argnames=("batch", "length"))
def write_captions(
    captioner: Captioner, images: UInt8[Array, "b h w 3"] | None, prompt: Int[Array, " p"], *, batch: int, length: int
) -> Int[Array, "b l"]:
    """The likeliest token at every step, with a cache of keys and values; after the first end token only end tokens."""
    prefix = read_prefix(captioner, images, prompt, batch=batch)
    start, total = prefix.shape[1], prefix.shape[1] + length
    cache = decoder.empty_cache(captioner.config, batch, total)
    seen = jnp.arange(total) < start
    x, cache = decoder.run_blocks(captioner.decoder, prefix, jnp.broadcast_to(seen, (start, total)), cache=cache)

    def choose(x: Array) -> Array:
        return jnp.argmax(decoder.logits(captioner.decoder, x[:, -1:])[:, 0], axis=-1).astype(jnp.int32)

    def write(state: tuple[Array, decoder.Cache], position: Array) -> tuple[tuple[Array, decoder.Cache], Array]:
        token, cache = state
        x, cache = decoder.run_blocks(
            captioner.decoder,
            decoder.embed(captioner.decoder, token[:, None]),
            jnp.arange(total)[None] <= position,
            start=position,
            cache=cache,
        )
        following = jnp.where(token == END, END, choose(x))
        return (following, cache), following

    first = choose(x)
    _, rest = lax.scan(write, (first, cache), jnp.arange(start, total - 1))
    return jnp.concatenate([first[None], rest]).T
