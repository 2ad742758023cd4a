"""What a training step needs on machines that are not at hand: memory, traffic, time."""
