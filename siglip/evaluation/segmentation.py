"""Linear segmentation: a class for each pixel from frozen patch tokens, by one linear layer (DINOv2, DINOv3).

    logits = resize(x W + b) to the mask, bilinear;   IoU_c = hits / (predicted + true - hits);   mIoU = mean over the classes

One confusion matrix over all images; classes that occur neither in the masks nor in the predictions are left out. DINOv2 and
DINOv3 train on crops at several scales and slide a window over large images; here tokens are computed once for each image at the
model's resolution, and masks are resized to it without mixing classes: numbers are lower than theirs.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from siglip.array_types import Array, Float, Int, UInt8
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, FirstValues
from siglip.evaluation.frozen_tokens import apply_head, channel_statistics, read_tokens, standardised, train_head
from siglip.evaluation.results import Result, check_name, dataset_name
from siglip.parallel.collectives import gather_records, gather_rows
from siglip.parallel.launch import in_all_or_none

_MAX_CLASSES = 255


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A linear layer on frozen patch tokens: mean intersection over union, pixel accuracy.

    Attributes:
        data: shards of the images that are segmented.
        train: shards of the images on which the layer is trained; their tokens go into a temporary file.
        mask: field with a PNG of one channel whose values are classes.
        ignore: values that are no class: 255, and 0 of ADE20k.
        steps: of training.
        images_per_step: of training, over all devices.
        learning_rate: of AdamW, at its peak.
        weight_decay: of AdamW.
        dropout: share of the channels that a step leaves out.
        seed: of the order and the dropout.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    train: str
    mask: str = "mask"
    ignore: tuple[int, ...] = (255,)
    steps: int = 2000
    images_per_step: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    dropout: float = 0.1
    seed: int = 0
    name: str | None = None
    task: Literal["segmentation"] = "segmentation"

    BENCHMARK_TASK: ClassVar[str] = "linear_segmentation"
    EMBEDS_TEXTS: ClassVar[bool] = False
    NEEDS_ONE_SIZE: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_name(self.name)
        if min(self.steps, self.images_per_step) < 1 or not self.learning_rate > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"segmentation: steps={self.steps}, images_per_step={self.images_per_step} and "
                f"learning_rate={self.learning_rate} must be positive, dropout={self.dropout} in [0, 1)"
            )

    @property
    def dataset(self) -> str:
        """Name of the data set in the result."""
        return dataset_name(self.name, self.data)

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        for data in (self.train, self.data):
            if not any(first_values(data, (self.mask, f"{self.mask}.bytes")).values()):
                raise UserError(
                    f"the first pair of {data} has no field {self.mask!r}; name that of the masks with --mask"
                )

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError where no mask can be read, or masks hold one class alone."""
        train = read_tokens(embedder, self.train, mask=self.mask)
        tokens, masks = train.arrays["tokens"], train.arrays["mask"]
        classes = self._classes(masks)
        grid = _grid(embedder.image_size, tokens.shape[1])
        mean, std = channel_statistics(tokens)
        width, size = tokens.shape[-1], embedder.image_size
        params = {"kernel": np.zeros((width, classes), np.float32), "bias": np.zeros(classes, np.float32)}

        def loss(params, batch, key):
            logits = pixel_logits(params, batch["tokens"], key, grid=grid, size=size, dropout=self.dropout)
            known = ~jnp.isin(batch["mask"], jnp.asarray(self.ignore, jnp.uint8))
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, batch["mask"], 0))
            return (each * known).sum() / jnp.maximum(known.sum(), 1)

        params = train_head(
            params | {"mean": mean, "std": std}, loss, {"tokens": tokens, "mask": masks}, steps=self.steps,
            batch_size=self.images_per_step, learning_rate=self.learning_rate, weight_decay=self.weight_decay,
            seed=self.seed, mesh=embedder.mesh,
        )  # fmt: skip
        test = read_tokens(embedder, self.data, mask=self.mask)
        head = functools.partial(pixel_logits, grid=grid, size=size)
        predict = lambda params, x: jnp.argmax(head(params, x), axis=-1).astype(jnp.uint8)  # noqa: E731

        def count() -> np.ndarray:
            confusion = np.zeros((classes, classes), np.int64)
            for rows, predicted in apply_head(predict, params, test.arrays["tokens"]):
                confusion += confusion_of(predicted, test.arrays["mask"][rows], classes=classes, ignore=self.ignore)
            return confusion

        confusion = in_all_or_none(count, bad_input=(UserError,))
        # Counts above 2^24 would not survive float32, nor those above 2^31 int32: two halves go to the others.
        halves = np.stack([confusion >> 24, confusion & (2**24 - 1)]).astype(np.int32)
        high, low = gather_rows(halves[None]).astype(np.int64).sum(axis=0)
        return [Result(self, self.dataset, "", segmentation_metrics((high << 24) + low))]

    def _classes(self, masks: UInt8[np.ndarray, "n h w"]) -> int:
        """One more than the largest class of the training masks."""
        present = np.zeros(_MAX_CLASSES + 1, bool)
        for mask in masks:
            present[np.unique(mask)] = True
        present = np.any(gather_records([present.tolist()]), axis=0)
        present[[value for value in self.ignore if 0 <= value <= _MAX_CLASSES]] = False
        if present.sum() < 2:
            raise UserError(
                f"the masks of {self.train} hold {present.sum()} classes besides {self.ignore}; two are needed"
            )
        return int(np.flatnonzero(present)[-1]) + 1


