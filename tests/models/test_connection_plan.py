"""Plans of compositions: every layer runs once, and each bridge at its place."""

import hypothesis
import hypothesis.strategies as st
import pytest

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig
from calm_jax.models.connections import plan_connections


def spaced(every, augment_layers, anchor_layers):
    """The paper's connections by definition, counted layer by layer."""
    taps = [i for i in range(augment_layers) if (i + 1) % every == 0]
    gap = 0
    while (gap + 1) * len(taps) <= anchor_layers:
        gap += 1
    return [(i, gap * (k + 1) - 1) for k, i in enumerate(taps)]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 40))
def test_evenly_spaced_connections(every, augment_layers, anchor_layers):
    hypothesis.assume(1 <= augment_layers // every <= anchor_layers)
    found = CompositionConfig(every=every).resolve(augment_layers, anchor_layers)
    assert list(found) == spaced(every, augment_layers, anchor_layers)


def test_published_example():
    """BERT-small to BERT-large as the paper pairs them, one connection a layer of the augment."""
    connections = CompositionConfig(every=1).resolve(4, 24)
    assert connections == ((0, 5), (1, 11), (2, 17), (3, 23))


@pytest.mark.parametrize(("every", "augment", "anchor"), [(4, 3, 8), (1, 8, 4), (0, 8, 8)])
def test_no_even_spacing_fits(every, augment, anchor):
    with pytest.raises(CalmError, match=rf"every={every} .* {augment} layers .* {anchor}"):
        CompositionConfig(every=every).resolve(augment, anchor)


@st.composite
def compositions(draw):
    """Configs of one to three augments with their depths, and an anchor's depth."""
    anchor_depth = draw(st.integers(1, 12))
    configs, depths = [], []
    for _ in range(draw(st.integers(1, 3))):
        depth = draw(st.integers(1, 9))
        scan = draw(st.sampled_from([True, True, True, False]))
        every = draw(st.integers(1, 3))
        if draw(st.booleans()) and 1 <= depth // every <= anchor_depth:
            configs.append(CompositionConfig(every=every, scan=scan))
        else:
            pair = st.tuples(st.integers(0, depth - 1), st.integers(0, anchor_depth - 1))
            pairs = draw(st.lists(pair, min_size=1, max_size=8, unique=True))
            configs.append(CompositionConfig(connections=pairs, scan=scan))
        depths.append(depth)
    return configs, anchor_depth, depths


def steps(plan):
    """What a plan runs, in order: ("layer", number) and ("bridges", connections)."""
    layer = 0
    found = []

    def run(count):
        nonlocal layer
        found.extend(("layer", number) for number in range(layer, layer + count))
        layer += count

    run(plan.connections[0].anchor_layer + 1)
    for round_ in plan.rounds:
        assert round_.first == layer
        steps = {len(entry) for entry in round_.entries}
        assert round_.stacked or steps == {1}
        for step in range(*steps):
            found.append(("bridges", {entry[step] for entry in round_.entries}))
            run(round_.layers)
    return found


@hypothesis.settings(deadline=None)
@hypothesis.given(compositions())
def test_every_layer_runs_once_and_every_bridge_at_its_place(composition):
    configs, anchor_depth, depths = composition
    plan = plan_connections(configs, anchor_depth, depths)
    wanted = {
        (number, i, j)
        for number, (config, depth) in enumerate(zip(configs, depths, strict=True))
        for i, j in (config.connections or spaced(config.every, depth, anchor_depth))
    }
    assert {(c.augment, c.layer, c.anchor_layer) for c in plan.connections} == wanted
    assert len(plan.connections) == len(wanted)

    expected = []
    for layer in range(anchor_depth):
        expected.append(("layer", layer))
        here = {c for c in plan.connections if c.anchor_layer == layer}
        if here:
            expected.append(("bridges", here))
    assert steps(plan) == expected
    # A round is of one form: each entry belongs to one augment.
    for round_ in plan.rounds:
        assert all(len({c.augment for c in entry}) == 1 for entry in round_.entries)


@hypothesis.settings(deadline=None)
@hypothesis.given(compositions())
def test_tapped_layers(composition):
    configs, anchor_depth, depths = composition
    plan = plan_connections(configs, anchor_depth, depths)
    for number in range(len(depths)):
        taps = sorted({c.layer for c in plan.connections if c.augment == number})
        assert plan.tap_layers[number] == tuple(taps)


def test_evenly_spaced_connections_are_one_scan():
    plan = plan_connections([CompositionConfig(every=2)], 14, [8])
    rounds = [(len(r.entries[0]), r.stacked, r.first, r.layers) for r in plan.rounds]
    assert rounds == [(3, True, 3, 3), (1, False, 12, 2)]
    unrolled = plan_connections([CompositionConfig(every=2, scan=False)], 14, [8])
    assert not any(round_.stacked for round_ in unrolled.rounds)
    assert [(r.first, r.layers) for r in unrolled.rounds] == [(3, 3), (6, 3), (9, 3), (12, 2)]


def test_errors_say_of_which_augment_they_are():
    configs = [CompositionConfig(every=2), CompositionConfig(every=5)]
    with pytest.raises(CalmError, match=r"^augment 1: .*every=5"):
        plan_connections(configs, 8, [8, 4])


def test_names_are_in_the_order_of_the_numbers():
    """By anchor layer, then by augment, however they were given."""
    config = CompositionConfig(connections=((3, 2), (3, 0)))
    assert plan_connections([config], 4, [4]).names == ["3→0", "3→2"]
    assert plan_connections([config] * 2, 4, [4, 4]).names == [
        "0: 3→0",
        "1: 3→0",
        "0: 3→2",
        "1: 3→2",
    ]


def test_one_config_for_each_augment():
    with pytest.raises(CalmError, match=r"2 composition configs .* 1 augments"):
        plan_connections([CompositionConfig(), CompositionConfig()], 8, [8])


@pytest.mark.parametrize(
    ("pair", "what", "depth"),
    [((4, 0), "augment", 4), ((0, 6), "anchor", 6), ((-1, 0), "augment", 4)],
)
def test_connection_outside_the_layers(pair, what, depth):
    config = CompositionConfig(connections=((0, 0), pair))
    layer = pair[0] if what == "augment" else pair[1]
    with pytest.raises(CalmError, match=rf"{what} layer {layer}, .* 0 to {depth - 1}"):
        plan_connections([config], 6, [4])
