"""Tokenising a file of JSON lines: its seconds beside those of the tokenizer alone.

  python benchmarks/tokenization.py [--examples=100000] [--repeats=5] [--output=FILE.json]

Writes short examples and a byte-level BPE tokenizer that is trained on some of them. One row is
`tokenizers.encode_batch` of all texts in one call, the other `open_dataset`: reading and checking
the lines, tokenising, packing, and writing the rows of a new cache. They are run in turns; the
medians count.
"""

import json
import os
import pathlib
import random
import statistics
import tempfile

from absl import app, flags
from measuring import Clock, short, tell

EXAMPLES = flags.DEFINE_integer("examples", 100_000, "lines of the file")
REPEATS = flags.DEFINE_integer("repeats", 5, "of both, in turns; medians count")
OUTPUT = flags.DEFINE_string("output", None, "JSON file of the results")

WORDS = 5_000  # different ones, of which an example has 4 to 16 before its answer and 1 to 8 in it
LENGTH = 512  # tokens of a row


def make_texts(count: int) -> list[tuple[str, str]]:
    """Prompts and answers of random words, common ones more often."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(WORDS)]
    shares = [1 / (rank + 10) for rank in range(WORDS)]

    def text(fewest: int, most: int) -> str:
        return " ".join(draw.choices(words, shares, k=draw.randint(fewest, most)))

    return [(text(4, 16), text(1, 8)) for _ in range(count)]


def make_tokenizer(folder: pathlib.Path, texts: list[str]) -> pathlib.Path:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8_000,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def main(_) -> None:
    # Both use as many threads as there are cores, whatever has been run before.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers

    from calm_jax.data import load_vocabulary, open_dataset

    pairs = make_texts(EXAMPLES.value)
    texts = [text for pair in pairs for text in pair]
    seconds = {"encode_batch": [], "open_dataset": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        file = make_tokenizer(folder, texts[:10_000])
        with (folder / "examples.jsonl").open("w") as lines:
            for inputs, targets in pairs:
                lines.write(json.dumps({"inputs": inputs, "targets": targets}) + "\n")
        tokenizer, vocabulary = tokenizers.Tokenizer.from_file(str(file)), load_vocabulary(file)
        for repeat in range(REPEATS.value):
            data = {
                "train": ({"jsonl": str(folder / "examples.jsonl")},),
                "cache_dir": str(folder / str(repeat)),
                **{"length": LENGTH, "pack": True, "strict": True, "limit": 0},
            }
            with Clock() as clock:
                encodings = tokenizer.encode_batch(texts)
            seconds["encode_batch"].append(clock.seconds)
            tokens = sum(map(len, encodings))
            del encodings
            with Clock() as clock:
                open_dataset(data, "train", vocabulary)
            seconds["open_dataset"].append(clock.seconds)
    alone = statistics.median(seconds["encode_batch"])
    rows = [("what", "seconds", "examples a second", "tokens a second", "/ encode_batch")]
    for what, times in seconds.items():
        middle = statistics.median(times)
        rates = short(len(pairs) / middle), short(tokens / middle)
        rows.append((what, short(middle), *rates, short(middle / alone)))
    tell("tokenization", rows, OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
