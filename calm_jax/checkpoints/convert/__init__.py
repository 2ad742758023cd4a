"""Published checkpoints to frozen folders and back: a file for each family, the rest shared."""
