"""Sums with handwritten digits: an anchor that calculates and cannot see, an augment that sees.

  pip install '.[examples]'
  python examples/digits.py

The anchor is a small decoder, trained here on sums of plain numbers: 7+17= → 24. In its prompts `?`
stands for a digit that it is not told. The augment is a small transformer that names the digits on
scikit-learn's 1,797 images; it reads no text. A bridge between the two, both frozen, is trained on
sums over a fifth of the images: <image>+17= → 24. All are scored on images that neither the augment
nor the bridge has met, and on numbers that no image was added to in the bridge's training.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import calm_jax
from calm_jax import sharding
from calm_jax.data import own_features, own_tokens
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.evaluation.metrics import wilson_interval
from calm_jax.models.parts import Parts
from calm_jax.models.taps import Taps
from calm_jax.training.step import Shardings, make_train_step

PATCH, PATCHES, WIDTH, DEPTH = 2, 16, 48, 3
BATCH, LENGTH = 64, 10  # "99+?=108" and its end token
ROUTE = tuple((DEPTH - 1, layer) for layer in range(3))  # from the augment's last layer
# What a prompt says: `i` is an image, written `?`, `d` a digit, `n` a number below 100.
PLAIN, SEEN = ("d+n", "n+d", "d+d", "d"), ("i+n", "n+i", "i+i", "i")
COLUMNS = {
    "image + number": SEEN[:2],
    "image + image": ("i+i",),
    "image": ("i",),
    "digit + number": PLAIN[:2],
}
VOCABULARY = load_vocabulary("bytes")


class Images(NamedTuple):
    """Images as patches [N, 16, 4], from 0 to 1, and their digits [N]."""

    patches: np.ndarray
    digits: np.ndarray


class Question(NamedTuple):
    """A prompt with `?` for each image, the patches of these, and the answer."""

    prompt: str
    images: list[np.ndarray]
    answer: str


class Block(nnx.Module):
    """Attention and an MLP, each of the normed stream and added to it."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x_NPE: jax.Array) -> jax.Array:
        x_NPE += self.attention(self.norms[0](x_NPE))
        return x_NPE + self.down(jax.nn.gelu(self.up(self.norms[1](x_NPE))))


