"""What one accelerator of each kind can do."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as it is documented. All bandwidths are in bytes per second.

    Attributes:
        hbm_bytes: memory that a program can have, a little less than the chip has.
        flops: peak, bfloat16, dense, per second.
        hbm_bandwidth: to and from the chip's memory.
        link_bandwidth: of one link to a neighbour, in one direction.
        network_bandwidth: of the data-centre network, the chip's share of its host's.
        torus: number of chips along a side from which its two ends are joined; 0: the chips are
            joined by a switch.
    """

    name: str
    kinds: tuple[str, ...]  # jax's names for such devices
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus: int


# https://cloud.google.com/tpu/docs/{v5e,v5p,v6e}: peak, memory, "bidirectional ICI bandwidth per
# chip" (halved, over four ports or six), data-centre network of a pod over its chips. The memory
# that programs can have is what the compiler reports. Ends are joined on a side of a whole pod's
# length (v5e, v6e) or of whole cubes of four (v5p).
# H100 and H200: the data sheets of the SXM modules, NVLink as one link, one 400 Gb/s card a GPU;
# memory that XLA may take of them: 90 % (its option for preallocation is more careful still).
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
    """The chip whose devices jax calls `kind`, or None."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
