"""Geometry of the page's line charts; `templates/charts.html` draws them.

Matplotlib and Altair are not used: they let the labels at the ends of lines overlap, cannot adapt
colours to a dark page, and take eight times the bytes (28 and 34 kB for a chart).
"""

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 340, 214  # in SVG units, each about a pixel wide
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 34
_LABEL_HEIGHT = 13
_FLAT = 1e-9  # values that differ by less are drawn as a level line
_POINTS = 240  # of a line at most: longer curves are averaged
_DOTS = 40  # of a line at most: more would run together

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Series:
    """A line over `xs`."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str  # of CSS
    style: str = "line"  # "line", "faint", "dashed" or "dots"
    label: str = ""  # is written at its end
    band: Sequence[tuple[float, float]] = ()  # lower and upper bound of each value


@dataclasses.dataclass(frozen=True)
class Tick:
    """A number beside an axis, `at` units from the left or from the top."""

    at: float
    text: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A `Series` in SVG units; `label_y` is the height of its label, `band` its band's outline."""

    series: Series
    points: Points
    dots: Points
    label_y: float
    band: Points


@dataclasses.dataclass(frozen=True)
class LineChart:
    """Lines between `left` and `right`, with their ticks, in SVG units."""

    description: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    right: float
    axis: str
    left: float = _LEFT
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def line_chart(
    description: str,
    series: Sequence[Series],
    *,
    percent: bool = False,
    log: bool = False,
    axis: str = "",
) -> LineChart | None:
    """A chart of the lines that have points; None if none has.

    `percent` fixes the vertical axis to 0–100; `log` makes it logarithmic where the values span
    more than a factor of 8. The horizontal axis is of steps; with an `axis`, its name, it has a
    tick at each x, and is logarithmic where they span more than a factor of 8.
    """
    shown = [_thinned(line) for line in series if line.xs]
    if not shown:
        return None
    values = [value for line in shown for value in line.ys]
    values += [bound for line in shown for bounds in line.band for bound in bounds]
    steps = sorted({step for line in shown for step in line.xs})
    scale = math.log10 if axis and _spans_much(steps) else float
    first, last = scale(steps[0]), scale(steps[-1])
    last = last if last > first else first + 1
    log = log and _spans_much(values)
    if percent:
        ticks = [0.0, 25.0, 50.0, 75.0, 100.0]
    else:
        ticks = log_ticks(values) if log else even_ticks(min(0, *values), max(values))
    longest = max(len(line.label) for line in shown)
    right = WIDTH - (14 + 6.6 * longest if longest else _RIGHT)
    low, high = (math.log10(tick) if log else tick for tick in (ticks[0], ticks[-1]))

    def x(step: float) -> float:
        return _LEFT + (scale(step) - first) / (last - first) * (right - _LEFT)

    def y(value: float) -> float:
        value = math.log10(max(value, ticks[0])) if log else value
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _BOTTOM - _TOP)

    def outline(line: Series) -> Points:
        bounds = list(zip(line.xs, line.band, strict=True)) if line.band else []
        return [(x(a), y(low)) for a, (low, _) in bounds] + [
            (x(a), y(high)) for a, (_, high) in reversed(bounds)
        ]

    points = [[(x(a), y(b)) for a, b in zip(s.xs, s.ys, strict=True)] for s in shown]
    labelled = [index for index, line in enumerate(shown) if line.label]
    heights = spread([points[index][-1][1] for index in labelled], _TOP, HEIGHT - _BOTTOM)
    label_y = dict(zip(labelled, heights, strict=True))
    unit = "%" if percent else ""
    if not axis:
        steps = [step for step in even_ticks(first, last) if first <= step <= last]
    return LineChart(
        description,
        [Tick(x(step), compact(step)) for step in steps],
        [Tick(y(tick), compact(tick) + unit) for tick in ticks],
        [
            Line(line, at, _dots(line, at), label_y.get(index, 0.0), outline(line))
            for index, (line, at) in enumerate(zip(shown, points, strict=True))
        ],
        right,
        axis or "step",
    )


def _spans_much(values: Sequence[float]) -> bool:
    return min(values) > _FLAT and max(values) / min(values) > 8


def even_ticks(low: float, high: float) -> list[float]:
    """Round numbers that span low to high, about four steps of 1, 2 or 5 times a power of 10."""
    if high - low < _FLAT:
        high = low + 1
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of 10 that span the values, about six at most."""
    first = math.floor(math.log10(min(values)))
    last = max(math.ceil(math.log10(max(values))), first + 1)
    step = math.ceil((last - first) / 6)
    return [10.0**power for power in range(first, last + step, step)]


def spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """The heights of labels moved apart, in the same order and, if they fit, within the limits."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    found: list[float] = []
    for index in order:
        above = found[-1] + _LABEL_HEIGHT if found else low
        found.append(max(wanted[index], above))
    ceiling = high
    for rank in reversed(range(len(found))):
        found[rank] = min(found[rank], ceiling)
        ceiling = found[rank] - _LABEL_HEIGHT
    by_index = dict(zip(order, found, strict=True))
    return [by_index[index] for index in range(len(wanted))]


def compact(value: float) -> str:
    """A tick's number: 1,500 · 20k · 3M · 0.05."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _dots(line: Series, points: Points) -> Points:
    """The points to mark: those of a line of dots, or of a line too short to be seen."""
    if line.style != "dots" and len(points) > 1:
        return []
    return [*points[: -1 : max(1, len(points) // _DOTS)], points[-1]]


def _thinned(line: Series) -> Series:
    """Means of neighbours, so that at most `_POINTS` points remain; a band stays as it is."""
    size = 1 if line.band else math.ceil(len(line.xs) / _POINTS)
    starts = range(0, len(line.xs), size)

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[at : at + size]) / len(values[at : at + size]) for at in starts]

    return dataclasses.replace(line, xs=means(line.xs), ys=means(line.ys))
