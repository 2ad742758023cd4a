"""Chat templates, turns as examples, and chats in `calm generate`.

What the templates of the four families must write is spelled out here, after their models' cards;
tests/parity/test_tokenizers.py compares them with transformers.
"""

import datetime
import json

import numpy as np
import published_tokenizers
import pytest
import tiny_models
import tiny_tokenizers

from calm_jax.cli import generate as command
from calm_jax.data import chat, open_dataset
from calm_jax.data.example_files import ExampleFiles
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding import Generator, Sampling, generate
from calm_jax.errors import CalmError

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# By family: the first prompt and answer, what the template writes between the answer and the second
# prompt, and the second answer.
TURNS = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Hello<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "So long<|eot_id|>",
    ),
    "qwen": (
        QWEN_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Hello<|im_end|>\n",
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        "So long<|im_end|>\n",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Hello<end_of_turn>\n",
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "So long<end_of_turn>\n",
    ),
    "mistral": (
        "<s>[INST] Hi [/INST]",
        " Hello</s>",
        "[INST] Bye [/INST]",
        " So long</s>",
    ),
}
EOS = {
    "llama3": ("<|eot_id|>", "<|end_of_text|>"),
    "qwen": ("<|im_end|>", "<|endoftext|>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "mistral": ("</s>",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {family: make(folder / family) for family, make in tiny_tokenizers.FAMILIES.items()}


@pytest.fixture(scope="module")
def vocabularies(folders):
    return {family: vocabulary_of_folder(folder) for family, folder in folders.items()}


@pytest.fixture(params=TURNS)
def family(request):
    return request.param


def with_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    return vocabulary_of_folder(folder)


def test_templates_write_the_published_chats(family, vocabularies):
    vocabulary, (prompt, answer, between, last) = vocabularies[family], TURNS[family]
    assert vocabulary.chat(CHAT[:1]) == prompt
    assert vocabulary.chat(CHAT[:3]) == prompt + answer + between
    assert vocabulary.chat(CHAT, add_generation_prompt=False) == prompt + answer + between + last


def test_end_tokens(family, vocabularies):
    vocabulary = vocabularies[family]
    assert vocabulary.eos_ids == tuple(map(vocabulary.token_id, EOS[family]))
    assert vocabulary.eos_id == vocabulary.eos_ids[0]


def test_a_sequence_starts_once(family, vocabularies):
    vocabulary = vocabularies[family]
    text = vocabulary.chat(CHAT[:1])
    ids = vocabulary.encode_sequence(text)
    start = [] if family == "qwen" else [vocabulary.bos_id]
    assert ids == vocabulary.encode(text)
    assert ids[:1] == start or family == "qwen"
    assert vocabulary.encode_sequence("Hi") == [*start, *vocabulary.encode("Hi")]


def test_turns_are_cut_from_the_text_of_the_whole_chat(family, vocabularies):
    prompt, answer, between, last = TURNS[family]
    turns = list(chat.turns(vocabularies[family], CHAT))
    assert turns == [(prompt, answer), (prompt + answer + between, last)]


def test_ids_of_a_turn_go_on_from_what_generation_starts_with(family, vocabularies):
    vocabulary = vocabularies[family]
    for prompt, answer in chat.turns(vocabulary, CHAT):
        (inputs,), (targets,) = chat.encode_examples(vocabulary, [prompt], [answer], [True])
        assert [*vocabulary.start_ids, *inputs] == vocabulary.encode_sequence(prompt)
        assert [*vocabulary.start_ids, *inputs, *targets] == vocabulary.encode_sequence(
            prompt + answer
        )
        # The end token that the template wrote, and no second one.
        assert sum(token in vocabulary.eos_ids for token in targets) == 1
        assert vocabulary.decode(targets).strip() == answer.partition("<")[0].strip()


def test_an_answer_that_the_template_does_not_close_is_closed(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), template)
    text = "look: <end_of_turn> is a token"
    answers = ["yes\n", f"{text}\n"]
    inputs, targets = chat.encode_examples(vocabulary, ["a: "] * 3, [*answers, "x"], [1, 1, 0])
    assert [row[-1] for row in targets] == [vocabulary.eos_id] * 3
    assert targets[1][:-1] == vocabulary.encode(answers[1])
    assert inputs[0] == vocabulary.encode("a: ")


def test_an_answer_is_tokenised_behind_its_prompt(tmp_path):
    """By itself it would begin with a space, as every text of this family does."""
    vocabulary = with_template(tiny_tokenizers.mistral(tmp_path / "m"), "x")
    alone = vocabulary.encode("Hello")
    (inputs,), (targets,) = chat.encode_examples(vocabulary, ["[/INST]"], ["Hello"], [True])
    assert [*inputs, *targets[:-1]] == vocabulary.encode("[/INST]Hello")
    assert targets[:-1] != alone
    _, (apart,) = chat.encode_examples(vocabulary, ["[/INST]"], ["Hello"], [False])
    assert apart[:-1] == alone


def test_a_token_over_the_border_is_not_trained(tmp_path):
    """A prompt that ends in a space: of the whole text " Hello" would be one token."""
    vocabulary = with_template(tiny_tokenizers.llama3(tmp_path / "l"), "x")
    assert vocabulary.encode("a: Hello")[:3] != vocabulary.encode("a: ")
    (inputs,), (targets,) = chat.encode_examples(vocabulary, ["a: "], ["Hello"], [True])
    assert inputs == vocabulary.encode("a: ")
    assert targets == [*vocabulary.encode("Hello"), vocabulary.eos_id]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a\n  {% if true %}\n x\n  {% endif %}\n{# c #}\nb\n", "a\n x\nb"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<é>"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a\n{% generation %}\nb\n{% endgeneration %}\nc", "a\nb\nc"),
        ("{{ bos_token }}{{ pad_token }}{{ sep_token }}{{ tools is none }}", "<bos><pad>True"),
        ("{{ messages[0].name is defined }}", "False"),
    ],
)
def test_templates_find_what_transformers_gives_them(tmp_path, template, text):
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), template)
    assert vocabulary.chat([{"role": "user", "content": "<é>", "name": None}]) == text


