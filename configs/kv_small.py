"""Every table of the key-value task in little: about eleven minutes on two CPU cores.

  calm experiment --config=configs/kv_small.py --workdir=runs/small

The arms of table5_kv.py and some of kv_ablations.py and kv_share.py, one seed each, with models of
half the width, 400 keys instead of 1,000, short trainings and 200 expressions of each set. It shows
that everything runs, and roughly what the larger ones show.
"""

import dataclasses
import pathlib

from calm_jax.cli.config import call_file, load_file
from calm_jax.experiment.arms import Experiment
from calm_jax.experiment.matching import matched_rank
from calm_jax.training.run_model import composition_configs, decoder_config

ARMS = {
    "kv_ablations": ("every_1", "init_paper", "no_norms"),
    "kv_share": ("share_5", "share_50"),
}
NUM_STEPS = {"anchor": 1_200, "augment": 600, "vanilla": 150, "random": 1}
BRIDGE_STEPS = 400


def get_experiment():
    table5, share = (_experiment(name) for name in ("table5_kv", "kv_share"))
    found = [dataclasses.replace(arm, x=20) if arm.name == "calm" else arm for arm in table5.arms]
    for file, names in ARMS.items():
        found += [arm for arm in _experiment(file).arms if arm.name in names]
    return dataclasses.replace(
        table5,
        title="The key-value task in little",
        arms=tuple(found),
        tasks=tuple(name.replace("/demo", "/small") for name in share.tasks),
        seeds=(0,),
        axis=share.axis,
    )


def get_config(arm: str = "calm"):
    file = next((file for file, names in ARMS.items() if arm in names), "table5_kv")
    config = _smaller(load_file(f"{_path(file)}:{arm}"))
    config.train.num_steps = NUM_STEPS.get(arm, BRIDGE_STEPS)
    config.train.batch_size = 16
    config.train.validate_every = config.train.save_every = config.train.num_steps
    if arm == "lora":
        models = (decoder_config(get_config(name)) for name in ("anchor", "augment"))
        config.lora.rank = matched_rank(
            next(models), [*models], composition_configs(get_config("calm"))
        )
    return config


def _smaller(config):
    """The same with half the width, and the smaller world's data."""
    if config.kind == "decoder" and config.decoder.get("embed_dim"):
        for name in ("embed_dim", "head_dim", "mlp_dim"):
            config.decoder[name] //= 2
        config.decoder.embed_scale = config.decoder.embed_dim**0.5
    config.vocabulary = config.vocabulary.replace("/demo", "/small")
    for split in ("train", "validation"):
        config.data[split] = tuple(
            entry | {"task": entry["task"].replace("/demo", "/small")}
            for entry in config.data[split]
        )
    return config


def _experiment(name):
    return call_file(_path(name), "get_experiment", Experiment)


def _path(name):
    return str(pathlib.Path(__file__).with_name(f"{name}.py"))
