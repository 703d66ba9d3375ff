"""Who is served worse: zero-shot accuracy in each group, and how predictions differ between groups.

    worst group, gap    least accuracy, and greatest minus least
    demographic parity  max over classes c of  max_g P(predicted c | g) - min_g P(predicted c | g)

The accuracy of n images is known to sqrt(p (1 - p) / n): each group has its n and 1 standard error, and the gap has that of its
two groups. Among many small groups the worst looks bad by chance: those below `min_images` are reported, but take no part in
worst, gap and parity.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from siglip.array_types import Int
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, FirstValues
from siglip.evaluation.metrics import standard_error
from siglip.evaluation.results import Evaluation, Result
from siglip.evaluation.zeroshot import ZeroShot


@dataclasses.dataclass(frozen=True)
class Groups(Evaluation):
    """Zero-shot accuracy by group (region, income, gender): each group, the worst, the gap, demographic parity.

    Attributes:
        data: shards, as for training.
        group: field that names the group of an image.
        classes: file of class names, or "imagenet"; see the task zeroshot.
        templates: file of prompts, or "imagenet"; see the task zeroshot.
        label: field that holds the label.
        left_out: groups that take part in nothing, as FMoW's "Other".
        min_images: smaller groups are reported, but are neither the worst nor part of a gap.
        canonical: whether prompts lose punctuation, underscores and capitals; None does what the model's own pipeline does.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    group: str
    classes: str | None = None
    templates: str | None = None
    label: str = "cls"
    left_out: tuple[str, ...] = ()
    min_images: int = 10
    canonical: bool | None = None
    name: str | None = None
    task: Literal["groups"] = "groups"

    BENCHMARK_TASK: ClassVar[str] = "zeroshot_groups"

    @property
    def _zeroshot(self) -> ZeroShot:
        return ZeroShot(self.data, self.classes, self.templates, self.label, canonical=self.canonical, name=self.name)

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        self._zeroshot.check(first_values)
        first_values(self.data, (self.group,))

    def run(self, embedder: Embedder) -> list[Result]:
        """One result.

        Raises:
            UserError: as zero-shot classification does, or fewer than two groups are large enough.
        """
        zeroshot = self._zeroshot
        classes, weights, _ = zeroshot.class_weights(embedder)
        images = embedder.embed_shards(self.data, (self.label, self.group))
        rows, labels = zeroshot.labels_of(images, classes)
        groups = [str((images.values[self.group][row] or [""])[0]).replace("/", "-") for row in rows]
        known = np.asarray([group not in ("", *self.left_out) for group in groups], bool)
        if not known.any():
            raise UserError(f"no image of {self.data} has both a label and a group {self.group!r}")
        if not (np.isfinite(images.zimg).all() and np.isfinite(weights).all()):
            raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
        predicted = np.argmax(images.zimg[rows[known]] @ weights.T, axis=1)
        named = [group for group, there in zip(groups, known, strict=True) if there]
        found = group_gaps(predicted, labels[known], named, classes=len(classes.names), min_images=self.min_images)
        return [Result(self, self.dataset, "", found)]


def group_gaps(
    predicted: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    groups: Sequence[str],
    *,
    classes: int,
    min_images: int = 1,
) -> dict[str, float]:
    """{"acc1_worst_group", "acc1_gap", "demographic_parity_gap"}, and of each group acc1 and n; with errors and chance levels.

    Raises:
        UserError: fewer than two groups have `min_images` images.
    """
    groups = np.asarray(groups)
    each, share, shares_of = {}, {}, {}
    for group in np.unique(groups).tolist():
        own = groups == group
        share[group], count = float(np.mean(predicted[own] == labels[own])), int(own.sum())
        spread = standard_error(share[group], count)
        each |= {f"acc1_{group}": share[group], f"acc1_{group}_se": spread, f"acc1_{group}_chance": 1 / classes}
        each[f"n_{group}"] = float(count)
        if count >= min_images:
            shares_of[group] = np.bincount(predicted[own], minlength=int(predicted.max()) + 1) / count
    if len(shares_of) < 2:
        raise UserError(f"{len(shares_of)} groups have {min_images} images or more; gaps need two: lower min_images")
    worst, best = (pick(shares_of, key=share.__getitem__) for pick in (min, max))
    parity = np.ptp(np.stack(list(shares_of.values())), axis=0).max()
    return {
        "acc1_worst_group": share[worst],
        "acc1_worst_group_se": each[f"acc1_{worst}_se"],
        "acc1_gap": share[best] - share[worst],
        "acc1_gap_se": float(np.hypot(each[f"acc1_{worst}_se"], each[f"acc1_{best}_se"])),
        "demographic_parity_gap": float(parity),
    } | each
