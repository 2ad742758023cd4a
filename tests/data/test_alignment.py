"""What an augment with another tokenizer may read, and from which token of the anchor on."""

import functools
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tiny_tokenizers
import tokenizers
from hypothesis import example, given, settings

from calm_jax.data.alignment import LONGEST_PIECE, Alignment
from calm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary
from calm_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.errors import CalmError

NAMES = ("bytes", *tiny_tokenizers.FAMILIES, "sentencepiece", "nfkc")
PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if pair[0] != pair[1]]
SPELLING = [pair for pair in PAIRS if pair[1] != "nfkc"]
SAMPLES = [
    *tiny_tokenizers.TEXT,
    "e\u0301te\u0301, it's 3rd; don't!\n\n\tx = f(y)  # 100%",
    "👩\N{ZERO WIDTH JOINER}💻👍🏽 1\ufe0f\u20e3🇨🇭",
    "שלום עולם، مرحبا بالعالم",
    "春" * 50 + "。한국어",
]
TEXTS = st.one_of(
    st.text(max_size=24),
    st.lists(
        st.sampled_from([*" \n\t.'’(1aé漢ह्ש🙂", "\u0301", "\u200d", "🏽", "the", " fox", "'ll"]),
        max_size=16,
    ).map("".join),
    st.tuples(st.sampled_from(SAMPLES), st.integers(0, 40)).map(lambda x: x[0][x[1] :][:30]),
)
# By anchor, the beginning of a chat, and what may come after it.
CHATS = {
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>",
    ),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>",
    ),
    "gemma": (
        "<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>",
    ),
}


@st.composite
def asked(draw):
    """Two vocabularies and a text, half of the time a chat of the first."""
    pair = draw(st.sampled_from(PAIRS))
    if pair[0] not in CHATS or draw(st.booleans()):
        return pair, draw(TEXTS)
    begin, *others = CHATS[pair[0]]
    parts = st.lists(st.sampled_from([*others, "Hi", " 12", "\n", "user"]), max_size=6)
    return pair, begin + draw(TEXTS)[:6] + "".join(draw(parts))


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    found = {"bytes": load_vocabulary("bytes")}
    for name, make in tiny_tokenizers.FAMILIES.items():
        found[name] = vocabulary_of_folder(make(root / name))
    identity = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<call>", "  "],
    }
    for name, options in {"sentencepiece": identity, "nfkc": {}}.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny_tokenizers.TEXT * 5),
            model_prefix=str(root / name),
            vocab_size=390,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        found[name] = SentencePieceVocabulary((root / f"{name}.model").read_bytes(), name)
    return found


@functools.cache
def alignment(anchor, augment):
    return Alignment(anchor, augment)


def visible(aligned, index):
    """The augment's ids that the anchor's token `index` may read."""
    return [token for token, order in zip(*aligned, strict=True) if order <= index]


@functools.cache
def bytes_of(vocabulary):
    return vocabulary.token_bytes()


def spelled(vocabulary, ids):
    given = b"".join(map(bytes_of(vocabulary).__getitem__, ids)).decode(errors="replace")
    return given.removeprefix(" ") if vocabulary.space_before_text else given


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
@example("".join(SAMPLES))
def test_tokens_have_the_bytes_that_decoding_shows(vocabularies, name, text):
    vocabulary = vocabularies[name]
    ids = vocabulary.encode_sequence(text)
    assert spelled(vocabulary, ids) == vocabulary.decode(ids)


CASES = {"data": st.data(), "asked": asked()}


@settings(deadline=None, max_examples=300)
@given(**CASES)
def test_no_later_token_changes_what_is_visible(vocabularies, data, asked):
    check_later_tokens(vocabularies, data, *asked)


@pytest.mark.slow
@settings(deadline=None, max_examples=10_000)
@given(**CASES)
def test_no_later_token_changes_what_is_visible_in_many_cases(vocabularies, data, asked):
    check_later_tokens(vocabularies, data, *asked)


def check_later_tokens(vocabularies, data, pair, text):
    """Neither later text nor any later ids, such as a model may generate, change anything."""
    anchor, augment = (vocabularies[name] for name in pair)
    ids = anchor.encode_sequence(text)
    hypothesis.assume(ids)
    count = data.draw(st.integers(1, len(ids)))
    prompt = data.draw(st.one_of(st.none(), st.integers(1, count)))
    any_ids = st.lists(st.integers(0, anchor.size - 1), max_size=6)
    after = data.draw(st.one_of(any_ids, TEXTS.map(anchor.encode)))
    alignment = Alignment(anchor, augment)
    whole, other, beginning = alignment.align([ids, ids[:count] + after, ids[:count]], [prompt] * 3)
    assert visible(whole, count - 1) == visible(other, count - 1) == beginning.ids
    assert whole.order == sorted(whole.order)


@settings(deadline=None, max_examples=300)
@given(pair=st.sampled_from(SPELLING), text=TEXTS, ids=st.lists(st.integers(0, 255), max_size=8))
def test_what_is_visible_spells_the_text_so_far(vocabularies, pair, text, ids):
    anchor, augment = (vocabularies[name] for name in pair)
    # Special tokens end a character that is not whole, which joining all bytes would complete.
    ids = [token for token in ids if bytes_of(anchor)[token]]
    ids = anchor.encode_sequence(text) + ids
    hypothesis.assume(ids)
    open_ended, closed = alignment(anchor, augment).align([ids, ids], [None, len(ids)])
    normal = augment._tokenizer.normalizer if pair[1] == "qwen" else None

    for count in range(1, len(ids) + 1):
        text = spelled(anchor, ids[:count])
        seen = spelled(augment, visible(open_ended, count - 1))
        if normal is None:
            assert text.lstrip(" ").startswith(seen.lstrip(" "))
        left = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if augment.by_character:
            assert seen.rstrip("\N{REPLACEMENT CHARACTER}") == left
    text, closed = text.lstrip(" "), spelled(augment, closed.ids).lstrip(" ")
    # All but the last bytes, if they are a part of a character.
    whole = [text[:end] for end in range(max(len(text) - 3, 0), len(text) + 1)]
    assert closed in [normal.normalize_str(x) if normal else x for x in whole]


