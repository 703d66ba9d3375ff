"""Images and texts to unit vectors, on all devices of all processes.

    shards -> (decoded by the data side, each process its share) -> batches of one size -> towers on the mesh -> gathered

An `Embedder` is what an evaluation is run with. How shards are read and texts are tokenized is handed in: the data side is not
known here. Every process calls the same methods with the same arguments, and gets everything.

The trap: a forward pass needs all processes. One that has run out of images still takes part, with a batch of zeros.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from siglip.array_types import Array, Float, Int, UInt8
from siglip.errors import UserError
from siglip.models.two_tower import ModelConfig, make_model
from siglip.parallel import sharding
from siglip.parallel.collectives import gather_records, gather_rows, own_rows

logger = logging.getLogger(__name__)

_COLLAPSED = 1e-3  # embeddings that all lie this close together: their scores differ by rounding
_FEW = 8  # so many inputs may happen to be copies of one

Params = Mapping[str, Any]
Value = str | int | float
# (shards, fields) -> what the fields of the first pair hold; a missing field holds nothing.
FirstValues = Callable[[str, Sequence[str]], Mapping[str, list[Value]]]


class ImageBatch(NamedTuple):
    """Some decoded images. values: what the fields asked for hold, one list for each field, in the fields' order."""

    images: UInt8[np.ndarray, "b h w 3"]
    index: list[int]
    keys: list[str]
    values: list[list[list[Value]]]


class Images(Protocol):
    """This process's share of the images of some shards, in batches.

    Attributes:
        pairs: number of pairs in the shards, those of all processes and undecodable ones included.
        counts: after a pass, how many images of this process could not be decoded, by reason.
    """

    pairs: int
    counts: Mapping[str, int]

    def __iter__(self) -> Iterator[ImageBatch]: ...


class EmbeddedImages(NamedTuple):
    """All decodable images of some shards, in order.

    Attributes:
        index: place of each image in the shards. keys: its name.
        values: for each field asked for, what it holds for each image: texts and numbers, none where it is missing.
    """

    zimg: Float[np.ndarray, "n e"]
    index: list[int]
    keys: list[str]
    values: dict[str, list[list[Value]]]


class EmbedFns(NamedTuple):
    """Jitted forward passes of one tower each; leading axes are free, a new one compiles once."""

    images: Callable[[Params, UInt8[Array, "b h w 3"]], Float[Array, "b e"]]
    texts: Callable[[Params, Int[Array, "b l"]], Float[Array, "b e"]]


def make_embed_fns(model: ModelConfig) -> EmbedFns:
    """uint8 images or token ids -> L2-normalised embeddings."""
    module = make_model(model)
    return EmbedFns(
        images=jax.jit(lambda params, images: module.apply({"params": params}, {"image": images})[0]),
        texts=jax.jit(lambda params, texts: module.apply({"params": params}, {"text": texts})[1]),
    )


