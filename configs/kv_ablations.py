"""The key-value task's bridge, one choice changed at a time, with the models of table5_kv.py.

  calm experiment --config=configs/kv_ablations.py --workdir=runs/ablations

Every arm is trained on the same examples, for as many steps, as `calm`, the bridge of table5_kv.py.
It has 5 connections, all from the augment's last layer, to the first anchor layers.
"""

import pathlib

from calm_jax.cli.config import load_file
from calm_jax.experiment.arms import Arm, Experiment
from calm_jax.models import CompositionConfig
from calm_jax.training.configuration import composed_run

TASK = "calm_jax/key_value/demo"
PAIR = {"anchor": "anchor", "augments": ("augment",)}

# Label and changes of each arm.
ABLATIONS = {
    "every_1": ("every augment layer, spaced evenly", {"connections": None, "every": 1}),
    "every_2": ("every 2nd, spaced evenly", {"connections": None, "every": 2}),
    "every_4": ("every 4th, spaced evenly, as in the paper", {"connections": None, "every": 4}),
    "first_layer": ("last augment layer to the first of the anchor", {"connections": ((3, 0),)}),
    "early_taps": (
        "first augment layer to the same of the anchor",
        {"connections": ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4))},
    ),
    "heads_1": ("1 head", {"num_heads": 1}),
    "heads_2": ("2 heads", {"num_heads": 2}),
    "heads_8": ("8 heads", {"num_heads": 8}),
    "init_paper": ("random start, as in the paper", {"init": "paper"}),
    "gate": ("a gate", {"gate": True}),
    "no_norms": ("no norms, as in the paper", {"norms": False}),
    "no_rotary": ("no positions, as in the paper", {"rotary": False}),
}


def get_experiment():
    return Experiment(
        title="What does the bridge need?",
        arms=(
            Arm("anchor", kind="part"),
            Arm("augment", kind="part"),
            Arm("calm", "as in table5_kv.py", kind="calm", **PAIR),
            *(Arm(name, label, kind="ablation", **PAIR) for name, (label, _) in ABLATIONS.items()),
        ),
        tasks=tuple(f"{TASK}/{name}" for name in ("math", "subs", "num")),
        reference="calm",
        seeds=(0, 1, 2),
        flags=("--max_new_tokens=8",),
    )


def get_config(arm: str = "calm"):
    if arm in ("anchor", "augment"):
        return _of_table5(arm)
    config = _of_table5("calm")
    if arm != "calm":
        _, changes = ABLATIONS[arm]
        fields = config.composition.to_dict() | changes
        config.composition = composed_run(CompositionConfig(**fields)).composition
    return config


def _of_table5(arm):
    return load_file(f"{pathlib.Path(__file__).with_name('table5_kv.py')}:{arm}")
