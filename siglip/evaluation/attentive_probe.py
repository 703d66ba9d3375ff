"""Attentive probe on frozen patch tokens (AIM, arXiv:2401.08541): what a tower knows that its own pooling does not show.

    out = sum_n softmax_n(q_h . K x_n / sqrt(d_h)) V x_n  in every head h, then a linear layer

One learned query, keys and values without bias, channels standardised as by a BatchNorm without parameters.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from siglip.array_types import Array, Bool, Float
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder
from siglip.evaluation.frozen_tokens import (
    FrozenTokens,
    apply_head,
    channel_statistics,
    read_tokens,
    standardised,
    train_head,
    valid_of,
)
from siglip.evaluation.labels import Supervised, keep_labelled, names_of
from siglip.evaluation.metrics import probe_accuracies
from siglip.evaluation.results import Result
from siglip.parallel.collectives import gather_records, gather_rows
from siglip.parallel.launch import in_all_or_none


@dataclasses.dataclass(frozen=True)
class AttentiveProbe(Supervised):
    """A learned query over frozen patch tokens, and a linear layer: ap_acc1, mean recall per class.

    Attributes:
        data: shards of the images that are classified.
        train: shards of the labelled images on which the probe is trained; their tokens go into a temporary file.
        label: field that holds the label in both: a number or a name.
        epochs: passes over the training images.
        images_per_step: of training, over all devices.
        learning_rate: of AdamW, at its peak.
        weight_decay: of AdamW.
        heads: of the attention; must divide the tower's width.
        seed: of the first weights and of the order.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    train: str
    label: str = "cls"
    epochs: int = 20
    images_per_step: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    heads: int = 12
    seed: int = 0
    name: str | None = None
    task: Literal["attentive_probe"] = "attentive_probe"

    BENCHMARK_TASK: ClassVar[str] = "attentive_probe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.images_per_step, self.heads) < 1 or not self.learning_rate > 0 or self.seed < 0:
            raise UserError(
                f"attentive_probe: epochs={self.epochs}, images_per_step={self.images_per_step}, heads={self.heads} and "
                f"learning_rate={self.learning_rate} must be positive"
            )

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError where labels are missing, or `heads` does not divide the width."""
        width = embedder.embed_images(embedder.no_images, feature="tokens").shape[-1]  # told before images are read
        if width % self.heads:
            fits = next(n for n in range(min(self.heads, width), 0, -1) if width % n == 0)
            raise UserError(f"attentive_probe: heads={self.heads} does not divide the width {width}; use {fits}")
        train = read_tokens(embedder, self.train, (self.label,))
        own = [value for (value,) in gather_records([v[0] for v in train.values if len(v[0]) == 1])]
        names = names_of(own, data=self.train, label=self.label)
        arrays = self._labelled(train, names, self.train)
        mean, std = channel_statistics(arrays)
        params = first_params(width, len(names), seed=self.seed) | {"mean": mean, "std": std}
        images = sum(gather_records([len(arrays["label"])]))

        def head(params, batch):
            return attentive_logits(params, batch["tokens"], valid_of(batch), heads=self.heads)

        def loss(params, batch, key):
            logits = head(params, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        params = train_head(
            params, loss, arrays, steps=max(1, images * self.epochs // self.images_per_step),
            batch_size=self.images_per_step, learning_rate=self.learning_rate, weight_decay=self.weight_decay,
            seed=self.seed, mesh=embedder.mesh,
        )  # fmt: skip
        arrays = self._labelled(read_tokens(embedder, self.data, (self.label,)), names, self.data)
        scored = apply_head(head, params, arrays)
        predicted = [np.argmax(logits, axis=1).astype(np.int32) for _, logits in scored]
        predicted = gather_rows(np.concatenate([np.zeros(0, np.int32), *predicted]))
        metrics = probe_accuracies(predicted, gather_rows(arrays["label"]), "ap", "tokens", classes=len(names))
        return [Result(self, self.dataset, "", metrics)]

    def _labelled(self, found: FrozenTokens, names: list, data: str) -> dict[str, np.ndarray]:
        """The arrays of this process's images that have a label, and "label"."""
        values = [own[0] for own in found.values]
        rows = np.arange(len(values))
        keep = functools.partial(keep_labelled, data=data, label=self.label, names=names)
        kept = in_all_or_none(lambda: keep(rows, found.keys, values), bad_input=(UserError,))
        arrays = found.arrays
        if len(kept.features) < len(rows):
            arrays = {name: array[kept.features] for name, array in arrays.items()}
        return arrays | {"label": kept.labels.astype(np.int32)}


def first_params(width: int, classes: int, *, seed: int) -> dict[str, np.ndarray]:
    """The probe before training; keys and values keep the size of their input."""
    rng = np.random.default_rng(seed)
    return {
        "query": rng.normal(0, 0.02, width).astype(np.float32),
        "key": rng.normal(0, width**-0.5, (width, width)).astype(np.float32),
        "value": rng.normal(0, width**-0.5, (width, width)).astype(np.float32),
        "kernel": np.zeros((width, classes), np.float32),
        "bias": np.zeros(classes, np.float32),
    }


def attentive_logits(
    params, tokens: Float[Array, "b n d"], valid: Bool[Array, "b n"] | None = None, *, heads: int
) -> Float[Array, "b k"]:
    """The probe's equation; `params` hold the training set's "mean" and "std" too. valid: False where a token is padding."""
    x = standardised(params, tokens)
    query, keys, values = (
        z.reshape(*z.shape[:-1], heads, -1) for z in (params["query"], x @ params["key"], x @ params["value"])
    )
    scores = jnp.einsum("hd,bnhd->bnh", query, keys) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=1, where=None if valid is None else valid[..., None])
    pooled = jnp.einsum("bnh,bnhd->bhd", weights, values).reshape(len(x), -1)
    return pooled @ params["kernel"] + params["bias"][None]
