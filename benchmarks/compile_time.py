"""How the compile time of the step grows with the anchor's depth.

  python benchmarks/compile_time.py [--size=small|h200] [--layers=12,24,48] [--remat=full]
      [--topology=v5e:4x4] [--repeats=3] [--output=FILE.json]

Everything but the anchor's depth stays as it is; nothing runs. Without --topology the step is
compiled for one device of this machine; with it for a TPU slice, which need not be there (data 2 x
fsdp 2 x tensor the rest). Counted is processor time, of all threads together, tracing included, the
least of the repeats: so a busy machine changes little.
"""

import dataclasses
import time

import jax
from absl import app, flags
from measuring import Clock, short, tell
from pair import ATTENTION, LOSS_CHUNK, OUTPUT, REMAT, TOPOLOGY, Pair, RandomStep, chosen, mesh_of

LAYERS = flags.DEFINE_list("layers", ["12", "24", "48"], "depths of the anchor")
REPEATS = flags.DEFINE_integer("repeats", 3, "of compiling each depth, in turns")


def main(_) -> None:
    pair, depths = chosen(), [int(layers) for layers in LAYERS.value]
    mesh = mesh_of(TOPOLOGY.value, {"data": 2, "fsdp": 2, "tensor": -1})
    pairs = [
        dataclasses.replace(pair, anchor=dataclasses.replace(pair.anchor, num_layers=depth))
        for depth in depths
    ]
    compile_once(pairs[0], mesh)  # what is loaded once belongs to no depth
    rounds = [[compile_once(pair, mesh) for pair in pairs] for _ in range(REPEATS.value)]
    best = [min(seconds) for seconds in zip(*rounds, strict=True)]
    rows = [("layers", "processor seconds", "seconds", "/ fewest layers", "bound")]
    for depth, (processor, elapsed) in zip(depths, best, strict=True):
        bound = "<= 1.15" if depth == depths[-1] else ""
        rows.append((depth, short(processor), short(elapsed), short(processor / best[0][0]), bound))
    tell("compile_time", rows, OUTPUT.value)


def compile_once(pair: Pair, mesh: jax.sharding.Mesh) -> tuple[float, float]:
    """Seconds of the processor, and of the clock, that tracing and compiling take."""
    jax.clear_caches()
    random = RandomStep(
        pair, mesh, attention=ATTENTION.value, remat=REMAT.value, loss_chunk=LOSS_CHUNK.value
    )
    abstract = random.abstract()
    start = time.process_time()
    with Clock() as clock, jax.set_mesh(mesh):
        random.step.lower(*abstract).compile()
    return time.process_time() - start, clock.seconds


if __name__ == "__main__":
    app.run(main)
