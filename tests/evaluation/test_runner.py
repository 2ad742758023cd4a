"""Scoring runs of small random models: what is written is what the model says."""

import functools
import json
import shutil
import sys
import types

import jax
import numpy as np
import published_tokenizers
import pytest
import sentencepiece
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from calm_jax import data
from calm_jax.checkpoints.composed import identities
from calm_jax.checkpoints.frozen import load, save_frozen
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.cli import evaluate as command
from calm_jax.data import entries, key_value
from calm_jax.data.tokenizer_vocabulary import TokenizerVocabulary
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.decoding import Completion, Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.evaluation import answering, attention, metric_table, own_prompts, runner, variants
from calm_jax.evaluation.answering import Options
from calm_jax.evaluation.results import predictions_file, read_run
from calm_jax.evaluation.tasks.prompts import TEMPLATES
from calm_jax.evaluation.tasks.task import Task
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.parameters import module_tree

MATH, SUBS = "calm_jax/key_value/tiny/math", "calm_jax/key_value/tiny/subs"
ANSWER = 6  # tokens
VOCABULARY = load_vocabulary("key_value/tiny")
(VOCABULARY.eos_id,) = VOCABULARY.encode("e")  # a token that random models do write: answers end
# Of unlike lengths, so that batches mix rows of one length and another. The longest is the first,
# and there are two lengths of prefills: however many are asked, the same programs answer.
PROMPTS = ["abc-de+fgh-abcdefgh-abcd+ef=", "ab+c=", "aa=", "b-cd=", "cc+dd=", "z-y="]
LONGEST = len(VOCABULARY.encode_sequence("<math>" + PROMPTS[0])) + ANSWER
BATCH = 2  # prompts at once, in every test that is not about it


def frozen_decoder(folder, width: int, seed: int) -> Decoder:
    # With a head of its own: a random model with a tied one repeats its last token.
    config = DecoderConfig.llama(
        vocab_size=VOCABULARY.size + -VOCABULARY.size % 8, embed_dim=width,
        num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32,
    )  # fmt: skip
    decoder = Decoder(config, nnx.Rngs(seed))
    block = decoder.layers
    for branch in (block.attention.output, block.mlp.down):
        # Random branches are small, and what a token says would hardly depend on those before.
        branch.set_value(3 * branch.get_value())
    save_frozen(decoder, folder, vocabulary=VOCABULARY)
    return load(folder)


def write_config(folder, kind: str, **others) -> None:
    folder.mkdir(exist_ok=True)
    evaluation = {"tasks": [MATH, SUBS], "limit": 0, "max_new_tokens": ANSWER}
    mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "kind": kind,
                "evaluate": evaluation,
                "mesh": mesh,
                "data": {"cache_dir": str(folder / "cache")},
                **others,
            }
        )
    )


def save_steps(folder, steps, tree, state) -> None:
    with TrainingCheckpoints(folder / "checkpoints") as checkpoints:
        for step in steps:
            checkpoints.save(
                step, {"bridge": tree}, {"count": np.zeros(1)}, state, {"loss": 1 / step}
            )


@pytest.fixture(scope="module")
def decoder_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchor")
    write_config(folder, "decoder")
    decoder = frozen_decoder(folder / "frozen", 16, 0)
    save_steps(folder, [3, 7], module_tree(decoder), {"frozen": []})
    return folder, decoder


@pytest.fixture(scope="module")
def composed_run(tmp_path_factory, decoder_run):
    folder = tmp_path_factory.mktemp("composed")
    places = {"anchor": str(decoder_run[0] / "frozen"), "augments": [str(folder / "augment")]}
    write_config(folder, "composed", **places)
    anchor = load(decoder_run[0] / "frozen")
    augment = frozen_decoder(folder / "augment", 8, 1)
    config = CompositionConfig(connections=((0, 0), (1, 1)), init="paper")
    composed = compose(anchor, augment, config, rngs=nnx.Rngs(2))
    save_composed(folder, composed)
    return folder, composed


def save_composed(folder, composed):
    state = {"frozen": identities(composed), "composition": [composed.configs[0].to_dict()]}
    save_steps(folder, [5], module_tree(composed.bridge), state)


