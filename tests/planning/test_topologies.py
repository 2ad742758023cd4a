"""The table of slices and chips, against what the documents say of whole pods."""

import pytest

from calm_jax import chips
from calm_jax.errors import CalmError
from calm_jax.planning import topologies


@pytest.mark.parametrize("name", topologies.names())
def test_names_find_what_they_name(name):
    assert topologies.find(name).name == name
    assert topologies.find(f"{name}*3").name == f"{name}*3"
    assert topologies.find(f"{name}*3").chips == 3 * topologies.find(name).chips


@pytest.mark.parametrize(
    "chip, flops, all_reduce, network, memory",
    [
        # Of a pod of 256 chips: peak, "all-reduce bandwidth", data-centre network in bits; and GB
        # of a chip.
        ("v5e", 50.63e15, 51.2e12, 6.4e12, 16),
        ("v6e", 234.9e15, 102.4e12, 25.6e12, 32),
    ],
)
def test_chips_add_up_to_their_pod(chip, flops, all_reduce, network, memory):
    found = topologies.find(f"{chip}:16x16")
    assert found.chips == 256
    assert found.chips * found.chip.flops == pytest.approx(flops, rel=0.01)
    assert found.chips * 4 * found.chip.link_bandwidth == pytest.approx(all_reduce)
    assert found.chips * 8 * found.chip.network_bandwidth == pytest.approx(network)
    assert 0.95 * memory * 2**30 < found.chip.hbm_bytes < memory * 2**30


def test_a_v5p_chip_has_six_links_and_the_documented_bandwidth():
    chip = chips.CHIPS["v5p"]
    assert 2 * 6 * chip.link_bandwidth == 1200e9
    assert max(topologies.find(f"v5p:{shape}").chips for shape in topologies.SHAPES["v5p"]) == 6144


def test_only_whole_sides_are_rings():
    link = chips.CHIPS["v5e"].link_bandwidth
    pod = topologies.find("v5e:8x16")
    assert [pod.side_bandwidth(side) for side in (0, 1)] == [link, 2 * link]
    cube, small = topologies.find("v5p:4x4x8"), topologies.find("v5p:2x2x1")
    assert cube.side_bandwidth(0) == 2 * chips.CHIPS["v5p"].link_bandwidth
    assert small.side_bandwidth(0) == chips.CHIPS["v5p"].link_bandwidth


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5e:64x64", "v5e:16x16"),
        ("v5e:4x2", "v5e:2x4"),
        ("v5x:4x4", "v5e:4x4"),
        ("h200:16", "h200:8"),
        ("", "v5e:1x1"),
        ("v5e:4x4*", "'' is not a number of slices"),
        ("v5e:4x4*0", "'0' is not a number of slices"),
        ("v5e:4x4*two", "'two' is not a number of slices"),
    ],
)
def test_what_is_not_offered_is_refused(name, said):
    with pytest.raises(CalmError) as refused:
        topologies.find(name)
    assert f"--topology={name}: " in str(refused.value) and said in str(refused.value)


def test_devices_know_their_chip():
    assert chips.chip_of("TPU v5 lite").name == "v5e"
    assert chips.chip_of("TPU v5").name == "v5p"
    assert chips.chip_of("NVIDIA H200").name == "h200"
    assert chips.chip_of("cpu") is None
