"""Two augments, each of which knows one half of the keys, and one anchor that knows none.

  calm train --config=configs/kv_two_augments.py:first --workdir=runs/two/first
  calm train --config=configs/kv_two_augments.py:second --workdir=runs/two/second
  calm train --config=configs/kv_two_augments.py:anchor --workdir=runs/two/anchor
  calm train --config=configs/kv_two_augments.py:compose --workdir=runs/two/composed

The augments differ in family, width and depth, and each has connections of its own. Letters that
mean nothing to it an augment calls `?`, so that the bridge can tell which of the two to heed. The
bridge is trained on a fifth of the keys; subs_first, subs_second, math_first and math_second ask
for the others of each half, subs and math for both halves at once. `:alone` is the same bridge
without the second augment.
"""

from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training.configuration import composed_run, decoder_run

TASK = "calm_jax/key_value/demo"


# To many anchor layers, for the value of a key is needed early, and more than once.
FIRST = CompositionConfig(connections=((3, 0), (3, 1), (3, 2), (3, 3)), rotary=True)
SECOND = CompositionConfig(connections=((2, 0), (2, 1), (2, 2), (2, 3)), rotary=True)


def get_config(run: str = "compose"):
    runs = {"first": first, "second": second, "anchor": anchor, "compose": compose, "alone": alone}
    config = runs[run]()
    config.name = f"kv_two_augments:{run}"
    return config


def first():
    decoder = DecoderConfig.llama(num_layers=4, tied_head=True, embed_scale=96**0.5, **_sizes(96))
    config = decoder_run(decoder)
    _set_up(config, "augment_first", num_steps=600, learning_rate=4e-3, weight_decay=0.5)
    return config


def second():
    config = decoder_run(DecoderConfig.gemma(num_layers=3, **_sizes(128)))
    _set_up(config, "augment_second", num_steps=700, learning_rate=4e-3, weight_decay=0.5)
    return config


def anchor():
    decoder = DecoderConfig.llama(num_layers=5, tied_head=True, embed_scale=96**0.5, **_sizes(96))
    config = decoder_run(decoder)
    _set_up(config, "anchor", num_steps=1_000, learning_rate=3e-3, weight_decay=0.1)
    config.train.noise = 0.7
    return config


def compose():
    return _bridge({"first": FIRST, "second": SECOND})


def alone():
    return _bridge({"first": FIRST})


def _bridge(compositions):
    config = composed_run(*compositions.values())
    config.anchor = "runs/two/anchor/frozen"
    config.augments = tuple(f"runs/two/{augment}/frozen" for augment in compositions)
    _set_up(config, "bridge", num_steps=1_000, learning_rate=5e-3, weight_decay=0.3)
    config.train.noise = 0.7
    return config


def _sizes(width):
    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": width // 4}
    return {"vocab_size": 80, "embed_dim": width, "mlp_dim": 3 * width, **heads}


def _set_up(config, corpus, *, num_steps, learning_rate, weight_decay):
    config.vocabulary = "key_value/demo"
    task = {"task": f"{TASK}/{corpus}"}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 48
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = weight_decay
    config.train.num_steps = num_steps
    config.train.batch_size = 32
    config.train.log_every = 20
    config.train.validate_every = 200
    config.train.save_every = 200
    sets = ("subs_first", "subs_second", "subs", "num", "math_first", "math_second", "math")
    config.evaluate.tasks = tuple(f"{TASK}/{name}" for name in sets)
    config.evaluate.max_new_tokens = 8