@functools.cache  # a model loaded anew would be compiled anew
def said_by(model) -> tuple[str, ...]:
    """What the model answers to each prompt, asked one by one."""
    generator = Generator(model, max_length=LONGEST, slots=1)
    sampling = Sampling(max_new_tokens=ANSWER)
    answers = [generator.generate(["<math>" + text], sampling) for text in PROMPTS]
    return tuple(VOCABULARY.decode(answer.tokens) for ((answer,),) in answers)


def examples_for(model) -> list[dict]:
    """Examples of which `model` is right on every second one."""
    examples = []
    for row, (prompt, said) in enumerate(zip(PROMPTS, said_by(model), strict=True)):
        fits = len(VOCABULARY.encode(said)) < ANSWER
        target = said if row % 2 and fits else "1+1"
        examples.append(
            {"inputs": "<math>" + prompt, "targets": target, "set": "math", "operands": row}
        )
    return examples


@pytest.fixture
def ask(monkeypatch):
    """Makes the tasks' examples: `ask(model)` gives `examples_for` it."""

    def set_examples(model) -> list[dict]:
        examples = examples_for(model)
        monkeypatch.setattr(
            data, "evaluation_examples",
            lambda task, split, vocabulary, limit, _: [dict(e) for e in examples[: limit or None]],
        )  # fmt: skip
        return examples

    return set_examples


def lines(folder, task: str) -> list[dict]:
    path = folder / "evaluation" / f"{task.replace('/', '_')}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [BATCH, 16])
def test_every_prediction_is_the_models_own(decoder_run, ask, batch_size):
    folder, decoder = decoder_run
    (folder / "evaluation" / "summary.json").unlink(missing_ok=True)
    examples = ask(decoder)
    assert len(set(said_by(decoder))) >= 4  # so that rows confused would be seen
    summary = runner.evaluate(folder, batch_size=batch_size)
    for task in (MATH, SUBS):
        written = lines(folder, task)
        assert [line["inputs"] for line in written] == [e["inputs"] for e in examples]
        assert tuple(line["prediction"] for line in written) == said_by(decoder)
        for line, example in zip(written, examples, strict=True):
            assert line["correct"] == (line["prediction"] == example["targets"])
            assert line["operands"] == example["operands"]
        right = sum(line["correct"] for line in written)
        assert 0 < right < len(PROMPTS)
        assert summary[task]["exact_match"] == pytest.approx(100 * right / len(PROMPTS))
        assert summary[task]["count"] == len(PROMPTS)
    assert read_run(folder).scores == {task: summary[task] for task in (MATH, SUBS)}


def test_composed_run_is_scored_with_its_bridge(composed_run, ask):
    folder, composed = composed_run
    ask(composed)
    summary = runner.evaluate(folder, batch_size=BATCH)
    assert summary["_run"]["step"] == 5
    assert tuple(line["prediction"] for line in lines(folder, MATH)) == said_by(composed)
    assert said_by(composed) != said_by(composed.anchor)


def test_registered_task_is_asked_whole(decoder_run):
    folder, _ = decoder_run
    summary = runner.evaluate(folder, tasks=[MATH], max_new_tokens=8)
    written = lines(folder, MATH)
    assert len(written) == summary[MATH]["count"] == key_value.config("tiny").evaluation_examples
    assert {(line["set"], line["unseen"]) for line in written} == {("math", True)}
    assert {line["operands"] for line in written} == {2, 3}
    for line in written:
        assert line["correct"] == (line["prediction"] == line["targets"])


def test_attention_of_one_expression(composed_run, ask):
    folder, composed = composed_run
    ask(composed)
    runner.evaluate(folder, batch_size=BATCH)
    kept = json.loads((folder / "evaluation" / "attention.json").read_text())
    ids = VOCABULARY.encode_sequence(kept["inputs"])
    assert kept["tokens"] == [VOCABULARY.tokens()[token] for token in ids]  # each is its own text
    assert [(c["from"], c["to"]) for c in kept["connections"]] == [(0, 0), (1, 1)]
    maps = composed.attention_maps(np.array([ids], np.int32))
    for found, expected in zip(kept["connections"], maps, strict=True):
        weights = np.array(found["weights"])
        np.testing.assert_allclose(weights, np.asarray(expected["weights"])[0].mean(0), atol=1e-4)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-2)
        assert not np.triu(weights, 1).any()


