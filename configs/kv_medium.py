"""The key-value task between the demo and the paper (section 4.1), for a CPU.

  calm experiment --config=configs/kv_medium.py --workdir=runs/medium

5,000 keys of 2 to 6 letters, values from 1 to 999, 3 or 4 operands, + and -, a digit a token, a
fifth of the keys in the bridge's training. A value of several digits is never whole at its key, so
answers are written out: the expression again with each value behind its key, then one operation
after another. The augment knows each digit of a value there, and the anchor each one of a result.
Numbers have four digits, units first, a negative one is its ten's complement, and an operation is
written in columns: a digit of both operands, then that of the result. Where abc is 412 and de is 7,
`<math>abc+de-3000=` is answered by `abc2140+de7000-3000=+279101404000-936101404000`.
"""

from calm_jax.experiment.arms import Arm, Experiment, control
from calm_jax.experiment.matching import matched_rank, trained_as
from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training.configuration import composed_run, decoder_run
from calm_jax.training.run_model import composition_configs, decoder_config

TASK = "calm_jax/key_value/medium"


def get_experiment():
    return Experiment(
        title="Values of several tokens",
        arms=(
            Arm("anchor", kind="part"),
            Arm("augment", kind="part"),
            Arm("calm", "CALM", kind="calm", anchor="anchor", augments=("augment",)),
            Arm("lora", "anchor with LoRA", decoder="anchor"),
            control("permuted", "augment's weights permuted"),
        ),
        tasks=tuple(f"{TASK}/{name}" for name in ("math", "subs", "num", "math_seen")),
        reference="calm",
        seeds=(0, 1, 2),
        flags=("--max_new_tokens=88",),
    )


def get_config(arm: str = "calm"):
    return {"anchor": anchor, "augment": augment, "calm": calm, "lora": lora}[arm]()


def anchor():
    return _part("anchor", num_steps=1_300)


def augment():
    return _part("augment", num_steps=2_000)


def calm():
    # A digit is what the augment predicts at its last layer: the anchor needs it once it knows from
    # the marker and its own place that a digit comes next, in its last layers.
    connections = ((3, 1), (3, 2), (3, 3))
    config = composed_run(CompositionConfig(connections=connections, rotary=True))
    config.anchor = "runs/medium/seed_0/anchor/frozen"
    config.augments = ("runs/medium/seed_0/augment/frozen",)
    _set_data(config, "bridge")
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.1
    config.train.num_steps = 600
    return config


def lora():
    bridge = calm()
    config = trained_as(bridge)
    config.name, config.vocabulary = bridge.name, bridge.vocabulary
    models = [decoder_config(get_config(name)) for name in ("anchor", "augment")]
    config.lora.rank = matched_rank(models[0], models[1:], composition_configs(bridge))
    return config


def _part(corpus, num_steps):
    decoder = DecoderConfig.llama(
        vocab_size=64,
        embed_dim=96,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        mlp_dim=288,
        tied_head=True,
        embed_scale=96**0.5,
    )
    config = decoder_run(decoder)
    _set_data(config, corpus)
    config.optimizer.name = "muon"  # begins to learn sums and keys in fewer steps than Adam
    config.optimizer.learning_rate = 4e-3
    config.optimizer.weight_decay = 0.1
    config.train.num_steps = num_steps
    return config


def _set_data(config, corpus):
    config.name = f"kv_medium:{corpus}"
    config.vocabulary = "key_value/medium"
    task = {"task": f"{TASK}/{corpus}"}
    config.data.train = (task,)
    config.data.validation = (task,)
    config.data.length = 140
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.99
    config.train.batch_size = 20
    config.train.log_every = 20
    config.train.validate_every = 100
    config.train.save_every = 100
    config.evaluate.tasks = tuple(f"{TASK}/{name}" for name in ("subs", "num", "math"))
    config.evaluate.max_new_tokens = 88
