"""Speeds and memory of each kind of accelerator, as its maker documents them."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. All bandwidths are in bytes per second.

    Attributes:
        hbm_bytes: memory that a program can use, a little less than the chip has.
        flops: peak FLOPs per second, dense, in bfloat16.
        hbm_bandwidth: to and from the chip's memory.
        link_bandwidth: of one link to a neighbour, in one direction.
        network_bandwidth: the chip's share of its host's link to the data-centre network.
        torus: least number of chips along an axis whose two ends are connected; 0: a switch
            connects all chips.
    """

    name: str
    kinds: tuple[str, ...]  # JAX's names for such devices
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus: int


# TPUs: https://cloud.google.com/tpu/docs/{v5e,v5p,v6e}. A link has half of the "bidirectional ICI
# bandwidth per chip", divided by the chip's four or six ports; the network bandwidth is a pod's
# divided by its chips. The usable memory is what the compiler reports. The ends of an axis are
# connected if it is as long as a whole pod (v5e, v6e), or made of whole cubes of four (v5p).
# GPUs: the data sheets of the SXM modules, with NVLink as one link, one 400 Gb/s card for each GPU,
# and 90 % of the memory as usable (XLA's own preallocation takes 75 %).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), 197e12, 819e9, 50e9, 3.125e9, 16),
        Chip("v5p", ("TPU v5", "TPU v5p"), int(95.73 * GIB), 459e12, 2765e9, 100e9, 6.25e9, 4),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), int(31.24 * GIB), 918e12, 1638e9, 100e9, 12.5e9, 16
        ),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), int(0.9 * 80e9), 989e12, 3350e9, 450e9, 50e9, 0),
        Chip("h200", ("NVIDIA H200",), int(0.9 * 141e9), 989e12, 4800e9, 450e9, 50e9, 0),
    )
}


def chip_of(kind: str) -> Chip | None:
    """The chip whose devices JAX calls `kind`, or None."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