class Encoder(nnx.Module):
    """Names the digit on an image of 8 by 8 pixels; what the bridge reads of it is `taps`."""

    width, depth, item_shape = WIDTH, DEPTH, (PATCHES, PATCH**2)

    def __init__(self, rngs: nnx.Rngs):
        self.into = nnx.Linear(PATCH**2, WIDTH, rngs=rngs)
        self.places = nnx.Param(rngs.params.normal((PATCHES, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def logits(self, patches_NPF: jax.Array) -> jax.Array:
        """What each patch says of the image's digit, [N, 16, 10]."""
        return self.head(self.norm(self._states(patches_NPF)[-1]))

    def taps(self, inputs, layers, cache=None):
        """The states after `layers`; each item of the features is an image."""
        B, S, F = inputs.features_BTD.shape
        states = self._states(inputs.features_BTD.reshape(-1, PATCHES, F))
        found = {layer: states[layer].reshape(B, S, WIDTH) for layer in layers}
        return Taps(jax.lax.stop_gradient(found)), cache

    def _states(self, patches_NPF: jax.Array) -> list[jax.Array]:
        x_NPE, states = self.into(patches_NPF) + self.places[...], []
        for block in self.blocks:
            x_NPE = block(x_NPE)
            states.append(x_NPE)
        return states


def split_images(random: np.random.Generator) -> tuple[Images, Images, Images]:
    """The images of the augment (a half), of the bridge (a fifth) and of the scores, in turn."""
    found = load_digits()
    count, side = len(found.images), 8 // PATCH
    squares = (found.images / 16).reshape(count, side, PATCH, side, PATCH).swapaxes(2, 3)
    everything = Images(squares.reshape(count, PATCHES, PATCH**2).astype("f4"), found.target)
    order = random.permutation(count)
    parts = np.split(order, [count // 2, count // 2 + count // 5])
    return tuple(Images(*(array[part] for array in everything)) for part in parts)


def train_encoder(images: Images, steps: int, random: np.random.Generator, seed: int) -> Encoder:
    """An encoder trained on the digits of images."""
    graphdef, weights = nnx.split(Encoder(nnx.Rngs(seed)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(weights, opt_state, patches, digits):
        def loss(weights):
            logits_NPC = nnx.merge(graphdef, weights).logits(patches)
            labels_NP = jnp.broadcast_to(digits[:, None], logits_NPC.shape[:2])
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits_NPC, labels_NP
            ).mean()

        value, gradients = jax.value_and_grad(loss)(weights)
        updates, opt_state = optimizer.update(gradients, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, value

    opt_state = optimizer.init(weights)
    for number in range(steps):
        chosen = random.integers(len(images.digits), size=BATCH)
        noise = 0.1 * random.normal(size=(BATCH, PATCHES, PATCH**2))
        patches = (images.patches[chosen] + noise).astype("f4")
        weights, opt_state, loss = step(weights, opt_state, patches, images.digits[chosen])
        tell("augment", number, steps, loss)
    return nnx.merge(graphdef, weights)


def question(
    random: np.random.Generator,
    forms: Sequence[str],
    numbers: Sequence[int],
    images: Images,
    first: int | None = None,
) -> Question:
    """A question of one of the forms; `first` is the first image, or else it is drawn."""
    terms, shown, total = [], [], 0
    for kind in random.choice(forms).split("+"):
        value = int(random.choice(numbers) if kind == "n" else random.integers(10))
        if kind == "i":
            index = random.integers(len(images.digits)) if first is None or shown else first
            shown.append(images.patches[index])
            value = int(images.digits[index])
        terms.append("?" if kind == "i" else str(value))
        total += value
    return Question("+".join(terms) + "=", shown, str(total))


def places(questions: Sequence[Question]) -> list[own_features.Placed]:
    """The images of each question at the `?` of its prompt."""
    (place,) = VOCABULARY.encode("?")
    return [
        own_features.placed(VOCABULARY.encode_sequence(asked.prompt), place, asked.images)
        for asked in questions
    ]


def as_batch(questions: Sequence[Question], *, with_images: bool) -> dict[str, np.ndarray]:
    """A row of each question and its answer, on which alone the loss is taken."""
    prompts = [VOCABULARY.encode_sequence(asked.prompt) for asked in questions]
    answers = [[*VOCABULARY.encode(asked.answer), VOCABULARY.eos_id] for asked in questions]
    batch = own_tokens.training_batch({}, prompts, answers, LENGTH)
    if with_images:
        batch |= own_features.own_arrays(0, Encoder.item_shape, places(questions), batch)
    return batch


def train(
    name: str,
    model: nnx.Module,
    steps: int,
    next_batch: Callable[[], dict[str, np.ndarray]],
    learning_rate: float,
) -> nnx.Module:
    """The model after training: all of a decoder, or the bridge of a composed model."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, min(100, steps // 4), steps)
    adam = optax.adamw(schedule, b2=0.99, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
    parts, mesh = Parts(model), sharding.make_mesh({}, jax.devices()[:1])
    shardings = Shardings.of(parts, optimizer, mesh)
    # What a bridge adds is never exactly an embedding: noise teaches the anchor to read near ones.
    step = make_train_step(parts, optimizer, shardings, schedule=schedule, noise=0.7)
    trees = parts.of(model), (shardings.trainable, shardings.frozen)
    trainable, frozen = jax.device_put(*trees)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    for number in range(steps):
        batch = sharding.put_batch(next_batch(), mesh)
        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, np.int32(number))
        tell(name, number, steps, metrics["loss"])
    return parts.merge(trainable, frozen)


def tell(name: str, number: int, steps: int, loss: jax.Array) -> None:
    """Prints the loss ten times in a training."""
    if (number + 1) % max(1, steps // 10) == 0:
        print(f"{name:8} step {number + 1:5,} of {steps:,}: loss {loss:.3f}", flush=True)


def answers(model: nnx.Module, questions: Sequence[Question], *, see: bool) -> list[str]:
    """The model's answer to each question, with its images if it can `see`."""
    generator = calm_jax.Generator(model, max_length=16, slots=BATCH)
    items = [{0: row} for row in places(questions)] if see else None
    found = generator.generate(
        [asked.prompt for asked in questions], calm_jax.Sampling(max_new_tokens=4), items
    )
    return [answer.text for (answer,) in found]


def digits_of(encoder: Encoder, questions: Sequence[Question]) -> list[str]:
    """The digit that the augment alone sees on the first image of each question, or nothing."""
    blank = np.zeros(Encoder.item_shape, np.float32)
    patches = np.stack([asked.images[0] if asked.images else blank for asked in questions])
    found = nnx.jit(Encoder.logits)(encoder, patches).mean(axis=1).argmax(axis=1)
    return [str(d) if asked.images else "" for d, asked in zip(found, questions, strict=True)]


def score(said: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """The share of right answers in percent, with its 95 % interval."""
    right = sum(answer == asked.answer for answer, asked in zip(said, questions, strict=True))
    low, high = wilson_interval(right, len(questions))
    return {"percent": 100 * right / len(questions), "low": low, "high": high}


def swapped(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each with the images of the next one."""
    return [
        asked._replace(images=other.images)
        for asked, other in zip(questions, [*questions[1:], questions[0]], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--augment_steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--anchor_steps", type=int, default=2_000, help="default: %(default)s")
    parser.add_argument("--bridge_steps", type=int, default=1_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the data, the weights")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the table")
    flags = parser.parse_args()
    for name in ("augment_steps", "anchor_steps", "bridge_steps"):
        if (steps := getattr(flags, name)) < 1:
            parser.error(f"--{name} is {steps}; it must be at least 1")
    random = np.random.default_rng(flags.seed)
    for_augment, for_bridge, for_scores = split_images(random)
    numbers = random.permutation(100)
    in_bridge, in_scores = numbers[:80], numbers[80:]
    encoder = train_encoder(for_augment, flags.augment_steps, random, flags.seed)

    config = calm_jax.DecoderConfig.llama(
        vocab_size=264, embed_dim=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16,
        mlp_dim=192, tied_head=True, embed_scale=8.0,
    )  # fmt: skip
    # Any digit may be hidden, so that the anchor guesses as well as it can.
    hidden = Images(np.zeros((10, *Encoder.item_shape), np.float32), np.arange(10))

    def sums() -> dict[str, np.ndarray]:
        forms = (*PLAIN, *PLAIN, *SEEN)
        drawn = [question(random, forms, numbers, hidden) for _ in range(BATCH)]
        return as_batch(drawn, with_images=False)

    anchor = calm_jax.Decoder(config, nnx.Rngs(flags.seed))
    anchor = train("anchor", anchor, flags.anchor_steps, sums, 3e-3)
    anchor.vocabulary = VOCABULARY

    def sums_of_images() -> dict[str, np.ndarray]:
        forms = (*SEEN, *PLAIN[:1])
        drawn = [question(random, forms, in_bridge, for_bridge) for _ in range(BATCH)]
        return as_batch(drawn, with_images=True)

    composition = calm_jax.CompositionConfig(connections=ROUTE, rotary=True)
    pair = calm_jax.compose(anchor, encoder, composition, rngs=nnx.Rngs(flags.seed))
    pair = train("bridge", pair, flags.bridge_steps, sums_of_images, 5e-3)

    table = {"anchor alone": {}, "augment alone": {}, "composed": {}, "composed, other images": {}}
    for column, forms in COLUMNS.items():
        asked = [
            question(random, forms, in_scores, for_scores, first)
            for first in range(len(for_scores.digits))
        ]
        said = (
            answers(pair.anchor, asked, see=False),
            digits_of(encoder, asked),
            answers(pair, asked, see=True),
            answers(pair, swapped(asked), see=True),
        )
        for row, texts in zip(table.values(), said, strict=True):
            row[column] = score(texts, asked)
    print(f"\nright answers in %, of {len(for_scores.digits)} questions each, with 95 % intervals")
    print(("{:24}" + "{:18}" * len(COLUMNS)).format("", *COLUMNS).rstrip())
    for name, row in table.items():
        cells = (f"{s['percent']:.1f} [{s['low']:.1f}–{s['high']:.1f}]" for s in row.values())
        print((f"{name:24}" + "".join(f"{cell:18}" for cell in cells)).rstrip())
    if flags.output:
        flags.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
