"""What a training step will need on machines that are not there: memory, traffic, time."""
