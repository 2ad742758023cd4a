"""The key-value experiment in seconds, for tests: its models learn nothing of worth.

calm train --config=configs/kv_tiny.py:augment --workdir=DIR/augment       (and :anchor, :compose)
"""

from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training.configuration import composed_run, decoder_run

TASK = "calm_jax/key_value/tiny"


def get_config(run: str = "compose"):
    if run == "compose":
        config = composed_run(CompositionConfig(every=1))
        config.anchor, config.augments = "runs/tiny/anchor/frozen", ("runs/tiny/augment/frozen",)
    else:
        sizes = {"embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 32}
        config = decoder_run(DecoderConfig.llama(vocab_size=128, num_layers=3, **sizes))
    config.name = f"kv_tiny:{run}"
    config.vocabulary = "key_value/tiny"
    task = {"task": f"{TASK}/{'bridge' if run == 'compose' else run}"}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 32
    config.optimizer.warmup_steps = 2
    config.train.num_steps = 10
    config.train.batch_size = 8
    config.train.log_every = 1
    config.train.validate_every = 5
    config.train.save_every = 5
    config.train.tensorboard = False
    config.evaluate.tasks = tuple(f"{TASK}/{name}" for name in ("subs", "num", "math", "math_seen"))
    config.evaluate.limit = 20
    config.evaluate.max_new_tokens = 8
    return config