@pytest.mark.parametrize("name", ["llama3", "qwen", "sentencepiece", "nfkc"])
def test_text_is_cut_where_tokenizers_split_it(vocabularies, name):
    """Pieces encoded one by one are what the tokenizer makes of a whole text."""
    augment = vocabularies[name]
    bytes_ = vocabularies["bytes"]
    for text in [
        *tiny_tokenizers.TEXT[:3],
        *SAMPLES[-3:-1],
        "it's 3rd; don't!\n\n\tx = f(y)  # 100%",
    ]:
        (aligned,) = alignment(bytes_, augment).align([bytes_.encode(text)], [len(text.encode())])
        assert aligned.ids == augment.encode_sequence(text), text


def test_words_are_read_from_the_next_word_on(vocabularies):
    anchor, augment = vocabularies["bytes"], vocabularies["llama3"]
    text = "It's 12 dogs"
    (aligned,) = alignment(anchor, augment).align([anchor.encode(text)], [None])
    by_order = {
        order: augment.decode([token for token, _ in group])
        for order, group in itertools.groupby(zip(*aligned, strict=True), lambda pair: pair[1])
    }
    assert by_order == {0: "", 2: "It", 4: "'s", 7: " 12"}
    (aligned,) = alignment(anchor, augment).align([anchor.encode(text)], [len(text)])
    assert aligned.order[-1] == 11 and augment.decode(aligned.ids) == text


def test_long_text_without_a_border_is_cut(vocabularies):
    anchor, augment = vocabularies["bytes"], vocabularies["llama3"]
    (aligned,) = alignment(anchor, augment).align([anchor.encode("x" * 100)], [None])
    assert augment.decode(aligned.ids) == "x" * (3 * LONGEST_PIECE)


def test_a_character_of_several_tokens_ends_with_its_last(vocabularies):
    anchor = augment = vocabularies["bytes"]
    anchor = vocabularies["gemma"]
    ids = anchor.encode("a🙂b")
    assert len(ids) == 6
    (aligned,) = alignment(anchor, augment).align([ids], [None])
    assert aligned.order == [0, 4, 4, 4, 4, 5]
    # A prompt that ends within a character leaves it to the answer.
    (aligned,) = alignment(anchor, augment).align([ids], [3])
    assert aligned.order == [0, 4, 4, 4, 4, 5]
    # Other text after half a character shows that it stays half.
    (aligned,) = alignment(anchor, augment).align([ids[:3] + ids[-1:]], [None])
    assert augment.decode(aligned.ids) == "a\N{REPLACEMENT CHARACTER}b"


def test_special_tokens_end_the_text_and_are_not_read(vocabularies):
    anchor, augment = vocabularies["qwen"], vocabularies["bytes"]
    ids = anchor.encode("<|im_start|>user\nHi<|im_end|>")
    (aligned,) = alignment(anchor, augment).align([ids], [None])
    assert augment.decode(aligned.ids) == "user\nHi"
    anchor, augment = augment, anchor
    (aligned,) = alignment(anchor, augment).align([anchor.encode("a<|im_end|>b")], [None])
    assert augment.token_id("<|im_end|>") in aligned.ids


def test_equal_tokenizers_read_the_same_tokens(vocabularies):
    ids = vocabularies["qwen"].encode(SAMPLES[0])
    (aligned,) = Alignment(vocabularies["qwen"], vocabularies["qwen"]).align([ids], [None])
    assert aligned.ids == ids and aligned.order == list(range(len(ids)))


def test_words_of_a_word_level_tokenizer_are_whole():
    anchor, augment = load_vocabulary("bytes"), load_vocabulary("key_value")
    text = "<math>ab+cd=12"
    (aligned,) = alignment(anchor, augment).align([anchor.encode(text)], [len(text)], check=True)
    assert aligned.ids == augment.encode_sequence(text)


def word_pieces():
    words = {"[UNK]": 0, "the": 1, "##m": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return TokenizerVocabulary(tokenizer.to_str(), None, 0)


def test_an_anchor_whose_tokens_have_no_text_of_their_own_is_refused(vocabularies):
    with pytest.raises(CalmError, match=r"its decoder is WordPiece\), so no other tokenizer can"):
        Alignment(word_pieces(), vocabularies["bytes"])
    values = json.loads(word_pieces()._text) | {"decoder": None}
    with pytest.raises(CalmError, match=r"its decoder is None\)"):
        Alignment(TokenizerVocabulary(json.dumps(values), None, 0), vocabularies["bytes"])


def test_text_that_a_tokenizer_cannot_spell_is_refused(vocabularies):
    bytes_, words = vocabularies["bytes"], load_vocabulary("key_value")
    with pytest.raises(CalmError, match=r"augment 1's tokenizer has no token for 'É' in 'aÉ'"):
        Alignment(bytes_, words, "augment 1").align([bytes_.encode("aÉ")], [3], check=True)
    with pytest.raises(CalmError, match=r"between 'a' and .* stands the anchor's token for"):
        Alignment(words, bytes_).align([words.encode("aÉ")], [None], check=True)
    alphabet = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    few = TokenizerVocabulary(alphabet.to_str(), None, 0)
    with pytest.raises(CalmError, match=r"has no token for 'c' in 'abc'"):
        Alignment(bytes_, few).align([bytes_.encode("abc")], [3], check=True)
