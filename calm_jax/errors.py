"""The one error that stands for bad input."""


class CalmError(ValueError):
    """Bad input: one clear line for the person who gave it."""
