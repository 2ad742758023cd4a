"""Where the tokens of an echoed prompt begin in its text."""

import types

import pytest
import tiny_tokenizers
import tokenizers

from calm_jax.data.vocabularies import vocabulary_of_folder
from calm_jax.decoding import TokenLogprob
from calm_jax.serving.choices import prompt_pieces
from calm_jax.serving.token_texts import TokenTexts

TURN = {
    "llama3": "<|start_header_id|>user<|end_header_id|>",
    "qwen": "<|im_start|>user",
    "gemma": "<start_of_turn>user",
    "mistral": "<unk>user",
}
END = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "gemma": "<end_of_turn>", "mistral": "</s>"}


def offsets_of(vocabulary, text, ids):
    asked = types.SimpleNamespace(
        model=types.SimpleNamespace(vocabulary=vocabulary), texts=[text], prompts=[ids]
    )
    scores = [TokenLogprob(0.0)] * (len(ids) - 1)
    pieces = prompt_pieces(asked, 0, scores, TokenTexts(vocabulary))
    assert [piece.token for piece in pieces] == ids
    return [piece.offset for piece in pieces]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("family", TURN)
def test_offsets_are_those_of_the_tokenizer(family, start, tmp_path):
    """Of the tokenizers library, for special tokens in the text, and text that it normalises."""
    folder = tiny_tokenizers.FAMILIES[family](tmp_path)
    vocabulary = vocabulary_of_folder(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    turn, end = TURN[family], END[family]
    text = f"{turn}\nGrüße, the dog 你好 né\u0301e{end}{turn}\n the fox. {end} so"
    if start and vocabulary.start_ids:
        text = library.id_to_token(vocabulary.bos_id) + text
    encoding = library.encode(text, add_special_tokens=False)
    ids = vocabulary.encode_sequence(text)
    put = len(ids) - len(encoding.ids)
    assert ids[put:] == encoding.ids and text.count(end) == 2
    expected = [begin for begin, _ in encoding.offsets]
    assert offsets_of(vocabulary, text, ids) == [0] * put + expected


def test_a_special_token_with_the_space_before_it(tmp_path):
    folder = tiny_tokenizers.qwen(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    library.save(str(folder / "tokenizer.json"))
    text = "dog  <mask> fox<mask>"
    encoding = library.encode(text)
    vocabulary = vocabulary_of_folder(folder)
    expected = [begin for begin, _ in encoding.offsets]
    assert offsets_of(vocabulary, text, encoding.ids) == expected


def test_ids_point_into_their_decoded_text(tmp_path):
    """Special tokens are not in it."""
    vocabulary = vocabulary_of_folder(tiny_tokenizers.qwen(tmp_path))
    ids = vocabulary.encode("<|im_start|>dog<|im_end|>dog")
    size = len(vocabulary.encode("dog"))
    found = offsets_of(vocabulary, "dogdog", ids)
    assert found[:2] == [0, 0] and found[size + 1 : size + 3] == [3, 3]
