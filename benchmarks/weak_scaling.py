"""Work and traffic of each chip from 16 to 4,096 chips, by compilation alone.

  python benchmarks/weak_scaling.py [--size=scaling] [--topologies=v5e:4x4,...,v5e:16x16*16]
      [--rows=1] [--output=FILE.json]

The batch is --rows for each chip, so each has the same to do however many there are. The models are
split over fsdp 4, what is left of a slice is data, and slices are joined outermost. FLOPs and
bytes are those of one chip's compiled program; XLA counts the FLOPs of a loop's body once, so they
are good for their ratio alone.
"""

import dataclasses

from absl import app, flags
from measuring import Clock, short, tell
from pair import ATTENTION, LOSS_CHUNK, OUTPUT, RandomStep, chosen, mesh_of

from calm_jax.planning import collectives, hlo, topologies

TOPOLOGIES = flags.DEFINE_list(
    "topologies",
    ["v5e:4x4", "v5e:8x8", "v5e:16x16", "v5e:16x16*4", "v5e:16x16*16"],
    "TPU slices to compile for; the first is compared with",
)
ROWS = flags.DEFINE_integer("rows", 1, "of the batch, for each chip")
BOUND = "<= 1.05"


def main(_) -> None:
    head = (
        "chips",
        "GFLOP a chip, loops once",
        "FLOPs / first",
        "MB sent a chip",
        "bytes / first",
        "over",
        "compile s",
    )
    rows, first = [(*head, "bound")], None
    for name in TOPOLOGIES.value:
        chips = topologies.find(name).chips
        pair = dataclasses.replace(chosen(), batch_size=ROWS.value * chips)
        mesh = mesh_of(name, {"fsdp": 4, "data": -1})
        random = RandomStep(
            pair, mesh, attention=ATTENTION.value, remat="full", loss_chunk=LOSS_CHUNK.value
        )
        with Clock() as clock:
            compiled = random.compile()
        found = collectives.totals(collectives.find(hlo.parse(compiled.as_text()), mesh))
        flops = compiled.cost_analysis()["flops"]
        sent = sum(row["bytes"] for row in found)
        first = first or (flops, sent)
        over = ", ".join(
            f"{row['kind']} {'+'.join(row['axes'])} {row['bytes'] / 1e6:.1f}" for row in found[:4]
        )
        rows.append(
            (
                chips,
                short(flops / 1e9),
                short(flops / first[0]),
                short(sent / 1e6),
                short(sent / first[1]),
                over,
                short(clock.seconds),
                BOUND,
            )
        )
    tell("weak_scaling", rows, OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
