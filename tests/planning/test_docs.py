"""The committed plans: pages and numbers agree, and their commands still mean something."""

import json
import pathlib
import shlex

import pytest

from calm_jax.cli.config import load_file, override
from calm_jax.planning import formula, page, topologies
from calm_jax.training import configuration

ROOT = pathlib.Path(__file__).parents[2]
PLANS = sorted((ROOT / "docs/plans").glob("*/plan.json"))


def test_there_are_plans():
    assert PLANS


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_a_page_is_made_of_its_numbers(path):
    plan = json.loads(path.read_text())
    written = path.with_name("plan.md").read_text()
    assert written == page.document(plan)
    title = f"# {' + '.join(plan['models'])} on {plan['topology']}"
    assert written.startswith(f"{title}\n\n    {plan['command']}\n")
    assert plan["compiled"] and plan["memory"]["fits"]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.parent.name)
def test_its_command_is_of_a_config_that_is_there(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = json.loads(path.read_text())
    calm, command, *arguments = shlex.split(plan["command"])
    assert (calm, command) == ("calm", "plan")
    flags = dict(argument.lstrip("-").split("=", 1) for argument in arguments)
    assert ROOT / flags["output"] == path.parent
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    config = override(load_file(flags["config"]), overrides)
    configuration.validate(config)
    topology = topologies.find(flags["topology"])
    found = formula.mesh_of(config, topology)
    assert dict(found.shape) == plan["mesh"] and topology.chips == plan["chips"]
    assert config.train.batch_size == plan["batch_size"]
