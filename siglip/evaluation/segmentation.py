"""Linear segmentation: a class for each pixel from frozen patch tokens, by one linear layer (DINOv2, DINOv3).

    logits = resize(x W + b) to the mask, bilinear;   IoU_c = hits / (predicted + true - hits);   mIoU = mean over the classes

Pixels are summed over all images; classes that occur neither in the masks nor in the predictions are left out. Images are the
independent cases of the standard error: that of the jackknife, which leaves out each in turn. DINOv2 and
DINOv3 train on crops at several scales and slide a window over large images; here tokens are computed once for each image at the
model's resolution, and masks are resized to it without mixing classes: numbers are lower than theirs. Of a NaFlex model that is
the resolution of each image: a mask is cut into patches as its image is, and logits are resized within its grid of tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from siglip.array_types import Array, Bool, Float, Int, UInt8
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, FirstValues
from siglip.evaluation.frozen_tokens import (
    apply_head,
    channel_statistics,
    read_tokens,
    standardised,
    train_head,
    valid_of,
)
from siglip.evaluation.results import Evaluation, Result
from siglip.parallel.collectives import gather_records, gather_rows
from siglip.parallel.launch import in_all_or_none

_MAX_CLASSES = 255


@dataclasses.dataclass(frozen=True)
class Segmentation(Evaluation):
    """A linear layer on frozen patch tokens: mean intersection over union, pixel accuracy.

    Attributes:
        data: shards of the images that are segmented.
        train: shards of the images on which the layer is trained; their tokens go into a temporary file.
        mask: field with a PNG of one channel whose values are classes.
        ignore: values that are not a class: 255, and 0 of ADE20k.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.images_per_step) < 1 or not self.learning_rate > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"segmentation: steps={self.steps}, images_per_step={self.images_per_step} and "
                f"learning_rate={self.learning_rate} must be positive, dropout={self.dropout} in [0, 1)"
            )

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        for data in (self.train, self.data):
            first_values(data, (self.mask, f"{self.mask}.bytes"))

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError where no mask can be read, or masks hold one class alone."""
        arrays = read_tokens(embedder, self.train, mask=self.mask).arrays
        classes = self._classes(arrays)
        mean, std = channel_statistics(arrays)
        width = arrays["tokens"].shape[-1]
        params = {"kernel": np.zeros((width, classes), np.float32), "bias": np.zeros(classes, np.float32)}
        head = functools.partial(pixel_logits, size=embedder.image_size, patch_px=embedder.patch_px)

        def loss(params, batch, key):
            logits = head(params, batch, key, dropout=self.dropout)
            known, valid = ~jnp.isin(batch["mask"], jnp.asarray(self.ignore, jnp.uint8)), valid_of(batch)
            known = known if valid is None else known & valid[..., None]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, batch["mask"], 0))
            return (each * known).sum() / jnp.maximum(known.sum(), 1)

        params = train_head(
            params | {"mean": mean, "std": std}, loss, arrays, steps=self.steps, batch_size=self.images_per_step,
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, seed=self.seed, mesh=embedder.mesh,
        )  # fmt: skip
        arrays = read_tokens(embedder, self.data, mask=self.mask).arrays
        predict = lambda params, batch: jnp.argmax(head(params, batch), axis=-1).astype(jnp.uint8)  # noqa: E731

        def count() -> np.ndarray:
            counts, valid = np.zeros((len(arrays["mask"]), 3, classes), np.int32), valid_of(arrays)
            for rows, predicted in apply_head(predict, params, {k: a for k, a in arrays.items() if k != "mask"}):
                for n, image in zip(range(rows.start, rows.stop), predicted, strict=True):
                    own = (_without_padding(values, valid, n) for values in (image, arrays["mask"][n]))
                    counts[n] = counts_of(*own, classes=classes, ignore=self.ignore)
            return counts

        counts = gather_rows(in_all_or_none(count, bad_input=(UserError,)))
        return [Result(self, self.dataset, "", segmentation_metrics(counts))]

    def _classes(self, arrays: Mapping[str, np.ndarray]) -> int:
        """One more than the largest class of the training masks."""
        present, valid = np.zeros(_MAX_CLASSES + 1, bool), valid_of(arrays)
        for n, mask in enumerate(arrays["mask"]):
            present[np.unique(_without_padding(mask, valid, n))] = True
        present = np.any(gather_records([present.tolist()]), axis=0)
        present[[value for value in self.ignore if 0 <= value <= _MAX_CLASSES]] = False
        if present.sum() < 2:
            raise UserError(
                f"the masks of {self.train} hold {present.sum()} classes besides {self.ignore}; two are needed"
            )
        return int(np.flatnonzero(present)[-1]) + 1


def _without_padding(
    pixels: UInt8[np.ndarray, "h w"], valid: Bool[np.ndarray, "n patches"] | None, image: int
) -> UInt8[np.ndarray, "_ _"]:
    """The pixels of an image; where they are patches, those of all that are not padding."""
    return pixels if valid is None else pixels[valid[image]]


def pixel_logits(
    params,
    batch: Mapping[str, Array],
    key: Array | None = None,
    *,
    size: tuple[int, int],
    patch_px: tuple[int, int],
    dropout: float = 0.0,
) -> Float[Array, "b h w k"] | Float[Array, "b n p k"]:
    """Logits of every pixel: patch by patch where the batch has a "grid", else of images of one `size`.

    key: of the dropout; None: none.
    """
    x = standardised(params, batch["tokens"])
    if key is not None and dropout:
        kept = jax.random.bernoulli(key, 1 - dropout, (len(x), 1, x.shape[-1]))
        x = jnp.where(kept, x / (1 - dropout), 0)
    logits = x @ params["kernel"] + params["bias"][None, None]
    if "grid" in batch:
        return resize_in_patches(logits, batch["grid"], patch_px)
    grid = (side // patch for side, patch in zip(size, patch_px, strict=True))
    return jax.image.resize(logits.reshape(len(x), *grid, -1), (len(x), *size, logits.shape[-1]), "bilinear")


def resize_in_patches(
    x: Float[Array, "b n k"], grid: Int[Array, "b 2"], patch_px: tuple[int, int]
) -> Float[Array, "b n p k"]:
    """A value for each patch of images of several grids -> for each pixel of the patches, bilinear.

    Between the middles of patches lie at most their neighbours; beyond the outermost, values go on as they are.
    """
    b, n, k = x.shape
    down, across = (side[:, None] for side in grid.clip(1).T)
    place = jnp.arange(n)[None]
    steps = jnp.arange(-1, 2)[None, None]
    row = jnp.clip((place // across)[..., None] + steps, 0, down[..., None] - 1)
    column = jnp.clip((place % across)[..., None] + steps, 0, across[..., None] - 1)
    places = (row[..., :, None] * across[..., None, None] + column[..., None, :]).reshape(b, n * 9, 1)
    near = jnp.take_along_axis(x, places, axis=1).reshape(b, n, 3, 3, k)
    down_weights, across_weights = map(_neighbour_weights, patch_px)
    return jnp.einsum("bnyxk,iy,jx->bnijk", near, down_weights, across_weights).reshape(b, n, -1, k)


def _neighbour_weights(pixels: int) -> Float[np.ndarray, "pixels 3"]:
    """For each pixel of a patch, the weights of the patch before, of its own and of the one after."""
    at = (np.arange(pixels) + 0.5) / pixels - 0.5
    return np.stack([np.maximum(-at, 0), 1 - abs(at), np.maximum(at, 0)], axis=1).astype(np.float32)


def counts_of(
    predicted: UInt8[np.ndarray, "h w"],
    mask: UInt8[np.ndarray, "h w"],
    *,
    classes: int,
    ignore: tuple[int, ...] = (255,),
) -> Int[np.ndarray, "3 k"]:
    """How many pixels of an image are hits, in the mask, and predicted, by class; those to ignore count nowhere.

    Raises:
        UserError: the mask holds a class that no training mask has.
    """
    known = ~np.isin(mask, ignore)
    true, guessed = mask[known], predicted[known]
    if len(true) and true.max() >= classes:
        raise UserError(f"a mask holds class {true.max()}, but those of training end at {classes - 1}")
    return np.stack([np.bincount(found, minlength=classes) for found in (true[true == guessed], true, guessed)])


def segmentation_metrics(counts: Int[np.ndarray, "n 3 k"]) -> dict[str, float]:
    """Mean IoU and pixel accuracy of `counts_of` each image, with standard errors over images and what a class drawn at random
    for each pixel gets.

    Raises:
        UserError: no pixel has a class.
    """
    n, _, classes = counts.shape
    total = counts.sum(axis=0, dtype=np.int64)
    if not (pixels := total[1].sum()):
        raise UserError("no pixel of the masks has a class")
    at_random = np.stack([total[1] / classes, total[1], np.full(classes, pixels / classes)])
    found = {}
    for name, measure in {"mean_iou_tokens": _mean_iou, "pixel_acc_tokens": _pixel_accuracy}.items():
        without = measure(total - counts)  # each image in turn: the jackknife
        found[name] = float(measure(total))
        found[f"{name}_se"] = float(np.sqrt(n - 1) * np.std(without)) if n > 1 else float("nan")
        found[f"{name}_chance"] = float(measure(at_random))
    return found


def _mean_iou(counts: np.ndarray) -> np.ndarray | float:
    hits, true, predicted = np.moveaxis(counts, -2, 0)
    union = true + predicted - hits
    return (hits / np.maximum(union, 1)).sum(axis=-1) / np.maximum((union > 0).sum(axis=-1), 1)


def _pixel_accuracy(counts: np.ndarray) -> np.ndarray | float:
    hits, true, _ = np.moveaxis(counts, -2, 0)
    return hits.sum(axis=-1) / np.maximum(true.sum(axis=-1), 1)
