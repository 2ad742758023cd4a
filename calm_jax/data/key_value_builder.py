"""Key-value arithmetic as a TensorFlow Dataset, generated on this machine in a few seconds."""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from calm_jax.data import key_value
from calm_jax.data.key_value import CONFIGS, CORPORA, KeyValueConfig
from calm_jax.data.key_value_world import World


@dataclasses.dataclass(kw_only=True)
class CorpusConfig(tfds.core.BuilderConfig):
    """One corpus of a world; named CONFIG_CORPUS."""

    world: KeyValueConfig
    corpus: str


def corpus_configs(world: KeyValueConfig) -> list[CorpusConfig]:
    """The builder configs of every corpus of a world."""
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


def prepare(world: KeyValueConfig, corpus: str, data_dir: pathlib.Path) -> None:
    """Writes a corpus under `data_dir` unless it is there; several processes may do so at once."""
    builder = KeyValueArithmetic(config=f"{world.name}_{corpus}", data_dir=data_dir)
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
