"""What was built: beside the paper's setting, what it costs, and how to make it again."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from calm_jax.data.key_value import HALVES, KeyValueConfig, parse_task
from calm_jax.evaluation.page import Element, element, missing, section, table, visible
from calm_jax.evaluation.results import Run, compositions
from calm_jax.models import CompositionConfig

_AUGMENT = (
    "trained from scratch on substitution and on expressions in which each key is followed by its "
    "value"
)
_PAPER_BRIDGE = (
    "every 4th augment layer; no norm, gate or position in the cross-attention, initial values not "
    "stated"
)
_FLOPS = ("k", "M", "G", "T", "P", "E")
_PACKAGES = ("calm_jax", "jax", "flax", "optax", "orbax-checkpoint", "seqio", "grain")


def trees(run: Run) -> dict[str, dict[str, Any]]:
    """The entries of costs.json by the tree's name."""
    return {tree["name"]: tree for tree in run.costs.get("trees", ())}


def parameters(run: Run, name: str) -> str | None:
    tree = trees(run).get(name)
    return None if tree is None else amount(tree["parameters"])


def differences(runs: Sequence[Run]) -> Element:
    """The paper's setting beside that of the runs, from their configs."""
    heading = "How this differs from the paper's setting"
    world = next((found for run in runs for found in _worlds(run)), None)
    if world is None:
        return section(heading, missing("The runs' configs name no key-value task."))
    low, high = world.values
    numbers = "one token a number" if world.number_tokens else "one token a digit"
    unique = "unique" if world.unique_values else "shared by several keys"
    math, subs, num = (f"{100 * rate:g}%" for rate in world.bridge_rates)
    mixture = (
        f"{world.bridge_examples:,}: {math} MATH, {subs} SUBS, {num} NUM; beside its keys an "
        f"expression has plain numbers ({100 * world.bridge_plain:g}% of the operands), and "
        f"{100 * world.bridge_single:g}% have one operand"
    )
    rows = [
        ("Keys", "25,000 strings of 2–6 characters",
         f"{world.keys:,} strings of {_range(world.key_length)} letters, one token a letter"),
        ("Values", "unique integers from 1 to 25,000",
         f"integers from {low:,} to {high:,}, {unique}; {numbers}"),
        ("Operands", "3–6 keys", f"{_range(world.operands)} keys"),
        ("Operators", "+ − ×", " ".join({"-": "−", "*": "×"}.get(o, o) for o in world.operators)),
        ("Keys in the bridge's training", "20%",
         f"{100 * world.bridge_keys:g}% ({round(world.bridge_keys * world.keys):,} keys)"),
        ("The bridge's training examples", "number not stated",
         mixture),
        ("Telling the tasks apart", "prompts not printed", "the prompt's first token is a marker"),
        ("Expressions scored in a set", "not stated", f"{world.evaluation_examples:,} at most"),
    ]  # fmt: skip
    models = {
        "augment": ("Augment", "PaLM2-XXS, pretrained, then trained on substitution",
                    _AUGMENT),
        "anchor": ("Anchor", "PaLM2-XS, pretrained",
                   "trained from scratch on plain numbers among random letters"),
    }  # fmt: skip
    for run in runs:
        corpus, _, half = _corpus(run).partition("_")
        if corpus in models:
            label, paper, ours = models[corpus]
            if half in HALVES:
                label, ours = f"{label}, {half}", f"{ours}, of the {half} half of the keys"
            rows.append((label, paper, f"{_form(run)}{ours}"))
        if run.composed:
            label = "Bridge" if run.name == "composed" else f"Bridge of {visible(run.name)}"
            rows.append((label, _PAPER_BRIDGE, _bridge(run)))
    return section(heading, table(("", "Paper", "Here"), rows))


