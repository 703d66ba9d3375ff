"""Does the sigmoid loss suffer less from wrong pairs than the softmax? (SigLIP, arXiv:2303.15343, section 4.10: yes.)

    python -m benchmarks.studies.label_noise

Batch alignment: that share of the captions goes round among the images of its batch (data_pipelines/samples/noise.py).
"""

import functools

import numpy as np

from benchmarks.studies.driver import LOSSES, Pairs, Run, plot, study, training_pairs
from data_pipelines.samples.noise import NoiseConfig, text_positions

BATCH, SHARES = 64, (0.0, 0.3, 0.6)
PAPER = "The sigmoid loss is above the softmax\nfor every kind of noise.\n(Figure 7; no table)"


@functools.lru_cache(2)
def misaligned(share: float, seed: int) -> Pairs:
    """The stream with that share of its captions at other images of their batch."""
    pairs, config = training_pairs(seed), NoiseConfig(alignment=share)
    batches = range(0, len(pairs.text), BATCH)
    shown = np.concatenate([text_positions(config, range(at, at + BATCH), seed=seed) for at in batches])
    return pairs._replace(text=pairs.text[shown])


if __name__ == "__main__":
    runs = {loss: {str(share): Run(BATCH, knobs) for share in SHARES} for loss, knobs in LOSSES.items()}
    found = study("label_noise", runs, lambda _, share, seed: misaligned(float(share), seed))
    plot("label_noise", found, axis="share of captions at a wrong image", source="section 4.10", paper=PAPER)