def rows_per_process(batch_size: int, mesh: Mesh) -> int:
    """Rows that each process brings to a forward pass of about `batch_size` rows: as many on each device."""
    return -(-batch_size // mesh.size) * mesh.size // jax.process_count()


def embed_rows(
    function: Callable[[Array], Array], rows: np.ndarray, *, mesh: Mesh, rows_per_pass: int
) -> Float[np.ndarray, "n e"]:
    """`function` of this process's rows, `rows_per_pass` at a time over the mesh, by all processes at once.

    The last batch is filled up with zeros, so that one shape is compiled; no rows are one batch of zeros. All processes must
    come to the same number of passes.
    """
    parts = []
    for start in range(0, max(len(rows), 1), rows_per_pass):
        part = rows[start : start + rows_per_pass]
        full = np.zeros((rows_per_pass, *rows.shape[1:]), rows.dtype)
        full[: len(part)] = part
        parts.append(own_rows(function(sharding.put_batch({"rows": full}, mesh)["rows"]), mesh)[: len(part)])
    return np.concatenate(parts)


class Embedder:
    """Both towers of a model, ready to embed shards and strings on a mesh.

    Attributes:
        rows: rows of this process in each forward pass.
        image_size: (height, width) in pixels.
    """

    def __init__(
        self,
        fns: EmbedFns,
        params: Params,
        *,
        mesh: Mesh,
        rows: int,
        image_size: tuple[int, int],
        tokenize: Callable[[Sequence[str]], Int[np.ndarray, "m l"]],
        read: Callable[[str, Sequence[str]], Images],
    ) -> None:
        """Takes the parameters as they lie on the mesh.

        Args:
            rows: as `rows_per_process` says.
            tokenize: strings -> token ids, padded to the length of the text tower.
            read: (shards, fields) -> this process's share of the images, at most `rows` at a time.
        """
        self.rows, self.image_size = rows, image_size
        embed = functools.partial(embed_rows, mesh=mesh, rows_per_pass=rows)
        self._images = lambda rows: embed(functools.partial(fns.images, params), rows)
        self._texts = lambda rows: embed(functools.partial(fns.texts, params), rows)
        self._tokenize, self._read = tokenize, read

    def embed_images(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n e"]:
        """Embeddings of this process's images; all processes must bring as many batches."""
        return self._images(images)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "m e"]:
        """Embeddings of the texts, which are the same in every process; equal texts are embedded once."""
        rows: dict[str, int] = {}
        for text in texts:
            rows.setdefault(text, len(rows))
        distinct, count = list(rows), jax.process_count()
        own = self._tokenize(distinct[jax.process_index() :: count])
        share = np.zeros((-(-len(distinct) // count), *own.shape[1:]), own.dtype)
        share[: len(own)] = own
        z = gather_rows(self._texts(share)[: len(own)])
        order = [i for first in range(count) for i in range(first, len(distinct), count)]
        z = z[np.argsort(order)]
        _warn_if_collapsed(z, "different texts", "text")
        return z[[rows[text] for text in texts]]

    def embed_shards(self, data: str, fields: Sequence[str] = ()) -> EmbeddedImages:
        """Embeddings of every decodable image, with what `fields` hold; how many could not be decoded is logged.

        Raises:
            FileNotFoundError, UserError: shards are missing or damaged, lack a field, or no image can be decoded.
        """
        images = self._read(data, fields)
        batches, z, records = iter(images), [], []
        nothing = ImageBatch(np.zeros((0, *self.image_size, 3), np.uint8), [], [], [])
        for _ in range(-(-images.pairs // (self.rows * jax.process_count()))):
            batch = next(batches, nothing)
            z.append(self._images(batch.images))
            records += zip(batch.index, batch.keys, batch.values, strict=True)
        next(batches, None)  # what comes last may have to be counted as broken
        counts = sum(map(Counter, gather_records([dict(images.counts)])), Counter())
        records = gather_records(records)
        if not records:
            raise UserError(f"{data} holds no image that can be decoded ({dict(counts)}); check the shards")
        if counts and jax.process_index() == 0:
            logger.warning("images of %s left out because they cannot be decoded: %s", data, dict(counts))
        order = np.argsort([index for index, _, _ in records])
        index, keys, values = zip(*(records[i] for i in order), strict=True)
        zimg = gather_rows(np.concatenate(z))[order]
        _warn_if_collapsed(zimg, f"images of {data}", "image")
        columns = {field: [own[n] for own in values] for n, field in enumerate(fields)}
        return EmbeddedImages(zimg, list(index), list(keys), columns)


def _warn_if_collapsed(z: Float[np.ndarray, "n e"], what: str, tower: str) -> None:
    """Names an encoder that maps everything to one point: its metrics would look like mere chance."""
    if len(z) > _FEW and jax.process_index() == 0 and np.linalg.norm(z - z[0], axis=1).max() < _COLLAPSED:
        logger.warning("the %s tower has collapsed: the embeddings of %d %s are all equal", tower, len(z), what)
