"""Metrics of scores and probabilities, as scikit-learn defines them; sums are float64.

average precision = sum_t (R_t - R_(t-1)) P_t over the distinct scores t, from the highest: equal scores are one threshold, so
constant scores give the prevalence, whatever the order of the input
ROC-AUC = P(a positive scores more than a negative) + P(they score alike) / 2
calibration error = sum_bins share of the bin * |mean probability - share of positives|
"""

from collections.abc import Callable

import numpy as np

from siglip.array_types import Bool, Float, Int
from siglip.errors import UserError

_CLASSES = 32  # scored at a time: n x k scores are never held
_DRAWS = 400
_GROUPS = 20


def average_precision(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> float:
    """As `sklearn.metrics.average_precision_score`; 0 where nothing is positive."""
    true, false = _cumulative(scores, positive, weights)
    if not true[-1]:
        return 0.0
    return float(np.sum(np.diff(true, prepend=0) * true / (true + false)) / true[-1])


def roc_auc(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> float:
    """As `sklearn.metrics.roc_auc_score`; NaN unless there are both positives and negatives."""
    true, false = _cumulative(scores, positive, weights)
    if not true[-1] or not false[-1]:
        return float("nan")
    return float(np.trapezoid(np.append(0, true), np.append(0, false)) / true[-1] / false[-1])


def _cumulative(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Weights of the positives and of the negatives down to each distinct score, from the highest."""
    if not np.isfinite(scores).all():
        raise UserError("some scores are not finite; the model has diverged or its file is damaged")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    weights = (np.ones(len(scores)) if weights is None else weights)[order]
    return np.cumsum(weights * positive[order])[last], np.cumsum(weights * ~positive[order])[last]


def mean_average_precision(
    zimg: Float[np.ndarray, "n e"], classes: Float[np.ndarray, "k e"], positive: Bool[np.ndarray, "n k"]
) -> float:
    """The mean over the classes, as scikit-learn's `average="macro"`: a class without positives is 0, and counts."""
    found = []
    for start in range(0, len(classes), _CLASSES):
        scores = zimg @ classes[start : start + _CLASSES].T
        found += [average_precision(own, positive[:, start + k]) for k, own in enumerate(scores.T)]
    return float(np.mean(found))


def accuracies(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """{"acc1", "mean_per_class_recall"}; classes that no label names are left out of the mean, as in scikit-learn's."""
    right = predicted == labels
    return {"acc1": float(np.mean(right)), "mean_per_class_recall": mean_recall(right, labels)[0]}


def mean_recall(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """(mean over the classes of the share that is right, its standard error for classes of the sizes that they have)."""
    counts, hits = (np.bincount(labels, of) for of in (None, right))
    recalls = hits[counts > 0] / counts[counts > 0]
    variances = recalls * (1 - recalls) / counts[counts > 0]
    return float(np.mean(recalls)), float(np.sqrt(variances.sum()) / len(recalls))


def probe_accuracies(
    predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], prefix: str, feature: str, *, classes: int
) -> dict[str, float]:
    """`accuracies` under the names PREFIX_acc1_FEATURE and so on, with their standard errors and chance levels."""
    right, name = predicted == labels, f"{prefix}_mean_per_class_recall_{feature}"
    found = with_error(f"{prefix}_acc1_{feature}", right, chance=1 / classes)
    recall, error = mean_recall(right, labels)
    return found | {name: recall, f"{name}_se": error, f"{name}_chance": 1 / classes}


def with_error(
    name: str, cases: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"], *, chance: float | None = None
) -> dict[str, float]:
    """{name: the mean over independent cases, NAME_se: its standard error} and, where it is known, NAME_chance."""
    found = {name: float(np.mean(cases)), f"{name}_se": float(np.std(cases) / np.sqrt(len(cases)))}
    return found if chance is None else found | {f"{name}_chance": chance}


def jackknife_error(measure: Callable[[Bool[np.ndarray, " n"]], float], case: Int[np.ndarray, " n"]) -> float:
    """Standard error of a measure, by leaving out a twentieth of the cases in turn (the delete-a-group jackknife).

    Args:
        measure: of the rows that a mask keeps.
        case: of each row; rows of one case are not independent of each other.

    Returns:
        The error, itself known to 1 / sqrt(2 * 19) = 16 %; NaN for one case.
    """
    names, place = np.unique(case, return_inverse=True)
    groups = min(_GROUPS, len(names))
    part = np.random.default_rng(0).permutation(len(names))[place] % groups
    return (
        float(np.sqrt(groups - 1) * np.std([measure(part != left) for left in range(groups)])) if groups > 1 else np.nan
    )


def standard_error(share: float, count: float) -> float:
    """Of a share among `count` independent cases: sqrt(p (1 - p) / n)."""
    return float(np.sqrt(share * (1 - share) / count))


def brier_score(
    probability: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Weighted mean of (probability - outcome)^2, as `sklearn.metrics.brier_score_loss`."""
    return float(np.average((probability - positive) ** 2, weights=weights))


def calibration_error(
    probability: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    *,
    bins: int = 15,
    equal_mass: bool = False,
) -> tuple[float, float]:
    """(expected calibration error, 1 standard error).

    Equal widths: bins [a, b), the last one closed, as torchmetrics' BinaryCalibrationError with norm "l1". The standard error is
    that of outcomes drawn anew, in each bin as many positives as its share says (a parametric bootstrap with a fixed seed).

    Args:
        equal_mass: bins of equal weight by rank instead: where positives are rare, equal widths put everything into one bin.
    """
    if equal_mass:
        order = np.argsort(probability, kind="stable")
        cumulative = np.cumsum(weights[order]) - weights[order] / 2
        place = np.empty(len(order), np.int64)
        place[order] = np.minimum((cumulative / weights.sum() * bins).astype(int), bins - 1)
    else:
        # The edges in float64 as torchmetrics has them, 0, 1 / bins, …: rounding decides no place by itself.
        place = np.clip(np.searchsorted(np.linspace(0, 1, bins + 1), probability, side="right") - 1, 0, bins - 1)
    mass, squares, mean, share = (
        np.bincount(place, values, bins) for values in (weights, weights**2, weights * probability, weights * positive)
    )
    there = mass > 0
    mass, mean, share = mass[there] / weights.sum(), mean[there] / mass[there], share[there] / mass[there]
    cases = np.maximum(1, np.round(np.bincount(place, weights, bins)[there] ** 2 / squares[there])).astype(int)
    drawn = np.random.default_rng(0).binomial(cases, np.clip(share, 0, 1), (_DRAWS, len(cases))) / cases
    return float(np.sum(mass * abs(mean - share))), float(np.std(np.sum(mass * abs(mean - drawn), axis=1)))
