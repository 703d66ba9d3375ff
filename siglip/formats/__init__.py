"""Checkpoint formats: one file each, reader and writer side by side.

containers.py reads and writes arrays in files, key_maps.py translates their names, infer_config.py finds the model behind their
shapes. export_format.py is what a format that `siglip export` writes says about itself.
"""
