"""Zero-shot classification: a class is the mean of its prompts' normalised embeddings, normalised again.

    w_k = normalise(mean_m normalise(text(template_m(class_k))));    prediction = argmax_k  zimg . w_k

Prompts are canonicalised first, as big_vision's evaluator does for SigLIP: "_" becomes a space, punctuation goes, everything is
lower case. Without it published models lose up to 12 points on class names with underscores.
"""

import string
from collections.abc import Callable, Sequence

import numpy as np

from siglip.array_types import Float, Int
from siglip.errors import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """ "Polar_Bear!" -> "polar bear"."""
    return " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())


def make_prompts(classname: str, templates: Sequence[str]) -> list[str]:
    """One canonical prompt per template; a template has "{}" (or "{c}", as CLIP_benchmark writes) for the class name.

    Raises:
        ValueError: for a template without a place for the class name.
    """
    for template in templates:
        if "{}" not in template and "{c}" not in template:
            raise UserError(f"template {template!r} has no {{}} for the class name")
    return [canonicalize(template.replace("{c}", "{}").replace("{}", classname)) for template in templates]


def class_embeddings(
    embed_texts: Callable[[list[str]], Float[np.ndarray, "m e"]], classnames: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "k e"]:
    """One unit vector per class; all prompts of all classes go through `embed_texts` together."""
    prompts = [prompt for name in classnames for prompt in make_prompts(name, templates)]
    z = embed_texts(prompts).reshape(len(classnames), len(templates), -1)
    return _normalise(_normalise(z).mean(axis=1))


def classification(
    zimg: Float[np.ndarray, "n e"], classes: Float[np.ndarray, "k e"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """{"acc1", "acc5" (for 5 classes or more), "mean_per_class_recall"} of n pictures.

    Raises:
        ValueError: if a label is not one of the k classes, there is no picture, or an embedding is not finite.
    """
    if len(zimg) == 0:
        raise UserError("zero-shot classification needs at least one picture, got none")
    if not (np.isfinite(zimg).all() and np.isfinite(classes).all()):
        raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"labels reach from {labels.min()} to {labels.max()}, but there are {len(classes)} classes")
    scores = zimg @ classes.T
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # Wrong classes win every tie, as in retrieval: a collapsed encoder gets 0.
    rank = np.sum(scores >= own, axis=1)
    top1 = rank == 1
    metrics = {
        "acc1": float(np.mean(top1)),
        "mean_per_class_recall": float(np.mean([np.mean(top1[labels == k]) for k in np.unique(labels)])),
    }
    return metrics | ({"acc5": float(np.mean(rank <= 5))} if len(classes) >= 5 else {})


def _normalise(z: Float[np.ndarray, "... e"]) -> Float[np.ndarray, "... e"]:
    return z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
