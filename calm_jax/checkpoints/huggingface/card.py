"""The model card of an exported bridge: README.md, as the hub of Hugging Face shows it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from calm_jax.checkpoints.files import read_json
from calm_jax.models import ComposedDecoder
from calm_jax.models.parameters import module_tree

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- calm
- custom_code
license: # fill in: the licence of this bridge; those of the frozen models stay as they are
base_model:
{base}
---

# {name}

A bridge that joins language models which stay as they are
([CALM](https://arxiv.org/abs/2401.02412), trained with calm_jax). After some of its layers the
anchor reads hidden states of {augments} through cross-attention. This folder holds the bridge
alone: {count:,} parameters.

## Use

`config.json` names the frozen models, which are loaded too; the arguments `anchor="..."` and
`augments=["..."]` of `from_pretrained` name other places. `model(input_ids, labels=...)` trains the
bridge further, and `save_pretrained` writes only the bridge.

```python
{example}
```

## Frozen models

| role | model | dtype | fingerprint in calm_jax |
|---|---|---|---|
{models}

Licences of the frozen models: fill in.

## Connections

{connections}

## Training

{training}

## Scores

{scores}
"""

_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("a prompt", return_tensors="pt")
tokens = model.generate(inputs.input_ids, max_new_tokens=32)
print(tokenizer.decode(tokens[0]))"""

_TOKENS = """import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=32)
print(tokens[0].tolist())"""


def model_card(
    name: str,
    config: Mapping[str, Any],
    composed: ComposedDecoder,
    identities: Sequence[Mapping[str, Any]],
    run: epath.Path | None,
    step: int | None,
) -> str:
    """The card, with code that works where `name` is a folder.

    `config` is the config.json beside it, `identities` are those of
    `calm_jax.checkpoints.composed.identities`, and run and step are where the bridge was trained.
    """
    places = [config["anchor"], *config["augments"]]
    published = composed.vocabulary is not None and composed.vocabulary.kind == "tokenizer"
    return _CARD.format(
        base="\n".join(_base(place) for place in dict.fromkeys(places)),
        name=name,
        augments="an augment" if len(places) == 2 else f"{len(places) - 1} augments",
        count=sum(x.size for x in jax.tree.leaves(module_tree(composed.bridge))),
        example=(_TEXT if published else _TOKENS).format(name=name),
        models="\n".join(
            f"| {entry['role']} | {place} | {_dtype(model)} | `{entry['fingerprint']}` |"
            for entry, place, model in zip(identities, places, composed.models, strict=True)
        ),
        connections="\n".join(
            f"- augment {augment}, layer {i} → anchor, layer {j}: "
            + ", ".join(f"{key} {value}" for key, value in config["bridges"][augment].items())
            for augment, i, j in config["connections"]
        ),
        training=_training(run, step),
        scores=_scores(run, step),
    )


def _base(place: str) -> str:
    return f"# fill in the name of {place}" if os.path.isabs(place) else f"- {place}"


def _dtype(model: Any) -> str:
    rounded = f", rounded to {model.config.weights} in training" if model.config.weights else ""
    return model.config.dtype + rounded


def _training(run: epath.Path | None, step: int | None) -> str:
    """What the run's config.json says of data and steps, as lines of a list."""
    if run is None or not (run / "config.json").exists():
        return "Not known: the bridge was not exported from the folder of a run."
    config = read_json(run / "config.json", "a run")
    data, train, optimizer = (config.get(key, {}) for key in ("data", "train", "optimizer"))
    told = {
        "data": ", ".join(" ".join(map(str, entry.values())) for entry in data.get("train", ())),
        "length of a row, in tokens": data.get("length"),
        "step": f"{step:,} of {train['num_steps']:,}" if "num_steps" in train else step,
        "rows in a batch": train.get("batch_size"),
        "optimizer": f"{optimizer.get('name')}, learning rate {optimizer.get('learning_rate')}",
        "seed": train.get("seed"),
    }
    return "\n".join(f"- {key}: {value}" for key, value in told.items())


def _scores(run: epath.Path | None, step: int | None) -> str:
    """The run's evaluation/summary.json as a table."""
    path = None if run is None else run / "evaluation" / "summary.json"
    if path is None or not path.exists():
        return "None yet: `calm evaluate` writes them."
    summary = read_json(path, "a run")
    of_parts = summary.pop("_parts", {})
    scored = summary.pop("_run", {}).get("step", step)
    lines = [
        "| model | task | metric | score | 95 % interval | prompts |",
        "|---|---|---|---|---|---|",
    ]
    for part, cells in {"composed": summary, **of_parts}.items():
        for task, cell in cells.items():
            if not isinstance(cell, Mapping) or "count" not in cell:
                continue
            metric = cell.get("metric", "exact_match")
            low, high = cell["interval"]
            lines.append(
                f"| {part} | {task} | {metric} | {cell[metric]:.4g} | {low:.4g}–{high:.4g} "
                f"| {cell['count']:,} |"
            )
    if scored != step:
        lines += ["", f"These are the scores of step {scored:,}, not of step {step:,}."]
    return "\n".join(lines)
