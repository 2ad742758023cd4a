"""Charts as inline SVG: no script, no network, legible at 300 pixels and in print."""

import dataclasses
import math
from collections.abc import Sequence

from calm_jax.evaluation.page import FAINT, INK, LINE, MUTED, Element, cut, element

_WIDTH, _HEIGHT = 340, 214  # of a panel, in SVG units; shown at about one pixel a unit
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 34
_TEXT = 11.5
_FLAT = 1e-9  # what varies less is drawn as a level line
_POINTS = 240  # of a line at most: longer curves are averaged, the eye sees no more


@dataclasses.dataclass(frozen=True)
class Series:
    """A line. `label`, if given, stands at its end."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    style: str = "line"  # "line", "faint", "dashed" or "dots"
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A share in percent with its interval; `paper` puts a mark beside it."""

    label: str
    value: float
    colour: str
    interval: tuple[float, float] | None = None
    paper: float | None = None
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class _Scale:
    """From values to positions, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._of(self.low), self._of(self.high)
        return self.start + (self._of(value) - low) / (high - low) * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value


def line_chart(
    description: str, series: Sequence[Series], *, percent: bool = False, log: bool = False
) -> Element:
    """Lines over steps. `percent` fixes the vertical axis to 0–100; `log` makes it logarithmic."""
    shown = [dataclasses.replace(line, **_thinned(line.xs, line.ys)) for line in series if line.xs]
    values = [value for line in shown for value in line.ys]
    steps = [step for line in shown for step in line.xs]
    log = log and min(values) > _FLAT and max(values) / min(values) > 8
    ticks = (
        [0, 25, 50, 75, 100]
        if percent
        else _log_ticks(values)
        if log
        else _ticks(min(0, *values), max(values))
    )
    longest = max(len(line.label) for line in shown)
    right = _WIDTH - (14 + 6.6 * longest if longest else _RIGHT)
    bottom = _HEIGHT - _BOTTOM
    last = max(steps) if max(steps) > min(steps) else min(steps) + 1
    x = _Scale(min(steps), last, _LEFT, right)
    y = _Scale(ticks[0], ticks[-1], bottom, _TOP, log)
    parts = _y_axis(y, ticks, right, "%" if percent else "")
    for tick in _ticks(min(steps), last, 4):
        if min(steps) <= tick <= last:
            parts.append(_text(_compact(tick), x(tick), bottom + 16, "middle"))
    parts.append(_text("step", right, bottom + 31, "end"))
    for line in shown:
        parts += _line(
            line, [(x(step), y(value)) for step, value in zip(line.xs, line.ys, strict=True)]
        )
    labelled = [(y(line.ys[-1]), line) for line in shown if line.label]
    for position, line in _spread(labelled, 13, _TOP, bottom):
        parts.append(_text(line.label, right + 7, position + 4, "start", line.colour, 600))
    return _svg(description, _WIDTH, _HEIGHT, parts)


def bar_chart(description: str, groups: Sequence[tuple[str, str, Sequence[Bar]]]) -> Element:
    """Bars from 0 to 100 % in groups of (label, note below it, bars), with interval whiskers."""
    count = sum(len(bars) for _, _, bars in groups)
    width = max(_WIDTH, _LEFT + _RIGHT + 30 * count + 16 * len(groups))
    bottom, top = _HEIGHT - 42, _TOP + 14  # room for the number above a full bar
    y = _Scale(0, 100, bottom, top)
    parts = _y_axis(y, [0, 25, 50, 75, 100], width - _RIGHT, "%")
    room = (width - _LEFT - _RIGHT) / len(groups)
    for place, (label, note, bars) in enumerate(groups):
        middle = _LEFT + room * (place + 0.5)
        step = min(44.0, (room - 12) / max(len(bars), 1))
        for index, bar in enumerate(bars):
            centre = middle + step * (index - (len(bars) - 1) / 2)
            wide = min(28.0, step - 4)
            parts.append(_rect(centre - wide / 2, y(bar.value), wide, bottom - y(bar.value), bar))
            above = y(bar.value)
            if bar.interval:
                parts += _whisker(centre, y(bar.interval[0]), centre, y(bar.interval[1]))
                above = y(bar.interval[1])
            parts.append(_text(_short(bar.value), centre, above - 4, "middle", INK, size=10.5))
        parts.append(_text(label, middle, bottom + 16, "middle", INK))
        parts.append(_text(note, middle, bottom + 31, "middle"))
    return _svg(description, width, _HEIGHT, parts)


def ladder(description: str, bars: Sequence[Bar]) -> Element:
    """Lying bars from 0 to 100 %, one a row, named at the left; a diamond marks `paper`."""
    left, right, pitch = 92, _WIDTH - 44, 27
    x = _Scale(0, 100, left, right)
    bottom = 6 + pitch * len(bars)
    parts = []
    for tick in (0, 50, 100):
        parts.append(_rule(x(tick), 4, x(tick), bottom))
        parts.append(_text(f"{tick}%", x(tick), bottom + 15, "middle"))
    for index, bar in enumerate(bars):
        middle = 6 + pitch * (index + 0.5)
        parts.append(_text(bar.label, left - 11, middle + 4, "end", INK))
        parts.append(_rect(left, middle - 8, max(x(bar.value) - left, 1.0), 16, bar))
        if bar.interval:
            parts += _whisker(x(bar.interval[0]), middle, x(bar.interval[1]), middle)
        if bar.paper is not None:
            at = x(bar.paper)
            outline = f"M{at:.1f} {middle - 6:.1f}l6 6l-6 6l-6 -6z"
            parts.append(element("path", d=outline, fill="#fff", stroke=INK, stroke_width=1.4))
        beyond = x(max(bar.value, *(bar.interval or (0,)))) + 6
        if bar.paper is not None and -12 < x(bar.paper) - beyond < 36:
            beyond = x(bar.paper) + 11  # else the mark would stand in the number
        parts.append(_text(f"{bar.value:.1f}", beyond, middle + 4, "start", INK, 600))
    return _svg(description, _WIDTH, bottom + 20, parts)


def heatmap(description: str, tokens: Sequence[str], weights: Sequence[Sequence[float]]) -> Element:
    """Shares from 0 to 1: rows look at columns."""
    labels = [cut(token, 12) for token in tokens]
    longest = max(map(len, labels))
    # A letter is 0.62 of its size wide, and the size 0.82 of a cell, unless cells are large.
    cell = (_WIDTH - 12) / (max(len(labels), 12) + 0.51 * longest)
    size = min(11.5, cell * 0.82)
    margin = 8 + 0.62 * size * longest
    cell = (_WIDTH - margin - 4) / max(len(labels), 12)
    edge = cell * len(labels)
    background = element(
        "rect", x=margin, y=margin, width=edge, height=edge, fill="#f7f9fa", stroke=LINE
    )
    parts = [background]
    for index, label in enumerate(labels):
        at = margin + cell * (index + 0.5)
        parts.append(_text(label, margin - 5, at + size * 0.36, "end", INK, size=size, mono=True))
        if 0.62 * size * len(label) < cell:
            parts.append(_text(label, at, margin - 6, "middle", INK, size=size, mono=True))
        else:
            turned = _text(label, 0, size * 0.36, "start", INK, size=size, mono=True)
            turned.set("transform", f"translate({at:.1f} {margin - 5:.1f}) rotate(-90)")
            parts.append(turned)
    for query, row in enumerate(weights):
        for tap, weight in enumerate(row):
            if weight < 0.005:
                continue
            where = element("title", f"{tokens[query]} looks at {tokens[tap]}: {weight:.2f}")
            parts.append(
                element(
                    "rect",
                    where,
                    x=margin + cell * tap,
                    y=margin + cell * query,
                    width=max(cell - 0.6, 0.4),
                    height=max(cell - 0.6, 0.4),
                    fill=heat(weight),
                )
            )
    return _svg(description, _WIDTH, margin + edge + 4, parts)


def heat(weight: float) -> str:
    """From white at 0 to a dark green at 1, even steps to the eye being worth more near 0."""
    share = min(max(weight, 0.0), 1.0) ** 0.7
    light, dark = (247, 249, 250), (4, 84, 72)
    return "#" + "".join(
        f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True)
    )


def heat_key() -> Element:
    """The heatmap's colours from 0 to 1."""
    steps = 24
    parts = [
        element("rect", x=20.0 + 5 * step, y=1, width=5.2, height=12, fill=heat(step / (steps - 1)))
        for step in range(steps)
    ]
    parts += [_text("0", 10, 11, "middle"), _text("1", 20 + 5 * steps + 10, 11, "middle")]
    made = _svg("Colours from 0 to 1", 160, 14, parts)
    made.set("style", "width: 160px")
    return made