def test_templates_know_the_day(tmp_path):
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), "{{ strftime_now('%Y') }}")
    year = datetime.date.today().year
    assert vocabulary.chat(CHAT) in (str(year), str(year + 1))


def refused(template, messages, tmp_path):
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), template)
    with pytest.raises(CalmError) as caught:
        list(chat.turns(vocabulary, messages))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_templates_refuse_is_said_in_one_line(tmp_path, vocabularies):
    message = refused("{{ raise_exception('roles\n must alternate') }}", CHAT, tmp_path)
    assert message.endswith("g/chat_template.jinja: roles must alternate")
    assert "unsupported operand" in refused("{{ 1 + messages }}", CHAT, tmp_path)
    assert "does not write message 1 after its own prompt" in refused(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>"
        "{% endif %}",
        CHAT,
        tmp_path,
    )
    assert "begins with the assistant" in refused("x", CHAT[1:], tmp_path)
    with pytest.raises(CalmError, match="System role not supported"):
        vocabularies["gemma"].chat([{"role": "system", "content": "x"}])
    with pytest.raises(CalmError, match="the chat has no messages"):
        vocabularies["gemma"].chat([])
    with pytest.raises(CalmError, match=r"ByteVocabulary.* has no chat template"):
        ByteVocabulary().chat(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_stay_in_the_sandbox(tmp_path, template):
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), template)
    with pytest.raises(CalmError, match="chat template of"):
        vocabulary.chat(CHAT)


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [{"messages": CHAT}, {"inputs": "1+1=", "targets": "2"}, {"text": "Hello"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lines_of_chats_take_the_template(family, vocabularies, chats):
    prompt, answer, between, last = TURNS[family]
    assert list(ExampleFiles({"jsonl": chats}).examples(vocabularies[family])) == [
        {"inputs": prompt, "targets": answer, "is_turn": True},
        {"inputs": prompt + answer + between, "targets": last, "is_turn": True},
        {"inputs": "1+1=", "targets": "2", "is_turn": False},
        {"inputs": "", "targets": "Hello", "is_turn": False},
    ]
    plain = list(ExampleFiles({"jsonl": chats}).examples(ByteVocabulary()))
    assert plain[0] == {"inputs": "user: Hi\nassistant: ", "targets": "Hello"}


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
# What templates of models with tools do: print them as JSON, and the calls of the assistant.
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{{ style }}\n"
    "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls | tojson }}"
    "{{ m.weight }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def read(tmp_path, vocabulary, record):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return list(ExampleFiles({"jsonl": str(path)}).examples(vocabulary))


def test_tools_and_arguments_of_a_record_reach_the_template(tmp_path):
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), TOOL_TEMPLATE)
    calls = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    messages = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": [{"type": "text", "text": "42"}]},
        {"role": "assistant", "content": "It is 42.", "weight": 1},
    ]
    record = {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"style": "short"}}
    head = f"{json.dumps(TOOLS)}\nshort\nuser: Hi\nassistant: "
    called = f"{json.dumps(calls)}\n"
    assert read(tmp_path, vocabulary, record) == [
        {"inputs": head, "targets": called, "is_turn": True},
        {
            "inputs": f"{head}{called}tool: 42\nassistant: ",
            "targets": "It is 42.\n",
            "is_turn": True,
        },
    ]
    messages[1]["weight"] = 0
    assert len(read(tmp_path, vocabulary, record)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": "[]"}, '"tools" is not a list but str'),
        ({"chat_template_kwargs": [1]}, '"chat_template_kwargs" is not an object but list'),
        ({"chat_template_kwargs": {"messages": []}}, 'cannot set "messages"'),
    ],
)
def test_what_a_template_cannot_be_told_is_named(tmp_path, changes, message, vocabularies):
    with pytest.raises(CalmError, match=rf"a\.jsonl:1: .*{message}"):
        read(tmp_path, vocabularies["qwen"], {"messages": CHAT, **changes})


