"""The key-value task's augment m_A: it knows the value of every key, and cannot calculate."""

from calm_jax.models import DecoderConfig
from calm_jax.training.configuration import decoder_run


def get_config():
    form = DecoderConfig.llama(
        vocab_size=128,
        embed_dim=96,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        mlp_dim=256,
        tied_head=True,
    )
    config = decoder_run(form)
    config.name = "kv_augment"
    config.vocabulary = "key_value/demo"
    # On all tokens: a value that stands behind its key is learned only where it is itself asked for.
    task = {"task": "calm_jax/key_value/demo/augment", "loss_on_inputs": True}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 64
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.01
    config.train.num_steps = 700
    config.train.batch_size = 48
    config.train.log_every = 20
    config.train.validate_every = 100
    config.train.save_every = 100
    config.evaluate.tasks = tuple(f"calm_jax/key_value/demo/{name}" for name in ("subs", "num", "math"))
    config.evaluate.max_new_tokens = 8
    return config