def swatch(style: str, colour: str = MUTED) -> Element:
    """A bit of a line, of a bar, or the mark "paper": `style` as in `Series`, or "(faint) bar"."""
    if style == "paper":
        mark = element("path", d="M15 0l6 6l-6 6l-6 -6z", fill="#fff", stroke=INK, stroke_width=1.4)
        return _svg("", 30, 12, [mark])
    if style in ("bar", "faint bar"):
        bar = Bar("", 0, colour, faint=style == "faint bar")
        return _svg("", 30, 12, [_rect(4, 0, 22, 12, bar)])
    return _svg("", 30, 12, _line(Series((0, 1), (0, 0), colour, style), [(2, 6), (28, 6)]))


def legend(*entries: tuple[str, str | None, str]) -> Element:
    """A list of (style of `swatch`, colour or None for grey, meaning)."""
    items = []
    for style, shade, meaning in entries:
        mark = swatch(style, shade) if shade else swatch(style)
        items.append(element("li", mark, meaning))
    return element("ul", *items, class_="legend")


def _svg(description: str, width: float, height: float, parts: Sequence[Element]) -> Element:
    about = {"role": "img", "aria_label": description} if description else {"aria_hidden": "true"}
    return element("svg", *parts, viewBox=f"0 0 {width:.0f} {height:.0f}", **about)