def test_rows_of_another_day_are_other_data(tmp_path, chats, data, monkeypatch):
    template = "{{ strftime_now('%d %b %Y') }}" + tiny_tokenizers.GEMMA_CHAT
    vocabulary = with_template(tiny_tokenizers.gemma(tmp_path / "g"), template)

    def opened(day, cache_dir):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls):
                return cls(2025, 1, day)

        monkeypatch.setattr(datetime, "datetime", Clock)
        config = data({"jsonl": str(chats)}, length=256, cache_dir=str(tmp_path / cache_dir))
        source = open_dataset(config, "train", vocabulary)
        return source.fingerprint, source.parts[0].arrays["targets"].tolist()

    first, second, again = opened(1, "a"), opened(2, "b"), opened(1, "c")
    assert first == again
    assert first[0] != second[0] and first[1] != second[1]
    # What is cached stays as it is, so that a run goes on with its own data.
    assert opened(2, "a") == first


def test_chats_reach_the_rows_of_training(family, vocabularies, chats, data):
    vocabulary = vocabularies[family]
    config = data({"jsonl": str(chats)}, length=256, pack=False)
    source = open_dataset(config, "train", vocabulary)
    arrays = source.parts[0].arrays
    rows = [
        (row[valid == 1].tolist(), prompt[valid == 1].tolist())
        for row, valid, prompt in zip(
            arrays["targets"], arrays["segment_ids"], arrays["prompt"], strict=True
        )
    ]
    prompt, answer, between, last = TURNS[family]
    for (ids, is_prompt), text, start in zip(
        rows,
        [prompt + answer, prompt + answer + between + last],
        [prompt, prompt + answer + between],
        strict=False,
    ):
        assert ids == vocabulary.encode_sequence(text)[1:]
        assert sum(is_prompt) == len(vocabulary.encode_sequence(start)) - 1
    plain = [*vocabulary.start_ids, *vocabulary.encode("1+1="), *vocabulary.encode("2")]
    assert rows[2][0] == [*plain, vocabulary.eos_id][1:]
    plain = [*vocabulary.start_ids, *vocabulary.encode("Hello")]
    assert rows[3][0] == [*plain, vocabulary.eos_id][1:]


def test_another_template_is_another_cache(tmp_path, chats, data):
    folder = tiny_tokenizers.gemma(tmp_path / "g")
    config = data({"jsonl": str(chats)}, length=256)
    first = open_dataset(config, "train", vocabulary_of_folder(folder))
    again = open_dataset(config, "train", vocabulary_of_folder(folder))
    changed = tiny_tokenizers.GEMMA_CHAT.replace("'model'", "'bot'").replace("model", "bot")
    other = open_dataset(config, "train", with_template(folder, changed))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    rows = [source.parts[0].arrays["targets"].tolist() for source in (first, other)]
    assert rows[0] != rows[1]


def test_a_chat_that_the_template_refuses_is_named_by_its_line(tmp_path, vocabularies):
    path = tmp_path / "a.jsonl"
    line = {"messages": [{"role": "user", "content": "a"}] * 2 + CHAT[1:2]}
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(CalmError, match=r"a\.jsonl:2: chat template of .*must alternate"):
        list(ExampleFiles({"jsonl": path}).examples(vocabularies["gemma"]))


def model_with(vocabulary):
    model = tiny_models.decoder(vocab_size=vocabulary.size)
    model.vocabulary = vocabulary
    return model


