"""seqio Tasks, read as token ids or as texts; importing this module imports TensorFlow.

A `Task` holds texts `inputs` (may be empty) and `targets`; the end token follows the targets. A
user's own seqio Task may hold ids from the start.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.data.rows import CHUNK, Sequences
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.quiet import import_tensorflow

tf = import_tensorflow()
import seqio  # noqa: E402 - imports TensorFlow, and so after it

TOKENIZE_BATCH = 1024


class SeqioVocabulary(seqio.Vocabulary):
    """Encodes with the Python vocabulary, also a whole batch of texts [N] as ragged ids [N, ?].

    seqio treats id 0 as padding; calm_jax never passes ids to seqio where that matters.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    @property
    def bos_id(self) -> int | None:
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.vocabulary.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.vocabulary.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = self.vocabulary.encode_batch([text.decode() for text in texts])
            lengths = np.array([len(row) for row in rows], np.int64)
            return np.concatenate([np.array(row, np.int32) for row in rows]), lengths

        texts, types = tf.reshape(s, [-1]), (tf.int32, tf.int64)
        flat, lengths = tf.numpy_function(encode, [texts], types, stateful=False)
        flat.set_shape([None])
        lengths.set_shape([None])
        ids = tf.RaggedTensor.from_row_lengths(flat, lengths, validate=False)
        return ids if s.shape.rank else ids.flat_values

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(ids: np.ndarray) -> np.ndarray:
            texts = [self.vocabulary.decode(row).encode() for row in ids.reshape(-1, ids.shape[-1])]
            return np.array(texts, object).reshape(ids.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SeqioVocabulary)
            and self.vocabulary.fingerprint == other.vocabulary.fingerprint
            and (self.bos_id, self.eos_id) == (other.bos_id, other.eos_id)
        )


def tokenize(
    dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
    """Texts to ids with end tokens, a thousand in each call; only `output_features` remain.

    seqio's own steps, with one text in each call, take several times as long.
    """

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
        "inputs": seqio.Feature(SeqioVocabulary(vocabulary), add_eos=False),
        "targets": seqio.Feature(SeqioVocabulary(vocabulary), add_eos=True),
    }


class Task(seqio.Task):
    """A Task whose name may have slashes, which seqio's own check refuses."""

    def __init__(self, name: str, **fields):
        self._given_name = name
        super().__init__(name.replace("/", ":"), **fields)

    @property
    def name(self) -> str:
        return self._given_name

    def prepare(self, data_dir: pathlib.Path) -> None:
        """Generates the data that the Task reads under `data_dir`, if it reads generated data."""


def find(task: str, module: str = "") -> list[tuple[seqio.Task, float]]:
    """The Tasks behind a registered Task or Mixture, with the shares at which they mix.

    `module` is imported first: a user's module registers Tasks there. Raises `CalmError` if the
    module or the name is not found.
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


def with_vocabulary(task: seqio.Task, vocabulary: Vocabulary) -> seqio.Task:
    """The Task with its texts in `vocabulary`; features that hold ids from the start keep them."""
    features = dict(task.output_features)
    for name, feature in features.items():
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary):
            continue
        if feature.add_eos and vocabulary.eos_id is None:
            raise CalmError(f"task {task.name!r}: {vocabulary} has no end token for its {name}")
        features[name] = dataclasses.replace(feature, vocabulary=SeqioVocabulary(vocabulary))
    return Task(
        task.name, source=task.source, preprocessors=task.preprocessors, output_features=features
    )


def sequences(
    task: seqio.Task, split: str, start_ids: Sequence[int], limit: int
) -> Iterator[Sequences]:
    """The ids of a Task's prompts and answers, in its order; `limit` 0 is all."""
    dataset = task.get_dataset(None, split, shuffle=False).take(limit or -1)
    names = [name for name in ("inputs", "targets") if name in dataset.element_spec]
    dataset = dataset.map(lambda example: {name: example[name] for name in names})
    for batch in dataset.ragged_batch(CHUNK).prefetch(1):
        answers = batch["targets"].to_list()
        prompts = batch["inputs"].to_list() if "inputs" in batch else [[]] * len(answers)
        yield Sequences.of(prompts, answers, start_ids)


def text_examples(task: seqio.Task, split: str, limit: int) -> Iterator[dict[str, Any]]:
    """The texts of a Task's features, with its examples' other fields; `limit` 0 is all."""
    if tokenize in task.preprocessors:
        dataset = task.source.get_dataset(split, shuffle=False)
    else:
        dataset = task.get_dataset(None, split, shuffle=False)
    for example in dataset.take(limit or -1).as_numpy_iterator():
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
