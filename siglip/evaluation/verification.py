"""Does this caption belong to this image: what a sigmoid model can claim, since its logits are log odds.

    p = sigmoid(t x.y + b)              the probability of a match at the prior of training, 1 / B: there .2 to .4 is high
    logit' = logit + log((B - 1) pi / (1 - pi))      the same at a prior of pi

The pairs of the data match. Others are drawn, captions of other images, or are those that the data mark as wrong. Both kinds are
weighted to the prior pi, so that the numbers are those of a stream in which a share pi matches. At rare priors the plain
calibration error says nothing, since nearly all mass lies in one bin: there `ece_equal_mass` and `observed_over_expected` count.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np

from siglip.array_types import Bool, Float, Int
from siglip.errors import UserError
from siglip.evaluation import metrics
from siglip.evaluation.embed import EmbeddedImages, Embedder, FirstValues
from siglip.evaluation.results import Evaluation, Result


@dataclasses.dataclass(frozen=True)
class Verification(Evaluation):
    """Whether image and caption match: average precision, ROC-AUC, Brier score, calibration error.

    Attributes:
        data: shards, as for training.
        captions: field that holds the captions.
        match: field that is 1 where caption and image match and 0 where they do not; None: all pairs match, and others are drawn.
        negatives: pairs that do not match, for each that does, where they are drawn.
        priors: shares of matching pairs; each has metrics of its own, with @PRIOR at their end.
        train_batch_size: B, the pairs in a batch of training (32768 for the published models); None: only the probabilities as
            they are.
        seed: of the draw.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    captions: str = "txt"
    match: str | None = None
    negatives: int = 31
    priors: tuple[float, ...] = (0.5,)
    train_batch_size: int | None = None
    seed: int = 0
    name: str | None = None
    task: Literal["verification"] = "verification"

    BENCHMARK_TASK: ClassVar[str] = "pair_verification"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.priors or not all(0 < prior < 1 for prior in self.priors):
            raise UserError(f"verification: priors={self.priors} must be shares between 0 and 1")
        if self.negatives < 1 or (self.train_batch_size is not None and self.train_batch_size < 2):
            raise UserError(
                f"verification: negatives={self.negatives} must be at least 1, "
                f"train_batch_size={self.train_batch_size} at least 2"
            )

    @property
    def _fields(self) -> tuple[str, ...]:
        return (self.captions,) if self.match is None else (self.captions, self.match)

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        found = first_values(self.data, self._fields)
        missing = next((field for field in self._fields if not found[field]), None)
        if missing is not None:
            raise UserError(f"the first pair of {self.data} has no field {missing!r}")

    def run(self, embedder: Embedder) -> list[Result]:
        """One result.

        Raises:
            UserError: there are no matching pairs or no others, or the model has no temperature.
        """
        if embedder.temperature is None or embedder.bias is None:
            raise UserError("this model has no temperature and bias, so its scores are not probabilities")
        images = embedder.embed_shards(self.data, self._fields)
        texts = [[text for text in own if isinstance(text, str)] for own in images.values[self.captions]]
        image = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
        if not len(image):
            raise UserError(f"no image of {self.data} has a caption {self.captions!r}")
        ztxt, own_image = embedder.embed_texts([text for own in texts for text in own]), image
        if self.match is None:
            image, text, positive = draw_pairs(image, self.negatives, self.seed)
        else:
            text, positive = np.arange(len(image)), self._matches(images)[image]
        if positive.all() or not positive.any():
            raise UserError(
                f"{self.data} has {positive.sum()} matching pairs of {len(positive)}; both kinds are needed"
            )
        parts = range(0, len(image), 1 << 16)
        cosine = [
            np.einsum("pe,pe->p", images.zimg[image[p : p + (1 << 16)]], ztxt[text[p : p + (1 << 16)]]) for p in parts
        ]
        logits = embedder.temperature * np.concatenate(cosine).astype(np.float64) + embedder.bias
        measure = lambda kept: metrics.roc_auc(logits[kept], positive[kept])  # noqa: E731
        case, all_pairs = own_image[text], np.arange(len(text))
        found = {
            "roc_auc": measure(all_pairs),
            "roc_auc_se": metrics.jackknife_error(measure, case),
            "roc_auc_chance": 0.5,
        }
        for prior in self.priors:
            own = verification(logits, positive, prior=prior, train_batch_size=self.train_batch_size, case=case)
            found |= {f"{name}@{prior:g}": value for name, value in own.items()}
            found[f"average_precision@{prior:g}_chance"] = prior
        return [Result(self, self.dataset, "", found)]

    def _matches(self, images: EmbeddedImages) -> Bool[np.ndarray, " n"]:
        matches = [(own or [None])[0] for own in images.values[self.match]]
        # Of a CSV file all is text, and of a column with gaps a number may be nan.
        known = {0: False, 1: True, "0": False, "1": True}
        wrong = next((row for row, value in enumerate(matches) if value not in known), None)
        if wrong is not None:
            raise UserError(
                f"image {images.keys[wrong]} of {self.data} has {self.match}={matches[wrong]!r}; it must be 0 or 1"
            )
        return np.asarray([known[value] for value in matches], bool)