def _text(text, x, y, anchor, colour=MUTED, weight=400, size=_TEXT, mono=False) -> Element:
    made = element(
        "text", text, x=float(x), y=float(y), text_anchor=anchor, fill=colour, font_size=float(size)
    )
    if weight != 400:
        made.set("font-weight", str(weight))
    if mono:
        made.set("class", "token")
        made.set("style", f"font-size: {size:.1f}px")  # the page's rule for tokens would win
    return made


def _rule(x1, y1, x2, y2, colour=LINE, width=1.0) -> Element:
    return element(
        "line",
        x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), stroke=colour, stroke_width=width,
    )  # fmt: skip


def _rect(x: float, y: float, width: float, height: float, bar: Bar) -> Element:
    fill = _lighter(bar.colour) if bar.faint else bar.colour
    return element(
        "rect", x=float(x), y=float(y), width=float(width), height=float(max(height, 1)),
        fill=fill, rx=2,
    )  # fmt: skip


def _lighter(colour: str) -> str:
    """Mixed with white rather than see-through: grid lines would show."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - 0.4 * (255 - part)):02x}" for part in parts)


def _whisker(x1: float, y1: float, x2: float, y2: float) -> list[Element]:
    along, across = (0, 3) if y1 == y2 else (3, 0)
    return [
        _rule(x1, y1, x2, y2, INK, 1.2),
        _rule(x1 - along, y1 - across, x1 + along, y1 + across, INK, 1.2),
        _rule(x2 - along, y2 - across, x2 + along, y2 + across, INK, 1.2),
    ]


def _y_axis(y: _Scale, ticks: Sequence[float], right: float, unit: str) -> list[Element]:
    parts = []
    for tick in ticks:
        parts.append(_rule(_LEFT, y(tick), right, y(tick), FAINT if tick == ticks[0] else LINE))
        parts.append(_text(_compact(tick) + unit, _LEFT - 6, y(tick) + 4, "end"))
    return parts


def _line(line: Series, points: Sequence[tuple[float, float]]) -> list[Element]:
    path = element(
        "polyline",
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        fill="none",
        stroke=line.colour,
        stroke_width=1.6 if line.style == "faint" else 2.0,
        stroke_linejoin="round",
        stroke_linecap="round",
    )
    if line.style == "faint":
        path.set("stroke-opacity", "0.42")
    if line.style == "dashed":
        path.set("stroke-dasharray", "5 4")
    if line.style != "dots" and len(points) > 1:
        return [path]
    every = max(1, len(points) // 40)  # dots of a long curve would run together
    dots = [*points[:-1:every], points[-1]]
    return [path] + [element("circle", cx=x, cy=y, r=2.6, fill=line.colour) for x, y in dots]


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> dict[str, list[float]]:
    """Means of neighbours, so that at most `_POINTS` points remain."""
    size = math.ceil(len(xs) / _POINTS)
    starts = range(0, len(xs), size)
    return {
        name: [sum(values[at : at + size]) / len(values[at : at + size]) for at in starts]
        for name, values in (("xs", xs), ("ys", ys))
    }


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span low to high, about `count` steps of 1, 2 or 5 times a power of 10."""
    if high - low < _FLAT:
        high = low + 1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    first = math.floor(math.log10(min(values)))
    last = max(math.ceil(math.log10(max(values))), first + 1)
    step = math.ceil((last - first) / 6)  # of many decades not every one gets a line
    return [10.0**power for power in range(first, last + step, step)]


def _spread(placed: list, gap: float, low: float, high: float) -> list:
    """Moves labels apart, keeping their order and, as far as they fit, the limits."""
    placed = sorted(placed, key=lambda item: item[0])
    positions: list[float] = []
    for wanted, _ in placed:
        positions.append(max(wanted, positions[-1] + gap) if positions else max(wanted, low))
    ceiling = high
    for index in range(len(positions) - 1, -1, -1):
        positions[index] = min(positions[index], ceiling)
        ceiling = positions[index] - gap
    return [(position, item) for position, (_, item) in zip(positions, placed, strict=True)]


def _compact(value: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _short(value: float) -> str:
    return "100" if value >= 99.95 else f"{value:.1f}"
