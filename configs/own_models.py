"""A bridge between two models of your own, trained on your own examples.

  calm train --config=configs/own_models.py --workdir=runs/mine \
    --config.anchor=ANCHOR --config.augments="('AUGMENT',)" \
    --config.data.train="({'jsonl': 'examples.jsonl'},)"

ANCHOR and AUGMENT are frozen folders: `calm_jax.save_frozen` writes them, and so does every
`calm train` of a decoder (WORKDIR/frozen). Their tokenizers may differ (docs/tokenizers.md).
`configs/own_models.py:2` is for two augments with connections of their own.

A small trial first shows within minutes that models and data fit together. Add to the above:

    --config.train.num_steps=20 --config.train.batch_size=8 --config.data.length=256 \
    --config.train.validate_every=10 --config.optimizer.warmup_steps=5 --workdir=runs/trial
"""

from calm_jax.models import CompositionConfig
from calm_jax.training.configuration import composed_run


def get_config(augments: str = "1"):
    composition = CompositionConfig(
        # Every 4th layer of the augment, read by evenly spaced layers of the anchor, as in the
        # paper. Or name them, as (augment layer, anchor layer), 0-based:
        # connections=((3, 5), (7, 11)),
        every=4,
        # Zero: training starts from the anchor as it is. "paper": from random matrices.
        init="zero",
    )
    # One for each augment, each of which --config.composition[1].every=2 may set anew.
    config = composed_run(*[composition] * int(augments))
    config.name = "own_models"
    config.anchor = "models/anchor"
    config.augments = ("models/augment",)

    # A line of the file is {"inputs": …, "targets": …}, {"prompt": …, "completion": …},
    # {"text": …} or {"messages": […]}; only answers are trained on. The path may have wildcards
    # and end in ".gz"; "parquet" in place of "jsonl" reads Parquet, and "columns" says where the
    # fields are if they have other names. Files and seqio Tasks mix by weight: config.data.train =
    # ({"jsonl": "a/*.jsonl", "weight": 3.0}, {"task": "mine", "import": "my.tasks"},
    #  {"parquet": "b.parquet", "columns": {"inputs": "question", "targets": "answer"}})
    config.data.train = ({"jsonl": "data/train.jsonl"},)
    # The checkpoint that scores best here is kept, whatever comes later.
    config.data.validation = ({"jsonl": "data/validation.jsonl"},)
    config.data.length = 2048  # tokens of a row; short examples share one, long texts take several

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.1

    # Devices: batches are split over data and fsdp, weights over fsdp and tensor; -1 is the rest.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    # The paper trained on 5-7 % of the data that fine-tuning the anchor would have taken.
    config.train.num_steps = 5_000
    config.train.batch_size = 64  # rows, over all devices
    config.train.accumulate = 1  # raise it when a step does not fit into memory
    config.train.validate_every = 500
    config.train.save_every = 500
    return config
