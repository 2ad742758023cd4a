"""Numbers as text, with three significant digits and the unit that fits."""

from collections.abc import Sequence


def size(number: float) -> str:
    """Bytes in binary units: 1536 is "1.5 KiB"."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def flops(number: float) -> str:
    """Floating-point operations: 12.3e9 is "12.3 GFLOP"."""
    return _scaled(number, 1000, (" FLOP", *(f" {prefix}FLOP" for prefix in "kMGTPE")))


def count(number: float) -> str:
    """A number of parameters or tokens: 9.24e9 is "9.24 B"."""
    return _scaled(number, 1000, ("", " k", " M", " B", " T"))


def seconds(number: float) -> str:
    """A time from microseconds to days: 0.315 is "315 ms"."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if number >= 2 * length:
            return f"{_digits(number / length)} {unit}"
    return f"{_digits(number)} s" if number >= 1 else _scaled(1e6 * number, 1000, (" µs", " ms"))


def _scaled(number: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(units) - 1:
        number, power = number / step, power + 1
    return _digits(number) + units[power]


def _digits(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"
