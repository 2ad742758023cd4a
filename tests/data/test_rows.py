"""Rows against grain's packing and against the sequences that went into them."""

import hashlib

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.data import cache
from calm_jax.data.rows import OPEN_ROWS, Sequences

LENGTH = 8
START = [77]
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=3 * LENGTH)


def columns(prompts, answers):
    """Ids and whether they are of the prompt [≤ LENGTH, 2], by hand."""
    pairs = zip(prompts, answers, strict=True)
    rows = [([(i, 1) for i in p] + [(i, 0) for i in a])[:LENGTH] for p, a in pairs]
    return [np.array(row, np.int64).reshape(-1, 2) for row in rows]


@pytest.mark.parametrize("count", [0, 3, 3 * OPEN_ROWS])
def test_packing_is_grains_first_fit(count):
    random = np.random.default_rng(count)
    sizes = random.integers(1, LENGTH + 1, (count, 2))
    prompts, answers = ([random.integers(0, 99, n).tolist() for n in column] for column in sizes.T)
    rows = Sequences.of(prompts, answers, START).cut(LENGTH).rows(LENGTH, pack=True)
    source = [{"row": row} for row in columns(prompts, answers)]
    packed = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct={"row": LENGTH},
        num_packing_bins=OPEN_ROWS,
        shuffle_bins=False,
    )
    expected = list(packed) if source else []
    assert len(rows["targets"]) == len(expected)
    for number, row in enumerate(expected):
        assert rows["targets"][number].tolist() == row["row"][:, 0].tolist()
        assert rows["prompt"][number].tolist() == row["row"][:, 1].tolist()
        assert rows["segment_ids"][number].tolist() == row["row_segment_ids"].tolist()


@given(st.lists(st.tuples(IDS, IDS), max_size=9))
def test_unpacked_a_sequence_is_a_row(pairs):
    prompts, answers = ([pair[side] for pair in pairs] for side in (0, 1))
    rows = Sequences.of(prompts, answers, START).cut(LENGTH).rows(LENGTH, pack=False)
    for number, row in enumerate(columns(prompts, answers)):
        assert rows["segment_ids"][number].tolist() == [1] * len(row) + [0] * (LENGTH - len(row))
        assert rows["targets"][number].tolist() == [*row[:, 0], *[0] * (LENGTH - len(row))]
        inputs = [*START, *row[:, 0]][: len(row)]
        assert rows["inputs"][number].tolist() == inputs + [0] * (LENGTH - len(row))
        assert rows["prompt"][number].tolist() == [*row[:, 1], *[0] * (LENGTH - len(row))]


@given(st.lists(st.tuples(IDS, IDS), max_size=9), st.booleans())
def test_text_goes_on_in_further_sequences_and_answers_do_not(pairs, pack):
    prompts, answers = ([pair[side] for pair in pairs] for side in (0, 1))
    found = Sequences.of(prompts, answers, START).continued(LENGTH)
    expected = []
    for prompt, answer in pairs:
        starts = [0] if prompt else range(0, max(len(answer), 1), LENGTH)
        whole = [*prompt, *answer]
        expected += [(whole[s:] if prompt else whole[s : s + LENGTH], len(prompt)) for s in starts]
    ends = np.cumsum(found.lengths_N)
    ids = [part.tolist() for part in np.split(found.ids_M, ends)[: len(found)]]
    assert list(zip(ids, found.prompts_N.tolist(), strict=True)) == expected


@given(st.lists(st.tuples(IDS, IDS), max_size=9), st.sampled_from([(), (77,), (77, 78)]))
def test_every_id_is_predicted_from_the_one_before_it(pairs, start):
    """The first id of a sequence without a start is an input alone."""
    prompts, answers = ([pair[side] for pair in pairs] for side in (0, 1))
    sequences = Sequences.of(prompts, answers, start).continued(LENGTH).cut(LENGTH)
    rows = sequences.rows(LENGTH, pack=True)
    found, expected = [], []
    for row in zip(*rows.values(), strict=True):
        inputs, targets, segments, prompt = row
        for segment in range(1, segments.max(initial=0) + 1):
            at = segments == segment
            if at.any():
                columns = (column[at].tolist() for column in (inputs, targets, prompt))
                found.append(list(zip(*columns, strict=True)))
    for prompt, answer in pairs:
        ids = [*start, *prompt, *answer]
        is_prompt = [1] * (len(start[1:]) + len(prompt)) + [0] * len(answer)
        pairs = list(zip(ids, ids[1:], is_prompt if start else is_prompt[1:], strict=False))
        if prompt or len(start) > 1:
            pieces = [pairs[:LENGTH]]
        else:
            pieces = [pairs[at : at + LENGTH] for at in range(0, len(pairs), LENGTH)]
        for number, piece in enumerate(pieces):
            if start and number:
                piece[0] = (start[0], *piece[0][1:])
        expected += [piece for piece in pieces if piece]
    assert sorted(found) == sorted(expected)


def test_counts_and_the_digest_of_a_part(tmp_path):
    prompts = [[], [1], [1] * 9, [], [1] * 8]
    answers = [list(range(20)), [2] * 9, [3], [4], []]
    parts = []
    for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [0, 1, 2, 3, 4]), ("c", [1, 0, 2, 3, 4])):
        pairs = [prompts[i] for i in order], [answers[i] for i in order]
        parts.append(
            cache.write_part(tmp_path / name, [Sequences.of(*pairs, START)], LENGTH, False)
        )
    assert {
        key: parts[0][key] for key in ("examples", "rows", "cut", "answers_lost", "longest")
    } == {
        "examples": 5,
        "rows": 7,
        "cut": 2,
        "answers_lost": 2,
        "longest": 10,
    }
    assert parts[0]["digest"] == parts[1]["digest"] != parts[2]["digest"]
    rows = cache.read_part(tmp_path / "a")
    digest = hashlib.sha256(b"".join(rows[name].tobytes() for name in rows)).hexdigest()
    assert digest == parts[0]["digest"]
    assert rows["targets"][:3].tolist() == [
        [*range(8)],
        [*range(8, 16)],
        [16, 17, 18, 19, 0, 0, 0, 0],
    ]
