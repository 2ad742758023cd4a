"""Two real models with different tokenizers: SmolLM2-135M-Instruct, which knows no Chinese, and
Gemma 3 270M, which reads it.

  bash launch/real_pair.sh tokenizers [FOLDER]

Neither is trained. D_C is 2,000 Chinese paragraphs of LibreOffice's help with the English ones.
What is scored are paragraphs of pages that D_C has nothing of.
"""

import os
import pathlib

from calm_jax.checkpoints import frozen
from calm_jax.experiment.arms import Arm, Experiment, control
from calm_jax.experiment.matching import matched_rank
from calm_jax.models import CompositionConfig
from calm_jax.training.configuration import composed_run, decoder_run
from calm_jax.training.run_model import composition_configs

# The folder of launch/real_pair.sh.
FOLDER = pathlib.Path(os.environ.get("REAL_PAIR", "runs/real_pair")).resolve()
ANCHOR, AUGMENT = str(FOLDER / "anchor"), str(FOLDER / "gemma")


def get_experiment():
    return Experiment(
        title="Does a real model translate what one with another tokenizer reads?",
        arms=(
            Arm("anchor", "SmolLM2-135M alone", kind="part", frozen=ANCHOR),
            Arm("augment", "Gemma 3 270M alone", kind="part", frozen=AUGMENT),
            Arm("calm", "CALM", kind="calm", anchor="anchor", augments=("augment",)),
            Arm("lora", "SmolLM2 with LoRA", decoder="anchor"),
            Arm(
                "handed_over",
                "Gemma's translation handed over",
                scored_from="anchor",
                flags=("--hand_over={augment}",),
            ),
            control("permuted", "augment's weights permuted"),
        ),
        tasks=(_file("test"),),
        reference="calm",
        # Models that D_C has not met do not end an answer to a plain prompt.
        flags=("--metric=chrf1,chrf2,bleu", "--max_new_tokens=64", "--stop=\n"),
    )


def get_config(arm: str = "calm"):
    return {"calm": _calm, "lora": _lora}[arm]()


def _file(name):
    return str(FOLDER / "tokenizers" / f"{name}.jsonl")


def _calm():
    connections = ((7, 4), (10, 9), (13, 14), (16, 19), (17, 24))
    config = composed_run(CompositionConfig(connections=connections, rotary=True))
    config.anchor, config.augments = ANCHOR, (AUGMENT,)
    _set_training(config)
    config.optimizer.weight_decay = 0.1
    return config


def _lora():
    config = decoder_run()
    config.decoder["from"] = ANCHOR
    _set_training(config)
    anchor, augment = (frozen.describe(folder).config for folder in (ANCHOR, AUGMENT))
    config.lora.rank = matched_rank(anchor, [augment], composition_configs(_calm()))
    return config


def _set_training(config):
    """D_C and its schedule, the same for the bridge and LoRA."""
    config.data.train = ({"jsonl": _file("bridge")},)
    config.data.validation = ({"jsonl": _file("validation")},)
    config.data.length = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.b2 = 0.99
    config.train.num_steps = 150
    config.train.batch_size = 8
    config.train.log_every = 10
    config.train.validate_every = 50
    config.train.save_every = 50
