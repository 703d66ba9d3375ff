"""Does it matter that a batch has so many more negatives than matches? (SigLIP, arXiv:2303.15343, section 4.8: little.)

    python -m benchmarks.studies.negative_ratio

Of each image's negatives some stay in the loss: at random, the hardest (the highest logits), or the easiest. The bias starts at
the log odds of a match among what is left.
"""

import math

import jax
import jax.numpy as jnp

from benchmarks.studies.driver import Run, plot, study

BATCH, KEPT = 64, (8, 2)
# (share of the scores that is random, factor of the logits in them)
KINDS = {"random": (1.0, 0.0), "hard": (0.0, 1.0), "easy": (0.0, -1.0)}
PAPER = (
    "Random negatives: worse the fewer there are.\nEasy ones: does not work at all.\nHard ones: nearly as good as all.\n"
    "(SigLiT, 16k, 900 10^6 examples; section 4.8)"
)


def masked(zimg, ztxt, t, b, key, knobs):
    """The sigmoid loss of the matches and, for each image, some of its negatives. knobs: how many, and a kind's two."""
    kept, random, factor = knobs
    logits = jnp.exp(t) * zimg @ ztxt.T + b
    match = jnp.eye(len(logits), dtype=bool)
    scores = jax.lax.stop_gradient(random * jax.random.uniform(key, logits.shape) + factor * logits)
    scores = jnp.where(match, -jnp.inf, scores)
    least = jnp.sort(scores, axis=1, descending=True)[:, kept.astype(int) - 1]
    used = match | (scores >= least[:, None])
    return jnp.where(used, jax.nn.softplus(jnp.where(match, -logits, logits)), 0).sum() / len(logits)


def lines() -> dict:
    """All negatives, and each kind with each number of them that stay."""
    return {"all": {f"1:{BATCH - 1}": Run(BATCH)}} | {
        kind: {f"1:{n}": Run(BATCH, (n, *knobs), masked, bias=-math.log(n)) for n in KEPT}
        for kind, knobs in KINDS.items()
    }


if __name__ == "__main__":
    found = study("negative_ratio", lines())
    plot("negative_ratio", found, axis="matches : negatives, for each image", source="section 4.8", paper=PAPER)
