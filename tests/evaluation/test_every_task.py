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
from calm_jax.evaluation import answering, metric_table, sandbox
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


def test_parts_and_samples(pair, tmp_path, capsys):
    """What is stored is what each model says to the prompt that the template and shots make."""
    needs_sandbox()
    output = tmp_path / "scores"
    tasks = [
        f"mgsm/de:{task_folders.mgsm(tmp_path / 'mgsm')}",
        f"choices:{task_folders.choices(tmp_path / 'colours.jsonl')}",
    ]
    flags = [f"--model={pair}", f"--output={output}", "--max_new_tokens=4", "--batch_size=1"]
    alike = [*flags, f"--tasks={','.join(tasks)}", "--parts"]
    with pytest.raises(CalmError, match=r"choices/colours has no split to draw --shots=1 from"):
        command.main([*alike, "--shots=1"])
    assert command.main([*alike, "--context=128", "--drop_shots", "--limit=2"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    composed = calm_jax.load_composed(pair)
    models = {"": composed, "anchor": composed.anchor, "augment 0": composed.augments[0]}
    shots = json.loads((output / "shots.json").read_text())["mgsm/de"]
    for name, model in models.items():
        generator = calm_jax.Generator(model, max_length=128, slots=1)
        scores = summary["_parts"][name] if name else summary
        folder = part_folder(output, name)
        record = records_of(folder, "mgsm/de")[1]
        prompt = "".join(shots[: record["shots"]]) + record["inputs"]
        ((said,),) = generator.generate([prompt], Sampling(max_new_tokens=4, stop=("\nFrage: ",)))
        assert record["prediction"] == said.text
        for one in records_of(folder, "choices/colours"):
            found = generator.score(
                [one["inputs"]] * 2, [f" {choice}" for choice in one["choices"]]
            )
            assert one["logprobs"] == pytest.approx([s.logprob for s in found], rel=1e-4)
            best = one["choices"][one["logprobs"].index(max(one["logprobs"]))]
            assert one["prediction"] == best and one["correct"] == (best == one["targets"])
        right = sum(one["correct"] for one in records_of(folder, "choices/colours"))
        assert scores["choices/colours"]["accuracy"] == 50 * right
        where = f"choices/colours, {name} alone: " if name else "choices/colours: "
        assert f"{where}accuracy {50 * right:.1f}% of 2 (" in printed
    assert "better than the anchor in 0 of 1" in printed

    human = f"--tasks=humaneval:{task_folders.human_eval(tmp_path / 'human')}"
    drawn = [*flags, human, "--samples=10", "--temperature=1.0", "--limit=2", "--seed=3"]
    assert command.main(drawn) == 0
    records = records_of(output, "humaneval")
    assert [len(one["samples"]) for one in records] == [10, 10] == [
        len(one["outcomes"]) for one in records
    ]  # fmt: skip
    assert len(set(records[0]["samples"])) > 5
    assert set(json.loads((output / "summary.json").read_text())["humaneval"]["intervals"]) == {
        "pass@1", "pass@10",
    }  # fmt: skip
    assert not (output / "shots.json").exists()


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
    monkeypatch.setattr(answering, "Generator", None)  # would fail if called
    tasks = f"--tasks=mbpp:{task_folders.mbpp(tmp_path)}"
    message = "mbpp is run in a sandbox only, .*: bubblewrap is not installed"
    with pytest.raises(CalmError, match=message):
        command.main([f"--model={pair}", tasks, f"--output={tmp_path / 'scores'}"])