def test_tokens_of_an_attention_map_are_text(tmp_path):
    """In the byte alphabet of GPT-2 "Ġ" is a space and "Ã©" the two bytes of "é"."""
    alphabet = ["Ġ", "t", "h", "e", "Ã", "©", "Ġt", "he", "Ġthe"]
    model = BPE({name: i for i, name in enumerate(alphabet)},
                [("Ġ", "t"), ("h", "e"), ("Ġt", "he")])  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(False), ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path / "tokenizer.json")
    ids = [vocabulary.token_id("<s>"), *vocabulary.encode("the the</s> theé")]
    texts = ["<s>", "t", "he", " the", "</s>", " the", "\ufffd", "é"]
    assert attention.token_texts(vocabulary, ids) == texts


def test_parts_are_scored_on_what_the_pair_is_scored_on(composed_run, ask, capsys):
    folder, composed = composed_run
    examples = ask(composed.anchor)
    flags = [f"--workdir={folder}", f"--tasks={MATH}", f"--batch_size={BATCH}"]
    assert command.main([*flags, "--parts"]) == 0
    printed = capsys.readouterr().out.splitlines()
    parts = {"": composed, "anchor": composed.anchor, "augment 0": composed.augments[0]}
    scores = {}
    for name, model in parts.items():
        right = [said == e["targets"] for said, e in zip(said_by(model), examples, strict=True)]
        where = f"{MATH}, {name} alone: " if name else f"{MATH}: "
        (line,) = [line for line in printed if line.startswith(where)]
        assert line.startswith(f"{where}{100 * sum(right) / len(right):.1f}% of 6 (")
        scores[name] = 100 * sum(right) / len(right)
    assert scores["anchor"] > 0
    run = read_run(folder)
    labels = [f"{folder.name}: {part} alone" for part in ("anchor", "augment")]
    assert [part.name for part in run.parts] == labels
    for part, name in zip(run.parts, ("anchor", "augment 0"), strict=True):
        assert part.scores[MATH]["exact_match"] == pytest.approx(scores[name])
        assert tuple(e["prediction"] for e in part.predictions[MATH]) == said_by(parts[name])
    # Scored without its parts it stays as it is; with other settings they go.
    evaluate = functools.partial(runner.evaluate, folder, tasks=[MATH], batch_size=BATCH)
    assert evaluate()["_parts"].keys() == {"anchor", "augment 0"}
    assert "_parts" not in evaluate(limit=2)
    assert not read_run(folder).parts


def test_parts_of_a_pair_whose_augment_is_destroyed_are_whole(composed_run, ask):
    folder, composed = composed_run
    ask(composed.anchor)
    variant = variants.Variant(control="permuted")
    runner.evaluate(folder, tasks=[MATH], batch_size=BATCH, parts=True, variant=variant)
    where = folder / "evaluation" / "permuted"
    for name, model in (("anchor", composed.anchor), ("augment_0", composed.augments[0])):
        found = predictions_file(where / name, MATH).read_text().splitlines()
        assert tuple(json.loads(line)["prediction"] for line in found) == said_by(model)


def test_a_run_that_is_trained_anew_is_scored_anew(composed_run, ask, monkeypatch, tmp_path):
    """Its best step may be the same again."""
    folder, composed = composed_run
    ask(composed.anchor)
    evaluate = functools.partial(runner.evaluate, folder, limit=1, batch_size=BATCH)
    before = evaluate()
    monkeypatch.setattr(variants, "Generator", None)  # fails if called
    assert evaluate() == before
    shutil.copytree(folder, tmp_path / "copy")
    assert runner.evaluate(tmp_path / "copy", limit=1, batch_size=BATCH) == before
    shutil.rmtree(folder / "checkpoints")
    save_composed(folder, composed)
    with pytest.raises(TypeError, match="NoneType"):
        evaluate()


def test_the_harness_has_the_mesh_and_the_limit(decoder_run, monkeypatch):
    found = {}
    harness = types.SimpleNamespace(evaluate_harness=lambda *_, **given: found.update(given) or "")
    monkeypatch.setitem(sys.modules, "calm_jax.evaluation.harness", harness)
    flags = [f"--workdir={decoder_run[0]}", "--harness=mine", "--mesh.fsdp=4", "--limit=3"]
    assert command.main(flags) == 0
    assert found["mesh"] == {"data": -1, "fsdp": 4, "tensor": 1} and found["limit"] == 3


