"""Charts stay inside their picture and show what they are given, whatever that is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.evaluation import charts
from calm_jax.evaluation.charts import Bar, Series

VALUES = st.lists(
    st.tuples(st.integers(0, 10**7), st.floats(0, 1e6)), min_size=1, max_size=40,
    unique_by=lambda point: point[0],
)  # fmt: skip


def size(svg) -> tuple[float, float]:
    return tuple(map(float, svg.get("viewBox").split()[2:]))


def numbers(svg, tag: str, name: str) -> list[float]:
    return [float(found.get(name)) for found in svg.iter(tag)]


@given(VALUES, st.booleans())
def test_lines_stay_inside(points, log):
    steps, values = zip(*sorted(points), strict=True)
    svg = charts.line_chart("", [Series(steps, values, "#000000", "dots", "last")], log=log)
    width, height = size(svg)
    for x, y in zip(numbers(svg, "circle", "cx"), numbers(svg, "circle", "cy"), strict=True):
        assert 0 <= x <= width and 0 <= y <= height
    for name, limit in (("x", width), ("y", height)):
        assert all(0 <= at <= limit for at in numbers(svg, "text", name))


def test_line_goes_up_where_values_do():
    svg = charts.line_chart("", [Series((0, 5, 10), (0.1, 1.0, 50.0), "#000000", "dots")], log=True)
    heights = numbers(svg, "circle", "cy")
    assert heights == sorted(heights, reverse=True)
    # 0.1 to 1 is one decade of four between 0.1 and 100, 1 to 50 is 1.7 of them.
    assert (heights[1] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(1.699, abs=0.01)


def test_long_line_keeps_its_mean():
    thinned = charts._thinned(range(10_000), [float(step % 7) for step in range(10_000)])
    assert len(thinned["ys"]) <= 240
    assert sum(thinned["ys"]) / len(thinned["ys"]) == pytest.approx(3.0, abs=0.02)


@given(st.just(0) | st.integers(0, 10**7), st.floats(1, 1e9))
def test_ticks_span_the_values_in_even_steps(low, span):
    ticks = charts._ticks(low, low + span)
    assert ticks[0] <= low * (1 + 1e-8) and ticks[-1] >= (low + span) * (1 - 1e-8)
    assert 2 <= len(ticks) <= 8


@given(st.lists(st.floats(12, 180), min_size=1, max_size=9))
def test_labels_do_not_overlap(wanted):
    placed = charts._spread([(at, str(at)) for at in wanted], 13, 12, 180)
    positions = [at for at, _ in placed]
    assert all(b - a >= 13 - 1e-6 for a, b in itertools.pairwise(positions))
    assert [float(label) for _, label in placed] == sorted(wanted)
    assert positions[-1] <= 180 + 1e-6


@pytest.mark.parametrize("value", [0.0, 37.5, 100.0])
def test_bar_is_as_high_as_its_share(value):
    bars = [Bar("whole", 100.0, "#000000"), Bar("part", value, "#000000", (value, value))]
    whole, part = list(charts.bar_chart("", [("", "", bars)]).iter("rect"))
    bottom = float(whole.get("y")) + float(whole.get("height"))
    assert bottom - float(part.get("y")) == pytest.approx(
        value / 100 * float(whole.get("height")), abs=0.02
    )


def test_heatmap_darkens_with_weight_and_hides_nothing_large():
    svg = charts.heatmap("", ["a", "b"], [[1.0, 0.0], [0.3, 0.7]])
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["a looks at a: 1.00", "b looks at a: 0.30", "b looks at b: 0.70"]
    shades = [int(charts.heat(weight)[1:3], 16) for weight in (0.0, 0.3, 0.7, 1.0)]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 4


@given(st.floats(0, 100), st.floats(0, 100))
def test_number_of_a_lying_bar_is_free_of_the_papers_mark(value, paper):
    svg = charts.ladder("", [Bar("name", value, "#000000", (value, value), paper)])
    mark = float(next(svg.iter("path")).get("d")[1:].split()[0])
    (number,) = [text for text in svg.iter("text") if text.text == f"{value:.1f}"]
    start = float(number.get("x"))
    assert mark + 6 < start or mark - 6 > start + 28
    assert start + 28 <= size(svg)[0]
