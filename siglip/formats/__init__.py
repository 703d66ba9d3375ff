"""Checkpoint formats: one file each, reader and writer side by side; names.py holds the key maps."""
