"""Cached decoding: a pair against its parts, recomputing, transformers, and full rows.

  python benchmarks/decode.py [--size=small|tiny|h200] [--parts=pair,recomputing,transformers,
      batching,beginning,drafts,evaluation] [--new=128] [--rounds=3] [--output=FILE.json]

  pair          tokens/s of a pair x (t_A + t_B), the times of a step of its parts; 1 row and 8
  recomputing   512 new tokens against a whole forward pass for each, of which every 32nd is timed
  transformers  the anchor's tokens/s against transformers' generate with its cache; float32
  batching      256 prompts of 5 to 500 tokens with answers of 1 to 64: the time that its tokens
                take in full chunks and full rows ÷ the time taken
  beginning     64 prompts that share 1,000 tokens: time of their prefill ÷ that of one
  drafts        a pair whose augment foresees 4 of 5 tokens of the anchor: tokens/s with drafts of 4
                against those without
  evaluation    the answers to 256 prompts in the evaluation of a task against the generator alone

Weights are random. Everything that is compared is timed in turns, once a turn compiles nothing; the
medians are compared.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from measuring import short, tell
from pair import OUTPUT, chosen

import calm_jax
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.decoding import Generator, Sampling, steps
from calm_jax.evaluation.answering import Options, answers
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Task
from calm_jax.models import Decoder, Inputs, compose
from calm_jax.models.calling import call

PARTS = flags.DEFINE_list(
    "parts",
    ["pair", "recomputing", "transformers", "batching", "beginning", "drafts", "evaluation"],
    "what is measured",
)
NEW = flags.DEFINE_integer("new", 128, "tokens of an answer")
MOST_WARM_UPS = 6  # drafts change their length, and so compile, until they know their times
ROUNDS = flags.DEFINE_integer("rounds", 3, "times that each is measured")


def main(_) -> None:
    configs = chosen()
    anchor = Decoder(configs.anchor, nnx.Rngs(0))
    augment = Decoder(configs.augment, nnx.Rngs(1))
    pair = compose(anchor, augment, configs.composition, rngs=nnx.Rngs(2))
    measures = {
        "pair": lambda: against_parts(pair),
        "recomputing": lambda: against_recomputing(pair),
        "transformers": lambda: against_transformers(anchor),
        "batching": lambda: continuous_batching(pair),
        "beginning": lambda: shared_beginning(pair),
        "drafts": lambda: drafts(configs),
        "evaluation": lambda: in_evaluation(pair),
    }
    rows = [("what", "rows", "ours s", "other s", "ratio", "tokens/s")]
    for part in PARTS.value:
        measured = measures[part]()
        print(*measured, sep="\n", file=sys.stderr, flush=True)
        rows += measured
    tell("decode", rows, OUTPUT.value)


def against_parts(pair) -> list[tuple]:
    rows = []
    for count in (1, 8):
        models = (pair, pair.anchor, pair.augments[0])
        generators = [Generator(model, max_length=16 + NEW.value, slots=count) for model in models]
        ours, anchor, augment = medians(*(answering(one, count) for one in generators))
        rows.append(row("pair: (t_A + t_B) / t", count, ours, anchor + augment, NEW.value * count))
    return rows


def against_recomputing(pair) -> list[tuple]:
    new = 4 * NEW.value
    generator = Generator(pair, max_length=16 + new, slots=1)
    tokens = np.ones((1, 16 + new), np.int32)
    sampled = range(32, new + 1, 32)

    def recompute():
        for length in sampled:
            call(pair, "forward", Inputs(jnp.asarray(tokens[:, :length]))).block_until_ready()

    ours, other = medians(answering(generator, 1, new), recompute)
    return [row("recomputing / cached", 1, ours, other * new / len(sampled), new)]


def against_transformers(anchor: Decoder) -> list[tuple]:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        calm_jax.save_frozen(anchor, f"{folder}/ours")
        calm_jax.export(f"{folder}/ours", f"{folder}/theirs")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/theirs", dtype=torch.float32
        )
    rows = []
    for count in (1, 8):
        prompts = random_prompts(count, 8, 9)
        generator = Generator(anchor, max_length=16 + NEW.value, slots=count)
        found = {}

        def ours(generator=generator, prompts=prompts, found=found):
            answers = generator.generate(prompts, Sampling(max_new_tokens=NEW.value))
            found["ours"] = [answer.tokens for (answer,) in answers]

        def other(prompts=prompts, found=found):
            ids = torch.tensor(prompts)
            with torch.no_grad():
                whole = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW.value,
                    min_new_tokens=NEW.value,
                    do_sample=False,
                    pad_token_id=0,
                )
            found["theirs"] = whole[:, ids.shape[1] :].tolist()

        seconds = medians(ours, other)
        same = np.mean(np.equal(found["ours"], found["theirs"]))
        rows.append(
            row(f"transformers / ours ({same:.0%} equal)", count, *seconds, NEW.value * count)
        )
    return rows


def continuous_batching(pair) -> list[tuple]:
    prompts, random = random_prompts(256, 5, 501), np.random.default_rng(1)
    asked = [Sampling(max_new_tokens=int(n)) for n in random.integers(1, 65, len(prompts))]
    generator = Generator(pair, max_length=576, slots=8)
    chunk = random_prompts(8, 511, 512, seed=2)
    full = [[*prompt[:300]] for prompt in chunk]

    def all_of_them():
        generator.generate(prompts, asked)
        forget(generator)

    def full_chunks():
        generator.generate(chunk, Sampling(max_new_tokens=1))
        forget(generator)

    def full_rows():
        generator.generate(full, Sampling(max_new_tokens=64))
        forget(generator)

    def full_rows_prefill():
        generator.generate(full, Sampling(max_new_tokens=1))
        forget(generator)

    whole, chunks, rows, before = medians(all_of_them, full_chunks, full_rows, full_rows_prefill)
    a_prompt_token = chunks / (8 * 511)
    a_step = (rows - before) / 63
    new = sum(one.max_new_tokens for one in asked)
    ideal = a_prompt_token * sum(map(len, prompts)) + a_step * new / 8
    return [row("full rows / mixed", 8, whole, ideal, new)]


def shared_beginning(pair) -> list[tuple]:
    generator = Generator(pair, max_length=1088, slots=8)
    beginning = random_prompts(1, 1000, 1001)[0]
    prompts = [[*beginning, 1 + n % 32, 1 + n // 32] for n in range(64)]

    def one():
        generator.generate(prompts[:1], Sampling(max_new_tokens=1))
        forget(generator)

    def all_of_them():
        generator.generate(prompts, Sampling(max_new_tokens=1))
        forget(generator)

    alone, together = medians(one, all_of_them)
    return [("64 prompts of one beginning / one", 8, *map(short, (together, alone)),
             short(together / alone), None)]  # fmt: skip


def drafts(configs) -> list[tuple]:
    pair, rows = foreseen_pair(configs, share=0.8), []
    for count in (1, 8):
        generators = [
            Generator(pair, max_length=16 + 2 * NEW.value, slots=count, draft=k) for k in (4, 0)
        ]
        ours, other = medians(*(answering(one, count, 2 * NEW.value) for one in generators))
        rows.append(row("drafts of 4 / none", count, ours, other, 2 * NEW.value * count))
        drafting = generators[0].drafting
        print(
            f"{count} rows: {drafting.acceptance:.1%} of drafted tokens accepted, at last "
            f"{drafting.length} at a time: {drafting.reason}"
        )
    return rows


def in_evaluation(pair) -> list[tuple]:
    letters, pair.anchor.vocabulary = random_prompts(256, 5, 65), load_vocabulary("bytes")
    examples = [
        {"inputs": "".join(chr(33 + n % 25) for n in each), "targets": ""} for each in letters
    ]
    task = Task("letters", examples, TEMPLATES["own"], ("exact_match",))
    prompts = [pair.vocabulary.encode_sequence(example["inputs"]) for example in examples]
    options = Options(max_new_tokens=NEW.value)
    generator = Generator(pair, max_length=max(map(len, prompts)) + NEW.value, slots=8)

    def evaluated():
        answers(pair, "", [task], options, batch_size=8)

    def alone():
        generator.generate(prompts, Sampling(max_new_tokens=NEW.value))
        forget(generator)

    return [row("generator / evaluation", 8, *medians(evaluated, alone), NEW.value * len(prompts))]


def foreseen_pair(configs, share: float):
    """A pair that does all its work, and whose next token follows from the last one alone.

    Layers and bridge add zeros; the heads name the next token, the augment's the same as the
    anchor's for a random `share` of all tokens.
    """
    random = np.random.default_rng(0)
    order = random.permutation(configs.anchor.vocab_size)
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    foreseen = following.copy()
    missed = random.permutation(order)[round(share * len(order)) :]
    foreseen[missed] = following[np.roll(missed, -1)]
    models = []
    for number, (config, after) in enumerate(
        ((configs.anchor, following), (configs.augment, foreseen))
    ):
        model = Decoder(config, nnx.Rngs(number))
        nnx.update(model.layers, jax.tree.map(jnp.zeros_like, nnx.state(model.layers)))
        embedding_VD = model.embedding[...]
        head_VD = jnp.zeros_like(embedding_VD).at[after].set(embedding_VD)
        model.head.set_value(head_VD.T.astype(model.head[...].dtype))
        models.append(model)
    composition = dataclasses.replace(configs.composition, init="zero")
    return compose(*models, composition, rngs=nnx.Rngs(2))


def answering(generator: Generator, rows: int, new: int | None = None) -> Callable[[], None]:
    """A function that answers `rows` prompts of 8 tokens."""
    prompts = random_prompts(rows, 8, 9)
    return lambda: generator.generate(prompts, Sampling(max_new_tokens=new or NEW.value))


def forget(generator: Generator) -> None:
    """Lets no prompt find its beginning in the rows."""
    for held in generator.scheduler.rows:
        held.tokens = []


def medians(*functions: Callable[[], None]) -> list[float]:
    """The median seconds of each function; they take turns, once none compiles any more."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(MOST_WARM_UPS):
        before = programs()
        for function in functions:
            function()
        if programs() == before:
            break
    for _ in range(ROUNDS.value):
        for function, kept in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


def programs() -> int:
    """The number of compiled steps."""
    return steps.prefill._cache_size() + steps.decode._cache_size()


def random_prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    vocabulary = chosen().anchor.vocab_size
    return [
        random.integers(1, vocabulary, random.integers(low, high)).tolist() for _ in range(count)
    ]


def row(what: str, rows: int, ours: float, other: float, tokens: int) -> tuple:
    return what, rows, short(ours), short(other), short(other / ours), short(tokens / ours)


if __name__ == "__main__":
    jax.config.parse_flags_with_absl()
    app.run(main)