def pixel_logits(
    params,
    tokens: Float[Array, "b n d"],
    key: Array | None = None,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    dropout: float = 0.0,
) -> Float[Array, "b h w k"]:
    """Of every pixel. key: of the dropout; None: none."""
    x = standardised(params, tokens)
    if key is not None and dropout:
        kept = jax.random.bernoulli(key, 1 - dropout, (len(x), 1, x.shape[-1]))
        x = jnp.where(kept, x / (1 - dropout), 0)
    logits = (x @ params["kernel"] + params["bias"][None, None]).reshape(len(x), *grid, -1)
    return jax.image.resize(logits, (len(x), *size, logits.shape[-1]), "bilinear")


def confusion_of(
    predicted: Int[np.ndarray, "n h w"] | UInt8[np.ndarray, "n h w"],
    mask: UInt8[np.ndarray, "n h w"],
    *,
    classes: int,
    ignore: tuple[int, ...] = (255,),
) -> Int[np.ndarray, "k k"]:
    """Pixels by (class in the mask, predicted class).

    Raises:
        UserError: a mask holds a class that no training mask has.
    """
    known = ~np.isin(mask, ignore)
    if known.any() and mask[known].max() >= classes:
        raise UserError(f"a mask holds class {mask[known].max()}, but those of training end at {classes - 1}")
    pairs = mask[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def segmentation_metrics(confusion: Int[np.ndarray, "k k"]) -> dict[str, float]:
    """{"mean_iou", "pixel_acc"} of pixels by (true class, predicted class), from tokens.

    Raises:
        UserError: no pixel has a class.
    """
    if not confusion.sum():
        raise UserError("no pixel of the masks has a class")
    hits = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    iou = hits[union > 0] / union[union > 0]
    return {"mean_iou_tokens": float(np.mean(iou)), "pixel_acc_tokens": float(hits.sum() / confusion.sum())}


def _grid(size: tuple[int, int], patches: int) -> tuple[int, int]:
    """(down, across) of the patches of an image, which are as tall as wide or as the image's sides have it."""
    fitting = [(n, patches // n) for n in range(1, patches + 1) if patches % n == 0]
    return min(fitting, key=lambda grid: abs(grid[0] * size[1] - grid[1] * size[0]))
