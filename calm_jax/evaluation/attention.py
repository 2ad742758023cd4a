"""What the connections of a composed model attend to in one prompt, kept for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.data.vocabulary import Vocabulary
from calm_jax.models import ComposedDecoder, Inputs

ATTENTION_TOKENS = 32  # tokens of the prompt whose attention is kept: more are not legible


def attention(model: ComposedDecoder, answers: Mapping[str, list[dict]]) -> dict[str, Any] | None:
    """What each connection attends to in one prompt, as a mean over heads; None without prompts.

    None too where an augment's tokens are not the anchor's: one row of labels could not name both.
    The prompt is the first that was answered right, of MATH where there is such a set.
    """
    records = [one for of_task in answers.values() for one in of_task if one.get("inputs")]
    if not records or any(model.own_tokens):
        return None
    example = min(
        records, key=lambda one: (not one.get("correct", False), one.get("set") != "math")
    )
    vocabulary = model.vocabulary
    ids = vocabulary.encode_sequence(example["inputs"])[:ATTENTION_TOKENS]
    tokens_1T = np.array([ids], np.int32)
    maps = model.attention_maps(Inputs(tokens_1T, prompt_mask_BT=np.ones_like(tokens_1T)))
    return {
        "inputs": example["inputs"],
        "tokens": token_texts(vocabulary, ids),
        "connections": [
            found | {"weights": np.round(np.asarray(found["weights"])[0].mean(0), 4).tolist()}
            for found in maps
        ],
    }


def token_texts(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """The text that each token adds: "�" for part of a character, the name of a special token."""
    names, texts = vocabulary.tokens(), []
    start, before = 0, ""
    for end, token in enumerate(ids, start=1):
        text = vocabulary.decode(ids[start:end])
        added = text.removeprefix(before)
        texts.append("\ufffd" if "\ufffd" in added else added or names[token])
        before = text.rstrip("\ufffd")
        if token in vocabulary.eos_ids:  # decoding would stop at it: what follows starts anew
            start, before = end, ""
    return texts
