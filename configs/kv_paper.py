"""The key-value task at the paper's size (section 4.1), for an accelerator.

  calm experiment --config=configs/kv_paper.py --workdir=runs/paper

25,000 keys of 2 to 6 letters, unique values to 25,000, 3 to 6 operands, + - and *, a fifth of the
keys in the bridge's training. Values have several tokens, so answers are written out, as in
kv_medium.py; numbers are as people write them. The paper says neither what its models' sizes were
nor how long they trained.
"""

import dataclasses
import pathlib

from calm_jax.cli.config import call_file
from calm_jax.experiment.arms import Experiment
from calm_jax.experiment.matching import matched_rank, trained_as
from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training.configuration import composed_run, decoder_run
from calm_jax.training.run_model import composition_configs, decoder_config

TASK = "calm_jax/key_value/paper"


def get_experiment():
    medium, table5 = map(_experiment_of, ("kv_medium", "table5_kv"))
    return dataclasses.replace(
        medium,
        title="The paper's size",
        tasks=tuple(f"{TASK}/{name}" for name in ("math", "subs", "num", "math_seen")),
        flags=("--max_new_tokens=224",),
        paper=table5.paper[:1],
    )


def get_config(arm: str = "calm"):
    return {"anchor": anchor, "augment": augment, "calm": calm, "lora": lora}[arm]()


def augment():
    config = decoder_run(_form(embed_dim=512, num_layers=12, num_heads=8))
    _set_data(config, "augment")
    config.train.num_steps = 50_000
    return config


def anchor():
    config = decoder_run(_form(embed_dim=1024, num_layers=24, num_heads=16))
    _set_data(config, "anchor")
    config.train.num_steps = 100_000
    return config


def calm():
    config = composed_run(CompositionConfig(every=4, rotary=True))
    config.anchor = "runs/paper/seed_0/anchor/frozen"
    config.augments = ("runs/paper/seed_0/augment/frozen",)
    _set_data(config, "bridge")
    config.train.num_steps = 30_000
    return config


def lora():
    bridge = calm()
    config = trained_as(bridge)
    config.name, config.vocabulary = bridge.name, bridge.vocabulary
    # Of all matrices, no rank gives as many parameters as the bridge has, within 1 %.
    targets = config.lora.targets = ("query", "key", "value", "output")
    models = [decoder_config(get_config(name)) for name in ("anchor", "augment")]
    config.lora.rank = matched_rank(models[0], models[1:], composition_configs(bridge), targets)
    return config


def _form(**sizes):
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    return DecoderConfig.palm(
        vocab_size=128, head_dim=width // heads, mlp_dim=4 * width, dtype="bfloat16", **sizes
    )


def _set_data(config, corpus):
    config.name = f"kv_paper:{corpus}"
    config.vocabulary = "key_value/paper"
    task = {"task": f"{TASK}/{corpus}"}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 288
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 1_000
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.train.batch_size = 256
    config.train.validate_every = 1_000
    config.train.save_every = 1_000
    config.evaluate.tasks = tuple(f"{TASK}/{name}" for name in ("subs", "num", "math", "math_seen"))
    config.evaluate.max_new_tokens = 224


def _experiment_of(name):
    file = pathlib.Path(__file__).with_name(f"{name}.py")
    return call_file(str(file), "get_experiment", Experiment)
