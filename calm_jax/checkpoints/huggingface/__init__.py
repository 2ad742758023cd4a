"""Composed models for transformers: the folder that is written, and the code in it."""
