"""Run directories as training and evaluation leave them, made of arithmetic alone."""

import json
import math
import random
from pathlib import Path

import pytest

CONNECTIONS = [(3, 0), (3, 1), (3, 2)]
# Share of right answers by model and set: about what the experiment is expected to give.
SKILL = {
    "augment": {"subs": 0.995, "num": 0.01, "math": 0.0, "math_seen": 0.0},
    "anchor": {"subs": 0.0, "num": 1.0, "math": 0.06, "math_seen": 0.07},
    "composed": {"subs": 0.985, "num": 0.99, "math": 0.951, "math_seen": 0.99},
}
STEPS = {"augment": 900, "anchor": 1200, "composed": 2500}


def question(task: str, seed: random.Random) -> dict:
    """One example of a set, with its metadata."""
    operands = seed.choice((2, 3))
    values = [seed.randrange(10) for _ in range(operands)]
    keys = ["".join(seed.choice("abcdefgh") for _ in range(seed.randint(2, 4))) for _ in values]
    signs = [seed.choice("+-") for _ in values[1:]]
    shown = [str(value) for value in values] if task == "num" else keys
    text = shown[0] + "".join(sign + word for sign, word in zip(signs, shown[1:], strict=True))
    result = values[0] + sum(
        value if sign == "+" else -value for sign, value in zip(signs, values[1:], strict=True)
    )
    substituted = str(values[0]) + "".join(
        s + str(v) for s, v in zip(signs, values[1:], strict=True)
    )
    return {
        "inputs": ("<subs>" if task == "subs" else "<math>") + text + "=",
        "targets": substituted if task == "subs" else str(result),
        "operands": operands,
        "unseen": task in ("subs", "math"),
        "set": task.removesuffix("_seen"),
    }


def write_predictions(run: Path, model: str, count: int) -> None:
    summary = {"_run": {"step": STEPS[model], "date": "2025-01-31 12:00 UTC", "device": "cpu x 2",
                        "command": f"calm evaluate --workdir=runs/kv/{model}"}}  # fmt: skip
    (run / "evaluation").mkdir()
    for task, skill in SKILL[model].items():
        examples, luck = random.Random(f"questions {task}"), random.Random(f"{model} {task}")
        records = []
        for _ in range(count):
            record = question(task, examples)
            correct = luck.random() < skill
            prediction = record["targets"] if correct else record["targets"] + "0"
            records.append({**record, "prediction": prediction, "correct": correct})
        name = f"calm_jax/key_value/demo/{task}"
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run / "evaluation" / f"{name.replace('/', '_')}.jsonl").write_text(lines)
        right = sum(record["correct"] for record in records)
        summary[name] = {"exact_match": 100 * right / count, "count": count, "interval": [0, 100]}
    (run / "evaluation" / "summary.json").write_text(json.dumps(summary))


def write_metrics(run: Path, model: str) -> None:
    noise, lines = random.Random(model), []
    if model == "composed":
        lines.append({"step": 0, "split": "anchor", "loss": 1.75, "accuracy": 0.4, "exact": 0.05})
    for step in range(0, STEPS[model] + 1, 10):
        done = step / STEPS[model]
        loss = 3.5 * math.exp(-7 * done) + 0.02
        wobble = 1 + 0.15 * (noise.random() - 0.5)
        line = {"step": step, "split": "train", "loss": loss * wobble, "learning_rate": 1e-3,
                "accuracy": math.exp(-loss) * (2 - wobble), "grad_norm": 1.0,
                "tokens_per_second": 20000.0 * wobble}  # fmt: skip
        line["accuracy"] = min(line["accuracy"], 1.0)
        if model == "composed":
            for index in range(len(CONNECTIONS)):
                share = (0.55 - 0.2 * index) * (1 - math.exp(-6 * done))
                line[f"connection/{index}"] = share * wobble
        lines.append(line)
        if step % 100 == 0:
            exact = math.exp(-3 * loss)
            sets = (
                {"math": exact**1.5, "num": exact**0.3, "subs": exact}
                if model == "composed"
                else {}
            )
            lines.append({"step": step, "split": "validation", "loss": loss * 1.1,
                          "accuracy": math.exp(-loss), "exact": exact,
                          **{f"exact/bridge_{name}": sets[name] for name in sets}})  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_costs(run: Path, model: str) -> None:
    if model == "composed":
        trees = [
            ("anchor", 858_112, False),
            ("augment 0", 230_400, False),
            ("bridge", 221_440, True),
        ]
    else:
        trees = [("decoder", 858_112 if model == "anchor" else 230_400, True)]
    trees.append(("optimizer", 2 * trees[-1][1] + 1, False))
    costs = {
        "trees": [{"name": n, "parameters": p, "bytes": 4 * p, "trained": t,
                   "flops_per_token": None if n == "optimizer" else 2.0 * p} for n, p, t in trees],
        "connections": [f"{i}→{j}" for i, j in CONNECTIONS] if model == "composed" else [],
        "flops_per_step": 1.9e10, "memory_bytes": 310_000_000, "global_batch": 128,
        "tokens_per_step": 4096, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip
    (run / "costs.json").write_text(json.dumps(costs))


def write_attention(run: Path) -> None:
    tokens = ["<math>", "a", "b", "c", "+", "d", "e", "-", "f", "a", "g", "h", "="]
    connections = []
    for number, (i, j) in enumerate(CONNECTIONS):
        rows = []
        for t in range(len(tokens)):
            raw = [math.exp(-abs(t - s - number) + (2 if tokens[s].isalpha() else 0))
                   for s in range(t + 1)]  # fmt: skip
            rows.append([x / sum(raw) for x in raw] + [0.0] * (len(tokens) - t - 1))
        connections.append({"augment": 0, "from": i, "to": j, "weights": rows})
    value = {"tokens": tokens, "inputs": "<math>abc+de-fagh=", "connections": connections}
    (run / "evaluation" / "attention.json").write_text(json.dumps(value))


def write_run(run: Path, model: str, count: int) -> None:
    run.mkdir(parents=True)
    composed = model == "composed"
    config = {
        "name": {"composed": "kv_compose"}.get(model, f"kv_{model}"),
        "kind": "composed" if composed else "decoder",
        "data": {
            "train": [{"task": f"calm_jax/key_value/demo/{model}", "weight": 1.0}],
            "validation": [{"jsonl": "held_out.jsonl"}],
            "length": 48,
        },
        "train": {"num_steps": STEPS[model], "batch_size": 128},
    }
    if composed:
        config |= {"anchor": "runs/kv/anchor/frozen", "augments": ["runs/kv/augment/frozen"]}
        config["composition"] = {"connections": CONNECTIONS, "rotary": True, "num_heads": None}
    else:
        config["decoder"] = {"num_layers": 4, "embed_dim": 128 if model == "anchor" else 64}
    (run / "config.json").write_text(json.dumps(config))
    command = f"calm train --config=configs/{config['name']}.py --workdir=runs/kv/{model}"
    (run / "commands.json").write_text(json.dumps({"commands": [command]}))
    write_metrics(run, model)
    write_costs(run, model)
    write_predictions(run, model, count)
    if composed:
        write_attention(run)


def write_experiment(folder: Path, count: int) -> Path:
    for model in SKILL:
        write_run(folder / model, model, count)
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """The three runs of the key-value experiment, 60 predictions a task."""
    return write_experiment(tmp_path / "kv", 60)
