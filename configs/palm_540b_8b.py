"""PaLM 540B reads PaLM 8B, on a v5p slice of 8 x 8 x 8 chips or a larger one.

Anchor and augment are presets, sizes that `calm plan` reads; set them to frozen folders to train.
"""

from calm_jax.models import CompositionConfig
from calm_jax.training.configuration import composed_run


def get_config():
    config = composed_run(CompositionConfig(every=4))
    config.name = "palm_540b_8b"
    config.anchor = "preset:palm_540b"
    config.augments = ("preset:palm_8b",)
    config.weight_sharding = "all"
    config.data.train = ({"jsonl": "data/train.jsonl"},)
    config.data.length = 2048
    config.mesh.fsdp = 32
    config.mesh.tensor = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.train.num_steps = 5_000
    config.train.batch_size = 256
    config.train.remat = "full"
    return config
