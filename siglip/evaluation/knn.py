"""Nearest neighbours on frozen features, as DINOv2 votes (arXiv:2304.07193, dinov2/eval/knn.py).

class = argmax_c  sum over the k nearest training images of class c of  exp(cosine / T)
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, Feature
from siglip.evaluation.labels import Supervised, check_feature, train_and_test
from siglip.evaluation.metrics import probe_accuracies
from siglip.evaluation.results import Result
from siglip.parallel.collectives import gather_rows

_TILE = (1024, 8192)  # queries, training images


@dataclasses.dataclass(frozen=True)
class Knn(Supervised):
    """Nearest neighbours among labelled training images.

    Attributes:
        data: shards of the images that are classified.
        train: shards of the labelled images among which neighbours are looked for.
        label: field that holds the label in both: a number or a name.
        k: neighbours; all, where there are fewer training images.
        temperature: of the votes: a neighbour counts exp(cosine / temperature).
        feature: map (the pooled vector before the head), patch_mean, head or embedding; it is in the metrics' names.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    train: str
    label: str = "cls"
    k: int = 20
    temperature: float = 0.07
    feature: Feature = "map"
    name: str | None = None
    task: Literal["knn"] = "knn"

    BENCHMARK_TASK: ClassVar[str] = "knn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or not self.temperature > 0:
            raise UserError(f"knn: k={self.k} must be at least 1 and temperature={self.temperature} above 0")
        check_feature(self.task, self.feature)

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError where labels are missing or differ from those of the training set."""
        train, test = train_and_test(embedder, self.train, self.data, self.label, feature=self.feature)
        votes = {"k": self.k, "temperature": self.temperature}
        predicted = knn_classes(train.features, train.labels, test.features, **votes)
        return [
            Result(
                self,
                self.dataset,
                "",
                probe_accuracies(predicted, test.labels, "knn", self.feature, classes=len(train.names)),
            )
        ]


def knn_classes(
    train: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "q d"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Int[np.ndarray, " q"]:
    """The class of each query; the first of equal neighbours is nearer, the first of equal classes wins.

    All processes call it with the same arguments and get the same; they share the queries.
    """
    k, classes = min(k, len(train)), int(labels.max()) + 1
    train, queries = (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (train, queries))
    share = -(-len(queries) // jax.process_count())
    own = queries[jax.process_index() * share :][:share]
    rows, columns = min(_TILE[0], len(queries)), min(_TILE[1], len(train))
    found, devices = [], jax.local_devices()
    for turn, start in enumerate(range(0, len(own), rows)):
        block = np.pad(own[start : start + rows], [(0, max(0, start + rows - len(own))), (0, 0)])
        block = jax.device_put(block, devices[turn % len(devices)])  # nothing waits: all devices are at work
        best = (np.full((rows, k), -np.inf, np.float32), np.zeros((rows, k), np.int32))
        for first in range(0, len(train), columns):
            tile = train[first : first + columns]
            more = columns - len(tile)
            tile_labels = np.pad(labels[first : first + columns], (0, more), constant_values=-1).astype(np.int32)
            best = _nearest(block, best, np.pad(tile, [(0, more), (0, 0)]), tile_labels)
        found.append(_vote(best, temperature=temperature, classes=classes))
    return gather_rows(np.concatenate([np.zeros(0, np.int32), *map(np.asarray, found)])[: len(own)])


@jax.jit
def _nearest(
    block: Float[Array, "r d"],
    best: tuple[Float[Array, "r k"], Int[Array, "r k"]],
    tile: Float[Array, "c d"],
    labels: Int[Array, " c"],
) -> tuple[Float[Array, "r k"], Int[Array, "r k"]]:
    """The k largest cosines so far, and their labels; a label of -1 is no training image."""
    cosines = jnp.where(labels[None] >= 0, jnp.matmul(block, tile.T, precision=jax.lax.Precision.HIGHEST), -jnp.inf)
    cosines = jnp.concatenate([best[0], cosines], axis=1)
    labels = jnp.concatenate([best[1], jnp.broadcast_to(labels, (len(block), len(labels)))], axis=1)
    nearest, places = jax.lax.top_k(cosines, best[0].shape[1])
    return nearest, jnp.take_along_axis(labels, places, axis=1)


@functools.partial(jax.jit, static_argnames=("temperature", "classes"))
def _vote(best: tuple[Float[Array, "r k"], Int[Array, "r k"]], *, temperature: float, classes: int) -> Int[Array, " r"]:
    cosines, labels = best
    weights = jnp.exp((cosines - cosines[:, :1]) / temperature)  # relative to the nearest: exp(1 / T) would be 10^6
    votes = jnp.zeros((len(cosines), classes)).at[jnp.arange(len(cosines))[:, None], labels].add(weights)
    return jnp.argmax(votes, axis=1)
