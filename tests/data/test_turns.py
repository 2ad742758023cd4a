"""Chats that two models read, each in its own template."""

import itertools
import json

import pytest
import tiny_tokenizers

from calm_jax.data.alignment import Alignment, Reader
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder

CHAT = [
    {"role": "user", "content": "Hello, how are you today?"},
    {"role": "assistant", "content": "I am fine, thanks."},
    {"role": "user", "content": "春眠不覺曉 <b> 12345 × 678\n\n[INST] user"},
]
SYSTEM = {"role": "system", "content": "Grüße aus Köln!"}
# Its marks begin with no special token: any user could write them.
UNMARKED = "mistral"
PAIRS = [
    (anchor, augment)
    for anchor, augment in itertools.permutations(tiny_tokenizers.FAMILIES, 2)
    if anchor != UNMARKED
]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    return {
        name: vocabulary_of_folder(make(root / name))
        for name, make in tiny_tokenizers.FAMILIES.items()
    }


def read(anchor, augment, messages, answer=""):
    """The augment's tokens for the anchor's tokens of a chat and the beginning of an answer."""
    prompt = anchor.encode_sequence(anchor.chat(messages))
    ids = prompt + anchor.encode(answer)
    (aligned,) = Alignment(anchor, augment).align([ids], [len(prompt)], check=True)
    return aligned, ids


def text(vocabulary, ids):
    """With special tokens."""
    return vocabulary._tokenizer.decode(ids, skip_special_tokens=False)


def own_text(vocabulary, messages):
    return text(vocabulary, vocabulary.encode_sequence(vocabulary.chat(messages)))


@pytest.mark.parametrize(("anchor", "augment"), PAIRS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_chat_is_read_in_the_augments_own_template(vocabularies, anchor, augment, count):
    anchor, augment = vocabularies[anchor], vocabularies[augment]
    aligned, _ = read(anchor, augment, CHAT[:count])
    assert text(augment, aligned.ids) == own_text(augment, CHAT[:count])


@pytest.mark.parametrize(("anchor", "augment"), [("llama3", "qwen"), ("qwen", "llama3")])
def test_a_system_message_is_one_for_both(vocabularies, anchor, augment):
    anchor, augment = vocabularies[anchor], vocabularies[augment]
    aligned, _ = read(anchor, augment, [SYSTEM, *CHAT])
    assert text(augment, aligned.ids) == own_text(augment, [SYSTEM, *CHAT])


def test_a_system_message_without_a_mark_is_text(vocabularies):
    anchor, augment = vocabularies["qwen"], vocabularies["gemma"]
    aligned, _ = read(anchor, augment, [SYSTEM, *CHAT])
    begin, rest = own_text(augment, CHAT).split("<start_of_turn>", 1)
    assert text(augment, aligned.ids) == f"{begin}{SYSTEM['content']}<start_of_turn>{rest}"


def test_the_answer_follows_the_header_in_both(vocabularies):
    anchor, augment = vocabularies["llama3"], vocabularies["gemma"]
    aligned, ids = read(anchor, augment, CHAT[:1], "I am fine, thanks.<|eot_id|>")
    answered = own_text(augment, CHAT[:2])
    assert text(augment, aligned.ids) == answered[: answered.rindex("<end_of_turn>")]
    prompt, _ = read(anchor, augment, CHAT[:1])
    assert prompt.ids == aligned.ids[: len(prompt.ids)]
    # The header can be read at the prompt's last token, "I" at the token after it.
    last = len(anchor.encode_sequence(anchor.chat(CHAT[:1]))) - 1
    assert prompt.order[-1] == last and aligned.order[len(prompt.ids)] == last + 2
    assert aligned.order[-1] == len(ids) - 1


@pytest.mark.parametrize(("anchor", "augment"), PAIRS)
def test_nothing_that_follows_changes_what_is_read(vocabularies, anchor, augment):
    anchor, augment = vocabularies[anchor], vocabularies[augment]
    alignment, messages = Alignment(anchor, augment), [SYSTEM, *CHAT]
    ids = anchor.encode_sequence(anchor.chat(messages if anchor is vocabularies["qwen"] else CHAT))
    (whole,) = alignment.align([ids], [None])
    for count in range(len(ids)):
        (part,) = alignment.align([ids[:count]], [None])
        seen = sum(order < count for order in whole.order)
        assert part.ids == whole.ids[:seen] and part.order == whole.order[:seen]


def test_a_reader_goes_on_from_within_a_mark(vocabularies):
    alignment = Alignment(vocabularies["qwen"], vocabularies["gemma"])
    ids = vocabularies["qwen"].encode_sequence(vocabularies["qwen"].chat([SYSTEM, *CHAT]))
    expected = Reader(alignment).read_all(ids, None)
    for count in range(len(ids)):
        first = Reader(alignment)
        pieces = first.read_all(ids[:count], None)
        second = first.copy()
        first.read_all(ids[:7], None)
        assert pieces + second.read_all(ids[count:], None) == expected


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format


@pytest.mark.parametrize(
    ("written", "read"),
    [
        # Not the system message that the template writes, and then a user; nor the whole of it.
        ("<|im_start|>user\nHi<|im_end|>", "user\nHi"),
        ("<|im_start|>system\nYou are a helpful dog", HEADER("system") + "You are a helpful dog"),
        ("<|im_start|>", ""),
        ("Hi", "Hi"),
        # What follows is a chat all the same.
        ("Hi<|im_end|>\n<|im_start|>user\nHi", f"Hi{HEADER('user')}Hi"),
        (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHi",
            f"user\nHi<|eot_id|>{HEADER('assistant')}Hi",
        ),
        # Results of a tool: another role.
        ("<|im_start|>tool\n7<|im_end|>\n<|im_start|>tool\n8", "tool\n7\ntool\n8"),
    ],
)
def test_what_no_template_writes_is_text(vocabularies, written, read):
    anchor, augment = vocabularies["qwen"], vocabularies["llama3"]
    ids = anchor.encode(written)
    (found,) = Alignment(anchor, augment).align([ids], [len(ids)])
    assert text(augment, found.ids) == f"<|begin_of_text|>{read}"


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "user"),
        ("system", "assistant", "assistant", "user"),
        ("user", "assistant", "system", "user"),
    ],
)
def test_no_two_messages_become_one(vocabularies, roles):
    messages = [{"role": role, "content": f"Hi {n}"} for n, role in enumerate(roles)]
    anchor, augment = vocabularies["qwen"], vocabularies["llama3"]
    aligned, _ = read(anchor, augment, messages)
    assert text(augment, aligned.ids) == own_text(augment, messages)


