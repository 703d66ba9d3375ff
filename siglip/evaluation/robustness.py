"""Zero-shot classification of images made worse on the fly, by ImageNet-C's corruptions and severities (arXiv:1903.12261).

    acc1_NAME = mean over the severities;   acc1_corrupted = mean over the corruptions;   relative = acc1_corrupted / acc1_clean
    mean_corruption_error = 1 - acc1_corrupted;   error_increase = acc1_clean - acc1_corrupted
    mce = mean over the corruptions of error_NAME / reference_NAME
    relative_mce = mean over them of (error_NAME - error_clean) / (reference_NAME - reference_clean)

They are computed at the model's resolution, as ImageNet-C is at 224 pixels. The errors of the reference are those of the same
corruptions and severities; AlexNet's are of ImageNet, and say nothing of other data.

The trap: published mCE is over 15 corruptions, six of which are not here (motion and glass blur, snow, frost, fog, elastic).
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from siglip.array_types import Bool, Float
from siglip.errors import UserError
from siglip.evaluation.class_files import read_classes
from siglip.evaluation.embed import Embedder, FirstValues
from siglip.evaluation.labels import are_multi_label, read_object
from siglip.evaluation.metrics import with_error
from siglip.evaluation.results import Evaluation, Result
from siglip.evaluation.zeroshot import ZeroShot, rank_right_classes
from siglip.trees import did_you_mean

Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur", "gaussian_blur", "zoom_blur",
    "brightness", "contrast", "jpeg_compression", "pixelate",
]  # fmt: skip

# AlexNet's errors on ImageNet by severity, which the authors of ImageNet-C divide by, and on clean images (Table 1).
ALEXNET_CLEAN = 0.435
ALEXNET: dict[Corruption, tuple[float, ...]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "speckle_noise": (0.66192, 0.74440, 0.90246, 0.94548, 0.97268),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "gaussian_blur": (0.54732, 0.70444, 0.82574, 0.89864, 0.95940),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
}
_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Robustness(Evaluation):
    """Zero-shot classification of corrupted images: noise, blur, zoom, brightness, contrast, JPEG, pixels.

    Attributes:
        data: shards, as for training.
        classes: file of class names, or "imagenet"; see the task zeroshot.
        templates: file of prompts, or "imagenet"; see the task zeroshot.
        label: field that holds the label.
        corruptions: which; each is a pass over the data for each severity.
        severities: from 1 to 5.
        reference: errors that those of the model are divided by, for `mce`: a JSON file {corruption: error, "clean": error}, each
            the mean over the severities (without "clean" there is no `relative_mce`), or "alexnet" for ImageNet.
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
    reference: str | None = None
    canonical: bool | None = None
    name: str | None = None
    task: Literal["robustness"] = "robustness"

    BENCHMARK_TASK: ClassVar[str] = "robustness"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corruptions or not self.severities or not set(self.severities) <= {1, 2, 3, 4, 5}:
            raise UserError(
                f"robustness: severities={self.severities} must be numbers from 1 to 5, and corruptions not empty"
            )

    @property
    def _clean(self) -> ZeroShot:
        return ZeroShot(self.data, self.classes, self.templates, self.label, canonical=self.canonical, name=self.name)

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        self._clean.check(first_values)
        count = len(read_classes(self.classes).names)
        if self.reference == "alexnet" and count != _IMAGENET_CLASSES:
            raise UserError(
                f"reference=alexnet are errors on ImageNet's {_IMAGENET_CLASSES} classes, and {self.data} has {count}; "
                'leave it out, or give errors on these data: a JSON file {corruption: error, "clean": error}'
            )
        self._references()

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError as zero-shot classification does, or where images have several labels."""
        classes, weights, texts = self._clean.class_weights(embedder)

        def hits(**more) -> Bool[np.ndarray, " n"]:
            images = embedder.embed_shards(self.data, (self.label,), **more)
            if are_multi_label(images.values[self.label]):
                raise UserError(f"images of {self.data} have several labels; robustness takes one label each")
            rows, labels = self._clean.labels_of(images, classes)
            return rank_right_classes(images.zimg[rows], weights, labels, texts=texts).ranks == 1

        clean, shares = hits(), []
        for name in self.corruptions:
            shares.append(np.mean([hits(corruption=(name, severity)) for severity in self.severities], axis=0))
        found = self._metrics(clean.astype(float), np.asarray(shares), chance=1 / len(classes.names))
        return [Result(self, self.dataset, "", found)]

    def _metrics(
        self, clean: Float[np.ndarray, " n"], shares: Float[np.ndarray, "c n"], *, chance: float
    ) -> dict[str, float]:
        """Of each image whether it is right, and of each corruption the share of the severities at which it is.

        All corruptions are of the same images, so their errors go together: a standard error is that of means by image.
        """
        corrupted, references = shares.mean(axis=0), self._references()
        found = with_error("acc1_clean", clean, chance=chance)
        for name, own in zip((*self.corruptions, "corrupted"), (*shares, corrupted), strict=True):
            found |= with_error(f"acc1_{name}", own, chance=chance)
        found |= with_error("error_increase", clean - corrupted)
        found |= with_error("mean_corruption_error", 1 - corrupted, chance=1 - chance)
        if found["acc1_clean"]:
            ratio = found["acc1_corrupted"] / found["acc1_clean"]
            # Of a ratio of means of the same images (the delta method).
            spread = with_error("relative", (corrupted - ratio * clean) / found["acc1_clean"])["relative_se"]
            found |= {"relative": ratio, "relative_se": spread}
        if references:
            errors = np.asarray([references[name] for name in self.corruptions])[:, None]
            found |= with_error("mce", np.mean((1 - shares) / errors, axis=0))
            if "clean" in references:
                found |= with_error("relative_mce", np.mean((clean - shares) / (errors - references["clean"]), axis=0))
        return found

    def _references(self) -> dict[str, float]:
        """The reference's errors of these corruptions, and of clean images where they are known; {} without a reference."""
        if self.reference is None:
            return {}
        if self.reference == "alexnet":
            places = np.asarray(self.severities) - 1
            return {name: float(np.mean(np.take(ALEXNET[name], places))) for name in self.corruptions} | {
                "clean": ALEXNET_CLEAN
            }
        found = read_object(Path(self.reference), '{corruption: error, "clean": error}')
        for name, value in found.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise UserError(f"{self.reference}: {name!r} is {value!r}; an error is a number from 0 to 1")
        clean = found.get("clean", 0)
        for name in self.corruptions:
            if name not in found:
                raise UserError(f"{self.reference} has no error of {name!r}{did_you_mean(name, found)}; add it")
            if found[name] <= clean:
                raise UserError(
                    f"{self.reference}: {name!r} is {found[name]}, which must be above the clean error {clean}"
                )
        return found