def draw_pairs(
    image_of_text: Int[np.ndarray, " m"], negatives: int, seed: int
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Bool[np.ndarray, " p"]]:
    """(image, text, whether they match): every text with its image, and with `negatives` images of others."""
    images = np.unique(image_of_text)
    if len(images) < 2:
        raise UserError("captions of one image alone have no others to be told from; two images are needed")
    rng, own = np.random.default_rng(seed), np.searchsorted(images, image_of_text)
    others = (own[:, None] + rng.integers(1, len(images), (len(own), negatives))) % len(images)
    image = np.concatenate([image_of_text, images[others].reshape(-1)])
    text = np.concatenate([np.arange(len(own)), np.repeat(np.arange(len(own)), negatives)])
    return image, text, np.arange(len(image)) < len(own)


def verification(
    logits: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    *,
    prior: float = 0.5,
    train_batch_size: int | None = None,
    case: Int[np.ndarray, " n"] | None = None,
) -> dict[str, float]:
    """Metrics of n pairs, weighted so that a share `prior` of them matches; with their standard errors, ending in `_se`.

    Args:
        case: of each pair; those of one caption or image are one case. None: all are independent.

    Returns:
        {"average_precision", "brier", "ece", "ece_se", "ece_equal_mass", "ece_equal_mass_se", "observed_over_expected"}; given
        the batch size of training, those but the first again as "…_shifted", of the probabilities at this prior.
    """
    case = np.arange(len(logits)) if case is None else case

    def with_error(name: str, measure: Callable, values: Float[np.ndarray, " n"]) -> dict[str, float]:
        def of(kept: np.ndarray) -> float:
            return measure(values[kept], positive[kept], _weights(positive[kept], prior))

        return {name: of(np.arange(len(values))), f"{name}_se": metrics.jackknife_error(of, case)}

    weights = _weights(positive, prior)
    found = with_error("average_precision", metrics.average_precision, logits)
    shifts = {"": 0.0}
    if train_batch_size is not None:
        shifts["_shifted"] = float(np.log((train_batch_size - 1) * prior / (1 - prior)))
    for ending, shift in shifts.items():
        probability = np.exp(-np.logaddexp(0, -(logits + shift)))
        found |= with_error(f"brier{ending}", metrics.brier_score, probability)
        for name, equal_mass in (("ece", False), ("ece_equal_mass", True)):
            error, spread = metrics.calibration_error(probability, positive, weights, equal_mass=equal_mass)
            found |= {f"{name}{ending}": error, f"{name}{ending}_se": spread}
        found[f"observed_over_expected{ending}"] = prior / float(weights @ probability)
    return found


def _weights(positive: Bool[np.ndarray, " n"], prior: float) -> Float[np.ndarray, " n"]:
    """Of pairs, so that a share `prior` matches."""
    return np.where(positive, prior / max(1, positive.sum()), (1 - prior) / max(1, (~positive).sum()))
