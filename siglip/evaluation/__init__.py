"""Evaluations: arrays in, {metric: value} out, under the names that CLIP_benchmark gives them."""
