"""A run on disk: its files, checkpoints, metrics and report. Reading one needs no training code."""
