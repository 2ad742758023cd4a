"""Tokenizer files and chat templates against transformers, on text of many scripts."""

import csv
import gzip
import json
import os
import pathlib

import published_tokenizers
import pytest
import tiny_tokenizers

from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install calm_jax[parity]"
)

from tests.parity import make_tokenizer_golden  # noqa: E402 - imports transformers

SPECIALS = {
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"],
    "qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>"],
    "mistral": ["<s>", "</s>", "<unk>"],
}
# Each as the generic class, and as the class that rebuilds it in its own way from the same file.
CLASSES = {
    "llama3": ["PreTrainedTokenizerFast"],
    "qwen": ["PreTrainedTokenizerFast", "Qwen2Tokenizer"],
    "gemma": ["PreTrainedTokenizerFast", "GemmaTokenizer"],
    "mistral": ["PreTrainedTokenizerFast", "LlamaTokenizer"],
}
HARD = [
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\r\nline\n\n\nbreaks\r",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🤷🏽‍♀️ 🇩🇪",
    "zero\u200bwidth\u200djoiner\ufeff and \u00a0 spaces\u3000",
    "é é ñ ñ Å Å ﬁ ① ½ ℌ",  # composed, decomposed, compatibility
    "Z̷̢̛a̴l̶g̸o̵ क्षि நி",
    "▁ is a character of its own ▁▁",
    "ends in a space ",
    "don't, I'LL, we've; 1234567 3.14 x²",
    "\x00\x01\x7f control \ud7ff\U0010ffff",
    "مرحبا بالعالم שלום עולם",
    "<0x41> <not_special> [INST] ",
]


def real_text() -> list[str]:
    """A few lines each of some thirty languages."""
    folder = os.environ.get("CALM_TEST_DATA")
    if folder is None:
        return []
    lines = []
    for path in sorted(pathlib.Path(folder, "data/ntrex").glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines += [next(file).rstrip("\n") for _ in range(20)]
    for path in sorted(pathlib.Path(folder, "data/mgsm").glob("*.tsv")):
        with path.open(encoding="utf-8") as file:
            lines += [row[0] for row in list(csv.reader(file, delimiter="\t"))[:20]]
    return lines


@pytest.fixture(scope="module")
def text():
    found = real_text()
    return found if found else pytest.skip("CALM_TEST_DATA does not name a folder with real text")


@pytest.fixture(scope="module", params=[(f, c) for f in CLASSES for c in CLASSES[f]], ids=str)
def pair(request, tmp_path_factory):
    """(family, our vocabulary, that of transformers) of one folder."""
    family, name = request.param
    folder = tiny_tokenizers.FAMILIES[family](
        tmp_path_factory.mktemp(family), tiny_tokenizers.TEXT + real_text()[::7], 1500
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return family, vocabulary_of_folder(folder), theirs


def assert_equal(ours, theirs, texts):
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        # An end token ends what we decode: up to the first one both must say the same.
        until = next((n for n, token in enumerate(ids) if token in ours.eos_ids), len(ids))
        assert ours.decode(ids) == theirs.decode(
            ids[:until], skip_special_tokens=True, clean_up_tokenization_spaces=False
        ), repr(text)


def test_special_ids(pair):
    _, ours, theirs = pair
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.size == len(theirs)
    assert ours.tokens() == theirs.convert_ids_to_tokens(range(len(theirs)))


def test_hard_text(pair):
    family, ours, theirs = pair
    texts = list(HARD)
    for special in SPECIALS[family]:
        texts += [special, f"a{special}b", f" {special} x {special}{special}\n", f"{special} tail"]
    assert_equal(ours, theirs, texts)


def test_real_text(pair, text):
    _, ours, theirs = pair
    assert len(text) > 500
    assert_equal(ours, theirs, text)


CHATS = [
    [("user", "Hi there")],
    [("user", "  spaces around  "), ("assistant", "Good.\n\nBye"), ("user", "¿Qué? 你好 👋🏽")],
    [("user", "a <b> & 'c' \"d\""), ("assistant", "{{ x }} {% y %}")],
    [("system", "Be short."), ("user", "नमस्ते"), ("assistant", "नमस्ते!"), ("user", "1+1?")],
    [("user", "one"), ("user", "two")],
    [("assistant", "first")],
]


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats(pair, chat, add_generation_prompt):
    _, ours, theirs = pair
    messages = [{"role": role, "content": content} for role, content in chat]
    options = {"add_generation_prompt": add_generation_prompt}
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        with pytest.raises(ValueError, match=str(error)):
            ours.chat(messages, **options)
        return
    found = ours.chat(messages, **options)
    assert found == expected
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode(found) == ids


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"é": 1}}}]},
        {"style": "short", "bos_token": "<other>", "documents": [{"text": "x"}]},
    ],
)
def test_arguments_of_templates(tmp_path, arguments):
    folder = tiny_tokenizers.gemma(tmp_path / "g")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ style }}{{ tools | tojson }}{{ documents | tojson }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    ours = vocabulary_of_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, **arguments)
    assert ours.chat(messages, add_generation_prompt=False, **arguments) == expected


