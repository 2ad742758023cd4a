"""The same step in calm_jax and in PyTorch, one after the other on this machine.

  python benchmarks/pytorch.py [--size=small|h200] [--attention=auto] [--loss_chunk=256]
                               [--steps=5] [--output=FILE.json]

`torch_pair.py` has two PyTorch versions: the careful one is compiled (`torch.compile`), the naive
one is not. Shapes, dtypes and the scale of the random weights are the same; each is measured in its
own process. A version that does not fit the device splits the batch into as few micro-batches as
fit. First, both versions get calm_jax's weights at a tiny size and must match its loss and
gradient.
"""

import dataclasses
import os
import statistics
import time

from absl import app
from measuring import in_process, short, tell
from pair import (
    ATTENTION,
    LOSS_CHUNK,
    OPTIMIZER,
    OUTPUT,
    SIZES,
    STEPS,
    Pair,
    RandomStep,
    chosen,
    random_batch,
    seconds_a_step,
)

BOUNDS = {"PyTorch, careful": ">= 1.2", "PyTorch, naive": ">= 2"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """One version's seconds a step, micro-batches a step, and peak bytes on a GPU."""

    seconds: float
    micro_batches: int
    peak_bytes: int | None


def main(_) -> None:
    pair = chosen()
    ours, careful, naive = in_process(losses_and_gradients, SIZES["tiny"])
    for name, theirs in (("careful", careful), ("naive", naive)):
        for what, found, expected in zip(("loss", "norm"), theirs, ours, strict=True):
            if abs(found - expected) > 1e-4 * abs(expected):
                raise AssertionError(f"{name}: the {what} is {found}, calm_jax's {expected}")
    jax_arguments = (ATTENTION.value, LOSS_CHUNK.value)
    figures = {
        "calm_jax": that_fits(measure_jax, pair, STEPS.value, *jax_arguments),
        "PyTorch, careful": that_fits(measure_torch, pair, STEPS.value, False),
        "PyTorch, naive": that_fits(measure_torch, pair, STEPS.value, True),
    }
    rows = [
        (
            "version",
            "seconds a step",
            "tokens a second",
            "micro-batches",
            "peak GiB",
            "/ calm_jax",
            "bound",
        )
    ]
    for name, measured in figures.items():
        rows.append(
            (
                name,
                short(measured.seconds),
                short(pair.tokens / measured.seconds),
                measured.micro_batches,
                None if measured.peak_bytes is None else short(measured.peak_bytes / 2**30),
                short(measured.seconds / figures["calm_jax"].seconds),
                BOUNDS.get(name, ""),
            )
        )
    tell("pytorch", rows, OUTPUT.value)


def that_fits(measure, pair: Pair, *arguments) -> Figures:
    """What `measure` finds with as few micro-batches as fit the device's memory."""
    micro_batches = 1
    while micro_batches <= pair.batch_size:
        figures = in_process(measure, pair, micro_batches, *arguments)
        if figures is not None:
            return figures
        micro_batches *= 2
    raise MemoryError(f"{measure.__name__} {arguments}: a single row does not fit this device")


def measure_jax(pair: Pair, micro_batches: int, steps: int, attention: str, loss_chunk: int):
    """`Figures` of calm_jax, or None when they do not fit."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    import jax

    from calm_jax.sharding import make_mesh

    device = jax.devices()[0]
    random = RandomStep(
        pair,
        make_mesh({}, [device]),
        attention=attention,
        loss_chunk=loss_chunk,
        accumulate=micro_batches,
    )
    try:
        with jax.set_mesh(random.mesh):
            seconds = seconds_a_step(random.compile(), random.arguments(), steps)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return Figures(seconds, micro_batches, (device.memory_stats() or {}).get("peak_bytes_in_use"))


def measure_torch(pair: Pair, micro_batches: int, steps: int, naive: bool):
    """`Figures` of a PyTorch version, or None when they do not fit."""
    import torch
    from torch_pair import Composed, Trainer

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    try:
        model = Composed(pair, device, naive=naive)
        trainer = Trainer(
            model, OPTIMIZER.learning_rate, compiled=not naive, micro_batches=micro_batches
        )
        batch, seconds = torch_batch(pair, device), []
        for _ in range(2 + steps):
            start = time.perf_counter()
            trainer.step(*batch)  # returns numbers, so the device has finished
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return Figures(statistics.median(seconds[2:]), micro_batches, peak)


def torch_batch(pair: Pair, device: str):
    """Input and target tokens of calm_jax's batch."""
    import torch

    batch = random_batch(pair)
    keys = ("decoder_input_tokens", "decoder_target_tokens")
    return [torch.as_tensor(batch[key], device=device).long() for key in keys]


def losses_and_gradients(pair: Pair) -> list[tuple[float, float]]:
    """Loss and norm of its gradient for one step on the same weights: ours, careful, naive."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from torch_pair import Composed, Trainer, copy_weights

    from calm_jax.sharding import make_mesh

    random = RandomStep(pair, make_mesh({}, jax.devices()[:1]))
    with jax.set_mesh(random.mesh):
        arguments = random.arguments()
        weights = jax.device_get((arguments[0], arguments[2]))
        _, _, metrics = random.step(*arguments)
    results = [(float(metrics["loss"]), float(metrics["grad_norm"]))]
    for naive in (False, True):
        model = Composed(pair, "cpu", naive=naive)
        copy_weights(random.parts.merge(*weights), model)
        trainer = Trainer(model, OPTIMIZER.learning_rate, compiled=False, micro_batches=1 + naive)
        results.append(trainer.step(*torch_batch(pair, "cpu")))
    return results


if __name__ == "__main__":
    app.run(main)
