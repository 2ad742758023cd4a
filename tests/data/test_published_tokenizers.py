"""Folders of tokenizer files against what transformers makes of them, as committed.

tests/parity/make_tokenizer_golden.py writes it, and test_tokenizers.py beside it holds it against
the transformers that is installed.
"""

import json
import pathlib

import published_tokenizers
import pytest
from absl import logging

from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.errors import CalmError

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "published_tokenizers.json").read_text()
)


@pytest.mark.parametrize("name", published_tokenizers.FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(name, tmp_path):
    published_tokenizers.FOLDERS[name](tmp_path / "published")
    golden = GOLDEN[name]
    original = vocabulary_of_folder(tmp_path / "published")
    original.save(tmp_path / "saved")
    for vocabulary in (original, load_vocabulary(tmp_path / "saved")):
        for text, ids in golden["texts"].items():
            if vocabulary.kind == "sentencepiece" and text.startswith(" "):
                # SentencePiece puts a space even before a space; transformers, in the class of
                # Llama's tokenizers, does not.
                continue
            assert vocabulary.encode_sequence(text) == ids, text
        for prompt, ids, text in golden["continued"]:
            assert vocabulary.decode_after(prompt, ids) == text
        assert sorted(vocabulary.eos_ids) == golden["ends"]
        assert vocabulary.eos_id in vocabulary.eos_ids
        assert vocabulary.size == golden["size"] == len(vocabulary.tokens())


def test_a_byte_order_of_characters_is_decoded_over_the_border(tmp_path):
    """Where the prompt ends within a character, the answer has it whole."""
    published_tokenizers.FOLDERS["no start token"](tmp_path)
    vocabulary = vocabulary_of_folder(tmp_path)
    ids = vocabulary.encode("dog é!")
    assert vocabulary.decode_after(ids[:-2], ids[-2:]) == "é!"


def test_an_end_in_the_prompt_does_not_end_the_answer(tmp_path):
    published_tokenizers.FOLDERS["start token named"](tmp_path)
    vocabulary = vocabulary_of_folder(tmp_path)
    prompt = vocabulary.encode("the<|im_end|> first")
    answer = vocabulary.encode(" dog<|im_end|> dog")
    assert vocabulary.decode_after(prompt, answer) == " dog"


def edit(folder, name, **changes):
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


REFUSED = {
    "a class that splits otherwise": (
        "vocab.json, Qwen 2", "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"},
        "tokenizer_class 'RobertaTokenizer'; without a tokenizer.json, vocab.json and merges.txt"),
    "no class at all": (
        "vocab.json, GPT-2", "config.json", {"model_type": "bart"}, "model_type 'bart'"),
    "a gap between ids": (
        "tokenizer.model", "added_tokens.json", {"<tool>": 999}, "'<tool>' has the id 999"),
    "an id of a piece": (
        "tokenizer.model", "added_tokens.json", {"<tool>": 7},
        "added_tokens.json gives '<tool>' the id 7, tokenizer.model has no such token"),
    "an id that is no number": (
        "tokenizer.model", "added_tokens.json", {"<tool>": "7"}, "'<tool>' has the id '7'"),
    "an end beyond the tokens": (
        "start token named", "config.json", {"eos_token_id": [1, 9999]},
        "config.json: eos_token_id 9999 is not an id below"),
    "a flag that is no flag": (
        "tokenizer.model, start token denied", "tokenizer_config.json", {"add_bos_token": "no"},
        "tokenizer_config.json: add_bos_token is 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(case, tmp_path):
    folder, file, changes, message = REFUSED[case]
    published_tokenizers.FOLDERS[folder](tmp_path)
    edit(tmp_path, file, **changes)
    with pytest.raises(CalmError) as caught:
        vocabulary_of_folder(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merges_that_are_no_pairs_are_named_by_their_line(tmp_path):
    published_tokenizers.FOLDERS["vocab.json, GPT-2"](tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nf i\nf i r\n")
    with pytest.raises(CalmError, match=r"merges\.txt:3: 'f i r' is not a pair of tokens"):
        vocabulary_of_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "older", "says"),
    [
        ("start token named", "<|im_start|>", True),
        ("no start token", "<|im_end|>", True),
        ("start token put", "<|im_start|>", False),
    ],
)
def test_a_folder_made_before_starts_as_it_did_and_says_so(name, older, says, tmp_path, caplog):
    published_tokenizers.FOLDERS[name](tmp_path / "published")
    vocabulary_of_folder(tmp_path / "published").save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "vocabulary.json").read_text())
    del index["start_ids"]
    (tmp_path / "saved" / "vocabulary.json").write_text(json.dumps(index))
    logging.set_verbosity(logging.WARNING)
    vocabulary = load_vocabulary(tmp_path / "saved")
    assert vocabulary.encode_sequence("dog")[:1] == [vocabulary.token_id(older)]
    assert ("made by an older version" in caplog.text) == says
