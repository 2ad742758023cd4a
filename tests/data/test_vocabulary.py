import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = [f"the {word} number {n} is not {n + 7}" for n in range(50) for word in ("first", "éa")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "m"), vocab_size=35, minloglevel=2
    )
    return folder / "m.model"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ids = {"one": 0, "two": 1, "</s>": 2, "[begin]": 3, "three": 7}  # 4, 5 and 6 mean nothing
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="</s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "[begin]"])
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@given(st.text())
def test_bytes_give_back_any_text(text):
    vocabulary = Vocabulary.bytes()
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert bytes(i - 3 for i in ids) == text.encode()


def test_bytes_have_the_ids_of_seqio():
    import seqio

    theirs, ours = seqio.ByteVocabulary(), Vocabulary.bytes()
    text = "naïve ☃ text"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.size, ours.eos_id) == (theirs.vocab_size, theirs.eos_id)


def test_sentencepiece_agrees_with_the_library(model_path):
    vocabulary = Vocabulary.load(str(model_path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    text = "the first number 7"
    assert vocabulary.encode(text) == library.encode(text)
    assert vocabulary.decode([vocabulary.bos_id, *vocabulary.encode(text)]) == text
    assert (vocabulary.bos_id, vocabulary.eos_id) == (library.bos_id(), library.eos_id())
    assert vocabulary.tokens()[vocabulary.eos_id] == "</s>"


def test_tokenizer_takes_its_special_tokens_from_the_file_beside_it(tokenizer_path):
    alone = Vocabulary.load(str(tokenizer_path))
    assert (alone.bos_id, alone.eos_id) == (None, 2)
    assert alone.encode("one three") == [0, 7]  # neither padded nor with special tokens
    assert alone.size == 8
    assert alone.tokens()[4] == ""
    config = tokenizer_path.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"bos_token": {"content": "[begin]"}, "eos_token": "</s>"}))
    try:
        beside = Vocabulary.load(str(tokenizer_path))
    finally:
        config.unlink()
    assert (beside.bos_id, beside.eos_id) == (3, 2)


def test_id_0_may_be_text(tokenizer_path):
    vocabulary = Vocabulary.load(str(tokenizer_path))
    assert vocabulary.decode([1, 0, 2, 0]).split() == ["two", "one"]


def test_saved_vocabularies_stand_alone(model_path, tokenizer_path, tmp_path):
    specs = ("bytes", "key_value/tiny", str(model_path), str(tokenizer_path))
    for number, spec in enumerate(specs):
        original = Vocabulary.load(spec)
        original.save(tmp_path / str(number))
        copy = Vocabulary.load(tmp_path / str(number))
        assert copy.fingerprint == original.fingerprint
        assert (copy.bos_id, copy.eos_id, copy.size) == (
            original.bos_id,
            original.eos_id,
            original.size,
        )
        assert copy.encode("one two") == original.encode("one two")


def test_the_first_difference_is_named():
    demo, bytes_ = Vocabulary.load("key_value"), Vocabulary.bytes()
    assert demo.first_difference(Vocabulary.load("key_value/demo")) is None
    assert demo.first_difference(bytes_) == (1, "<bos>", "</s>")


def test_a_longer_vocabulary_differs_where_the_other_ends():
    paper, tiny = Vocabulary.load("key_value/paper"), Vocabulary.load("key_value/tiny")
    index, in_tiny, in_paper = tiny.first_difference(paper)
    assert (index, in_tiny, in_paper) == (paper.size, "10", None)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("nothing", "'nothing'"),
        ("key_value/none", "'none'"),
        ("missing.model", "missing.model"),
        ("missing.json", "missing.json"),
    ],
)
def test_an_unknown_vocabulary_is_named(spec, part):
    with pytest.raises(CalmError, match=part):
        Vocabulary.load(spec)


@pytest.mark.parametrize("name", ["bad.model", "bad.json"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("not a vocabulary")
    with pytest.raises(CalmError, match=name):
        Vocabulary.load(str(tmp_path / name))


def test_seqio_sees_the_same_vocabulary():
    import tensorflow as tf

    vocabulary = Vocabulary.load("key_value/tiny")
    texts = ["<math>ab+12=", "", "zz"]
    rows = vocabulary.seqio.encode_tf(tf.constant(texts)).to_list()
    assert rows == [vocabulary.encode(text) for text in texts]
    assert vocabulary.seqio.encode_tf(tf.constant(texts[0])).numpy().tolist() == rows[0]
    decoded = vocabulary.seqio.decode_tf(tf.constant([rows[0]])).numpy().tolist()
    assert decoded == [texts[0].encode()]
    assert vocabulary.seqio == Vocabulary.load("key_value/tiny").seqio
    assert vocabulary.seqio != Vocabulary.load("key_value/paper").seqio
