"""What each policy of rematerialisation costs in FLOPs and seconds, and saves in memory.

  python benchmarks/remat.py [--size=small|h200] [--policies=none,dots,full,offload]
      [--topology=v5e:4x4] [--steps=5] [--output=FILE.json]

With --topology the step is only compiled, for that TPU slice (data 2 x fsdp 2 x tensor the rest);
its memory is then that of each chip. A policy that the devices do not have says so in its row.
"""

import jax
from absl import app, flags
from measuring import short, tell
from pair import (
    ATTENTION,
    LOSS_CHUNK,
    OUTPUT,
    STEPS,
    TOPOLOGY,
    Pair,
    RandomStep,
    chosen,
    mesh_of,
    peak_bytes,
    seconds_a_step,
)

from calm_jax.errors import CalmError
from calm_jax.models.execution import REMAT, check_remat
from calm_jax.training.flops import jaxpr_flops

POLICIES = flags.DEFINE_list("policies", list(REMAT), "which, the first being compared with")


def main(_) -> None:
    pair = chosen()
    mesh = mesh_of(TOPOLOGY.value, {"data": 2, "fsdp": 2, "tensor": -1})
    rows = [
        ("policy", "temporaries GiB", "peak GiB", "/ first", "FLOPs / ideal", "bound", "s a step",
         "seconds / first", "note")
    ]  # fmt: skip
    first = None
    for policy in POLICIES.value:
        try:
            if TOPOLOGY.value is None:
                check_remat(policy, mesh.devices.flat[0])
            figures = measured(pair, mesh, policy)
        except (CalmError, jax.errors.JaxRuntimeError) as error:
            rows.append((policy, *[None] * 7, str(error).splitlines()[0][:100]))
            continue
        first = first or figures
        temporaries, peak, flops, seconds = figures
        ideal = pair.ideal()
        allowed = ideal.total if policy == "none" else ideal.total_rematerialised
        rows.append(
            (
                policy,
                short(temporaries / 2**30),
                short(peak / 2**30),
                short(temporaries / first[0]),
                short(flops / ideal.total),
                f"<= {1.03 * allowed / ideal.total:.3f}",
                seconds and short(seconds),
                seconds and short(seconds / first[3]),
                "",
            )
        )
    tell("remat", rows, OUTPUT.value)


def measured(pair: Pair, mesh: jax.sharding.Mesh, policy: str):
    """Bytes of temporaries and at the peak, FLOPs traced, and seconds if the devices are here."""
    random = RandomStep(
        pair, mesh, attention=ATTENTION.value, remat=policy, loss_chunk=LOSS_CHUNK.value
    )
    with jax.set_mesh(mesh):
        traced = random.step.trace(*random.abstract())
        compiled = traced.lower().compile()
        seconds = None
        if TOPOLOGY.value is None:
            seconds = seconds_a_step(compiled, random.arguments(), STEPS.value)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return temporaries, peak_bytes(compiled, mesh), jaxpr_flops(traced.jaxpr.jaxpr), seconds


if __name__ == "__main__":
    app.run(main)
