"""Pieces of text are the text of all tokens, decoded at once."""

import time

import numpy as np
import pytest
import tiny_tokenizers

from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.decoding.text_stream import HALF, TextStream


@pytest.fixture(scope="module", params=["bytes", *tiny_tokenizers.FAMILIES])
def vocabulary(request, tmp_path_factory):
    if request.param == "bytes":
        return load_vocabulary("bytes")
    make = tiny_tokenizers.FAMILIES[request.param]
    return vocabulary_of_folder(make(tmp_path_factory.mktemp("tokenizer")))


TEXTS = [
    "Grüße aus Köln: 你好 🙂, the first dog.",
    "  Two spaces.\n",
    "dog!",
    "né\u0301e",
    "🙂🙂 第一",
]


def random_answer(vocabulary, random):
    """Pieces of text, each encoded alone, as a model may write them."""
    texts = random.choice(TEXTS, 20)
    return [
        token
        for text in texts
        for token in vocabulary.encode(str(text))
        if token not in vocabulary.eos_ids
    ]


def test_pieces_are_the_whole(vocabulary):
    random = np.random.default_rng(0)
    prompt = vocabulary.encode_sequence("the first") * 4
    for size in (1, 3, 40):
        tokens = random_answer(vocabulary, random)
        stream = TextStream(vocabulary, prompt)
        pieces = [stream.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == vocabulary.decode_after(prompt, tokens)


def test_no_piece_ends_in_half_a_character(vocabulary):
    prompt = vocabulary.encode_sequence("the first")
    stream, text = TextStream(vocabulary, prompt), "你好 🙂 ü"
    pieces = [stream.push([token]) for token in vocabulary.encode(text)]
    assert not any(HALF in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 3


def test_a_long_text_that_stops_costs_no_more_than_the_answer():
    vocabulary = load_vocabulary("bytes")
    stream, start = TextStream(vocabulary, [5], ("a" * 200_000 + "b",)), time.perf_counter()
    assert stream.push(vocabulary.encode("ca")) == "c"
    assert time.perf_counter() - start < 0.2
    assert stream.finish() == "a"


def test_what_may_become_a_stop_is_held_back(vocabulary):
    prompt = vocabulary.encode_sequence("the first")
    stream = TextStream(vocabulary, prompt, ("dog. Two", "never"))
    given = [stream.push([token]) for token in vocabulary.encode(" the dog. The dog. Two end")]
    assert "".join(given) == stream.text
    assert stream.text.endswith("The ")
    assert stream.stopped
    assert stream.finish() == ""


SPECIAL = {
    "qwen": "<|im_start|>",
    "gemma": "<mask>",
    "llama3": "<|start_header_id|>",
    "mistral": "<s>",
}


@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_token_stops(name, size, tmp_path):
    """Its text, alone or beside other text, is a stop like any other."""
    vocabulary = vocabulary_of_folder(tiny_tokenizers.FAMILIES[name](tmp_path))
    special = SPECIAL[name]
    token = vocabulary.token_id(special)
    assert token not in vocabulary.eos_ids
    dog, fox = map(vocabulary.encode, ("the dog.", "the fox!"))
    tokens = [*dog, token, *fox, token, *dog]
    for stop, expected in (
        (special, "the dog."),
        ("g." + special, "the do"),
        ("!" + special, f"{vocabulary.decode([*dog, *fox])[:-1]}"),
        ("." + special + special, vocabulary.decode([*dog, *fox, *dog])),
    ):
        stream = TextStream(vocabulary, [], (stop, "never"))
        pieces = [stream.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        assert "".join([*pieces, stream.finish()]) == stream.text == expected
        assert stream.stopped == (len(expected) < len(vocabulary.decode(tokens)))