def test_generation_ends_at_any_of_the_end_tokens(vocabularies):
    vocabulary = vocabularies["llama3"]
    model = model_with(vocabulary)
    prompts, new = ["Hi", "Wer reitet so spät", "море"], 6
    endless = Generator(model, max_length=128, slots=3, eos_ids=())
    answers = endless.generate(prompts, Sampling(max_new_tokens=new))
    free = np.array([answer.tokens for (answer,) in answers])
    # Whatever the model says second becomes an end token beside the vocabulary's own.
    vocabulary = vocabulary_of_folder(vocabulary.published.folder)
    vocabulary.other_eos_ids = tuple({int(row[1]) for row in free})
    model.vocabulary = vocabulary
    found = generate(model, prompts, max_new_tokens=new)
    for row, whole in zip(found.tolist(), free.tolist(), strict=True):
        length = next(i for i, token in enumerate(whole) if token in vocabulary.eos_ids) + 1
        assert length <= 2
        assert row == whole[:length] + [vocabulary.eos_id] * (new - length)
        assert vocabulary.decode(row) == vocabulary.decode(whole[: length - 1])


def test_the_command_puts_prompts_into_the_template(vocabularies, monkeypatch, capsys):
    vocabulary = vocabularies["qwen"]
    model = model_with(vocabulary)
    monkeypatch.setattr("calm_jax.checkpoints.any_model.load_model", lambda path, **options: model)
    arguments = ["--workdir=m", "--chat", "--system=Be brief.", "--max_new_tokens=3"]
    assert command.main([*arguments, "--prompt=Hi", "--prompt=Grüße <|im_end|>"]) == 0
    texts = [
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for prompt in ("Hi", "Grüße <|im_end|>")
    ]
    ids = [vocabulary.encode(text) for text in texts]
    answers = generate(model, ids, max_new_tokens=3)
    printed = "".join(
        f"user: {prompt}\nassistant: {vocabulary.decode(answer)}\n"
        for prompt, answer in zip(("Hi", "Grüße <|im_end|>"), np.asarray(answers), strict=True)
    )
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "vocabulary", "message"),
    [
        (["--chat"], "bytes", "--chat: the vocabulary of m has no chat template"),
        (["--chat"], None, "--chat: the vocabulary of m has no chat template"),
        (["--system=x"], "bytes", "--system has no effect without a chat"),
    ],
)
def test_the_command_needs_a_template(arguments, vocabulary, message, monkeypatch):
    model = tiny_models.decoder(vocab_size=264)
    model.vocabulary = vocabulary and load_vocabulary(vocabulary)
    monkeypatch.setattr("calm_jax.checkpoints.any_model.load_model", lambda path, **options: model)
    with pytest.raises(CalmError, match=message):
        command.main(["--workdir=m", "--prompt=a", *arguments])


def test_turns_end_as_config_json_says(tmp_path):
    """Generation ends at both tokens, and a turn is trained to end with its own."""
    folder = tiny_tokenizers.gemma(tmp_path / "g")
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 6]}))
    vocabulary = vocabulary_of_folder(folder)
    assert vocabulary.eos_ids == (1, 6)
    prompt, answer, _, _ = TURNS["gemma"]
    _, (ids,) = chat.encode_examples(vocabulary, [prompt], [answer], [True])
    assert ids.count(6) == 1 and 1 not in ids


def test_the_command_writes_an_answer_behind_its_prompt(tmp_path, monkeypatch, capsys):
    """By itself "▁dog" would lose its space."""
    published_tokenizers.FOLDERS["tokenizer.model"](tmp_path)
    vocabulary = vocabulary_of_folder(tmp_path)
    dog = vocabulary.token_id("▁dog")
    assert vocabulary.decode([dog]) == "dog"
    model = tiny_models.decoder(vocab_size=vocabulary.size)
    model.vocabulary = vocabulary
    # The head is the embedding, so a token is followed by the one whose row is its own, but longer.
    embedding_VD = model.embedding.get_value()
    last = vocabulary.encode_sequence("the first")[-1]
    model.embedding.set_value(embedding_VD.at[dog].set(10 * embedding_VD[last]))
    monkeypatch.setattr("calm_jax.checkpoints.any_model.load_model", lambda *_, **__: model)
    flags = ["--workdir=m", "--prompt=the first", "--max_new_tokens=1"]
    assert command.main(flags) == 0
    assert capsys.readouterr().out == "the first dog\n"
