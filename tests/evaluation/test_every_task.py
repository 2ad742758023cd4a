"""A tiny pair and its parts on every task."""

import json
import time

import numpy as np
import pytest
import task_folders
import tiny_models  # noqa: F401 - programs compile without optimizations
import tiny_pairs

import calm_jax
from calm_jax.cli import evaluate as command
from calm_jax.decoding import Sampling
from calm_jax.errors import CalmError
from calm_jax.evaluation import answering, metric_table, sandbox, variants
from calm_jax.evaluation.results import part_folder, predictions_file

ROWS = {
    "gsm8k": "number",
    "mgsm/zh": "number",
    "mgsm/de": "number",
    "ntrex/mar": "chrf1",
    "ntrex/pol": "chrf1",
    "flores/pol_Latn": "chrf1",
    "humaneval": "pass@1",
    "mbpp": "pass@1",
    "codexglue/python": "chrf1",
    "codexglue/ruby": "chrf1",
    "choices/colours": "accuracy",
    "text/words": "bits_per_byte",
}


def needs_sandbox():
    try:
        sandbox.check("a test")
    except CalmError as error:
        pytest.skip(str(error))


def records_of(output, task):
    return [json.loads(line) for line in predictions_file(output, task).read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pairs.pair(tmp_path_factory.mktemp("models"))


def test_a_pair_on_every_task(pair, tmp_path, capsys):
    needs_sandbox()
    tasks, output = task_folders.every_task(tmp_path), tmp_path / "scores"
    own = str(tmp_path / "own.jsonl")
    flags = [f"--model={pair}", f"--tasks={tasks}", f"--output={output}", "--limit=2"]
    flags += ["--max_new_tokens=8", "--batch_size=2", "--metric=contains,chrf2"]
    start = time.process_time()  # however busy the machine is
    # In bytes some prompts are long: fewer lengths, fewer programs.
    assert command.main([*flags, "--context=256", "--drop_shots"]) == 0
    assert time.process_time() - start < 180
    printed = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    rows = {**ROWS, own: "contains"}
    assert [task for task in summary if not task.startswith("_")] == list(rows)
    for task, metric in rows.items():
        cell = summary[task]
        assert cell["metric"] == metric and len(cell["interval"]) == 2
        # Every number comes from the stored predictions.
        records = records_of(output, task)
        again = metric_table.score(records, list(cell["intervals"]))
        assert again.items() <= cell.items()
        assert len(records) == cell["count"] <= 2
        assert f"{task}: " in printed
    assert "mgsm: mean number 0.0 of 2 rows" in printed
    shots = {
        task: len(texts) for task, texts in json.loads((output / "shots.json").read_text()).items()
    }
    assert shots == {
        "gsm8k": 8, "mgsm/zh": 8, "mgsm/de": 8, "ntrex/mar": 5, "ntrex/pol": 5,
        "flores/pol_Latn": 5, "mbpp": 3, "codexglue/python": 3, "codexglue/ruby": 3,
    }  # fmt: skip
    kept = {task: {one["shots"] for one in records_of(output, task)} for task in shots}
    assert kept["mbpp"] < {0, 1} and kept["ntrex/pol"] == {5} and max(kept["gsm8k"]) < 8


def test_an_answer_is_the_generators_to_the_prompt_of_shots_and_question(pair, tmp_path):
    name = f"ntrex/pol:{task_folders.ntrex(tmp_path / 'ntrex')}"
    flags = [f"--model={pair}", f"--tasks={name}", f"--output={tmp_path}", "--batch_size=1"]
    flags += ["--max_new_tokens=4", "--context=64", "--drop_shots", "--limit=2"]
    assert command.main(flags) == 0
    shots = json.loads((tmp_path / "shots.json").read_text())["ntrex/pol"]
    record = records_of(tmp_path, "ntrex/pol")[1]
    assert len(shots) == 5 and record["shots"] == 1  # as many as fit
    generator = calm_jax.Generator(calm_jax.load_composed(pair), max_length=64, slots=1)
    prompt = shots[0] + record["inputs"]
    ((said,),) = generator.generate([prompt], Sampling(max_new_tokens=4, stop=("\n",)))
    assert record["prediction"] == said.text


def test_choices_of_a_pair_and_its_parts(pair, tmp_path, capsys):
    file, task = task_folders.choices(tmp_path / "colours.jsonl"), "choices/colours"
    flags = [f"--model={pair}", f"--tasks=choices:{file}", f"--output={tmp_path}", "--parts"]
    with pytest.raises(CalmError, match=r"choices/colours has no split to draw --shots=1 from"):
        command.main([*flags, "--shots=1"])
    assert command.main([*flags, "--batch_size=1"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    composed = calm_jax.load_composed(pair)
    models = {"": composed, "anchor": composed.anchor, "augment 0": composed.augments[0]}
    for name, model in models.items():
        generator = calm_jax.Generator(model, max_length=32, slots=1)
        records = records_of(part_folder(tmp_path, name), task)
        for one in records:
            choices = [f" {choice}" for choice in one["choices"]]
            found = generator.score([one["inputs"]] * 2, choices)
            assert one["logprobs"] == pytest.approx([s.logprob for s in found], rel=1e-4)
            best = one["choices"][one["logprobs"].index(max(one["logprobs"]))]
            assert one["prediction"] == best and one["correct"] == (best == one["targets"])
        right = sum(one["correct"] for one in records)
        assert (summary["_parts"][name] if name else summary)[task]["accuracy"] == 50 * right
        where = f"{task}, {name} alone: " if name else f"{task}: "
        assert f"{where}accuracy {50 * right:.1f}% of 2 (" in printed


def test_an_answer_ends_before_a_stop_text(pair, tmp_path):
    own = task_folders.own(tmp_path / "own.jsonl")
    flags = [f"--model={pair}", f"--tasks={own}", "--max_new_tokens=8"]
    assert command.main([*flags, f"--output={tmp_path / 'whole'}"]) == 0
    whole = [record["prediction"] for record in records_of(tmp_path / "whole", str(own))]
    stops = ["{x}", whole[0][3:5]]
    flags += [f"--stop={text}" for text in stops]
    assert command.main([*flags, f"--output={tmp_path / 'cut'}"]) == 0
    cut = [record["prediction"] for record in records_of(tmp_path / "cut", str(own))]
    assert cut == [text.split(stops[1])[0] for text in whole] and len(cut[0]) <= 3 < len(whole[0])


@pytest.mark.parametrize(
    ("wanted", "length", "found"), [(128, 40, 128), (128, 2048, 32), (8, 2048, 8), (4, 10**6, 1)]
)
def test_fewer_rows_where_prompts_are_long(wanted, length, found):
    assert answering.rows(wanted, length) == found


def test_samples_of_programs(pair, tmp_path):
    needs_sandbox()
    human = f"--tasks=humaneval:{task_folders.human_eval(tmp_path / 'human')}"
    flags = [f"--model={pair}", human, f"--output={tmp_path}", "--max_new_tokens=4", "--limit=2"]
    drawn = ["--samples=10", "--temperature=1.0", "--seed=3", "--batch_size=4"]
    assert command.main([*flags, *drawn]) == 0
    records = records_of(tmp_path, "humaneval")
    for one in records:
        assert len(one["samples"]) == len(one["outcomes"]) == len(one["passed"]) == 10
    assert len(set(records[0]["samples"])) > 5
    cell = json.loads((tmp_path / "summary.json").read_text())["humaneval"]
    assert cell["intervals"].keys() == {"pass@1", "pass@10"}
    assert not (tmp_path / "shots.json").exists()


def test_bits_of_a_text_in_windows(pair, tmp_path):
    """Of every byte behind those of its window, by the logits themselves."""
    text = "Some words, äöü. " * 7
    (tmp_path / "a.txt").write_text(text)
    anchor = pair.parent / "anchor"
    flags = [f"--model={anchor}", f"--tasks=text:{tmp_path / 'a.txt'}", f"--output={tmp_path}"]
    assert command.main([*flags, "--context=48"]) == 0
    model = calm_jax.load(anchor)
    ids = model.vocabulary.encode(text)
    expected = 0.0
    for first in range(0, len(ids), 48):
        piece = ids[first : first + 48]
        before = ids[max(0, first + len(piece) - 49) : first] or [model.vocabulary.eos_id]
        logits = np.asarray(model(np.array([before + piece], np.int32)))[0, len(before) - 1 : -1]
        logits = logits[:, : model.vocabulary.size]  # the rows beyond it have no meaning
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += logprobs[np.arange(len(piece)), piece].sum()
    (record,) = records_of(tmp_path, "text/a")
    assert (record["bytes"], record["tokens"]) == (len(text.encode()), len(ids))
    assert record["logprob"] == pytest.approx(expected, rel=1e-5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    bits = -expected / np.log(2) / len(text.encode())
    assert summary["text/a"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        (
            "gsm8k",
            ["--context=100"],
            r"gsm8k, example 1: the prompt has \d+ tokens with its 8 shots and the answer may have "
            r"400, more than --context=100; --drop_shots leaves out",
        ),
        (
            "gsm8k",
            ["--context=20", "--drop_shots", "--max_new_tokens=8"],
            r"prompt has 25 tokens with its 0 shots and the answer may have 8, more than",
        ),
        ("gsm8k", ["--drop_shots"], "--drop_shots needs --context=TOKENS"),
        ("gsm8k", ["--shots=10"], "10 shots were asked for, but the split .* has 9 examples"),
        ("gsm8k", ["--metric=chrf1"], "--metric=chrf1: no task in --tasks is a file"),
        ("own", ["--metric=rouge"], "--metric=rouge: of prompts with answers, there are exact"),
        ("own", ["--metric=pass@1"], "--metric=pass@1: of prompts with answers, there are exact"),
        (
            "gsm8k",
            ["--stop=."],
            "--stop=.: no task in --tasks is a file or a seqio Task",
        ),
        ("own", ["--stop="], "--stop='' would end every answer before its first character"),
        ("own", ["--shots=1"], r"own.jsonl has no split to draw --shots=1 from"),
        ("gsm8k", ["--samples=2", "--temperature=1"], "no task in --tasks is scored by pass@k"),
        ("gsm8k", ["--samples=2"], "without a temperature all of them are the same"),
    ],
)
def test_options_that_do_not_fit(pair, tasks, flags, message, tmp_path):
    own = task_folders.own(tmp_path / "own.jsonl")
    names = {"gsm8k": f"gsm8k:{task_folders.gsm8k(tmp_path / 'gsm8k')}", "own": str(own)}
    output = tmp_path / "scores"
    base = [f"--model={pair.parent / 'anchor'}", f"--tasks={names[tasks]}", f"--output={output}"]
    with pytest.raises(CalmError, match=message):
        command.main([*base, *flags])
    assert not output.exists()


def test_programs_are_not_run_where_there_is_no_sandbox(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(variants, "Generator", None)  # would fail if called
    tasks = f"--tasks=mbpp:{task_folders.mbpp(tmp_path)}"
    message = "mbpp is run in a sandbox only, .*: bubblewrap is not installed"
    with pytest.raises(CalmError, match=message):
        command.main([f"--model={pair}", tasks, f"--output={tmp_path / 'scores'}"])