TEMPLATES = {
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "blocks": "  {% if true %}\n    x\n  {% endif %}\n{# c #}\n  y\n",
    "generation": "a\n{% generation %}\n {{ messages[0].content }}\n{% endgeneration %}\nb",
    "date": "{{ strftime_now('%d %b %Y') }}",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ nothing }}|{{ tools is none }}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}"
    "{% endfor %}{{ n.x }}",
    "forbidden": "{{ messages.append(1) }}",
    "escape": "{{ messages.__class__.__mro__ }}",
    "type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_may_do(tmp_path, name):
    folder = tiny_tokenizers.mistral(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    ours, theirs = vocabulary_of_folder(folder), None
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "<é> & 'x'", "name": None}, {"role": "b", "n": 1}]
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False)
    except Exception:
        with pytest.raises(ValueError, match="chat template of "):
            ours.chat(messages, add_generation_prompt=False)
        assert name in ("forbidden", "escape", "type")
    else:
        assert ours.chat(messages, add_generation_prompt=False) == expected


def test_tokens_that_only_the_config_adds(tmp_path):
    """Published folders whose tokenizer.json does not call all special tokens special."""
    folder = tiny_tokenizers.mistral(tmp_path / "m")
    path = folder / "tokenizer_config.json"
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "</s>"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    size = vocabulary_of_folder(folder).size
    token = {"content": "<tool>", "special": False, "normalized": False, "lstrip": True}
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {str(size): token}
    config |= json.loads((folder / "special_tokens_map.json").read_text())
    config["eos_token"] = "</s>"
    path.write_text(json.dumps(config))
    ours = vocabulary_of_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.size == len(theirs) == size + 1
    assert_equal(ours, theirs, ["a </s> b", "x  <tool> y", "<tool></s>"])


def test_exported_files_are_read_alike(pair, tmp_path):
    _, ours, theirs = pair
    ours.save(tmp_path / "vocabulary")
    load_vocabulary(tmp_path / "vocabulary").save_published(tmp_path / "exported")
    copy = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert copy.get_vocab() == theirs.get_vocab()
    messages = [{"role": "user", "content": "Grüße 👋"}]
    assert copy.apply_chat_template(messages) == theirs.apply_chat_template(messages)


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece(tmp_path, text, dummy_prefix):
    """A folder that has tokenizer.model alone, as Llama 2 and Gemma were first published."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=["<start_of_turn>"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.vocab").unlink()
    ours = vocabulary_of_folder(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path, add_prefix_space=dummy_prefix)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    texts = [*text, *HARD, "a<s>b", "<s> b", "x </s>", "a<start_of_turn>user\n"]
    # Before a text that starts with a space SentencePiece puts another one, transformers does not:
    # there the library that the model was trained with is right.
    if dummy_prefix:
        texts = [line for line in texts if not line.startswith((" ", "▁"))]
    assert_equal(ours, theirs, texts)


@pytest.mark.parametrize("name", published_tokenizers.FOLDERS)
def test_what_is_committed_is_what_transformers_does(name, tmp_path):
    published_tokenizers.FOLDERS[name](tmp_path)
    committed = json.loads(make_tokenizer_golden.TARGET.read_text())
    assert make_tokenizer_golden.reading(tmp_path) == committed[name]


def test_sequences_start_as_those_of_transformers(pair):
    _, ours, theirs = pair
    for text in [text for text in HARD if text]:
        assert ours.encode_sequence(text) == theirs(text)["input_ids"], repr(text)
        prompt, answer = theirs(text)["input_ids"], ours.encode(" and more")
        before, whole = (
            theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (prompt, prompt + answer)
        )
        assert ours.decode_after(prompt, answer) == whole[len(before) :]
