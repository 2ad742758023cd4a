"""Cached rows, and how they become batches."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

# The stored arrays of a row [T]; all others follow from them.
DTYPES = {"inputs": np.int32, "targets": np.int32, "segment_ids": np.int32, "prompt": np.uint8}

_OWN = ("input_tokens", "segment_ids", "order", "positions", "causal_attention")


def own_keys(number: int) -> tuple[str, ...]:
    """The names of the arrays of an augment's own tokens, in files and in batches alike.

    `calm_jax.models.Inputs` describes them: tokens, segments, order, positions, prompt mask.
    """
    return tuple(f"augment_{number}_{name}" for name in _OWN)


def features_key(number: int) -> str:
    """The name of the array of an augment's features in batches, in place of its own tokens."""
    return f"augment_{number}_features"


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """The rows of one Task.

    Attributes:
      weight: share of the rows in a mixed stream, relative to the other parts' weights.
      loss_on_inputs: whether prompt tokens are also trained on.
      arrays: `DTYPES`, each [N, T], memory-mapped; and those of `own_keys`, int32 [N, S], for each
        augment with tokens of its own.
    """

    name: str
    weight: float
    loss_on_inputs: bool
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.arrays["targets"])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of one length, of one or more parts.

    `fingerprint` identifies the rows: it is equal exactly if they are.
    """

    parts: tuple[TaskRows, ...]
    length: int
    fingerprint: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def names(self) -> list[str]:
        """A name for each part: the last word of its own, or all of it, or that with a number."""
        whole = [part.name for part in self.parts]
        short = [name.rpartition("/")[2] for name in whole]
        if len(set(short)) == len(short):
            return short
        earlier = [whole[:index].count(name) for index, name in enumerate(whole)]
        return [f"{name}.{n + 1}" if n else name for name, n in zip(whole, earlier, strict=True)]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.parts)])

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these indices as the six `decoder_…` arrays [B, T]; −1: a row of padding.

        Indices count through the parts in order. All arrays are int32, except
        `decoder_loss_weights`, which is float32. Augments with tokens of their own add those of
        `own_keys` [B, S].
        """
        shape = len(rows), self.length
        weights_BT = np.zeros(shape, np.float32)
        arrays = {
            key: np.zeros((len(rows), array.shape[1]), np.int32)
            for key, array in self.parts[0].arrays.items()
        }
        for start, part in zip(self._starts, self.parts, strict=False):
            (mine,) = np.nonzero((rows >= start) & (rows < start + len(part)))
            inside = rows[mine] - start
            for key, array in arrays.items():
                array[mine] = part.arrays[key][inside]
            trained = (arrays["prompt"][mine] == 0) | part.loss_on_inputs
            weights_BT[mine] = trained & (arrays["segment_ids"][mine] > 0)
        inputs_BT, targets_BT, segments_BT, prompt_BT = map(arrays.pop, DTYPES)
        real_BT = segments_BT > 0
        starts_BT = real_BT & (segments_BT != _shift_right(segments_BT))
        index_BT = np.broadcast_to(np.arange(self.length, dtype=np.int32), shape)
        first_BT = np.maximum.accumulate(np.where(starts_BT, index_BT, 0), axis=1)
        causal_BT = np.where(starts_BT, np.int32(1), _shift_right(prompt_BT))
        return {
            "decoder_input_tokens": inputs_BT,
            "decoder_target_tokens": targets_BT,
            "decoder_loss_weights": weights_BT,
            "decoder_positions": (index_BT - first_BT) * real_BT,
            "decoder_segment_ids": segments_BT,
            "decoder_causal_attention": causal_BT * real_BT,
            **arrays,  # of augments
        }


def _shift_right(x_BT: np.ndarray) -> np.ndarray:
    return np.pad(x_BT[:, :-1], ((0, 0), (1, 0)))
