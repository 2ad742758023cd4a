"""Batches of prompts and answers that are made in memory."""

import numpy as np
import pytest

from calm_jax.data import own_tokens
from calm_jax.errors import CalmError


def test_batches_of_prompts_and_answers():
    batch = own_tokens.training_batch({}, [[5, 6, 7], [8]], [[9, 1], [2, 3, 1]], 6)
    expected = {
        "decoder_input_tokens": [[5, 6, 7, 9, 0, 0], [8, 2, 3, 0, 0, 0]],
        "decoder_target_tokens": [[6, 7, 9, 1, 0, 0], [2, 3, 1, 0, 0, 0]],
        "decoder_loss_weights": [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
        "decoder_positions": [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]],
        "decoder_segment_ids": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
        "decoder_causal_attention": [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    }
    assert batch.keys() == expected.keys()
    for key, array in batch.items():
        np.testing.assert_array_equal(array, expected[key], key)
    assert own_tokens.training_batch({}, [[5]], [[1]])["decoder_input_tokens"].shape == (1, 1)
    with pytest.raises(CalmError, match="takes 3 tokens, but length is 2"):
        own_tokens.training_batch({}, [[5, 6]], [[7, 1]], 2)
    with pytest.raises(CalmError, match="the prompt of row 1 is empty"):
        own_tokens.training_batch({}, [[5], []], [[7], [1]])
