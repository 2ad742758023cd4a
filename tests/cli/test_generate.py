"""`calm generate`: sampling, files of answers that go on after a kill, and conversations."""

import fcntl
import io
import json

import pytest
import tiny_models
import tiny_tokenizers
from child_processes import ends, free_address, start

import calm_jax
from calm_jax.__main__ import main
from calm_jax.checkpoints.frozen import load, save_frozen
from calm_jax.cli.answer_file import AnswerFile
from calm_jax.data.vocabularies import vocabulary_of_folder
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding import Generator
from calm_jax.errors import CalmError

PROMPTS = ["one", "two", "three words", "", "five", "six"]
NEW = 4


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "frozen"
    vocabulary = ByteVocabulary()
    save_frozen(tiny_models.decoder(vocab_size=vocabulary.size), folder, vocabulary=vocabulary)
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty")
    vocabulary = vocabulary_of_folder(tiny_tokenizers.qwen(folder / "tokenizer"))
    decoder = tiny_models.decoder(vocab_size=vocabulary.size)
    save_frozen(decoder, folder / "frozen", vocabulary=vocabulary)
    return folder / "frozen"


@pytest.fixture
def ask(frozen, tmp_path, monkeypatch):
    """Answers a file of prompts, two rows at a time; returns the prompts that were asked."""
    asked = []
    as_completed = Generator.as_completed

    def watched(self, prompts, *others):
        asked.extend(bytes(token - 3 for token in prompt).decode() for prompt in prompts)
        return as_completed(self, prompts, *others)

    monkeypatch.setattr(Generator, "as_completed", watched)

    def run(prompts, *flags, status=0):
        asked.clear()
        file = tmp_path / "prompts.txt"
        file.write_text("".join(f"{prompt}\n" for prompt in prompts))
        arguments = [f"--workdir={frozen}", f"--prompts_file={file}", f"--max_new_tokens={NEW}"]
        output = f"--output={tmp_path / 'new' / 'answers.jsonl'}"
        assert main(["generate", *arguments, "--slots=2", output, *flags]) == status
        return list(asked)

    return run


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "answers.jsonl"


def told(model, prompts, **sampling):
    """What the model says to each, asked one by one, as texts."""
    vocabulary = model.vocabulary
    return [
        vocabulary.decode(calm_jax.generate(model, [prompt], max_new_tokens=NEW, **sampling)[0])
        for prompt in prompts
    ]


def test_answers_go_into_a_file(ask, frozen, output, capsys):
    prompts = [prompt for prompt in PROMPTS if prompt]
    assert sorted(ask(prompts)) == sorted(prompts)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == [
        {"index": index, "prompt": prompt, "answer": answer, "finish_reason": "length"}
        for index, (prompt, answer) in enumerate(
            zip(prompts, told(load(frozen), prompts), strict=True)
        )
    ]
    shown = capsys.readouterr()
    assert "5/5" in shown.err and "answer/s" in shown.err and "tokens/s" in shown.err
    assert ask(prompts) == []  # and the model is not loaded
    assert capsys.readouterr().out == f"{output} has all 5 answers\n"


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_killed_command_goes_on(ask, output, kept):
    prompts = ["one", "two", "drei Größen", "four", "five"]
    flags = ["--temperature=1.5", "--seed=3"]
    ask(prompts, *flags)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    half = lines[kept][: lines[kept].index(b"prompt") + 12]
    output.write_bytes(b"".join(lines[:kept]) + half)
    assert ask(prompts, *flags) == prompts[kept:]
    assert output.read_bytes() == whole


def test_what_is_done_stays_when_an_error_ends_the_command(ask, output, monkeypatch):
    """Also the answer to a later prompt, which is complete before that to an earlier one."""
    as_completed = Generator.as_completed

    def is_stopped(self, prompts, sampling):
        for number, answer in enumerate(as_completed(self, prompts, sampling)):
            if number == 2:
                raise KeyboardInterrupt
            yield answer

    prompts = ["the longest one", "b", "c"]
    with monkeypatch.context() as patch:
        patch.setattr(Generator, "as_completed", is_stopped)
        ask(prompts, status=130)
    lines = list(map(json.loads, output.read_text().splitlines()))
    assert [line["prompt"] for line in lines] == ["b", "c"]
    assert ask(prompts) == ["the longest one"]
    assert list(map(json.loads, output.read_text().splitlines()))[1:] == lines


def test_two_commands_do_not_fill_one_file(ask, output, capsys):
    ask(["a", "b"])
    output.write_bytes(output.read_bytes().splitlines(keepends=True)[0])
    with open(output) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ask(["a", "b"], status=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {output}: another command is filling it"
    )
    assert len(output.read_text().splitlines()) == 1
    asked = json.loads(output.with_name("answers.jsonl.flags.json").read_text())
    late = AnswerFile(output, ["a", "b"], 1, asked)
    assert ask(["a", "b"]) == ["b"]
    before = output.read_bytes()
    with pytest.raises(CalmError, match="another command has filled it meanwhile"):
        late.fill([])
    assert output.read_bytes() == before