def test_frozen_folder_is_scored(decoder_run, ask, tmp_path, capsys):
    folder, decoder = decoder_run
    examples = ask(decoder)
    frozen = folder / "frozen"
    flags = [f"--model={frozen}", f"--tasks={MATH}", f"--max_new_tokens={ANSWER}"]
    flags += [f"--batch_size={BATCH}"]
    assert command.main([*flags, "--limit=4", f"--output={tmp_path / 'scores'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    right = sum(x == e["targets"] for x, e in zip(said_by(decoder)[:4], examples, strict=False))
    assert printed[0].startswith(f"{MATH}: {100 * right / 4:.1f}% of 4 (")
    written = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert written["_run"]["command"].startswith("calm evaluate --model=")
    assert not (frozen / "evaluation").exists()
    assert command.main(flags) == 0  # into the folder, which stays a frozen folder
    assert len(lines(frozen, MATH)) == len(PROMPTS)
    load(frozen)
    (frozen / "evaluation" / "summary.json").unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --workdir, a run, or --model"),
        (["--workdir=RUN", "--model=RUN"], "give either --workdir, a run, or --model"),
        (["--workdir=RUN/frozen"], "is not a run but a frozen folder; give it as --model"),
        (["--model=RUN"], "is not a frozen folder or an exported bridge but a decoder's run"),
        (["--model=RUN/frozen"], "there is nothing to score; name a task or a file by --tasks"),
        (["--model=RUN/frozen", f"--tasks={MATH}", "--step=3"], "which has no checkpoints"),
        (["--model=RUN/frozen", f"--tasks={MATH}", "--parts"], "has no parts to score"),
        (["--workdir=RUN", "--limit=-1"], "limit"),
        (["--model=RUN/frozen", "--tasks=a.jsonl", "--columns=a"], "is not FIELD:COLUMN"),
        (
            ["--model=RUN/frozen", f"--tasks={MATH}", "--columns=inputs:a"],
            "--columns names columns of files, and .* is no file",
        ),
        (["--workdir=RUN", "--mix_weight=0.5"], "--mix_weight needs --mix"),
        (["--workdir=RUN", "--hand_over_prompt={answer}"], "--hand_over_prompt needs --hand_over"),
    ],
)
def test_flags_that_do_not_fit(decoder_run, flags, message):
    with pytest.raises(CalmError, match=message):
        command.main([flag.replace("RUN", str(decoder_run[0])) for flag in flags])


