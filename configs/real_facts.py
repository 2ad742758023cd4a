"""Private facts for a real anchor: SmolLM2-135M and a small augment that knows made-up names.

  bash launch/real_pair.sh facts [FOLDER]

The augment is trained from nothing on made-up names of countries. D_C asks for the capital, the
language or the currency of a fifth of the names; the anchor knows the answers, but no name. What is
scored are names that D_C never had, and names of countries that D_C never had. The same questions
with the countries' own names, which D_C has too, show what the anchor knows, and keeps.
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
        title="Does a real model use what a small one knows?",
        arms=(
            Arm("anchor", "SmolLM2-135M alone", kind="part", frozen=ANCHOR),
            Arm("augment", kind="part"),
            Arm("random", "augment never trained", kind="part"),
            Arm("calm", "CALM", kind="calm", **PAIR),
            Arm("lora", "anchor with LoRA", decoder="anchor"),
            Arm("finetuned", "anchor fine-tuned", decoder="anchor"),
            Arm("calm_random", "CALM, random augment", anchor="anchor", augments=("random",)),
            Arm("encoder_only", "augment reads the prompt alone", kind="ablation", **PAIR),
            Arm(
                "handed_over",
                "text handed over",
                scored_from="anchor",
                flags=(
                    "--hand_over={augment}",
                    "--hand_over_prompt=This is about{answer}. {inputs}",
                ),
            ),
            Arm("mixed", "logits mixed", scored_from="anchor", flags=("--mix={augment}",)),
            control("shuffled", "taps of other rows"),
            control("zeroed", "taps zeroed"),
            control("noise", "taps replaced by noise"),
            control("permuted", "augment's weights permuted"),
        ),
        tasks=tuple(_file(name) for name in ("names", "countries", "asked", "ceiling")),
        reference="calm",
        flags=("--metric=contains", "--max_new_tokens=6"),
    )


def get_config(arm: str = "calm"):
    return {
        "augment": _augment,
        "random": lambda: untrained(_augment()),
        "calm": _calm,
        "calm_random": _calm,
        "encoder_only": _encoder_only,
        "lora": _lora,
        "finetuned": _finetuned,
    }[arm]()


def _file(name):
    return str(FOLDER / "facts" / f"{name}.jsonl")


def _augment():
    config = decoder_run(
        DecoderConfig.llama(
            vocab_size=49_152,
            embed_dim=192,
            num_layers=4,
            num_heads=6,
            num_kv_heads=6,
            head_dim=32,
            mlp_dim=512,
            tied_head=True,
            embed_scale=192**0.5,
        )
    )
    config.vocabulary = str(FOLDER / "anchor" / "vocabulary")
    config.data.train = ({"jsonl": _file("augment")},)
    config.data.length = 64
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.3
    config.train.num_steps = 500
    config.train.batch_size = 16
    config.train.log_every = 20
    return config


def _calm():
    # The names' countries are cleanest at the augment's last layer.
    connections = ((3, 0), (3, 3), (3, 6), (3, 10))
    composition = CompositionConfig(connections=connections, num_heads=8, head_dim=64, rotary=True)
    config = composed_run(composition)
    config.anchor, config.augments = ANCHOR, (str(FOLDER / "augment"),)
    _set_training(config)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.3
    config.train.noise = 0.7
    return config


def _encoder_only():
    config = _calm()
    config.composition.encoder_only = True
    return config


def _finetuned():
    config = decoder_run()
    config.decoder["from"] = ANCHOR
    _set_training(config)
    config.optimizer.learning_rate = 1e-4
    return config


def _lora():
    config = _finetuned()
    anchor = frozen.describe(ANCHOR).config
    augment = decoder_config(_augment())
    config.lora.rank = matched_rank(anchor, [augment], composition_configs(_calm()))
    config.optimizer.learning_rate = 1e-3
    return config


def _set_training(config):
    """D_C and its schedule, the same for the bridge and what it is compared with."""
    config.data.train = ({"jsonl": _file("bridge")},)
    config.data.validation = ({"jsonl": _file("validation")},)
    config.data.length = 64
    config.optimizer.warmup_steps = 15
    config.optimizer.b2 = 0.99
    config.train.num_steps = 150
    config.train.batch_size = 4
    config.train.log_every = 10
    config.train.validate_every = 25
    config.train.save_every = 50
