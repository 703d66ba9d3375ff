"""Does the sigmoid loss need smaller batches than the softmax? (SigLIP, arXiv:2303.15343, section 4.2: yes, below 32k.)

python -m benchmarks.studies.batch_size
"""

from benchmarks.studies.driver import LOSSES, Run, plot, study

BATCHES = (16, 64, 256)
# Table 5, 3 10^9 examples.
PAPER = {
    "sigmoid": {"512": 51.5, "1k": 57.3, "2k": 62.1, "4k": 65.3, "8k": 68.6, "32k": 69.9, "98k": 69.5},
    "softmax": {"512": 47.7, "1k": 53.2, "2k": 59.3, "4k": 63.8, "8k": 66.6, "32k": 69.9, "98k": 69.7},
}

if __name__ == "__main__":
    found = study("batch_size", {loss: {str(n): Run(n, knobs) for n in BATCHES} for loss, knobs in LOSSES.items()})
    plot("batch_size", found, axis="pairs a batch", source="Table 5, 3 10^9 examples", paper=PAPER)
