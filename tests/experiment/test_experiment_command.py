"""`calm experiment` from its command line, on the tiny key-value task."""

import json
import pathlib

import pytest

from calm_jax.__main__ import main

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CONFIG = f"""
import importlib.util

from calm_jax.experiment.arms import Arm, Experiment
from calm_jax.training.configuration import decoder_run

TASK = "calm_jax/key_value/tiny"


def get_experiment():
    return Experiment(
        title="Tiny arms",
        arms=(
            Arm("anchor", kind="part", seeded=False),
            Arm("augment", kind="part", seeded=False),
            Arm("compose", "CALM", kind="calm", anchor="anchor", augments=("augment",)),
            Arm("broken", anchor="anchor", augments=("augment",)),
            Arm("handed_over", scored_from="anchor", flags=("--hand_over={{augment}}",)),
            Arm("zeroed", scored_from="compose", kind="control", flags=("--control=zeroed",)),
        ),
        tasks=(f"{{TASK}}/math", f"{{TASK}}/num"),
        reference="compose",
        seeds=(0, 1),
        flags=("--limit=10", "--max_new_tokens=8"),
    )


def get_config(arm):
    spec = importlib.util.spec_from_file_location("tiny", {str(CONFIGS / "kv_tiny.py")!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if arm == "broken":
        config = module.get_config("compose")
        config.composition.every = 99
        return config
    return module.get_config(arm)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny_arms.py"
    path.write_text(CONFIG)
    return path


def test_the_commands_are_printed(config, tmp_path, capsys):
    workdir = tmp_path / "runs"
    arguments = ["experiment", f"--config={config}", f"--workdir={workdir}", "--commands"]
    assert main([*arguments, "--arms=zeroed", "--seeds=1"]) == 0
    said = capsys.readouterr().out.splitlines()
    heads = [number for number, line in enumerate(said) if line.startswith("#")]
    assert [said[number] for number in heads] == [f"# group {number}" for number in (1, 2, 3, 4)]
    # Two trainings; one, and two evaluations; two evaluations; the whole.
    assert [b - a - 1 for a, b in zip(heads, [*heads[1:], len(said)], strict=True)] == [2, 3, 2, 1]
    assert f"calm evaluate --workdir={workdir}/seed_1/compose" in said[heads[3] - 1]
    assert said[-1] == " ".join(["calm", *arguments[:-1], "--arms=zeroed", "--seeds=1"])
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--arms=best", "--arms=best: there is no such arm; there are anchor, augment, compose"),
        ("--seeds=7", "--seeds=7: the experiment has the seeds 0, 1"),
    ],
)
def test_unknown_arms_and_seeds(config, tmp_path, capsys, flag, message):
    assert main(["experiment", f"--config={config}", f"--workdir={tmp_path / 'x'}", flag]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_an_experiment(tmp_path, capsys):
    arguments = [f"--config={CONFIGS / 'kv_tiny.py'}", f"--workdir={tmp_path / 'x'}"]
    assert main(["experiment", *arguments]) == 2
    assert "get_experiment" in capsys.readouterr().err


@pytest.mark.slow  # twenty processes that train and score: four minutes
def test_an_experiment_from_its_config_to_its_page(config, tmp_path, capsys):
    workdir = tmp_path / "runs"
    arguments = ["experiment", f"--config={config}", f"--workdir={workdir}"]
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert "2 of 10 jobs are not done: broken, seed 0, broken, seed 1" in told.err
    assert "composition.every=99 gives no valid connections" in told.out
    results = json.loads((workdir / "results.json").read_text())
    assert list(results) == ["anchor", "augment", "compose", "handed_over", "zeroed"]
    for name, of_arm in results.items():
        for cell in of_arm["tasks"].values():
            assert len(cell["values"]) == (1 if name in ("anchor", "augment") else 2)
            assert (cell["difference"] is None) == (name == "compose")
        assert set(of_arm["tasks"]) == {
            "calm_jax/key_value/tiny/math",
            "calm_jax/key_value/tiny/num",
        }
    cost = results["compose"]["cost"]
    assert 0 < cost["trained"] < cost["parameters"] and cost["memory"] > 0
    assert cost["latency"] > results["anchor"]["cost"]["latency"] > 0
    assert results["zeroed"]["cost"]["latency"] is None
    page = (workdir / "report.html").read_text()
    assert "Not finished: broken, seed 0; broken, seed 1" in page
    assert "taps" not in page and "CALM" in page

    (workdir / "report.html").unlink()
    (workdir / "costs.json").unlink()
    assert main([*arguments, "--report_only"]) == 0
    assert (workdir / "report.html").exists() and not (workdir / "costs.json").exists()
    capsys.readouterr()

    (workdir / "report.html").unlink()
    assert main([*arguments, "--arms=zeroed"]) == 0
    assert "6 of 6 jobs are done already" in capsys.readouterr().out
    assert (workdir / "report.html").exists()

    # The same folder, but the config of an arm has changed.
    changed = (
        'config = module.get_config(arm)\n    config.train.batch_size *= 1 + (arm == "compose")'
    )
    changed += "\n    return config"
    config.write_text(CONFIG.replace("return module.get_config(arm)", changed))
    assert main([*arguments, "--arms=compose", "--seeds=0"]) == 1
    told = capsys.readouterr().out
    assert "2 of 3 jobs are done already" in told
    assert "was started with another config: train.batch_size was 8, now 16" in told
