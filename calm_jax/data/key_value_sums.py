"""Sums in numbers: what each operation leaves of them, and how they are written."""

from collections.abc import Sequence

from calm_jax.data.key_value import KeyValueConfig


def carried_out(numbers: Sequence[int], operators: Sequence[str]) -> list[list[int | str]]:
    """The expression, numbers and operators in turns, and what each operation leaves of it."""
    parts: list[int | str] = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        parts += [operator, number]
    way = [parts]
    while len(parts) > 1:
        at = parts.index("*") if "*" in parts else 1  # products first
        left, operator, right = parts[at - 1 : at + 2]
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        parts = [*parts[: at - 1], result, *parts[at + 2 :]]
        way.append(parts)
    return way


def as_text(parts: Sequence[int | str], config: KeyValueConfig) -> str:
    """Numbers and operators, in turns, as text; the digits as the config says."""
    return "".join(part if isinstance(part, str) else _numeral(part, config) for part in parts)


def _numeral(number: int, config: KeyValueConfig) -> str:
    digits = str(abs(number)).zfill(config.width)
    return "-" * (number < 0) + (digits[::-1] if config.units_first else digits)