@pytest.mark.parametrize(
    "template",
    [
        # As DialoGPT's, and as DeepSeek's: nothing, or no more than a start token, before a
        # user's or a system message.
        "{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|start_header_id|>' + m.content }}{% else %}"
        "{{ '<|end_header_id|>' + m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|end_header_id|>' }}{% endif %}",
    ],
)
@pytest.mark.parametrize("start", [True, False])
def test_plain_text_is_no_chat(vocabularies, tmp_path, template, start):
    folder = tiny_tokenizers.llama3(tmp_path / "anchor")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    if not start:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    anchor, augment = vocabulary_of_folder(folder), vocabularies["qwen"]
    ids = anchor.encode_sequence("Hello, a plain document.")
    (found,) = Alignment(anchor, augment).align([ids], [len(ids)])
    assert text(augment, found.ids) == "Hello, a plain document."


def test_without_a_template_of_its_own_an_augment_reads_the_anchors_text(vocabularies):
    anchor, augment = vocabularies["qwen"], load_vocabulary("bytes")
    aligned, _ = read(anchor, augment, [SYSTEM, *CHAT[:1]])
    said = f"system\n{SYSTEM['content']}\nuser\n{CHAT[0]['content']}\nassistant\n"
    assert augment.decode(aligned.ids) == said


@pytest.mark.parametrize("whose", ["anchor", "augment"])
def test_a_template_that_writes_the_date_is_not_used(vocabularies, tmp_path, whose):
    folder = tiny_tokenizers.gemma(tmp_path / "dated")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b') }}" + template)
    dated, other = vocabulary_of_folder(folder), vocabularies["qwen"]
    pair = (dated, other) if whose == "anchor" else (other, dated)
    assert not Alignment(*pair).turns.begin.roles
    assert Alignment(vocabularies["gemma"], other).turns.begin.roles
