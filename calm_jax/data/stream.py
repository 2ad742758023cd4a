"""Batches of a cached dataset, as a function of only (seed, global batch index).

The number of processes only decides which rows of a batch each process holds.
"""

import functools
import itertools
from collections.abc import Iterator

import grain
import numpy as np

from calm_jax.data.dataset import Dataset
from calm_jax.errors import CalmError

READ_THREADS = 2
PREFETCHED_BATCHES = 8

ENDLESS = 2**53  # the largest number that grain divides without rounding

Batch = dict[str, np.ndarray]


class _ShuffledRows:
    """Row numbers `start` … `start + count`, in a new random order each epoch, without end.

    grain's own shuffle takes 0.8 ms for each index if there are few rows.
    """

    def __init__(self, start: int, count: int, seed: list[int]):
        self._start, self._count, self._seed = start, count, seed
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self._seed, epoch]).permutation(self._count)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> int:
        epoch, inside = divmod(index, self._count)
        return self._start + int(self._order(epoch)[inside])


class Stream:
    """An endless stream of training batches.

    Every part is shuffled anew in each of its epochs, and parts are mixed by weight. `batch_size`
    is global; each process holds `batch_size / process_count` rows, in the order of processes.
    Raises `CalmError` if that is not a whole number.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        local = _local_batch_size(batch_size, process_count)
        weights = [part.weight for part in dataset.parts]
        rows = min(len(part) * sum(weights) / part.weight for part in dataset.parts)
        # Batches before a row comes again.
        self.first_epoch = int(rows // batch_size)
        parts, start = [], 0
        for number, part in enumerate(dataset.parts):
            parts.append(grain.MapDataset.source(_ShuffledRows(start, len(part), [seed, number])))
            start += len(part)
        mixed = grain.MapDataset.mix(parts, weights)
        self._batches = mixed.batch(local)[process_index::process_count].map(dataset.batch)

    def __getitem__(self, index: int) -> Batch:
        """This process' rows of the global batch `index`: six arrays [B, T], as `Dataset.batch`."""
        return self._batches[index]

    def iterate(self, start: int = 0) -> Iterator[tuple[int, Batch]]:
        """(index, batch) from `start` on, without end, read ahead in threads."""
        options = grain.ReadOptions(
            num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES
        )
        return zip(itertools.count(start), self._batches[start:].to_iter_dataset(options))


def batches_once(
    dataset: Dataset, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every row of the dataset once, in order; padding rows fill the last global batch."""
    local = _local_batch_size(batch_size, process_count)
    for first in range(0, len(dataset), batch_size):
        rows = first + process_index * local + np.arange(local)
        yield dataset.batch(np.where(rows < len(dataset), rows, -1))


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise CalmError(f"batch size {batch_size} is not divisible by {process_count} processes")
    return batch_size // process_count
