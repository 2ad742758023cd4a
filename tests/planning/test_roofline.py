"""Times of a step from its bytes and FLOPs."""

import types

import pytest

from calm_jax.planning import roofline, topologies
from calm_jax.planning.collectives import Collective


def chip(*coords, slice_index=0):
    return types.SimpleNamespace(coords=coords, slice_index=slice_index)


def seconds(topology, devices, kind="all-gather", sent=1e9):
    one = Collective("x", kind, (), tuple(range(len(devices))), 1, sent)
    return roofline.communication([one], devices, topologies.find(topology))


def test_a_line_a_ring_and_two_sides():
    line = [chip(x, 0, 0) for x in range(4)]
    assert seconds("v5e:4x4", line) == (pytest.approx(1e9 / 50e9), 0)
    ring = [chip(x, 0, 0) for x in range(16)]
    assert seconds("v5e:16x16", ring) == (pytest.approx(1e9 / 100e9), 0)
    # A quarter of a ring is a line.
    assert seconds("v5e:16x16", ring[:4]) == (pytest.approx(1e9 / 50e9), 0)
    square = [chip(x, y, 0) for x in range(4) for y in range(4)]
    assert seconds("v5e:4x4", square) == (pytest.approx(1e9 / 100e9), 0)


def test_neighbours_use_one_link():
    pair = [chip(0, 0, 0), chip(1, 0, 0)]
    assert seconds("v5e:16x16", pair, "collective-permute")[0] == pytest.approx(1e9 / 50e9)


def test_between_slices_goes_over_the_network():
    pair = [chip(0, 0, 0), chip(0, 0, 0, slice_index=1)]
    assert seconds("v5e:4x4*2", pair) == (0, pytest.approx(1e9 / 3.125e9))


def test_a_step_lies_between_its_bounds():
    found = roofline.step_time(topologies.find("v5e:4x4"), 197e12, 819e9 / 2, 0.25, 0.0)
    assert found.parts == {"compute": 1.0, "memory": 0.5, "links": 0.25, "network": 0.0}
    assert (found.bound, found.serial, found.bottleneck) == (1.0, 1.75, "compute")
