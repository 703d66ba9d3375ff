"""Is Adam's second-moment decay of .95 steadier than .999? (SigLIP, arXiv:2303.15343, section 4.7: at large batches, yes.)

python -m benchmarks.studies.beta2
"""

from benchmarks.studies.driver import Run, plot, study

BATCH, RATES = 256, (1, 4)
PAPER = "At 32k, .999 has spikes of the gradient norm\nand may diverge; .95 trains smoothly.\n(curves of training; no table)"

if __name__ == "__main__":
    runs = {f"β2 {b2}": {f"x {rate}": Run(BATCH, b2=b2, lr=rate * 2e-3) for rate in RATES} for b2 in (0.95, 0.999)}
    plot("beta2", study("beta2", runs), axis=f"learning rate, {BATCH} pairs a batch", source="section 4.7", paper=PAPER)
