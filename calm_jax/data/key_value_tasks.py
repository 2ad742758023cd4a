"""The seqio Tasks and Mixtures of key-value arithmetic; importing this module registers them.

They read a TensorFlow Dataset that is generated on this machine in a few seconds.

For every key-value config C, with its own vocabulary:

    calm_jax/key_value/C/augment, …/anchor                       splits train, validation
    calm_jax/key_value/C/bridge_math, …/bridge_subs, …/bridge_num   splits train, validation
    calm_jax/key_value/C/bridge       Mixture of the three, at the config's rates
    calm_jax/key_value/C/subs, …/num, …/math, …/math_seen        split test
    calm_jax/key_value/C/augment_first, …/augment_second         as augment, for half of the keys
    calm_jax/key_value/C/subs_first, …/subs_second, …/math_first, …/math_second   split test
"""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from calm_jax.data import key_value, tasks
from calm_jax.data.key_value import CONFIGS, CORPORA, KeyValueConfig
from calm_jax.data.key_value_world import World
from calm_jax.data.tasks import seqio  # imported there after TensorFlow, as it must be
from calm_jax.errors import CalmError


@dataclasses.dataclass(kw_only=True)
class CorpusConfig(tfds.core.BuilderConfig):
    """One corpus of a world; named CONFIG_CORPUS."""

    world: KeyValueConfig
    corpus: str


def corpus_configs(world: KeyValueConfig) -> list[CorpusConfig]:
    return [
        CorpusConfig(
            name=f"{world.name}_{corpus}",
            description=f"Key-value arithmetic {world.name!r}: {corpus}",
            world=world,
            corpus=corpus,
        )
        for corpus in CORPORA
    ]


class KeyValueArithmetic(tfds.core.GeneratorBasedBuilder):
    """Substitution and arithmetic over keys with secret values (arXiv 2401.02412, section 4.1)."""

    VERSION = tfds.core.Version(key_value.VERSION)
    RELEASE_NOTES: ClassVar = {key_value.VERSION: "First release."}
    BUILDER_CONFIGS: ClassVar = [c for world in CONFIGS.values() for c in corpus_configs(world)]
    # There are no checksums in the code's folder; looking for them needs a package that TFDS 4.9.10
    # does not declare (importlib_resources).
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(
                {
                    "inputs": tfds.features.Text(),
                    "targets": tfds.features.Text(),
                    "set": tfds.features.Text(),
                    "operands": np.int32,
                    "unseen": np.bool_,
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict]]]:
        world = World(self.builder_config.world)
        corpus = self.builder_config.corpus
        return {split: self._generate_examples(world, corpus, split) for split in CORPORA[corpus]}

    def _generate_examples(
        self, world: World, corpus: str, split: str
    ) -> Iterator[tuple[int, dict]]:
        # TFDS shuffles by the key's hash, so that expressions of all sizes mix.
        yield from enumerate(world.examples(corpus, split))


class KeyValueTask(tasks.Task):
    """A Task whose TensorFlow Dataset is generated on this machine."""

    def prepare(self, data_dir: pathlib.Path) -> None:
        """Writes the corpus unless it is there; several processes may do so at once."""
        folder = data_dir / key_value.parse_task(self.name).fingerprint
        loader = self.source.tfds_dataset
        corpus = loader.name.partition(":")[0].removesuffix("/").rpartition("/")[2]
        _generate(KeyValueArithmetic(config=corpus, data_dir=folder))
        loader.override_data_dir(str(folder))


def _generate(builder: KeyValueArithmetic) -> None:
    if builder.is_prepared():
        return
    logging.info("Generating %s", builder.info.full_name)
    tfds.disable_progress_bar()
    try:
        # TFDS prints only about downloads, and there are none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        # Another process may have finished first: TFDS renames its folder into place.
        if not builder.is_prepared():
            raise


def register_key_value(config: KeyValueConfig) -> None:
    """Registers the Tasks and the Mixture of a config; users may call it for configs of theirs."""
    if CONFIGS.setdefault(config.name, config) != config:
        raise CalmError(f"another key-value config is already named {config.name!r}")
    corpora = KeyValueArithmetic.BUILDER_CONFIGS
    known = {corpus.name for corpus in corpora}
    corpora += [corpus for corpus in corpus_configs(config) if corpus.name not in known]
    folds, parts = ("train", "validation"), key_value.BRIDGE_PARTS
    for corpus in ("augment", *(f"augment_{half}" for half in key_value.HALVES), "anchor"):
        _add_key_value(config, corpus, corpus, {fold: fold for fold in folds})
    for part in parts:
        _add_key_value(config, f"bridge_{part}", "bridge", {f: f"{part}_{f}" for f in folds})
    for corpus in ("evaluation", "evaluation_halves"):
        for name in CORPORA[corpus]:
            _add_key_value(config, name, corpus, {"test": name})
    prefix = f"calm_jax/key_value/{config.name}/bridge"
    seqio.MixtureRegistry.add(
        prefix,
        [(f"{prefix}_{part}", rate) for part, rate in zip(parts, config.bridge_rates, strict=True)],
    )


def _add_key_value(config: KeyValueConfig, name: str, corpus: str, splits: dict[str, str]) -> None:
    dataset = f"{KeyValueArithmetic.name}/{config.name}_{corpus}:{key_value.VERSION}"
    seqio.TaskRegistry.add(
        f"calm_jax/key_value/{config.name}/{name}",
        source=seqio.TfdsDataSource(dataset, splits=splits),
        preprocessors=[tasks.tokenize],
        output_features=tasks.output_features(key_value.vocabulary(config.name)),
        task_cls=KeyValueTask,
    )


for _config in list(CONFIGS.values()):
    register_key_value(_config)
