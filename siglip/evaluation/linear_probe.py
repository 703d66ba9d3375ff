"""Multinomial logistic regression on frozen features, by L-BFGS with a sweep over C.

    argmin_(W, b)  sum_i cross-entropy(x_i W + b, y_i) + |W|^2 / (2 C)          as scikit-learn's LogisticRegression

Features are standardised by the training set's mean and std. C is chosen on a part of the training set, the first of the best,
and the probe is fitted again on all of it: the images that are scored choose nothing. CLIP and DINOv2 search C so;
CLIP_benchmark's probe (AdamW, L2-normalised features, ten epochs) and DINOv2's headline (SGD, the best learning rate *on the
validation set*) are other protocols, whose numbers are not comparable.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, Feature
from siglip.evaluation.labels import Labelled, Supervised, check_feature, train_and_test
from siglip.evaluation.metrics import probe_accuracies, with_error
from siglip.evaluation.results import Result
from siglip.parallel import sharding

_C = tuple(10.0**power for power in range(-6, 6))
_GRADIENT = 1e-9  # of the mean cross-entropy: there the minimum is exact to float64's own error
_SPLIT_SEED = 0

Probe = tuple[Float[np.ndarray, "d k"], Float[np.ndarray, " k"]]


@dataclasses.dataclass(frozen=True)
class LinearProbe(Supervised):
    """Logistic regression on frozen features: lp_acc1, lp_acc5, mean recall per class.

    Attributes:
        data: shards of the images that are classified.
        train: shards of the labelled images on which the probe is fitted.
        label: field that holds the label in both: a number or a name.
        c: inverse weights of the squared coefficients to choose from; one value is taken as it is.
        val_share: share of the training set on which C is chosen.
        max_iterations: of L-BFGS, for each C.
        l2_normalise: whether features are divided by their norm first, as CLIP_benchmark does.
        feature: map (the pooled vector before the head), patch_mean, head or embedding; it is in the metrics' names.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    train: str
    label: str = "cls"
    c: tuple[float, ...] = _C
    val_share: float = 0.1
    max_iterations: int = 1000
    l2_normalise: bool = False
    feature: Feature = "map"
    name: str | None = None
    task: Literal["linear_probe"] = "linear_probe"

    BENCHMARK_TASK: ClassVar[str] = "linear_probe"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c or min(self.c) <= 0 or not 0 < self.val_share < 1 or self.max_iterations < 1:
            raise UserError(
                f"linear_probe: c={self.c} and max_iterations={self.max_iterations} must be positive, "
                f"val_share={self.val_share} between 0 and 1"
            )
        check_feature(self.task, self.feature)

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError where labels are missing or differ from those of the training set."""
        train, test = train_and_test(embedder, self.train, self.data, self.label, feature=self.feature)
        if self.l2_normalise:
            train, test = (
                own._replace(features=own.features / np.linalg.norm(own.features, axis=1, keepdims=True))
                for own in (train, test)
            )
        c = self._chosen(train, embedder.mesh)
        probe = self._fitted(train.features, train.labels, len(train.names), [c], embedder.mesh)[0]
        scores = scores_of(probe, test.features)
        predicted, classes = np.argmax(scores, axis=1), len(train.names)
        metrics = probe_accuracies(predicted, test.labels, "lp", self.feature, classes=classes)
        if classes >= 5:
            fifth = np.partition(scores, -5, axis=1)[:, -5]
            among = scores[np.arange(len(scores)), test.labels] >= fifth
            metrics |= with_error(f"lp_acc5_{self.feature}", among, chance=5 / classes)
        return [Result(self, self.dataset, "", metrics | {"c": c})]

    def _chosen(self, train: Labelled, mesh: Mesh) -> float:
        if len(self.c) == 1:
            return self.c[0]
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(train.labels))
        count = round(len(order) * self.val_share)
        if not 0 < count < len(order):
            raise UserError(
                f"{self.train} has {len(order)} labelled images: too few to choose c on a part; give one --c"
            )
        val, fit = order[:count], order[count:]
        sweep = sorted(self.c)
        probes = self._fitted(train.features[fit], train.labels[fit], len(train.names), sweep, mesh)
        right = [
            np.mean(np.argmax(scores_of(probe, train.features[val]), axis=1) == train.labels[val]) for probe in probes
        ]
        return sweep[int(np.argmax(right))]

    def _fitted(self, features, labels, classes: int, sweep: list[float], mesh: Mesh) -> list[Probe]:
        return fit_logistic(
            features, labels, sweep, classes=classes, max_iterations=self.max_iterations, mesh=mesh
        )  # fmt: skip


def scores_of(probe: Probe, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
    """Logits of features that are as they were given to `fit_logistic`."""
    return features.astype(np.float64) @ probe[0] + probe[1]


def fit_logistic(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    sweep: list[float],
    *,
    classes: int,
    max_iterations: int = 1000,
    mesh: Mesh,
) -> list[Probe]:
    """(weights, bias) for each C of a sweep that rises, each starting from the one before; for features as they are given.

    Float64 on the devices of the mesh, over which the images are spread; all processes call it with the same arguments.
    """
    features = features.astype(np.float64)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1)
    rows = -(-len(features) // mesh.size) * mesh.size
    own = slice(*(rows // jax.process_count() * (jax.process_index() + edge) for edge in (0, 1)))
    batch = {"x": (features - mean) / scale, "y": labels, "weight": np.full(len(labels), 1 / len(labels))}
    padded = {
        name: np.pad(array, [(0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)])[own]
        for name, array in batch.items()
    }
    probes = []
    with jax.enable_x64(True):
        on_mesh = sharding.put_batch(padded, mesh)
        params = (np.zeros((features.shape[1], classes)), np.zeros(classes))
        for c in sweep:
            decay = np.float64(1 / (c * len(labels)))
            params = jax.tree.map(np.asarray, _minimise(params, on_mesh, decay, max_iterations=max_iterations))
            weights = params[0] / scale[:, None]
            probes.append((weights, params[1] - mean @ weights))
    return probes


@functools.partial(jax.jit, static_argnames="max_iterations")
def _minimise(params, batch, decay, *, max_iterations: int):
    """L-BFGS until the gradient's largest entry is below `_GRADIENT`."""
    optimizer = optax.lbfgs(memory_size=10)

    def loss(params: tuple[Float[Array, "d k"], Float[Array, " k"]]) -> Float[Array, ""]:
        logits = batch["x"] @ params[0] + params[1][None]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return batch["weight"] @ each + decay / 2 * jnp.sum(params[0] ** 2)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        steepest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(grad)]))
        return optax.apply_updates(params, updates), state, steepest

    def goes_on(carry):
        _, state, steepest = carry
        return (optax.tree.get(state, "count") < max_iterations) & (steepest > _GRADIENT)

    start = (params, optimizer.init(params), jnp.asarray(jnp.inf, jnp.float64))
    return jax.lax.while_loop(goes_on, step, start)[0]
