"""Checkpoint formats: one file each, reader and writer side by side.

containers.py holds arrays in files, names.py the key maps, architecture.py what shapes tell of a model.
"""
