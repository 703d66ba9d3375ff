"""Few-shot classification by ridge regression in closed form, as big_vision's `fewshot_lsr` computes it.

    x = [(f - mean) / (std + 1e-5), 100];   W = argmin |x W - y|^2 + 2^10 |W|^2,  y = +1 for the class and -1 for the others

Mean and std are those of the shots. Nothing is tuned, so it is the probe for a training run. The shots are the first 1, 5, 10, 25
of each class in an order drawn from the seed; each seed is reported apart, and their mean.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from siglip.array_types import Float, Int
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, Feature
from siglip.evaluation.labels import Supervised, check_feature, train_and_test
from siglip.evaluation.metrics import with_error
from siglip.evaluation.results import Result

_CONSTANT = 100.0  # beside the features: it is a bias that is hardly regularised
_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class FewShot(Supervised):
    """Ridge regression on a few labelled images of each class.

    Attributes:
        data: shards of the images that are classified.
        train: shards of the labelled images from which the shots are drawn.
        label: field that holds the label in both: a number or a name.
        shots: images of each class; all of them, where a class has fewer.
        seeds: each draws its own shots.
        l2_reg: weight of the squared coefficients.
        feature: map (the pooled vector before the head), patch_mean, head or embedding; it is in the metrics' names.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    train: str
    label: str = "cls"
    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: tuple[int, ...] = (0, 1, 2)
    l2_reg: float = 2.0**10
    feature: Feature = "map"
    name: str | None = None
    task: Literal["fewshot"] = "fewshot"

    BENCHMARK_TASK: ClassVar[str] = "fewshot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shots or min(self.shots) < 1 or not self.seeds or min(self.seeds) < 0 or not self.l2_reg > 0:
            raise UserError(
                f"fewshot: shots={self.shots}, seeds={self.seeds} and l2_reg={self.l2_reg} must be positive"
            )
        check_feature(self.task, self.feature)

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError where labels are missing or differ from those of the training set."""
        train, test = train_and_test(embedder, self.train, self.data, self.label, feature=self.feature)
        metrics = {}
        for shots in self.shots:
            found, right = {}, []
            for seed in self.seeds:
                chosen = draw_shots(train.labels, shots, seed)
                fitted = ridge_classes(
                    train.features[chosen], train.labels[chosen], test.features,
                    classes=len(train.names), l2_reg=self.l2_reg,
                )  # fmt: skip
                right.append(fitted == test.labels)
                found[f"fewshot_acc1_{self.feature}_{shots}shot_seed{seed}"] = float(np.mean(right[-1]))
            name, of_images = f"fewshot_acc1_{self.feature}_{shots}shot", np.mean(right, axis=0)
            metrics |= with_error(name, of_images, chance=1 / len(train.names)) | found
        return [Result(self, self.dataset, "", metrics)]


def draw_shots(labels: Int[np.ndarray, " n"], shots: int, seed: int) -> Int[np.ndarray, " s"]:
    """Places of the first `shots` of each class, in an order drawn from `seed`; more shots of one seed contain the fewer."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == k))[:shots] for k in np.unique(labels)]
    return np.concatenate(chosen)


def ridge_classes(
    features: Float[np.ndarray, "s d"],
    labels: Int[np.ndarray, " s"],
    queries: Float[np.ndarray, "q d"],
    *,
    classes: int,
    l2_reg: float = 2.0**10,
) -> Int[np.ndarray, " q"]:
    """The class of each query; float64, solved in the smaller of the two spaces: that of the shots or of the features."""
    features = features.astype(np.float64)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-5

    def with_constant(z: np.ndarray) -> np.ndarray:
        return np.pad((z - mean) / scale, [(0, 0), (0, 1)], constant_values=_CONSTANT)

    x, y = with_constant(features), np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    if len(x) < x.shape[1]:
        weights = x.T @ np.linalg.solve(x @ x.T + l2_reg * np.eye(len(x)), y)
    else:
        weights = np.linalg.solve(x.T @ x + l2_reg * np.eye(x.shape[1]), x.T @ y)
    blocks: Sequence[np.ndarray] = [queries[start : start + _BLOCK] for start in range(0, len(queries), _BLOCK)]
    return np.concatenate([np.argmax(with_constant(block) @ weights, axis=1) for block in blocks])