def test_done_once_for_the_same_settings(decoder_run, ask, monkeypatch):
    folder, decoder = decoder_run
    ask(decoder)
    evaluate = functools.partial(runner.evaluate, folder, batch_size=BATCH)
    first = evaluate(limit=2)
    assert first[MATH]["count"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(variants, "Generator", None)  # would fail if called
        assert evaluate(limit=2) == first
        patch.setattr(entries.built_in, "task_fingerprint", lambda name: "of other examples")
        with pytest.raises(TypeError, match="NoneType"):
            evaluate(limit=2)
    assert evaluate(limit=3)[MATH]["count"] == 3
    assert SUBS not in evaluate(limit=3, tasks=[MATH])


@pytest.mark.slow
def test_same_predictions_on_a_mesh(composed_run, ask):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    folder, composed = composed_run
    ask(composed)
    runner.evaluate(folder, batch_size=6)
    one = lines(folder, MATH)
    (folder / "evaluation" / "summary.json").unlink()
    runner.evaluate(folder, mesh={"data": 2, "fsdp": 2, "tensor": 2}, batch_size=4)
    assert lines(folder, MATH) == one


def test_a_file_of_json_lines_is_asked(decoder_run, tmp_path, capsys, caplog):
    folder, decoder = decoder_run
    examples = examples_for(decoder)
    file = tmp_path / "held out.jsonl"

    def write(*records):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    write(*({key: example[key] for key in ("inputs", "targets")} for example in examples))
    flags = [f"--workdir={folder}", f"--batch_size={BATCH}"]
    assert command.main([*flags, f"--config.evaluate.tasks=('{file}',)"]) == 0
    right = sum(said == e["targets"] for said, e in zip(said_by(decoder), examples, strict=True))
    assert 0 < right < len(examples)
    assert f" of {len(examples)} " in capsys.readouterr().out
    run = read_run(folder)
    assert run.scores[str(file)]["exact_match"] == pytest.approx(100 * right / len(examples))
    assert [e["prediction"] for e in run.predictions[str(file)]] == list(said_by(decoder))
    write({"text": "a whole text"})
    with pytest.raises(CalmError, match=r"held out.jsonl: none of 1 examples has a prompt"):
        runner.evaluate(folder, tasks=[str(file)], limit=1)
    answered = [{key: example[key] for key in ("inputs", "targets")} for example in examples[:3]]
    write(answered[0], {"text": "a whole text"}, *answered[1:])
    found = runner.evaluate(folder, tasks=[str(file)], batch_size=BATCH)
    assert found[str(file)]["count"] == 3
    assert "held out.jsonl: 1 of 4 have no prompt to answer" in caplog.text
    write(*({"question": e["inputs"], "label": e["targets"], "text": "other"} for e in answered))
    flags = [f"--model={folder / 'frozen'}", f"--tasks={file}", f"--output={tmp_path}"]
    flags += [f"--batch_size={BATCH}"]
    assert command.main([*flags, "--columns=inputs:question,targets:label"]) == 0
    asked = predictions_file(tmp_path, str(file)).read_text().splitlines()
    assert [json.loads(line)["inputs"] for line in asked] == [e["inputs"] for e in answered]
    with pytest.raises(CalmError, match='lacks "answer", which "columns" names'):
        command.main([*flags, "--columns=inputs:question,targets:answer"])

    config = json.loads((folder / "config.json").read_text())
    config["data"]["validation"] = [{"jsonl": str(file)}, {"task": "another"}]
    assert own_prompts.validation_files(config) == [str(file)]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("../validation.jsonl", "validation.jsonl"),
        ("./data/../../held.out.jsonl", "data_.._.._held.out.jsonl"),
        ("/data/test.jsonl", "data_test.jsonl"),
        ("gs://bucket/test.jsonl", "gs:__bucket_test.jsonl"),
        ("calm/kv/math", "calm_kv_math.jsonl"),
    ],
)
def test_files_of_predictions_are_not_hidden(task, name):
    assert predictions_file("evaluation", task).name == name


def test_predictions_are_not_mixed(decoder_run):
    folder, _ = decoder_run
    with pytest.raises(CalmError, match=r"of \.\./a\.jsonl and a\.jsonl would be one file"):
        runner.evaluate(folder, tasks=["../a.jsonl", "a.jsonl"])


def test_command(decoder_run, ask, capsys):
    folder, decoder = decoder_run
    ask(decoder)
    arguments = [f"--workdir={folder}", "--config.evaluate.limit=4", f"--batch_size={BATCH}"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{MATH}: " in printed and " of 4 " in printed
    assert str(predictions_file(folder / "evaluation", MATH)) in printed.splitlines()
    assert read_run(folder).scored["limit"] == 4
    assert command.main([*arguments, f"--config.evaluate.tasks=('{MATH}',)"]) == 0
    assert read_run(folder).scored["tasks"] == [MATH]


def test_nothing_is_left_behind_by_an_error(decoder_run, ask, monkeypatch):
    folder, decoder = decoder_run
    ask(decoder)
    before = runner.evaluate(folder, batch_size=BATCH)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Generator, "as_completed", fail)
    with pytest.raises(RuntimeError):
        runner.evaluate(folder, limit=1)
    assert read_run(folder).scores[MATH] == before[MATH]
    assert len(lines(folder, MATH)) == len(PROMPTS)


def test_bad_input(decoder_run, composed_run, ask, tmp_path):
    folder, decoder = decoder_run
    ask(decoder)
    with pytest.raises(CalmError, match=r"is not a run, .*: config.json is missing"):
        runner.evaluate(tmp_path)
    with pytest.raises(CalmError, match=r"--step=3: .* step 7"):
        runner.evaluate(folder, step=3)
    with pytest.raises(CalmError, match=r"no checkpoint of step 4; it has \[5\]"):
        runner.evaluate(composed_run[0], step=4)
    with pytest.raises(CalmError, match=r"--max_new_tokens is 2, but an answer of .* has 4"):
        runner.evaluate(folder, max_new_tokens=2, limit=1)
    with pytest.raises(CalmError, match=r"there is nothing to score; name .* by --tasks"):
        runner.evaluate(folder, tasks=())
    write_config(tmp_path, "decoder")
    with pytest.raises(CalmError, match="has no checkpoint yet"):
        runner.evaluate(tmp_path)


