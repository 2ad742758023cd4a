"""Published checkpoints to frozen folders and back: one file for each family, the rest shared."""
