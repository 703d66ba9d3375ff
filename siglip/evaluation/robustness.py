"""Zero-shot classification of images made worse on the fly, by ImageNet-C's corruptions and severities (arXiv:1903.12261).

    acc1_NAME = mean over the severities;   acc1_corrupted = mean over the corruptions;   relative = acc1_corrupted / acc1_clean

They are computed at the model's resolution, as ImageNet-C is at 224 pixels. It is not mCE, which needs all of its 15 corruptions
(motion, snow, frost, glass, elastic and fog are missing here) and AlexNet's errors.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, FirstValues
from siglip.evaluation.results import Result, check_name, dataset_name
from siglip.evaluation.zeroshot import ZeroShot

Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "gaussian_blur", "brightness",
    "contrast", "jpeg_compression", "pixelate",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Zero-shot classification of corrupted images: noise, blur, brightness, contrast, JPEG, pixels.

    Attributes:
        data: shards, as for training.
        classes: file of class names, or "imagenet"; see the task zeroshot.
        templates: file of prompts, or "imagenet"; see the task zeroshot.
        label: field that holds the label.
        corruptions: which; each is a pass over the data for each severity.
        severities: from 1 to 5.
        canonical: whether prompts lose punctuation, underscores and capitals; None does what the model's own pipeline does.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    classes: str | None = None
    templates: str | None = None
    label: str = "cls"
    corruptions: tuple[Corruption, ...] = (
        "gaussian_noise",
        "gaussian_blur",
        "brightness",
        "jpeg_compression",
        "pixelate",
    )
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    canonical: bool | None = None
    name: str | None = None
    task: Literal["robustness"] = "robustness"

    BENCHMARK_TASK: ClassVar[str] = "robustness"
    EMBEDS_TEXTS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.corruptions or not self.severities or not set(self.severities) <= {1, 2, 3, 4, 5}:
            raise UserError(
                f"robustness: severities={self.severities} must be numbers from 1 to 5, and corruptions not empty"
            )

    @property
    def dataset(self) -> str:
        """Name of the data set in the result."""
        return dataset_name(self.name, self.data)

    @property
    def _clean(self) -> ZeroShot:
        return ZeroShot(self.data, self.classes, self.templates, self.label, canonical=self.canonical, name=self.name)

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        self._clean.check(first_values)

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError as zero-shot classification does, or where images have several labels."""
        classes, weights, texts = self._clean.class_weights(embedder)

        def accuracy(**more) -> float:
            images = embedder.embed_shards(self.data, (self.label,), **more)
            found = self._clean.score(images, classes, weights, texts)
            if "acc1" not in found:
                raise UserError(f"images of {self.data} have several labels; robustness takes one label each")
            return found["acc1"]

        metrics = {"acc1_clean": accuracy()}
        for name in self.corruptions:
            found = [accuracy(corruption=(name, severity)) for severity in self.severities]
            metrics[f"acc1_{name}"] = float(np.mean(found))
        corrupted = float(np.mean([metrics[f"acc1_{name}"] for name in self.corruptions]))
        relative = {"relative": corrupted / metrics["acc1_clean"]} if metrics["acc1_clean"] else {}
        return [Result(self, self.dataset, "", metrics | {"acc1_corrupted": corrupted} | relative)]
