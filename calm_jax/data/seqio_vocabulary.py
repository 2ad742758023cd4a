"""A `Vocabulary` in the form that seqio Tasks take."""

from collections.abc import Sequence

import numpy as np

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.quiet import import_tensorflow

tf = import_tensorflow()
import seqio  # noqa: E402 - imports TensorFlow, and so after it


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
