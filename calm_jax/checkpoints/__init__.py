"""Models on disk: frozen folders, checkpoints of runs, exported bridges."""
