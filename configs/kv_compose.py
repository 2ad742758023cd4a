"""The key-value task's bridge: sums over keys, from arithmetic on a fifth of the keys alone."""

from calm_jax.models import CompositionConfig
from calm_jax.training.configuration import composed_run


def get_config():
    # The value of a key is cleanest at the augment's last layer, and the anchor needs it early: it
    # must have been read before the layers that calculate.
    connections = ((3, 0), (3, 1), (3, 2), (3, 3), (3, 4))
    config = composed_run(CompositionConfig(connections=connections, rotary=True))
    config.name = "kv_compose"
    config.anchor = "runs/demo/anchor/frozen"
    config.augments = ("runs/demo/augment/frozen",)
    task = {"task": "calm_jax/key_value/demo/bridge"}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 48
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.3
    config.train.num_steps = 4_500
    config.train.batch_size = 32
    config.train.noise = 0.7
    config.train.log_every = 20
    config.train.validate_every = 500
    config.train.save_every = 500
    config.evaluate.tasks = tuple(
        f"calm_jax/key_value/demo/{name}" for name in ("subs", "num", "math", "math_seen")
    )
    config.evaluate.max_new_tokens = 8
    return config
