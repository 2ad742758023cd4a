"""Answers of pairs with an augment that reads features, against models run from scratch."""

import jax
import numpy as np
import pytest
import tiny_models
from feature_encoders import Encoder, random_items
from flax import nnx
from random_models import assert_close, palm, random_decoder

from calm_jax.data import own_features, own_tokens
from calm_jax.data.own_features import Placed
from calm_jax.decoding import Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose

PLACE = 7
PROMPTS = [[1, PLACE, 3], [PLACE, 2, PLACE, 9, 4], [5, 6]]


@pytest.fixture(scope="module")
def model():
    """Its first augment reads the anchor's tokens, its second features."""
    config = CompositionConfig(connections=((0, 0), (2, 1)), init="paper", rotary=True)
    augments = [random_decoder(palm(), 1), Encoder(nnx.Rngs(1))]
    composed = compose(random_decoder(palm()), augments, config, rngs=nnx.Rngs(2))
    return tiny_models.randomised(composed)


def items_of(prompts):
    images = iter(random_items(3, 9))
    return [[next(images) for _ in range(prompt.count(PLACE))] for prompt in prompts]


def test_answers_are_those_of_the_whole_model_from_scratch(model):
    rows = [
        own_features.placed(prompt, PLACE, images)
        for prompt, images in zip(PROMPTS, items_of(PROMPTS), strict=True)
    ]
    answers = Generator(model, max_length=16, slots=2).generate(
        PROMPTS, Sampling(max_new_tokens=4, logprobs=0), [{1: row} for row in rows]
    )
    for prompt, row, (answer,) in zip(PROMPTS, rows, answers, strict=True):
        batch = own_tokens.batch({}, [[*prompt, *answer.tokens]])
        batch |= own_features.own_arrays(1, model.augments[1].item_shape, [row], batch)
        logprobs_TV = jax.nn.log_softmax(model(Inputs.of_batch(batch))[0])
        assert len(answer.tokens) == 4
        for step, (token, said) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            logprobs_V = logprobs_TV[len(prompt) - 1 + step]
            assert token == int(np.argmax(logprobs_V))
            assert_close(said.logprob, logprobs_V[token], 1e-4)
    shown, hidden = (
        Generator(model, max_length=16, slots=1)
        .generate([PROMPTS[1]], Sampling(max_new_tokens=1, logprobs=0), [items])[0][0]
        .logprobs[0]
        .logprob
        for items in ({1: rows[1]}, {})
    )
    assert shown == pytest.approx(answers[1][0].logprobs[0].logprob, abs=1e-5)
    assert abs(shown - hidden) > 1e-3


def test_items_that_do_not_fit_are_refused(model):
    generator = Generator(model, max_length=16)
    (item,) = random_items(0, 1)
    for items, message in (
        ([], "items of 0 prompts were given for 1 prompts"),
        ([{0: Placed([item], [0])}], "items are given for augment 0, which reads no features"),
        ([{1: Placed([item], [2])}], "stands at index 2, but the prompt has 2 tokens"),
        ([{1: Placed([item[:2]], [0])}], r"item 0 for augment 1 has the shape \(2, 5\), but"),
    ):
        with pytest.raises(CalmError, match=message):
            generator.generate([[1, 2]], items=items)
    anchor = Generator(model.anchor, max_length=16)
    with pytest.raises(CalmError, match="items are given for augment 0, which reads no features"):
        anchor.generate([[1, 2]], items=[{0: Placed([item], [0])}])
    with pytest.raises(CalmError, match="augment 1 reads features, not tokens, which draft=2 does"):
        Generator(model, max_length=16, draft=2)