def costs(runs: Sequence[Run]) -> Element:
    """Parameters and bytes of each tree, then what a step of each run costs."""
    rows, steps = [], []
    for run in runs:
        for name, tree in trees(run).items():
            state = "trained" if tree["trained"] else "frozen"
            flops = tree["flops_per_token"]
            rows.append(
                (
                    visible(run.name),
                    visible(name),
                    "" if name == "optimizer" else state,
                    f"{tree['parameters']:,}",
                    size(tree["bytes"]),
                    "–" if flops is None else amount(flops, _FLOPS),
                )
            )
        if run.costs:
            _, speeds = run.curve("train", "tokens_per_second")
            speed = f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if speeds else "not logged"
            steps.append(
                (
                    visible(run.name),
                    f"{run.config.get('train', {}).get('num_steps', 0):,}",
                    f"{run.costs['global_batch']:,}",
                    f"{run.costs['tokens_per_step']:,}",
                    amount(run.costs["flops_per_step"], _FLOPS),
                    size(run.costs["memory_bytes"]),
                    speed,
                )
            )
    if not rows:
        return section("Sizes and costs", missing("No run has written its costs yet."))
    header = ("Run", "Steps", "Sequences a step", "Tokens a step", "FLOPs a step",
              "Memory of a step", "Tokens a second")  # fmt: skip
    return section(
        "Sizes and costs",
        table(("Run", "Tree", "", "Parameters", "Bytes", "Forward FLOPs a token"), rows, numbers=3),
        table(header, steps, numbers=6),
        element(
            "p",
            "FLOPs are those of the matrix products, memory that of the compiled training step; "
            "the speed is the median over the run.",
            class_="note",
        ),
    )


def making(experiment: str, runs: Sequence[Run]) -> Element:
    """The commands, the time, the machine and the versions."""
    lines = []
    for run in runs:
        name, _, of = (run.config.get("name") or "…").partition(":")
        file = f"configs/{name}.py" + (f":{of}" if of else "")
        lines.append(f"calm train --config={file} --workdir={experiment}/{run.name}")
        if run.composed:
            lines[-1] += f" --config.anchor={run.config['anchor']}"
            lines[-1] += f' --config.augments="{tuple(run.config["augments"])}"'
        if run.made:
            lines.append(f"calm evaluate --workdir={experiment}/{run.name}")
    lines.append(f"calm report --experiment={experiment}")
    facts = [
        (
            visible(run.name),
            f"{run.made['step']:,}",
            visible(run.made["date"]),
            visible(run.made["device"]),
        )
        for run in runs
        if run.made
    ]
    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    today = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return section(
        "How this was made",
        element("pre", "\n".join(lines)),
        element(
            "p",
            "Other keys that were set on the command line stand, with all others, in the "
            "config.json of each run.",
            class_="note",
        ),
        table(("Run", "Scored at step", "Scored on", "Device"), facts)
        if facts
        else missing("No run has been evaluated yet."),
        element("p", f"Page written {today} with {versions}.", class_="note"),
    )


def _worlds(run: Run) -> list[KeyValueConfig]:
    """The key-value settings that the run's training data names."""
    return [world for world in map(parse_task, _tasks(run)) if world]


def _corpus(run: Run) -> str:
    """The key-value corpus that the run was trained on; "" of any other run."""
    return next((task.rpartition("/")[2] for task in _tasks(run) if parse_task(task)), "")


def _tasks(run: Run) -> list[str]:
    return [source.get("task", "") for source in run.config.get("data", {}).get("train", ())]


def _range(low_high: Sequence[int]) -> str:
    low, high = low_high
    return str(low) if low == high else f"{low}–{high}"


def _form(run: Run) -> str:
    """`4 layers, width 64, 230 k parameters; ` as far as the run says."""
    decoder = run.config.get("decoder", {})
    facts = [f"{decoder[key]} layers" for key in ("num_layers",) if key in decoder]
    facts += [f"width {decoder[key]}" for key in ("embed_dim",) if key in decoder]
    count = parameters(run, "decoder")
    facts += [f"{count} parameters"] if count else []
    return ", ".join(facts) + "; " if facts else ""


def _bridge(run: Run) -> str:
    sections = compositions(run)
    parts = []
    for augment, values in enumerate(sections):
        config = CompositionConfig.from_dict(values)
        pairs = config.connections
        places = (
            ("connections " + ", ".join(f"{i}→{j}" for i, j in pairs))
            if pairs
            else f"every {config.every}th augment layer"
        )
        parts.append(f"augment {augment}: {places}" if len(sections) > 1 else places)
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


def installed() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a run's page can be made where training's packages are absent
    return versions


def amount(number: float, units: Sequence[str] = ("k", "M", "B", "T")) -> str:
    """A number of three digits and its unit, in steps of a thousand: 1.23 M."""
    power = 0
    while abs(number) >= 999.5 and power < len(units):
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power - 1]}" if power else f"{number:g}"


def size(number: float) -> str:
    """Bytes in binary units."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:g} B"
