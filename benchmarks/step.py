"""The training step on this machine: its seconds, its memory, and its FLOPs against the ideal.

  python benchmarks/step.py [--size=small|h200] [--attention=auto] [--remat=none]
                            [--packed] [--loss_chunk=256] [--steps=5] [--output=FILE.json]

The step is the real one, on random models and a random batch. The ideal is counted from the configs
of the models alone (`calm_jax.planning.ideal`). MFU is the ideal's FLOPs in the seconds measured,
over the published dense peak of the device; where none is published, as for a CPU, the rate of one
large product of matrices stands for it.
"""

import statistics

import jax
import jax.numpy as jnp
from absl import app, flags
from measuring import Clock, short, tell
from pair import (
    ATTENTION,
    LOSS_CHUNK,
    OUTPUT,
    REMAT,
    STEPS,
    Pair,
    RandomStep,
    chosen,
    peak_bytes,
    seconds_a_step,
)

from calm_jax.chips import chip_of
from calm_jax.models.parameters import count
from calm_jax.sharding import make_mesh
from calm_jax.training.flops import jaxpr_flops

PACKED = flags.DEFINE_boolean("packed", False, "two sequences a row, which not every backend takes")


def main(_) -> None:
    rows = [("what", "figure", "bound"), *measured(chosen())]
    tell("step", rows, OUTPUT.value)


def measured(pair: Pair) -> list[tuple]:
    """Rows of the table: figure and bound of everything."""
    device = jax.devices()[0]
    random = RandomStep(
        pair,
        make_mesh({}, [device]),
        attention=ATTENTION.value,
        remat=REMAT.value,
        packed=PACKED.value,
        loss_chunk=LOSS_CHUNK.value,
    )
    with jax.set_mesh(random.mesh):
        traced = random.step.trace(*random.abstract())
        with Clock() as compiling:
            compiled = traced.lower().compile()
        seconds = seconds_a_step(compiled, random.arguments(), STEPS.value)
    memory, ideal = compiled.memory_analysis(), pair.ideal()
    flops = jaxpr_flops(traced.jaxpr.jaxpr)
    allowed = ideal.total if REMAT.value == "none" else ideal.total_rematerialised
    rate = matmul_rate(pair.anchor.dtype)
    rows = [
        ("device", device.device_kind, ""),
        ("attention", random.backend, ""),
        ("parameters of the anchor, millions", millions(random, "anchor"), ""),
        ("parameters of the augment, millions", millions(random, "augments"), ""),
        ("compile, s", short(compiling.seconds), ""),
        ("seconds a step", short(seconds), ""),
        ("tokens a second", short(pair.tokens / seconds), ""),
        (
            "FLOPs traced / ideal",
            short(flops / ideal.total),
            short(1.03 * allowed / ideal.total),
        ),
        ("arguments, GiB", short(memory.argument_size_in_bytes / 2**30), ""),
        ("temporaries, GiB", short(memory.temp_size_in_bytes / 2**30), ""),
        ("peak memory, GiB", short(peak_bytes(compiled, random.mesh) / 2**30), ""),
        ("ideal TFLOP/s", short(ideal.total / seconds / 1e12), ""),
        ("a large product, TFLOP/s", short(rate / 1e12), ""),
        ("ideal FLOP/s / a large product's", short(ideal.total / seconds / rate), ""),
    ]
    chip = chip_of(device.device_kind)
    if chip is not None:
        causal = pair.ideal_causal() / seconds / chip.flops
        rows.append(("MFU", short(ideal.total / seconds / chip.flops), ">= 0.5"))
        rows.append(("MFU, attention counted causally", short(causal), ""))
    return rows


def matmul_rate(dtype: str) -> float:
    """FLOP/s of one large product of square matrices on this device."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(12):
        with Clock() as clock:
            jax.block_until_ready(product(x, x))
        seconds.append(clock.seconds)
    return 2 * size**3 / statistics.median(seconds[2:])


def millions(random: RandomStep, name: str) -> float:
    return short(count(random.abstract()[2][name]) / 1e6)


if __name__ == "__main__":
    app.run(main)
