"""The key-value task's bridge by the share of the keys that its training contains, D_C.

  calm experiment --config=configs/kv_share.py --workdir=runs/share

With the models of table5_kv.py. All arms train for as many steps, and are scored on the same
expressions, over keys that none of them has met: the keys of a share are among those of every
larger one, so what the largest share leaves out is unseen at all.
"""

import pathlib

from calm_jax.cli.config import load_file
from calm_jax.data.key_value import SHARES
from calm_jax.experiment.arms import Arm, Experiment

TASK = "calm_jax/key_value/demo"
OWN = 20  # percent of the keys in the demo's D_C


def get_experiment():
    shares = sorted((*SHARES, OWN))
    return Experiment(
        title="How many keys must the bridge have met?",
        arms=(
            Arm("anchor", kind="part"),
            Arm("augment", kind="part"),
            *(
                Arm(
                    _name(share),
                    f"{share} % of the keys",
                    kind="calm" if share == OWN else "ablation",
                    anchor="anchor",
                    augments=("augment",),
                    x=share,
                )
                for share in shares
            ),
        ),
        tasks=(
            *(f"{TASK}_share_{max(shares)}/{name}" for name in ("math", "subs")),
            f"{TASK}/num",
        ),
        reference=_name(OWN),
        seeds=(0, 1, 2),
        flags=("--max_new_tokens=8",),
        axis="percent of the keys in D_C",
    )


def get_config(arm: str = "calm"):
    if arm in ("anchor", "augment"):
        return _of_table5(arm)
    config = _of_table5("calm")
    if arm != _name(OWN):
        task = {"task": f"{TASK}_{arm}/bridge"}
        config.data.train = (task,)
        config.data.validation = (task,)
    return config


def _name(share):
    return "calm" if share == OWN else f"share_{share}"


def _of_table5(arm):
    return load_file(f"{pathlib.Path(__file__).with_name('table5_kv.py')}:{arm}")
