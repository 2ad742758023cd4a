"""The training step of a pair with two tokenizers, and that of a pair with one, on as many tokens.

  python benchmarks/own_tokens.py [--size=small|h200] [--batch=N] [--length=N] [--steps=5]
      [--attention=auto] [--loss_chunk=256] [--remat=none] [--output=FILE.json]

Both run the same models on the same packed rows. For two tokenizers the augment's tokens are given
apart from the anchor's, each with the anchor's token from which on it is read. Steps take turns.
"""

import statistics

import jax
import jax.numpy as jnp
from absl import app
from measuring import Clock, short, tell
from pair import ATTENTION, LOSS_CHUNK, OUTPUT, REMAT, STEPS, RandomStep, chosen, mesh_of


def main(_) -> None:
    mesh = mesh_of(None, {})
    steps = {
        name: RandomStep(
            chosen(),
            mesh,
            attention=ATTENTION.value,
            remat=REMAT.value,
            packed=True,
            loss_chunk=LOSS_CHUNK.value,
            own_tokens=name == "two",
        )
        for name in ("one", "two")
    }
    compiled = {name: step.compile() for name, step in steps.items()}
    state = {name: step.arguments() for name, step in steps.items()}
    seconds = {name: [] for name in steps}
    for number in range(2 + STEPS.value):
        for name in steps:
            trainable, opt_state, *rest = state[name]
            with Clock() as clock:
                trainable, opt_state, metrics = jax.block_until_ready(
                    compiled[name](trainable, opt_state, *rest)
                )
            state[name] = (trainable, opt_state, *rest)
            if not jnp.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']}")
            if number >= 2:  # the first two warm up
                seconds[name].append(clock.seconds)
    medians = {name: statistics.median(of) for name, of in seconds.items()}
    rows = [("tokenizers", "seconds a step", "/ one")]
    rows += [(name, short(s), short(s / medians["one"])) for name, s in medians.items()]
    tell("own_tokens", rows, OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
