"""Checkpoints of runs, frozen models, bridges."""
