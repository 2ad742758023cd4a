import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.data.dataset import Dataset, TaskRows
from calm_jax.data.stream import Stream, batches_once
from calm_jax.errors import CalmError


def source_of(*sizes: int, weights: tuple[float, ...] = ()) -> Dataset:
    """Rows of two tokens that name their part and their number."""
    parts = []
    for number, size in enumerate(sizes):
        targets = np.stack([np.full(size, number), np.arange(size)], axis=1).astype(np.int32)
        arrays = {
            "inputs": targets,
            "targets": targets,
            "segment_ids": np.ones_like(targets),
            "prompt": np.zeros_like(targets, np.uint8),
        }
        parts.append(TaskRows(str(number), weights[number] if weights else 1.0, False, arrays))
    return Dataset(tuple(parts), 2)


def rows(batch) -> list[tuple[int, int]]:
    return list(map(tuple, batch["decoder_target_tokens"].tolist()))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    process_count=st.sampled_from([1, 2, 4]),
    index=st.integers(0, 10**6),
)
def test_the_global_batch_is_the_same_on_any_number_of_processes(sizes, seed, process_count, index):
    source = source_of(*sizes)
    whole = rows(Stream(source, batch_size=8, seed=seed)[index])
    parts = [
        Stream(source, batch_size=8, seed=seed, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    assert [row for part in parts for row in rows(part[index])] == whole


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 50), batch_size=st.integers(1, 9), epoch=st.integers(0, 3))
def test_each_epoch_has_every_row_once_in_a_new_order(size, batch_size, epoch):
    stream = Stream(source_of(size), batch_size=batch_size, seed=7)
    batches = -(-size * (epoch + 1) // batch_size)
    drawn = [row for index in range(batches) for row in rows(stream[index])]
    this_epoch = drawn[size * epoch : size * (epoch + 1)]
    assert sorted(this_epoch) == [(0, n) for n in range(size)]


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=3),
    batch_size=st.integers(1, 9),
)
def test_no_row_comes_twice_in_the_first_epoch(parts, batch_size):
    sizes, weights = zip(*parts, strict=True)
    stream = Stream(source_of(*sizes, weights=weights), batch_size=batch_size, seed=3)
    drawn = [row for index in range(stream.first_epoch) for row in rows(stream[index])]
    assert len(set(drawn)) == len(drawn) == stream.first_epoch * batch_size
    if len(sizes) == 1:
        assert stream.first_epoch == sizes[0] // batch_size


def test_epochs_and_seeds_shuffle_differently():
    first, second = (rows(Stream(source_of(50), batch_size=50, seed=0)[i]) for i in (0, 1))
    other = rows(Stream(source_of(50), batch_size=50, seed=1)[0])
    assert len({tuple(order) for order in (first, second, other)}) == 3


def test_iterating_from_an_index_gives_the_batches_of_that_index():
    stream = Stream(source_of(30, 11), batch_size=4, seed=3)
    for index, batch in zip(range(17, 40), stream.iterate(17), strict=False):
        assert batch[0] == index
        assert rows(batch[1]) == rows(stream[index])


def test_parts_mix_by_their_weights_in_every_stretch():
    stream = Stream(source_of(5, 500, weights=(1.0, 3.0)), batch_size=40, seed=0)
    for index in (0, 1, 999):
        from_first = sum(part == 0 for part, _ in rows(stream[index]))
        assert abs(from_first - 10) <= 1


def test_one_pass_has_every_row_once_and_ends_in_padding():
    source = source_of(5, 6)
    for process_count in (1, 2):
        seen = []
        for process_index in range(process_count):
            for batch in batches_once(
                source, 4, process_index=process_index, process_count=process_count
            ):
                assert batch["decoder_target_tokens"].shape == (4 // process_count, 2)
                real = batch["decoder_segment_ids"][:, 0] > 0
                assert (batch["decoder_loss_weights"].any(1) == real).all()
                seen += [row for row, is_real in zip(rows(batch), real, strict=True) if is_real]
        assert sorted(seen) == sorted([(0, n) for n in range(5)] + [(1, n) for n in range(6)])


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(CalmError, match="6 is not divisible by 4"):
        Stream(source_of(5), batch_size=6, seed=0, process_count=4)
    with pytest.raises(CalmError, match="6 is not divisible by 4"):
        next(batches_once(source_of(5), 6, process_count=4))
