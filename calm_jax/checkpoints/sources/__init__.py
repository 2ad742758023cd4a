"""Checkpoints of other programs, opened for reading: names, shapes and dtypes first."""
