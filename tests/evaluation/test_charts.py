"""Line charts stay inside their picture and show what they are given, whatever that is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.evaluation import charts
from calm_jax.evaluation.charts import Series, line_chart

VALUES = st.lists(
    st.tuples(st.integers(0, 10**7), st.floats(0, 1e6)), min_size=1, max_size=40,
    unique_by=lambda point: point[0],
)  # fmt: skip


@given(VALUES, st.booleans())
def test_lines_stay_inside(points, log):
    steps, values = zip(*sorted(points), strict=True)
    chart = line_chart("", [Series(steps, values, "red", "dots", "last")], log=log)
    (line,) = chart.lines
    assert line.dots[-1] == line.points[-1] and len(line.points) == len(points)
    for x, y in line.points:
        assert chart.left <= x <= chart.right and 0 <= y <= chart.bottom
    assert all(chart.left <= tick.at <= chart.right for tick in chart.x_ticks)
    assert all(0 <= tick.at <= chart.bottom for tick in chart.y_ticks)
    assert 0 <= line.label_y <= chart.bottom


def test_line_goes_up_where_values_do():
    chart = line_chart("", [Series((0, 5, 10), (0.1, 1.0, 50.0), "red")], log=True)
    (xs, ys) = zip(*chart.lines[0].points, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert list(ys) == sorted(ys, reverse=True)
    # 0.1 to 1 is one decade of four between 0.1 and 100, 1 to 50 is 1.7 of them.
    assert (ys[1] - ys[2]) / (ys[0] - ys[1]) == pytest.approx(1.699, abs=0.01)


def test_a_named_axis_has_a_tick_at_each_x_and_is_logarithmic_where_they_span_much():
    band = [(10, 20), (30, 50), (40, 60)]
    series = Series((1, 10, 50), (15, 40, 50), "red", "dots", "math", band)
    chart = line_chart("", [series], percent=True, axis="percent of keys")
    assert [tick.text for tick in chart.x_ticks] == ["1", "10", "50"]
    (first, second, third) = (tick.at for tick in chart.x_ticks)
    assert (third - second) / (second - first) == pytest.approx(0.699, abs=0.001)  # log10 of 5
    (line,) = chart.lines
    assert [x for x, _ in line.points] == [first, second, third]
    # There along the lower bounds, back along the upper ones, around the line.
    assert [x for x, _ in line.band] == [first, second, third, third, second, first]
    for (_, y), (_, low), (_, high) in zip(line.points, line.band, line.band[::-1], strict=False):
        assert high < y < low
    assert chart.axis == "percent of keys"
    near = line_chart("", [Series((2, 3, 4), (1, 2, 3), "red")], axis="heads")
    at = [tick.at for tick in near.x_ticks]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1])


def test_without_points_there_is_no_chart():
    assert line_chart("", [Series((), (), "red")]) is None


def test_long_line_keeps_its_mean():
    line = Series(range(10_000), [float(step % 7) for step in range(10_000)], "red")
    thinned = charts._thinned(line)
    assert len(thinned.xs) == len(thinned.ys) <= 240
    assert sum(thinned.ys) / len(thinned.ys) == pytest.approx(3.0, abs=0.02)


@given(st.just(0) | st.integers(0, 10**7), st.floats(1, 1e9))
def test_ticks_span_the_values_in_even_steps(low, span):
    ticks = charts.even_ticks(low, low + span)
    assert ticks[0] <= low * (1 + 1e-8) and ticks[-1] >= (low + span) * (1 - 1e-8)
    assert 2 <= len(ticks) <= 8


@given(st.lists(st.floats(12, 180), min_size=1, max_size=9))
def test_labels_do_not_overlap(wanted):
    placed = charts.spread(wanted, 12, 180)
    in_order = [at for _, at in sorted(zip(wanted, placed, strict=True))]
    assert all(b - a >= 13 - 1e-6 for a, b in itertools.pairwise(in_order))
    assert max(placed) <= 180 + 1e-6
