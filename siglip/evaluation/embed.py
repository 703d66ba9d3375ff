"""Images and texts to unit vectors, on all devices of all processes.

    shards -> (decoded by the data side, each process its share) -> batches of one size -> towers on the mesh -> gathered

An `Embedder` is what an evaluation is run with. How shards are read and texts are tokenized is handed in: the data side is not
known here. Every process calls the same methods with the same arguments, and gets everything.

The trap: a forward pass needs all processes. One that has run out of images still takes part, with a batch of zeros.
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.models.two_tower import ModelConfig, image_arrays, make_model
from siglip.parallel import sharding
from siglip.parallel.collectives import gather_records, gather_rows, own_rows

logger = logging.getLogger(__name__)

_COLLAPSED = 1e-3  # embeddings that all lie this close together: their scores differ by rounding
_MAX_KEPT_BYTES = 1 << 28
_FEW = 8  # so many inputs may happen to be copies of one

Params = Mapping[str, Any]
# What is read of the image tower. map: the pooled vector before the head, big_vision's `pre_logits`; patch_mean: the mean of the
# patches after the last LayerNorm; head: after the head, not normalised; embedding: that, normalised; tokens: [n, patches, d],
# those of a NaFlex model padded.
Feature = Literal["embedding", "map", "patch_mean", "head", "tokens"]
Value = str | int | float
# (shards, fields) -> what the fields of the first pair that has one hold, nothing for one that is missing there. Raises UserError
# if none of the first pairs has any.
FirstValues = Callable[[str, Sequence[str]], Mapping[str, list[Value]]]


class EmbeddedImages(NamedTuple):
    """All decodable images of some shards, in order.

    Attributes:
        zimg: embeddings, or another feature of the image tower.
        index: place of each image in the shards. keys: its name.
        grids: patches (down, across) of each image of a NaFlex model; else None.
        values: for each field asked for, what it holds for each image: texts and numbers, none where it is missing.
    """

    zimg: Float[np.ndarray, "n ..."]
    index: list[int]
    keys: list[str]
    values: dict[str, list[list[Value]]]
    grids: list[list[int]] | None = None


@functools.partial(jax.jit, static_argnames=("model", "feature"))
def embeddings(
    model: ModelConfig, params: Params, batch: Mapping[str, Array], *, feature: Feature = "embedding"
) -> Float[Array, "b ..."]:
    """{"image": uint8 [b, h, w, 3]}, {"patches", "grid"} or {"text": int32 [b, l]} -> L2-normalised; a new shape compiles once.

    Args:
        feature: of images, what is read instead of the embedding. Tokens that are padding are zeros.
    """
    zimg, ztxt, out = make_model(model).apply({"params": params}, batch)
    if feature == "embedding":
        return ztxt if "text" in batch else zimg
    if feature == "map":
        return out["img/pre_logits"]
    if feature == "head":
        return zimg * out["img/norm"]
    first = 1 if model.image.pool == "tok" else 0
    patches, mask = _tokens(out)[:, first:], out.get("img/mask")
    if feature == "tokens":
        return patches
    return patches.mean(axis=1, where=None if mask is None else mask[:, first:, None])


def _tokens(out: Mapping[str, Array]) -> Float[Array, "b n d"]:
    """After the last LayerNorm; zeros where they are padding."""
    tokens, mask = out["img/encoded"], out.get("img/mask")
    return tokens if mask is None else jnp.where(mask[..., None], tokens, 0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def token_embeddings(
    model: ModelConfig, dtype: str | None, params: Params, batch: Mapping[str, Array]
) -> Float[Array, "b n d"]:
    """As `embeddings`, but the tokens after the last LayerNorm and before pooling; zeros where they are padding."""
    *_, out = make_model(model).apply({"params": params}, batch)
    return (out["txt/encoded"] if "text" in batch else _tokens(out)).astype(dtype)


def rows_per_process(batch_size: int, mesh: Mesh) -> int:
    """Rows that each process brings to a forward pass of about `batch_size` rows: as many on each device."""
    return -(-batch_size // mesh.size) * mesh.size // jax.process_count()


def embed_rows(
    embed: Callable[[Mapping[str, Array]], Array], rows: Mapping[str, np.ndarray], *, mesh: Mesh, rows_per_pass: int
) -> Float[np.ndarray, "n ..."]:
    """`embed(rows)` of this process's rows, `rows_per_pass` at a time over the mesh, by all processes at once.

    The last batch is filled up with zeros, so that one shape is compiled; no rows are one batch of zeros. All processes must
    come to the same number of passes.
    """
    parts, count = [], len(next(iter(rows.values())))
    for start in range(0, max(count, 1), rows_per_pass):
        part = {name: array[start : start + rows_per_pass] for name, array in rows.items()}
        batch = sharding.put_batch({name: _filled(array, rows_per_pass) for name, array in part.items()}, mesh)
        parts.append(own_rows(embed(batch), mesh)[: count - start])
    return np.concatenate(parts)


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """Both towers of a model, ready to embed shards and strings on a mesh.

    Attributes:
        embed: `embeddings` with a model and its parameters, where `feature` may be given; or `token_embeddings`: then rows are
            [n, d] instead of [e].
        rows: rows of this process in each forward pass, as `rows_per_process` says.
        image_size, patch_px: (height, width) in pixels of an image and of a patch. no_images: an empty batch, as `read` gives it.
        max_patches: of an image, for a NaFlex model; None for images of one size.
        resample: the filter with which the model's images are resized.
        canonical_prompts: whether the model's own pipeline removes the punctuation of class prompts.
        tokenize: strings -> token ids, padded to the length of the text tower.
        read: (shards or an open source, fields) -> number of pairs of all processes, and this process's share of the images, at
            most `rows` at a time, as {"image", "index", "key", "fields"}, or "patches" and "grid" in place of "image". Its
            `counts` are the images that could not be decoded, by reason.
        values_of: (fields of a pair, name of one) -> what that holds.
        at_length: most patches of an image -> the same embedder for them.
        temperature, bias: of the model's logits; None where it has none.
        text_embeddings: what was computed, by its text: each text is embedded once, whatever the task. Embedders of one text
            tower may share it.
    """

    embed: Callable[..., Float[Array, "b ..."]]
    mesh: Mesh
    rows: int
    image_size: tuple[int, int]
    patch_px: tuple[int, int]
    no_images: Mapping[str, np.ndarray]
    resample: str
    canonical_prompts: bool
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "m l"]]
    read: Callable[[Any, Sequence[str]], tuple[int, Any]]
    values_of: Callable[[Mapping[str, Any], str], list[Value]]
    at_length: Callable[[int], "Embedder"] | None = None
    max_patches: int | None = None
    temperature: float | None = None
    bias: float | None = None
    text_embeddings: dict[str, Float[np.ndarray, " e"]] = dataclasses.field(default_factory=dict)

    def with_max_patches(self, max_patches: int) -> "Embedder":
        """The same for images of at most so many patches, with the texts that are embedded already."""
        return dataclasses.replace(self.at_length(max_patches), text_embeddings=self.text_embeddings)

    def with_image_column(self, name: str | None) -> "Embedder":
        """The same, which reads images from the column of that name; with None it finds the column."""
        return self if name is None else dataclasses.replace(self, read=functools.partial(self.read, image_column=name))

    def embed_images(self, batch: Mapping[str, Any], *, feature: Feature = "embedding") -> Float[np.ndarray, "n ..."]:
        """Embeddings of this process's images, in a batch as `read` gives it; all processes must bring as many batches."""
        embed = self.embed if feature == "embedding" else functools.partial(self.embed, feature=feature)
        return embed_rows(embed, image_arrays(batch), mesh=self.mesh, rows_per_pass=self.rows)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "m ..."]:
        """Embeddings of the texts, which are the same in every process; equal texts are embedded once. No texts: [0, e]."""
        if not texts:  # what a row is only the model tells
            return self._embed_distinct([""])[:0]
        known = {text: self.text_embeddings[text] for text in dict.fromkeys(texts) if text in self.text_embeddings}
        distinct = [text for text in dict.fromkeys(texts) if text not in known]
        if distinct:
            z = self._embed_distinct(distinct)
            found = dict(zip(distinct, z, strict=True))
            known |= found
            if z.ndim == 2 and (len(self.text_embeddings) + len(z)) * z[0].nbytes <= _MAX_KEPT_BYTES:
                self.text_embeddings.update(found)
        return np.stack([known[text] for text in texts])

    def _embed_distinct(self, distinct: Sequence[str]) -> Float[np.ndarray, "m ..."]:
        share = -(-len(distinct) // jax.process_count())
        own = self.tokenize(distinct[jax.process_index() * share :][:share])
        z = embed_rows(self.embed, {"text": _filled(own, share)}, mesh=self.mesh, rows_per_pass=self.rows)
        z = gather_rows(z[: len(own)])
        _warn_if_collapsed(z, "different texts", "text")
        return z

    def embed_shards(
        self, data: str, fields: Sequence[str] = (), *, feature: Feature = "embedding", **more: Any
    ) -> EmbeddedImages:
        """Embeddings of every decodable image, with what `fields` hold; how many could not be decoded is logged.

        Args:
            feature: what is read instead of the embedding; each process holds all of it.
            more: for `read`.

        Raises:
            FileNotFoundError, UserError: shards are missing or damaged, lack a field, or no image can be decoded.
        """
        found, counts = self.embed_batches(*self.read(data, fields, **more), fields, feature=feature)
        if not found.keys:
            raise UserError(f"{data} holds no image that can be decoded ({dict(counts)}); check the shards")
        if counts and jax.process_index() == 0:
            logger.warning("images of %s left out because they cannot be decoded: %s", data, dict(counts))
        if feature == "embedding":
            _warn_if_collapsed(found.zimg, f"images of {data}", "image")
        return found

    def embed_batches(
        self, pairs: int, images: Any, fields: Sequence[str] = (), *, feature: Feature = "embedding"
    ) -> tuple[EmbeddedImages, Mapping[str, int]]:
        """What `read` gives, embedded by all processes; and how many images could not be decoded, by reason."""
        batches, z, records = iter(images), [], []
        nothing = {**self.no_images, "index": [], "key": [], "fields": []}
        for _ in range(-(-pairs // (self.rows * jax.process_count()))):
            batch = next(batches, nothing)
            z.append(self.embed_images(batch, feature=feature))
            values = [[self.values_of(record, field) for field in fields] for record in batch["fields"]]
            grids = np.asarray(batch["grid"]).tolist() if "grid" in batch else [None] * len(values)
            records += zip(batch["index"], batch["key"], values, grids, strict=True)
        next(batches, None)  # what comes last may have to be counted as broken
        counts = sum(map(Counter, gather_records([dict(images.counts)])), Counter())
        records = gather_records(records)
        order = np.argsort([index for index, *_ in records]).astype(int)
        index, keys, values, grids = ([records[i][column] for i in order] for column in range(4))
        columns = {field: [own[n] for own in values] for n, field in enumerate(fields)}
        grids = None if self.max_patches is None else grids
        return EmbeddedImages(gather_rows(np.concatenate(z))[order], index, keys, columns, grids), counts


def _warn_if_collapsed(z: Float[np.ndarray, "n ..."], what: str, tower: str) -> None:
    """Names an encoder that maps everything to one point: its metrics would look like mere chance."""
    if len(z) <= _FEW or jax.process_index() or z.ndim > 2:
        return
    if np.linalg.norm(np.asarray(z - z[0], np.float32), axis=1).max() < _COLLAPSED:
        logger.warning("the %s tower has collapsed: the embeddings of %d %s are all equal", tower, len(z), what)
