"""The key-value task at the paper's size (section 4.1), for an accelerator.

  calm train --config=configs/kv_paper.py:augment --workdir=runs/paper/augment
  calm train --config=configs/kv_paper.py:anchor --workdir=runs/paper/anchor
  calm train --config=configs/kv_paper.py:compose --workdir=runs/paper/composed

25,000 keys of 2 to 6 letters, unique values to 25,000, 3 to 6 operands, + - and *, a fifth of the
keys in the bridge's training. The paper says neither what its models' sizes were nor how long they
trained.
"""

from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training.configuration import composed_run, decoder_run

TASK = "calm_jax/key_value/paper"


def get_config(run: str = "compose"):
    config = {"augment": augment, "anchor": anchor, "compose": compose}[run]()
    config.name = f"kv_paper:{run}"
    return config


def augment():
    config = decoder_run(_form(embed_dim=512, num_layers=12, num_heads=8))
    _set_data(config, "augment", loss_on_inputs=True)
    config.train.num_steps = 50_000
    return config


def anchor():
    config = decoder_run(_form(embed_dim=1024, num_layers=24, num_heads=16))
    _set_data(config, "anchor")
    config.train.num_steps = 100_000
    config.train.noise = 0.7
    return config


def compose():
    config = composed_run(CompositionConfig(every=4, rotary=True))
    config.anchor = "runs/paper/anchor/frozen"
    config.augments = ("runs/paper/augment/frozen",)
    _set_data(config, "bridge")
    config.train.num_steps = 30_000
    return config


def _form(**sizes):
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    return DecoderConfig.palm(
        vocab_size=128, head_dim=width // heads, mlp_dim=4 * width, dtype="bfloat16", **sizes
    )


def _set_data(config, corpus, **entry):
    config.vocabulary = "key_value/paper"
    task = {"task": f"{TASK}/{corpus}", **entry}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 256
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 1_000
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.train.batch_size = 256
    config.train.validate_every = 1_000
    config.train.save_every = 1_000
    config.evaluate.tasks = tuple(f"{TASK}/{name}" for name in ("subs", "num", "math", "math_seen"))
    config.evaluate.max_new_tokens = 48
