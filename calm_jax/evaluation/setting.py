"""What was built: the setting compared with the paper's, its cost, and the commands for it."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from calm_jax import units
from calm_jax.data.key_value import HALVES, parse_task
from calm_jax.evaluation.results import Run
from calm_jax.models import CompositionConfig
from calm_jax.training.config_keys import flatten

_MODELS = {
    "augment": (
        "Augment",
        "PaLM2-XXS, pretrained, then trained on substitution",
        "trained from scratch on substitution and on expressions in which each key is followed by "
        "its value",
    ),
    "anchor": (
        "Anchor",
        "PaLM2-XS, pretrained",
        "trained from scratch on plain numbers among random letters",
    ),
}
_PAPER_BRIDGE = (
    "every 4th augment layer; no norm, gate or position in the cross-attention, initial values not "
    "stated"
)
_PACKAGES = ("calm_jax", "jax", "flax", "optax", "orbax-checkpoint", "seqio", "grain")


def parameters(run: Run, name: str) -> str | None:
    """The number of parameters of a tree in costs.json, as text; None where it is not known."""
    found = [tree for tree in run.costs.get("trees", ()) if tree["name"] == name]
    return units.count(found[0]["parameters"]) if found else None


def world(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The key-value setting that the runs' data names, with its ranges as text; None without."""
    found = next(
        (parsed for run in runs for parsed in map(parse_task, _tasks(run)) if parsed), None
    )
    return found and {
        "setting": found,
        "key_length": _range(found.key_length),
        "operands": _range(found.operands),
        "operators": " ".join({"-": "−", "*": "×"}.get(sign, sign) for sign in found.operators),
        "rates": [f"{100 * rate:g}%" for rate in found.bridge_rates],
    }


def models(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Each model of the key-value experiment: what it is, in the paper, and here."""
    rows = []
    for run in runs:
        corpus, _, half = _corpus(run).partition("_")
        if corpus in _MODELS:
            label, paper, ours = _MODELS[corpus]
            if half in HALVES:
                label, ours = f"{label}, {half}", f"{ours}, of the {half} half of the keys"
            rows.append((label, paper, f"{_decoder(run)}{ours}"))
        if run.composed:
            label = "Bridge" if run.name == "composed" else f"Bridge of {run.name}"
            rows.append((label, _PAPER_BRIDGE, _bridge(run)))
    return rows


def median_speed(run: Run) -> float | None:
    """Tokens per second, the median over the run."""
    _, speeds = run.curve("train", "tokens_per_second")
    return sorted(speeds)[len(speeds) // 2] if speeds else None


def made(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """The commands that made the runs and the page, the runs' configs, the packages' versions."""
    commands = []
    for run in runs:
        commands += [*run.commands, *(one.scored.get("command") for one in (*run.parts, run))]
    return {
        "commands": [line for line in (*commands, command) if line],
        "unrecorded": [run.name for run in runs if not run.commands],
        "configs": [
            (run, [(key, repr(value)) for key, value in flatten(run.config).items() if value != {}])
            for run in runs
        ],
        "scored": [
            (run.name, f"{run.scored['step']:,}", run.scored["date"], run.scored["device"])
            for run in runs
            if run.scored
        ],
        "data": [(run, _data(run, "train"), _data(run, "validation")) for run in runs],
        "versions": ", ".join(f"{name} {version}" for name, version in installed().items()),
        "today": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def _data(run: Run, split: str) -> str:
    entries = run.config.get("data", {}).get(split) or ()
    named = [entry.get("task") or entry.get("jsonl") or entry.get("parquet") for entry in entries]
    return ", ".join(map(str, named))


def _corpus(run: Run) -> str:
    """The key-value corpus that the run was trained on; "" of any other run."""
    return next((task.rpartition("/")[2] for task in _tasks(run) if parse_task(task)), "")


def _tasks(run: Run) -> list[str]:
    return [source.get("task", "") for source in run.config.get("data", {}).get("train", ())]


def _range(low_high: Sequence[int]) -> str:
    low, high = low_high
    return str(low) if low == high else f"{low}–{high}"


def _decoder(run: Run) -> str:
    """`4 layers, width 64, 230 k parameters; `, as far as the run records it."""
    decoder = run.config.get("decoder", {})
    facts = [f"{decoder[key]} layers" for key in ("num_layers",) if key in decoder]
    facts += [f"width {decoder[key]}" for key in ("embed_dim",) if key in decoder]
    count = parameters(run, "decoder")
    facts += [f"{count} parameters"] if count else []
    return ", ".join(facts) + "; " if facts else ""


def _bridge(run: Run) -> str:
    given = run.config.get("composition") or []  # of each augment, or one for all
    if not isinstance(given, list):
        given = [given] * len(run.config.get("augments", [""]))
    parts = []
    for augment, values in enumerate(given):
        config = CompositionConfig.from_dict(values)
        pairs = config.connections
        places = (
            ("connections " + ", ".join(f"{i}→{j}" for i, j in pairs))
            if pairs
            else f"every {_ordinal(config.every)}augment layer"
        )
        parts.append(f"augment {augment}: {places}" if len(given) > 1 else places)
        extras = [
            word
            for word, on in (
                ("norms before it", config.norms),
                ("rotary positions", config.rotary),
                ("a gate", config.gate),
                ("biases", config.bias),
                ("the augment reads the prompt only", config.encoder_only),
            )
            if on
        ]
        start = "starting from 0" if config.init == "zero" else "starting at random"
        parts.append(", ".join([*extras, start]))
    count = parameters(run, "bridge")
    return "; ".join(parts) + (f"; {count} parameters" if count else "")


def _ordinal(number: int) -> str:
    """`4th `; nothing for 1."""
    return {1: "", 2: "2nd ", 3: "3rd "}.get(number, f"{number}th ")


def installed() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a run's page can be made where training's packages are absent
    return versions