def test_the_others_are_printed_where_one_fails(frozen, monkeypatch, capsys):
    as_completed = Generator.as_completed

    def failing(self, prompts, sampling):
        for index, (answer,) in as_completed(self, prompts, sampling):
            yield index, [answer._replace(error="step 3: no number") if index == 0 else answer]

    monkeypatch.setattr(Generator, "as_completed", failing)
    arguments = [f"--workdir={frozen}", "--prompt=a", "--prompt=b", "--max_new_tokens=2"]
    assert main(["generate", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("b") and len(shown.out.splitlines()) == 1
    assert shown.err.endswith("error: 1 answers failed; prompt 0, 'a': step 3: no number\n")


@pytest.mark.slow
def test_several_processes_share_the_work(ask, frozen, output, tmp_path):
    """Both have devices of one mesh; what one process has begun, two end."""
    ask([prompt for prompt in PROMPTS if prompt])
    expected = output.read_bytes()
    whole, rest = expected.splitlines(keepends=True)[:2], tmp_path / "rest.jsonl"
    rest.write_bytes(b"".join(whole))
    address = free_address()
    both = [
        start(
            *("-m", "calm_jax", "generate", f"--workdir={frozen}", f"--output={rest}"),
            *(f"--prompts_file={tmp_path / 'prompts.txt'}", f"--max_new_tokens={NEW}", "--slots=2"),
            *(f"--coordinator={address}", "--process_count=2", f"--process_index={index}"),
            *("--mesh.data=2",),
        )
        for index in range(2)
    ]
    statuses, outputs = ends(both)
    assert statuses == [0, 0], outputs
    assert rest.read_bytes() == expected
    assert "answer" in outputs[0] and "answer" not in outputs[1]


def test_files_of_other_prompts_are_refused(ask, output, capsys):
    ask(["a", "b", "c"])
    before = output.read_bytes()
    capsys.readouterr()
    for prompts, flags, message in (
        (["a", "x", "y"], [], "index 1 answers the prompt 'b', not 'x'; give another --output"),
        (["a", "b"], [], "index 2 is answered, but there are 2 prompts"),
        (["a", "b", "c", "d"], ["--n=2"], "index 0 has 1 answers, but --n is 2"),
    ):
        ask(prompts, *flags, status=2)
        assert capsys.readouterr().err == f"error: {output}: {message}\n"
        assert output.read_bytes() == before
    for flags, message in (
        (["--temperature=0.5"], "no --temperature, now there is --temperature=0.5"),
        (["--stop=x", "--stop=y"], "no --stop, now there is --stop=['x', 'y']"),
    ):
        ask(["a", "b", "c"], *flags, status=2)
        assert capsys.readouterr().err == (
            f"error: {output} was begun with {message}; give another --output\n"
        )
    output.write_text('{"index": "1", "prompt": "a"}\n')
    ask(["a"], status=2)
    assert f"{output}:1: not an answer with an index and a prompt" in capsys.readouterr().err
    output.write_bytes(2 * before.splitlines(keepends=True)[0])
    ask(["a", "b", "c"], status=2)
    assert "index 0 is answered twice; give another --output" in capsys.readouterr().err
    output.write_text("someone's text, without a newline")
    ask(["a"], status=2)
    assert "its last line is not an answer; give another --output" in capsys.readouterr().err
    assert output.read_text() == "someone's text, without a newline"
    output.write_text('{"index": 0, "prompt": "a", "answers": 1}\n')
    ask(["a"], status=2)
    assert "index 0 has no list of answers; give another --output" in capsys.readouterr().err
    output.write_text("text\n")
    ask(["a"], status=2)
    assert f"{output}:1: not JSON" in capsys.readouterr().err


def test_the_refused_prompt_is_named_before_any_is_answered(ask, output, capsys):
    assert ask(PROMPTS, status=2) == []
    assert "prompt 3, '': an empty prompt has no next token" in capsys.readouterr().err
    assert ask(["one", "two", "three words"], "--max_length=14", status=2) == []
    assert "prompt 2, 'three words': the prompt has 11 tokens" in capsys.readouterr().err
    assert not output.exists()


def test_several_answers_are_sampled(ask, frozen, output, capsys):
    flags = ["--n=3", "--temperature=2", "--top_k=40", "--top_p=0.99", "--min_p=0.001", "--seed=5",
             "--repetition_penalty=1.2"]  # fmt: skip
    ask(["one", "two"], *flags)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    sampling = calm_jax.Sampling(
        NEW, 2.0, top_k=40, top_p=0.99, min_p=0.001, repetition_penalty=1.2, n=3, seed=5
    )
    ids = [load(frozen).vocabulary.encode(text) for text in ("one", "two")]
    expected = Generator(load(frozen), slots=1).generate(ids, sampling)
    for line, answers in zip(lines, expected, strict=True):
        assert line["answers"] == [answer.text for answer in answers]
        assert line["finish_reasons"] == [answer.finish_reason for answer in answers]
        assert len(set(line["answers"])) > 1
    arguments = [f"--workdir={frozen}", "--prompt=one", f"--max_new_tokens={NEW}", *flags]
    assert main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == "".join(f"one{text}\n" for text in lines[0]["answers"])


def test_an_answer_ends_before_a_text(frozen, capsys):
    (answer,) = told(load(frozen), ["two"])
    arguments = [f"--workdir={frozen}", "--prompt=two", f"--max_new_tokens={NEW}"]
    assert main(["generate", *arguments, "--stop=never", f"--stop={answer[-1]}"]) == 0
    assert capsys.readouterr().out == "two" + answer[: answer.index(answer[-1])] + "\n"


def test_sizes_reach_the_generator(frozen, monkeypatch):
    sizes = []

    def watched(self, model, **given):
        sizes.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "__init__", watched)
    arguments = ["generate", f"--workdir={frozen}", "--max_new_tokens=7"]
    prompts = ["--prompt=four", "--prompt=a", "--n=5"]
    assert main([*arguments, *prompts]) == 130
    flags = ["--slots=3", "--max_length=20", "--cache_dtype=int8", "--prefill_chunk=16"]
    assert main([*arguments, *prompts, *flags]) == 130
    assert main([*arguments, "--max_length=20"]) == 130
    assert sizes == [
        {"max_length": 11, "slots": 10},
        {"slots": 3, "max_length": 20, "cache_dtype": "int8", "prefill_chunk": 16},
        {"max_length": 20, "slots": 1},
    ]


def test_an_int8_cache_answers(frozen, capsys):
    arguments = [f"--workdir={frozen}", "--prompt=one", "--max_new_tokens=1"]
    assert main(["generate", *arguments, "--cache_dtype=int8", "--prefill_chunk=2"]) == 0
    assert capsys.readouterr().out.startswith("one")


def talk(monkeypatch, folder, lines, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["generate", f"--workdir={folder}", f"--max_new_tokens={NEW}", *flags])


def test_without_a_template_each_line_is_gone_on_from(frozen, monkeypatch, capsys):
    lines = f"one\n\n{'x' * 20}\ntwo\n/exit\nthree\n"
    assert talk(monkeypatch, frozen, lines, "--max_length=16") == 0
    shown = capsys.readouterr()
    assert shown.out == "".join(f"{text}\n" for text in told(load(frozen), ["one", "two"]))
    assert shown.err.startswith("error: the prompt has 20 tokens and max_new_tokens is 4")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_remembers_its_messages(chatty, system, monkeypatch, capsys):
    flags = [] if system is None else [f"--system={system}"]
    assert talk(monkeypatch, chatty, "Hi\nWer reitet so spät?", *flags) == 0
    shown = capsys.readouterr().out
    model = load(chatty)
    messages, expected = [] if system is None else [{"role": "system", "content": system}], ""
    for line in ("Hi", "Wer reitet so spät?"):
        messages.append({"role": "user", "content": line})
        (answer,) = told(model, [model.vocabulary.chat(messages)])
        messages.append({"role": "assistant", "content": answer.lstrip(" ")})
        expected += answer.lstrip(" ") + "\n"
    assert shown == expected
    assert talk(monkeypatch, chatty, "Hi\n", "--nochat") == 0
    assert capsys.readouterr().out == told(model, ["Hi"])[0] + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slots=2"], "--slots=2 is for prompts: give --prompt or --prompts_file"),
        (["--n=2"], "--n=2 is for prompts"),
        (["--output=a.jsonl"], "--output=a.jsonl is for prompts"),
        (["--system=a"], "has no chat template"),
        (["--nochat", "--system=a"], "--system has no effect without a chat"),
        (["--prompt=a", "--top_k=3"], "top_k is 3, but temperature is 0"),
        (["--prompt=a", "--cache_dtype=int4"], "cache_dtype"),
        (["--prompt=a", "--output=gs://b/a.jsonl"], "answers are written to disk, not to a bucket"),
    ],
)
def test_flags_that_do_not_fit(frozen, flags, message, monkeypatch, capsys):
    assert talk(monkeypatch, frozen, "one\n", *flags) == 2
    assert message in capsys.readouterr().err
