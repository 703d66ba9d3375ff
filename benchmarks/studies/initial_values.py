"""Where should bias and temperature begin? (SigLIP, arXiv:2303.15343, Table 4: at the share of matches, and at 10.)

    python -m benchmarks.studies.initial_values

The paper's -10 is about minus the log of its batch; ours is minus the log of ours.
"""

import math

from benchmarks.studies.driver import SIGMOID_WITHOUT_BIAS, Run, plot, study

BATCH = 64
# Table 4: B/16, a batch of 8k, 900 10^6 examples.
PAPER = {"t' = log 10": {"no b": 62.0, "b = 0": 61.7, "b = -10": 63.0}, "t' = log 1": {"b = 0": 53.7, "b = -10": 61.0}}


def lines() -> dict:
    """Every combination of the paper, and its own -10."""
    biases = {"b = 0": 0.0, "b = -log B": -math.log(BATCH), "b = -10": -10.0}
    warm = {"no b": Run(BATCH, SIGMOID_WITHOUT_BIAS, bias=0.0)} | {
        name: Run(BATCH, bias=bias) for name, bias in biases.items()
    }
    cold = {name: Run(BATCH, bias=bias, temperature=1.0) for name, bias in biases.items()}
    return {"t' = log 10": warm, "t' = log 1": cold}


if __name__ == "__main__":
    plot("initial_values", study("initial_values", lines()), axis="", source="Table 4, ImageNet", paper=PAPER)
