import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile

import pytest
import sentencepiece
import tiny_tokenizers
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.data import key_value
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding.generator import encode
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
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert bytes(i - 3 for i in ids) == text.encode()


def test_bytes_have_the_ids_of_seqio():
    import seqio

    theirs, ours = seqio.ByteVocabulary(), ByteVocabulary()
    text = "naïve ☃ text"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.size, ours.eos_id) == (theirs.vocab_size, theirs.eos_id)


def test_sentencepiece_agrees_with_the_library(model_path):
    vocabulary = load_vocabulary(str(model_path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    text = "the first number 7"
    assert vocabulary.encode(text) == library.encode(text)
    assert vocabulary.decode([vocabulary.bos_id, *vocabulary.encode(text)]) == text
    assert (vocabulary.bos_id, vocabulary.eos_id) == (library.bos_id(), library.eos_id())
    assert vocabulary.tokens()[vocabulary.eos_id] == "</s>"


def test_tokenizer_takes_its_special_tokens_from_the_file_beside_it(tokenizer_path):
    alone = load_vocabulary(str(tokenizer_path))
    assert (alone.bos_id, alone.eos_id) == (None, 2)
    assert alone.encode("one three") == [0, 7]  # neither padded nor with special tokens
    assert alone.size == 8
    assert alone.tokens()[4] == ""
    config = tokenizer_path.with_name("tokenizer_config.json")
    config.write_text(json.dumps({"bos_token": {"content": "[begin]"}, "eos_token": "</s>"}))
    try:
        beside = load_vocabulary(str(tokenizer_path))
    finally:
        config.unlink()
    assert (beside.bos_id, beside.eos_id) == (3, 2)


def test_id_0_may_be_text(tokenizer_path):
    vocabulary = load_vocabulary(str(tokenizer_path))
    assert vocabulary.decode([1, 0, 2, 0]).split() == ["two", "one"]


def test_saved_vocabularies_stand_alone(model_path, tokenizer_path, tmp_path):
    specs = ("bytes", "key_value/tiny", str(model_path), str(tokenizer_path))
    for number, spec in enumerate(specs):
        original = load_vocabulary(spec)
        original.save(tmp_path / str(number))
        copy = load_vocabulary(tmp_path / str(number))
        assert copy.fingerprint == original.fingerprint
        assert (copy.bos_id, copy.eos_id, copy.size) == (
            original.bos_id,
            original.eos_id,
            original.size,
        )
        assert copy.encode("one two") == original.encode("one two")


def test_the_first_difference_is_named():
    demo, bytes_ = load_vocabulary("key_value"), ByteVocabulary()
    assert demo.first_difference(load_vocabulary("key_value/demo")) is None
    assert demo.first_difference(bytes_) == (1, "<bos>", "</s>")


def test_a_longer_vocabulary_differs_where_the_other_ends(monkeypatch):
    few = dataclasses.replace(key_value.CONFIGS["tiny"], name="few", values=(0, 3))
    monkeypatch.setitem(key_value.CONFIGS, "few", few)
    short, tiny = load_vocabulary("key_value/few"), load_vocabulary("key_value/tiny")
    index, in_tiny, in_short = tiny.first_difference(short)
    assert (index, in_tiny, in_short) == (short.size, "10", None)


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
        load_vocabulary(spec)


@pytest.mark.parametrize("name", ["bad.model", "bad.json"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("not a vocabulary")
    with pytest.raises(CalmError, match=name):
        load_vocabulary(str(tmp_path / name))


def test_seqio_sees_the_same_vocabulary():
    import tensorflow as tf

    from calm_jax.data.tasks import SeqioVocabulary

    vocabulary = load_vocabulary("key_value/tiny")
    theirs = SeqioVocabulary(vocabulary)
    texts = ["<math>ab+12=", "", "zz"]
    rows = theirs.encode_tf(tf.constant(texts)).to_list()
    assert rows == [vocabulary.encode(text) for text in texts]
    assert theirs.encode_tf(tf.constant(texts[0])).numpy().tolist() == rows[0]
    decoded = theirs.decode_tf(tf.constant([rows[0]])).numpy().tolist()
    assert decoded == [texts[0].encode()]
    assert theirs == SeqioVocabulary(load_vocabulary("key_value/tiny"))
    assert theirs != SeqioVocabulary(load_vocabulary("key_value/paper"))


@pytest.fixture
def published(tmp_path):
    return tiny_tokenizers.qwen(tmp_path / "published")


def edit(folder, name, **changes):
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", tiny_tokenizers.FAMILIES)
def test_published_files_go_along_byte_for_byte(family, tmp_path):
    folder = tiny_tokenizers.FAMILIES[family](tmp_path / "published")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n \n")
    index = load_vocabulary(folder / "tokenizer.json").token_id("a")
    (folder / "added_tokens.json").write_text(f'{{ "a":\r\n{index}}}')
    original = vocabulary_of_folder(folder)
    original.save(tmp_path / "saved")
    copy = load_vocabulary(tmp_path / "saved")
    copy.save_published(tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(folder)
    chat = [{"role": "user", "content": "Grüße"}]
    for name in (
        "fingerprint",
        "tokenization_fingerprint",
        "bos_id",
        "start_ids",
        "eos_ids",
        "size",
    ):
        assert getattr(copy, name) == getattr(original, name), name
    assert copy.chat(chat) == original.chat(chat)
    shutil.rmtree(folder)  # nothing of the copy stands there
    assert load_vocabulary(tmp_path / "saved").encode(copy.chat(chat)) == copy.encode(
        original.chat(chat)
    )


def test_weights_alone_have_no_vocabulary(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert vocabulary_of_folder(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "m.model", "gemma.spm"])
def test_a_folder_with_a_sentencepiece_model(model_path, tmp_path, name):
    shutil.copy(model_path, tmp_path / name)
    piece = load_vocabulary(str(model_path)).tokens()[9]
    edit(tmp_path, "tokenizer_config.json", eos_token=piece, chat_template="{{ bos_token }}x")
    edit(tmp_path, "generation_config.json", eos_token_id=[2, 9])
    vocabulary = vocabulary_of_folder(tmp_path)
    assert vocabulary.eos_ids == (9, 2)
    vocabulary.save(tmp_path / "saved")
    copy = load_vocabulary(tmp_path / "saved")
    assert (copy.eos_ids, copy.chat_template) == (vocabulary.eos_ids, "{{ bos_token }}x")
    assert (tmp_path / "saved/tokenizer.model").read_bytes() == model_path.read_bytes()


def test_tokenizer_json_stands_above_sentencepiece(model_path, published):
    shutil.copy(model_path, published / "tokenizer.model")
    vocabulary = vocabulary_of_folder(published)
    assert vocabulary.kind == "tokenizer"
    vocabulary.save_published(published.parent / "exported")
    assert contents(published.parent / "exported") == contents(published)


def test_two_sentencepiece_models_are_one_too_many(model_path, tmp_path):
    for name in ("a.model", "b.spm"):
        shutil.copy(model_path, tmp_path / name)
    with pytest.raises(CalmError, match=r"several SentencePiece models .*: a\.model, b\.spm"):
        vocabulary_of_folder(tmp_path)


def test_special_tokens_in_text_become_ids_and_say_nothing(model_path, published):
    pieces, bytes_ = load_vocabulary(str(model_path)), vocabulary_of_folder(published)
    assert pieces.encode("<s>") == [pieces.bos_id]
    # The space that begins a text does not begin what stands behind a token.
    names = [pieces.tokens()[token] for token in pieces.encode("first<s>number</s>first")]
    assert names.count("<s>") == names.count("</s>") == 1
    assert "".join(names) == "▁first<s>number</s>first"
    start, end = map(bytes_.token_id, ("<|im_start|>", "<|im_end|>"))
    ids = bytes_.encode("a<|im_start|>b<|im_end|>")
    assert ids == [*bytes_.encode("a"), start, *bytes_.encode("b"), end]
    assert bytes_.decode(ids) == "ab"
    assert bytes_.decode([*bytes_.encode("a"), end, *bytes_.encode("b")]) == "a"
    # What is added but not special is text.
    assert bytes_.decode(bytes_.encode("x<tool_call>")) == "x<tool_call>"


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_a_text_may_spell_the_token_of_unknown_text(family, tmp_path):
    folder = tiny_tokenizers.FAMILIES[family](tmp_path)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "What does <unk> mean?"
    ids = library.encode(text).ids
    assert library.token_to_id("<unk>") in ids
    assert encode(vocabulary_of_folder(folder), text) == ids


def test_what_is_lost_beside_the_token_of_unknown_text(tokenizer_path, model_path, tmp_path):
    shutil.copy(model_path, tmp_path / "tokenizer.model")
    edit(tmp_path, "tokenizer_config.json", unk_token="<unk>")
    pieces = vocabulary_of_folder(tmp_path)
    assert pieces.lost_character("first <unk>") is None
    assert pieces.encode("first <unk>").count(pieces.unknown_id) == 1
    assert pieces.lost_character("first <unk> <Z>") == "<"
    words = load_vocabulary(str(tokenizer_path))  # its unknown text becomes "</s>"
    assert words.lost_character("one </s> two") is None
    assert words.lost_character("one </s> zwei") == "z"


def test_what_is_lost_without_a_token_in_its_place(tmp_path):
    """Then the library's offsets of what follows are wrong."""
    letters = {letter: index for index, letter in enumerate("▁af ")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = vocabulary_of_folder(tmp_path)
    assert vocabulary.lost_character("Café") == "C"
    assert vocabulary.lost_character("fa é") == "é"
    assert vocabulary.lost_character("faf a") is None


def test_names_of_special_tokens_by_file(published):
    for name in ("tokenizer_config.json", "generation_config.json"):
        (published / name).unlink()

    def ids():
        vocabulary = vocabulary_of_folder(published)
        names = vocabulary.tokens()
        return [
            index if index is None else names[index]
            for index in (vocabulary.bos_id, *vocabulary.eos_ids)
        ]

    assert ids() == [None, "<|endoftext|>"]  # the first of the names in use
    edit(published, "special_tokens_map.json", eos_token={"content": "<|im_end|>"})
    assert ids() == [None, "<|im_end|>"]
    edit(published, "tokenizer_config.json", bos_token="<|im_start|>", eos_token="<tool_call>")
    assert ids() == ["<|im_start|>", "<|im_end|>"]
    edit(published, "tokenizer_config.json", added_tokens_decoder={})
    assert ids() == ["<|im_start|>", "<tool_call>"]
    edit(published, "tokenizer_config.json", eos_token=None)
    edit(published, "generation_config.json", eos_token_id=7)
    assert ids()[1:] == [vocabulary_of_folder(published).tokens()[7]]


def test_chat_templates_by_file(published):
    def template():
        return vocabulary_of_folder(published).chat_template

    assert template() == tiny_tokenizers.QWEN_CHAT
    edit(published, "chat_template.json", chat_template="of the processor")
    assert template() == tiny_tokenizers.QWEN_CHAT
    edit(published, "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}])
    assert template() == "of the processor"
    (published / "chat_template.jinja").write_text("of the file")
    assert template() == "of the file"


CONTRADICTIONS = {
    "eos_token not there": (
        "tokenizer_config.json", {"eos_token": "</end>"},
        "tokenizer_config.json: eos_token '</end>' is not in tokenizer.json"),
    "eos_token no text": (
        "tokenizer_config.json", {"eos_token": 7},
        "tokenizer_config.json: eos_token 7 is not a token"),
    "extra tokens": (
        "tokenizer_config.json", {"additional_special_tokens": "<a>"},
        "tokenizer_config.json: additional_special_tokens is str"),
    "another id": (
        "tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "<|im_end|>"}}},
        "tokenizer_config.json gives '<|im_end|>' the id 3, tokenizer.json "),
    "an id far off": (
        "tokenizer_config.json", {"added_tokens_decoder": {"9999": {"content": "<new>"}}},
        "tokenizer_config.json gives '<new>' the id 9999, tokenizer.json "),
    "no map": (
        "tokenizer_config.json", {"added_tokens_decoder": {"x": {}}},
        "tokenizer_config.json: added_tokens_decoder is not a map of ids to tokens"),
    "end beyond": (
        "generation_config.json", {"eos_token_id": [2, 99999]},
        "generation_config.json: eos_token_id 99999 is not an id below"),
    "end no number": (
        "generation_config.json", {"eos_token_id": "2"},
        "generation_config.json: eos_token_id '2' is not an id below"),
    "template no text": (
        "tokenizer_config.json", {"chat_template": 3},
        "tokenizer_config.json: chat_template is not text"),
    "template without a name": (
        "tokenizer_config.json", {"chat_template": [{"template": "x"}]},
        "tokenizer_config.json: chat_template lacks a name"),
    "template no Jinja": (
        "tokenizer_config.json", {"chat_template": "{% for %}"},
        "chat template of "),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_files_that_contradict_each_other_are_named(case, published):
    name, changes, message = CONTRADICTIONS[case]
    edit(published, name, **changes)
    with pytest.raises(CalmError) as caught:
        vocabulary_of_folder(published)
    assert message in str(caught.value)
    assert str(published) in str(caught.value)
    assert "\n" not in str(caught.value)


@functools.cache
def whole_folder():
    folder = pathlib.Path(tempfile.mkdtemp())
    tiny_tokenizers.gemma(folder)
    edit(folder, "special_tokens_map.json", eos_token="<eos>")
    shutil.copy(folder / "generation_config.json", folder / "chat_template.json")
    return contents(folder)


@settings(max_examples=150)
@given(st.data())
def test_damage_is_refused_in_one_line_or_harmless(data):
    files = dict(whole_folder())
    name = data.draw(st.sampled_from(sorted(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    damage = data.draw(st.sampled_from(["cut", "byte", "gone", "other"]))
    if damage == "cut":
        files[name] = files[name][:at]
    elif damage == "byte":
        byte = bytes([data.draw(st.integers(0, 255))])
        files[name] = files[name][:at] + byte + files[name][at + 1 :]
    elif damage == "gone":
        del files[name]
    else:
        files[name] = json.dumps(data.draw(st.sampled_from([[], 1, None, "x", {"a": 1}]))).encode()
    with tempfile.TemporaryDirectory() as folder:
        for kept, content in files.items():
            pathlib.Path(folder, kept).write_bytes(content)
        try:
            vocabulary = vocabulary_of_folder(folder)
        except CalmError as error:
            assert name in str(error)
            assert "\n" not in str(error)
            return
        if vocabulary is None:
            assert (name, damage) == ("tokenizer.json", "gone")
            return
        assert all(0 <= token < vocabulary.size for token in vocabulary.encode("Hello, 世界"))


def test_a_saved_folder_without_one_of_its_files_is_damaged(published, tmp_path):
    vocabulary_of_folder(published).save(tmp_path / "saved")
    (tmp_path / "saved/tokenizer_config.json").unlink()
    with pytest.raises(CalmError, match=r"saved is damaged: tokenizer_config\.json is missing"):
        load_vocabulary(tmp_path / "saved")