@pytest.mark.parametrize("kind", ["text", "choices"])
def test_a_model_without_a_vocabulary(decoder_run, tmp_path, kind):
    save_frozen(Decoder(decoder_run[1].config, nnx.Rngs(0)), tmp_path / "model")
    lines = {
        "text": "some text",
        "choices": '{"inputs": "a?", "choices": ["b", "c"], "answer": 0}',
    }
    (tmp_path / "file").write_text(lines[kind])
    with pytest.raises(CalmError, match="the model has no vocabulary to write prompts in"):
        runner.evaluate(tmp_path / "model", tasks=[f"{kind}:{tmp_path / 'file'}"])


def test_choices_are_scored_from_the_same_place_on(monkeypatch):
    """Two spaces are one token, of which the prompt's end is the first and a choice's start the
    second."""
    tokens = ["Ġ", "a", "b", "c", "ĠĠ", "</s>"]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(tokens)}, [("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        ByteLevel(False, use_regex=False),
        ByteLevelDecoder(),
    )
    vocabulary = TokenizerVocabulary(tokenizer.to_str(), None, 5)
    asked = []

    def score(before, after):
        asked.extend(zip(before, after, strict=True))
        return [types.SimpleNamespace(logprob=-float(len(ids))) for ids in after]

    generator = types.SimpleNamespace(score=score)
    monkeypatch.setattr(variants, "Generator", lambda *_, **__: generator)
    examples = [{"inputs": "a ", "choices": ["bc", "b"], "answer": 1, "targets": "b"}]
    task = Task("a", examples, TEMPLATES["choices"], ("accuracy",), answered="choices")
    model = types.SimpleNamespace(vocabulary=vocabulary)
    (record,) = answering.answers(model, "", [task], Options(), 1)["a"]
    assert asked == [([1], [4, 2, 3]), ([1], [4, 2])] and record["prediction"] == "b"


def nfc_vocabulary(folder):
    published_tokenizers.FOLDERS["vocab.json, Qwen 2"](folder)
    return vocabulary_of_folder(folder)


def nfkc_vocabulary(folder):
    """SentencePiece's own default, nmt_nfkc, which also makes one space of several."""
    text = [f"the first number {n} is not {n + 7}" for n in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "m"), vocab_size=35, minloglevel=2
    )
    return load_vocabulary(folder / "m.model")


@pytest.mark.parametrize(
    ("make", "targets", "written"),
    [
        (nfc_vocabulary, ["dog", "cafe\u0301"], {"cafe\u0301": "caf\u00e9"}),
        (
            nfkc_vocabulary,
            ["is", "the  first", "\ufb01rst number"],
            {"the  first": "the first", "\ufb01rst number": "first number"},
        ),
    ],
)
def test_a_perfect_model_is_right_where_its_vocabulary_cannot_write_the_targets(
    make, targets, written, tmp_path, monkeypatch, caplog
):
    vocabulary = make(tmp_path)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"inputs": "the first", "targets": target}) for target in targets]
    path.write_text("\n".join(lines) + "\n")
    model, entry = types.SimpleNamespace(vocabulary=vocabulary), {"jsonl": str(path)}
    settings = {"limit": 0, "max_new_tokens": 30}
    examples = own_prompts.examples_of(model, "a", entry, {}, settings)
    rows = [[*vocabulary.encode(target), vocabulary.eos_id] for target in targets]
    prompt = vocabulary.encode_sequence("the first")
    texts = [vocabulary.decode_after(prompt, row) for row in rows]
    answers = [[Completion(*one, "stop")] for one in zip(rows, texts, strict=True)]
    generator = types.SimpleNamespace(as_completed=lambda *_: enumerate(answers))
    monkeypatch.setattr(variants, "Generator", lambda *_, **__: generator)
    task = Task("a", examples, TEMPLATES["own"], ("exact_match",), max_new_tokens=30)
    records = answering.answers(model, "", [task], Options(), len(rows))["a"]
    assert [record["correct"] for record in records] == [True] * len(rows)
    found = {r["targets"]: r["written"].strip() for r in records if "written" in r}
    assert found == written
    assert metric_table.score(records, ["exact_match"]).get("rewritten", 0) == len(written)
    assert f"cannot write {len(written)} of {len(rows)} answers exactly" in caplog.text
