"""seqio Tasks and Mixtures of calm_jax; importing this module imports TensorFlow.

For every key-value config C, with its own vocabulary:

    calm_jax/key_value/C/augment, …/anchor                       splits train, validation
    calm_jax/key_value/C/bridge_math, …/bridge_subs, …/bridge_num   splits train, validation
    calm_jax/key_value/C/bridge       Mixture of the three, at the config's rates
    calm_jax/key_value/C/subs, …/num, …/math, …/math_seen        split test
    calm_jax/key_value/C/augment_first, …/augment_second         as augment, of half the keys
    calm_jax/key_value/C/subs_first, …/subs_second, …/math_first, …/math_second   split test

A Task here holds texts `inputs` (may be empty) and `targets`; the end token follows the targets.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from calm_jax.data import key_value, key_value_builder
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.quiet_tensorflow import import_tensorflow

tf = import_tensorflow()
import seqio  # noqa: E402 - imports TensorFlow, and so after it

TOKENIZE_BATCH = 1024


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Texts to ids, with the end tokens, a thousand a call; only `output_features` remain.

    seqio's own steps, a text a call, take several times as long. An example with a true
    `is_turn` is a turn of a chat, which ends as `chat.encode_examples` says.
    """
    if "is_turn" in dataset.element_spec:
        vocabulary = output_features["targets"].vocabulary
        return dataset.batch(TOKENIZE_BATCH).map(vocabulary.encode_examples_tf).unbatch()

    def encode(name: str, texts: tf.Tensor) -> tf.RaggedTensor:
        feature = output_features[name]
        ids = feature.vocabulary.encode_tf(texts)
        if not feature.add_eos:
            return ids
        return tf.concat([ids, tf.fill([ids.nrows(), 1], feature.vocabulary.eos_id)], axis=1)

    return (
        dataset.batch(TOKENIZE_BATCH)
        .map(lambda batch: {name: encode(name, batch[name]) for name in output_features})
        .unbatch()
    )


def output_features(vocabulary: Vocabulary) -> dict[str, seqio.Feature]:
    """The features of a Task of texts: prompt ids, and answer ids with the end token."""
    return {
        "inputs": seqio.Feature(vocabulary.seqio, add_eos=False),
        "targets": seqio.Feature(vocabulary.seqio, add_eos=True),
    }


class Task(seqio.Task):
    """A Task whose name may have slashes, which seqio's own check refuses."""

    def __init__(self, name: str, **fields):
        self._given_name = name
        super().__init__(name.replace("/", ":"), **fields)

    @property
    def name(self) -> str:
        return self._given_name


def register_key_value(config: key_value.KeyValueConfig) -> None:
    """Registers the Tasks and the Mixture of a world, for a module of one's own worlds too."""
    if key_value.CONFIGS.setdefault(config.name, config) != config:
        raise CalmError(f"there is another key-value config named {config.name!r}")
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
        preprocessors=[tokenize],
        output_features=output_features(key_value.vocabulary(config.name)),
        task_cls=Task,
    )


def find(task: str, module: str = "") -> list[tuple[seqio.Task, float]]:
    """The Tasks behind a registered Task or Mixture, with the shares at which they mix.

    `module`, imported first, is where a user registers his own.
    Raises `CalmError` if the module or the name is not found.
    """
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CalmError(f"task {task!r}: cannot import {module!r}: {error}") from error
    if task in seqio.TaskRegistry.names():
        return [(seqio.TaskRegistry.get(task), 1.0)]
    if task in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(task)
        rates = {part: float(mixture.get_rate(part)) for part in mixture.tasks}
        return [(part, rate / sum(rates.values())) for part, rate in rates.items()]
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    raise CalmError(f"no task {task!r}; known are {', '.join(known)}")


def make_ready(task: seqio.Task, data_dir: pathlib.Path) -> None:
    """Generates the data of a key-value Task under `data_dir`; leaves other Tasks alone."""
    config = key_value.parse_task(task.name)
    if config is None:
        return
    loader = task.source.tfds_dataset
    folder = data_dir / config.fingerprint
    name = loader.name.partition(":")[0].removesuffix("/").rpartition("/")[2]
    corpus = name.removeprefix(f"{config.name}_")
    key_value_builder.prepare(config, corpus, folder)
    loader.override_data_dir(str(folder))


def with_vocabulary(task: seqio.Task, vocabulary: Vocabulary) -> seqio.Task:
    """The Task with its texts in `vocabulary`; features that hold ids from the start keep them."""
    features = dict(task.output_features)
    for name, feature in features.items():
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary):
            continue
        if feature.add_eos and vocabulary.eos_id is None:
            raise CalmError(f"task {task.name!r}: {vocabulary} has no end token for its {name}")
        features[name] = dataclasses.replace(feature, vocabulary=vocabulary.seqio)
    return Task(
        task.name, source=task.source, preprocessors=task.preprocessors, output_features=features
    )


def text_examples(task: seqio.Task, split: str, limit: int) -> Iterator[dict[str, Any]]:
    """The texts of a Task's features, with what else its examples carry; `limit` 0 is all."""
    if tokenize in task.preprocessors:
        dataset = task.source.get_dataset(split, shuffle=False)
    else:
        dataset = task.get_dataset(None, split, shuffle=False)
    for example in (dataset.take(limit) if limit else dataset).as_numpy_iterator():
        for name, feature in task.output_features.items():
            if not isinstance(example[name], bytes):
                text = example.pop(f"{name}_pretokenized", None)
                ids = example[name].tolist()
                example[name] = feature.vocabulary.decode(ids) if text is None else text
        yield {name: _plain(value) for name, value in example.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


for _config in list(key_value.CONFIGS.values()):
    register_key_value(_config)
