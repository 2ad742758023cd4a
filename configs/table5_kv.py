"""The key-value task as an experiment: the composed model, its baselines, ablations and controls.

  calm experiment --config=configs/table5_kv.py --workdir=runs/table5

In the form of the paper's Table 5 (section 4.4). Every baseline is trained on the same examples as
the bridge, for as many steps; only `finetuned` and `lora` may change the anchor. LoRA has the rank
that gives it as many parameters as the bridge.
"""

import pathlib

from calm_jax.cli.config import load_file
from calm_jax.evaluation.table1 import PAPER
from calm_jax.experiment.arms import Arm, Experiment, PaperTable, control
from calm_jax.experiment.matching import matched_rank, trained_as, untrained
from calm_jax.training.run_model import composition_configs, decoder_config

TASK = "calm_jax/key_value/demo"
PAIR = {"anchor": "anchor", "augments": ("augment",)}

TABLE_1 = PaperTable(
    "Table 1",
    ("KV-MATH", "KV-SUBS", "NUM-MATH"),
    {
        arm: tuple(PAPER[row][column] for column in ("math", "subs", "num"))
        for arm, row in (("anchor", "anchor"), ("augment", "augment"), ("calm", "composed"))
    },
    "The paper's own, larger task: 25,000 keys, 3 to 6 operands. It has no baselines on it.",
)
TABLE_5 = PaperTable(
    "Table 5",
    (
        "FLORES-200, chrF1",
        "GSM8K, few resources",
        "GSM8K, many resources",
        "HumanEval",
        "MBPP",
        "CodeXGLUE, chrF1",
    ),
    {
        "calm": (60.5, 21.4, 33.1, 22.5, 32.2, 32.6),
        "finetuned": (62.1, 19.8, 27.1, 24.3, 43.0, 29.0),
        "lora": (59.2, 20.9, 31.2, 18.3, 28.7, 32.6),
        "calm_vanilla": (59.2, 19.0, 29.7, 20.0, 28.0, 32.2),
        "calm_random": (58.8, 17.8, 28.5, 20.1, 27.0, 32.1),
        "encoder_only": (59.3, 19.1, 29.1, 16.0, 27.0, 32.0),
    },
    "The paper's tasks are of language and code. Its anchor was fine-tuned on all of the augment's "
    "data, the one here on the bridge's.",
)


def get_experiment():
    return Experiment(
        title="Whose knowledge is it?",
        arms=(
            Arm("anchor", kind="part"),
            Arm("augment", kind="part"),
            Arm("vanilla", "augment that met no key", kind="part"),
            Arm("random", "augment never trained", kind="part"),
            Arm("calm", "CALM", kind="calm", **PAIR),
            Arm("finetuned", "anchor fine-tuned", decoder="anchor"),
            Arm("lora", "anchor with LoRA", decoder="anchor"),
            Arm("calm_vanilla", "CALM, vanilla augment", anchor="anchor", augments=("vanilla",)),
            Arm("calm_random", "CALM, random augment", anchor="anchor", augments=("random",)),
            Arm(
                "handed_over",
                "text handed over",
                scored_from="anchor",
                flags=(
                    "--hand_over={augment}",
                    "--hand_over_replace=<math>,<subs>",
                    "--hand_over_prompt=<math>{answer}=",
                ),
            ),
            Arm("mixed", "logits mixed", scored_from="anchor", flags=("--mix={augment}",)),
            Arm("encoder_only", "augment reads the prompt alone", kind="ablation", **PAIR),
            control("shuffled", "taps of other rows"),
            control("zeroed", "taps zeroed"),
            control("noise", "taps replaced by noise"),
            control("permuted", "augment's weights permuted"),
        ),
        tasks=tuple(f"{TASK}/{name}" for name in ("math", "subs", "num", "math_seen")),
        reference="calm",
        seeds=(0, 1, 2),
        flags=("--max_new_tokens=8",),
        finetuned="finetuned",
        paper=(TABLE_1, TABLE_5),
    )


def get_config(arm: str = "calm"):
    return {
        "anchor": lambda: _file("kv_anchor"),
        "augment": lambda: _file("kv_augment"),
        "vanilla": _vanilla,
        "random": lambda: untrained(_file("kv_augment")),
        "calm": _bridge,
        "calm_vanilla": _bridge,
        "calm_random": _bridge,
        "encoder_only": _encoder_only,
        "finetuned": _finetuned,
        "lora": _lora,
    }[arm]()


def _bridge():
    """The demo's bridge in a third of its steps, since every arm takes them."""
    config = _file("kv_compose")
    config.train.num_steps = 1_500
    return config


def _vanilla():
    """The augment's form, trained on what the anchor is trained on: numbers, and no key."""
    config = _file("kv_augment")
    config.data.train = ({"task": f"{TASK}/anchor"},)
    config.data.validation = ({"task": f"{TASK}/anchor"},)
    return config


def _encoder_only():
    config = _bridge()
    config.composition.encoder_only = True
    return config


def _finetuned():
    """The anchor, all of it, trained on the bridge's data."""
    config = trained_as(_bridge())
    config.vocabulary = _file("kv_anchor").vocabulary
    config.optimizer.learning_rate = 1e-3
    return config


def _lora():
    config = _finetuned()
    anchor, augment = (decoder_config(get_config(name)) for name in ("anchor", "augment"))
    config.lora.rank = matched_rank(anchor, [augment], composition_configs(_bridge()))
    config.optimizer.learning_rate = 5e-3
    return config


def _file(name):
    return load_file(str(pathlib.Path(__file__).with_name(f"{name}.py")))
