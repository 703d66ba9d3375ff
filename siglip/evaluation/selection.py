"""Which caption belongs to which image, among a few that hardly differ: SugarCrepe (arXiv:2306.14610), Winoground (2204.03162).

    text_acc    every image of an instance scores its own caption above all others
    image_acc   every caption scores its own image above all others
    acc         both

Strict: a tie is wrong, as SugarCrepe's and Winoground's own code have it. CLIP_benchmark takes the argmax with the right one
first, so an encoder that maps everything to one point gets 100 %: `strict=False` is that number.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import numpy as np

from siglip.array_types import Bool, Float
from siglip.errors import UserError
from siglip.evaluation.embed import EmbeddedImages, Embedder, FirstValues
from siglip.evaluation.metrics import with_error
from siglip.evaluation.results import Evaluation, Result

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Selection(Evaluation):
    """The right caption among hard negatives: one image with several captions, or several pairs that are each other's negatives.

    Attributes:
        data: shards, as for training.
        captions: fields that hold one caption each, the right one first: ("txt", "negative") of SugarCrepe, ("txt",) of
            Winoground.
        instance: field whose value the pairs of one instance share, as Winoground's two; None: every image is an instance.
        strict: whether a tie is wrong; False takes the first of equal scores, which is the right one.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    captions: tuple[str, ...] = ("txt", "negative")
    instance: str | None = None
    strict: bool = True
    name: str | None = None
    task: Literal["selection"] = "selection"

    BENCHMARK_TASK: ClassVar[str] = "image_caption_selection"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.captions) < 1 + (self.instance is None):
            raise UserError(
                f"selection among captions={self.captions}: name the right caption's field and those of wrong ones, or "
                "the field that the pairs of an instance share"
            )

    @property
    def _fields(self) -> tuple[str, ...]:
        return self.captions if self.instance is None else (*self.captions, self.instance)

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        found = first_values(self.data, self._fields)
        missing = next((field for field in self._fields if not found[field]), None)
        if missing is not None:
            raise UserError(f"the first pair of {self.data} has no field {missing!r}")

    def run(self, embedder: Embedder) -> list[Result]:
        """One result.

        Raises:
            UserError: nothing is whole: an image lacks a caption, an instance has one pair only.
        """
        images = embedder.embed_shards(self.data, self._fields)
        instances = self._instances(images)
        rows = [row for members in instances for row in members]
        ztxt = embedder.embed_texts([images.values[field][row][0] for row in rows for field in self.captions])
        ztxt, scores, done = ztxt.reshape(len(rows), len(self.captions), -1), [], 0
        for members in instances:
            own = ztxt[done : done + len(members)]
            # The images' own captions first, in the images' order; then the wrong ones.
            candidates = np.concatenate([own[:, 0], own[:, 1:].reshape(-1, own.shape[-1])])
            scores.append(np.einsum("ie,ce->ic", images.zimg[members], candidates))
            done += len(members)
        return [Result(self, self.dataset, "", selection(scores, strict=self.strict))]

    def _instances(self, images: EmbeddedImages) -> list[list[int]]:
        """Rows of the images of each instance that is whole; says how many are not."""
        members: dict[object, list[int]] = {}
        broken = set()
        for row, key in enumerate(images.keys):
            instance = row if self.instance is None else (*images.values[self.instance][row], None)[0]
            members.setdefault(instance, []).append(row)
            if not all(images.values[field][row] for field in self._fields):
                broken.add(instance)
            elif not all(isinstance(images.values[field][row][0], str) for field in self.captions):
                raise UserError(f"image {key} of {self.data} has something else than a text in one of {self.captions}")
            elif any(len(images.values[field][row]) > 1 for field in self.captions):
                raise UserError(
                    f"image {key} of {self.data} has several captions in one of {self.captions}; selection takes one"
                )
        least = 1 if self.instance is None else 2
        whole = [rows for instance, rows in members.items() if instance not in broken and len(rows) >= least]
        if not whole:
            raise UserError(f"no instance of {self.data} is whole: each image needs {', '.join(self._fields)}")
        if len(whole) < len(members) and jax.process_index() == 0:
            told = "%d of %d instances of %s left out because a caption or an image is missing"
            logger.warning(told, len(members) - len(whole), len(members), self.data)
        return whole


def selection(scores: Sequence[Float[np.ndarray, "i c"]], *, strict: bool = True) -> dict[str, float]:
    """{"text_acc"} and, where instances have several images, {"image_acc", "acc"}; and the share that a tie decides.

    Each has its standard error and its chance level, of scores drawn at random.

    Args:
        scores: of each instance, i images by c >= i captions; caption k belongs to image k.

    Raises:
        UserError: a score is not finite.
    """
    if not all(np.isfinite(own).all() for own in scores):
        raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
    text, image = ([_all_right(side, strict=strict) for side in way] for way in (scores, [own.T for own in scores]))
    tied = [_all_right(own, strict=True) != _all_right(own, strict=False) for own in scores]
    shapes = [own.shape for own in scores]
    chance = float(np.mean([c**-i for i, c in shapes]))
    metrics = with_error("text_acc", np.asarray(text), chance=chance) | {"tied_fraction": float(np.mean(tied))}
    if any(len(own) > 1 for own in scores):
        both = 1 / 6 if set(shapes) == {(2, 2)} else None  # of the 24 orders of four scores
        metrics |= with_error("image_acc", np.asarray(image), chance=float(np.mean([i**-i for i, _ in shapes])))
        metrics |= with_error("acc", np.logical_and(text, image), chance=both)
    return metrics


def _all_right(scores: Float[np.ndarray, "q c"], *, strict: bool) -> bool:
    """Whether each query that has a candidate of its own scores it highest."""
    count = min(scores.shape)
    right, others = np.diag(scores), scores[:count].copy()
    others[np.arange(count), np.arange(count)] = -np.inf
    worse: Bool[np.ndarray, "q c"] = others >= right[:, None] if strict else _first_is_other(scores[:count])
    return not worse.any()


def _first_is_other(scores: Float[np.ndarray, "q c"]) -> Bool[np.ndarray, " q"]:
    return np.argmax(scores, axis=1) != np.arange(len(scores))
