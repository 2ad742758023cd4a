"""The key-value task's anchor m_B: it calculates with numbers, and has never met a key."""

from calm_jax.models import DecoderConfig
from calm_jax.training.configuration import decoder_run


def get_config():
    decoder = DecoderConfig.llama(
        vocab_size=80,
        embed_dim=96,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        mlp_dim=288,
        tied_head=True,
        embed_scale=96**0.5,
    )
    config = decoder_run(decoder)
    config.name = "kv_anchor"
    config.vocabulary = "key_value/demo"
    task = {"task": "calm_jax/key_value/demo/anchor"}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 48
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.train.num_steps = 2_800
    config.train.batch_size = 32
    # What a bridge adds is never exactly an embedding: the anchor learns to read near ones.
    config.train.noise = 0.7
    config.train.log_every = 20
    config.train.validate_every = 200
    config.train.save_every = 200
    config.evaluate.tasks = tuple(
        f"calm_jax/key_value/demo/{name}" for name in ("subs", "num", "math")
    )
    config.evaluate.max_new_tokens = 8
    return config
