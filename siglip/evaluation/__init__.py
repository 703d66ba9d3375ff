"""Evaluations: one file per task, each a dataclass with its settings, its check and its run (see suite.py)."""
