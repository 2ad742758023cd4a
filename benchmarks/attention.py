"""Backends of attention at several lengths: forward alone, and with the gradient.

  python benchmarks/attention.py [--size=small|h200] [--backends=xla,chunked,splash,cudnn]
      [--lengths=512,1024,2048] [--rows=1] [--steps=5] [--output=FILE.json]

Heads and dtype are those of the size's anchor. Every result is held against that of "xla", which
comes first. A backend that this device lacks, or for which a length is too much, says so.
"""

import statistics

import jax
import jax.numpy as jnp
from absl import app, flags
from measuring import Clock, short, tell
from pair import OUTPUT, STEPS, chosen

from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig, Inputs
from calm_jax.models.attention import Attention
from calm_jax.models.attention_choice import Need, choose

BACKENDS = flags.DEFINE_list("backends", ["xla", "chunked", "splash", "cudnn"], "xla first")
LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048"], "tokens a row")
ROWS = flags.DEFINE_integer("rows", 1, "of each length")


def main(_) -> None:
    config = chosen().anchor
    need = Need.of_decoder("the anchor", config)
    rows = [
        ("length", "backend", "forward s", "/ xla", "with gradient s", "/ xla ", "temporaries MiB",
         "/ xla  ", "error", "note")
    ]  # fmt: skip
    for length in map(int, LENGTHS.value):
        arrays, first = random_arrays(config, ROWS.value, length), None
        for backend in BACKENDS.value:
            try:
                choose(backend, jax.devices()[0], need, length=length, packed=False)
                figures, results = measured(backend, arrays, config.scale, STEPS.value)
            except (CalmError, jax.errors.JaxRuntimeError) as error:
                rows.append((length, backend, *[None] * 7, str(error).splitlines()[0][:100]))
                continue
            first = first or (figures, results)
            ratios = [figure / base for figure, base in zip(figures, first[0], strict=True)]
            pairs = zip(figures, ratios, strict=True)
            told = [short(value) for pair in pairs for value in pair]
            rows.append((length, backend, *told, short(error_of(results, first[1])), ""))
    tell("attention", rows, OUTPUT.value)


def random_arrays(config: DecoderConfig, rows: int, length: int) -> list[jax.Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H], and the gradient of the result."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (rows, length, heads, H), config.dtype)
        for key, heads in zip(keys, (N, K, K, N), strict=True)
    ]


def measured(backend: str, arrays: list[jax.Array], scale: float, steps: int):
    """Seconds forward and with the gradient, MiB of temporaries with it; values and gradients."""
    *inputs, gradient = arrays

    @jax.jit
    def forward(q_BTNH, k_BSKH, v_BSKH):
        inputs = Inputs(segments_BT=jnp.ones(q_BTNH.shape[:2], jnp.int32))
        return Attention(backend, inputs, scale=scale)(q_BTNH, k_BSKH, v_BSKH)

    @jax.jit
    def both(gradient, *inputs):
        values, backward = jax.vjp(forward, *inputs)
        return values, *backward(gradient)

    compiled = both.lower(gradient, *inputs).compile()
    forward_seconds, _ = timed(forward, *inputs, steps=steps)
    seconds, results = timed(compiled, gradient, *inputs, steps=steps)
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return (forward_seconds, seconds, memory), results


def timed(function, *arguments, steps: int):
    """Median seconds after two calls that warm up, and the result."""
    seconds = []
    for _ in range(2 + steps):
        with Clock() as clock:
            result = jax.block_until_ready(function(*arguments))
        seconds.append(clock.seconds)
    return statistics.median(seconds[2:]), result


def error_of(results, expected) -> float:
    """The largest difference of any result, in parts of the largest value expected of it."""

    def difference(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))

    return max(map(difference, results, expected))


if __name__ == "__main__":
    app.run(main)
