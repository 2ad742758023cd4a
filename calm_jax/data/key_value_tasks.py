"""The seqio Tasks and Mixtures of key-value arithmetic; importing this module registers them.

For every key-value config C, with its own vocabulary:

    calm_jax/key_value/C/augment, …/anchor                       splits train, validation
    calm_jax/key_value/C/bridge_math, …/bridge_subs, …/bridge_num   splits train, validation
    calm_jax/key_value/C/bridge       Mixture of the three, at the config's rates
    calm_jax/key_value/C/subs, …/num, …/math, …/math_seen        split test
    calm_jax/key_value/C/augment_first, …/augment_second         as augment, for half of the keys
    calm_jax/key_value/C/subs_first, …/subs_second, …/math_first, …/math_second   split test
"""

import pathlib

from calm_jax.data import key_value, key_value_builder, tasks
from calm_jax.data.tasks import seqio  # imported there after TensorFlow, as it must be
from calm_jax.errors import CalmError


class KeyValueTask(tasks.Task):
    """A Task whose TensorFlow Dataset is generated on this machine."""

    def prepare(self, data_dir: pathlib.Path) -> None:
        world = key_value.parse_task(self.name)
        folder = data_dir / world.fingerprint
        loader = self.source.tfds_dataset
        name = loader.name.partition(":")[0].removesuffix("/").rpartition("/")[2]
        key_value_builder.prepare(world, name.removeprefix(f"{world.name}_"), folder)
        loader.override_data_dir(str(folder))


def register_key_value(config: key_value.KeyValueConfig) -> None:
    """Registers the Tasks and the Mixture of a config; users may call it for configs of theirs."""
    if key_value.CONFIGS.setdefault(config.name, config) != config:
        raise CalmError(f"another key-value config is already named {config.name!r}")
    builder = key_value_builder.KeyValueArithmetic
    known = {corpus.name for corpus in builder.BUILDER_CONFIGS}
    builder.BUILDER_CONFIGS += [
        corpus for corpus in key_value_builder.corpus_configs(config) if corpus.name not in known
    ]
    folds = ("train", "validation")
    parts = key_value.BRIDGE_PARTS
    for corpus in ("augment", *(f"augment_{half}" for half in key_value.HALVES), "anchor"):
        _add_key_value(config, corpus, corpus, {fold: fold for fold in folds})
    for part in parts:
        _add_key_value(config, f"bridge_{part}", "bridge", {f: f"{part}_{f}" for f in folds})
    for corpus in ("evaluation", "evaluation_halves"):
        for name in key_value.CORPORA[corpus]:
            _add_key_value(config, name, corpus, {"test": name})
    prefix = f"calm_jax/key_value/{config.name}/bridge"
    seqio.MixtureRegistry.add(
        prefix,
        [(f"{prefix}_{part}", rate) for part, rate in zip(parts, config.bridge_rates, strict=True)],
    )


def _add_key_value(
    config: key_value.KeyValueConfig, name: str, corpus: str, splits: dict[str, str]
) -> None:
    builder = key_value_builder.KeyValueArithmetic
    seqio.TaskRegistry.add(
        f"calm_jax/key_value/{config.name}/{name}",
        source=seqio.TfdsDataSource(
            f"{builder.name}/{config.name}_{corpus}:{builder.VERSION}", splits=splits
        ),
        preprocessors=[tasks.tokenize],
        output_features=tasks.output_features(key_value.vocabulary(config.name)),
        task_cls=KeyValueTask,
    )


for _config in list(key_value.CONFIGS.values()):
    register_key_value(_config)
