"""Translation for a real anchor: SmolLM2-135M, which knows no Basque, and an augment that reads it.

  bash launch/real_pair.sh translation [FOLDER]

The augment is trained from nothing on Basque alone: the help pages of LibreOffice. D_C is 2,000 of
their paragraphs with the English ones. What is scored are paragraphs of pages that nobody has met.
"""

import os
import pathlib

from calm_jax.checkpoints import frozen
from calm_jax.experiment.arms import Arm, Experiment, control
from calm_jax.experiment.matching import matched_rank, untrained
from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training.configuration import composed_run, decoder_run
from calm_jax.training.run_model import composition_configs, decoder_config

# The folder of launch/real_pair.sh.
FOLDER = pathlib.Path(os.environ.get("REAL_PAIR", "runs/real_pair")).resolve()
ANCHOR = str(FOLDER / "anchor")
PAIR = {"anchor": "anchor", "augments": ("augment",)}


def get_experiment():
    return Experiment(
        title="Does a real model translate what a small one reads?",
        arms=(
            Arm("anchor", "SmolLM2-135M alone", kind="part", frozen=ANCHOR),
            Arm("augment", kind="part"),
            Arm("random", "augment never trained", kind="part"),
            Arm("calm", "CALM", kind="calm", **PAIR),
            Arm("lora", "anchor with LoRA", decoder="anchor"),
            Arm("calm_random", "CALM, random augment", anchor="anchor", augments=("random",)),
            control("permuted", "augment's weights permuted"),
        ),
        tasks=(_file("test"),),
        reference="calm",
        # A model that D_C has not met does not end an answer to a plain prompt.
        flags=("--metric=chrf1,chrf2,bleu", "--max_new_tokens=48", "--stop=\n"),
    )


def get_config(arm: str = "calm"):
    return {
        "augment": _augment,
        "random": lambda: untrained(_augment()),
        "calm": _calm,
        "calm_random": _calm,
        "lora": _lora,
    }[arm]()


def _file(name):
    return str(FOLDER / "translation" / f"{name}.jsonl")


def _augment():
    config = decoder_run(
        DecoderConfig.llama(
            vocab_size=49_152,
            embed_dim=256,
            num_layers=6,
            num_heads=8,
            num_kv_heads=8,
            head_dim=32,
            mlp_dim=704,
            tied_head=True,
            embed_scale=256**0.5,
        )
    )
    config.vocabulary = str(FOLDER / "anchor" / "vocabulary")
    config.data.train = ({"jsonl": _file("augment")},)
    config.data.length = 128
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.train.num_steps = 500
    config.train.batch_size = 16
    config.train.log_every = 20
    config.train.save_every = 250
    return config


def _calm():
    connections = ((2, 4), (3, 9), (4, 14), (5, 19), (5, 24))
    composition = CompositionConfig(connections=connections, num_heads=6, head_dim=64, rotary=True)
    config = composed_run(composition)
    config.anchor, config.augments = ANCHOR, (str(FOLDER / "augment"),)
    _set_training(config)
    config.optimizer.weight_decay = 0.1
    return config


def _lora():
    config = decoder_run()
    config.decoder["from"] = ANCHOR
    _set_training(config)
    anchor = frozen.describe(ANCHOR).config
    augment = decoder_config(_augment())
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
