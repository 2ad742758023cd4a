"""Answers of pairs with an augment that reads features, against models run from scratch."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from feature_encoders import Encoder, random_items
from flax import nnx
from random_models import palm, random_decoder

from calm_jax.data import own_features, own_tokens
from calm_jax.data.own_features import Placed
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.decoding import Generator, Sampling, steps
from calm_jax.decoding.memory import bytes_per_row
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose

PLACE = 7
PROMPTS = [[1, PLACE, 3], [PLACE, 2, PLACE, 9, 4], [5, 6]]


CONFIG = CompositionConfig(connections=((0, 0), (2, 1)), init="paper")
CONFIGS = {
    "rotary": dataclasses.replace(CONFIG, rotary=True),
    "latent": CONFIG,
    "only the prompt": dataclasses.replace(CONFIG, encoder_only=True),
}


@pytest.fixture(
    scope="module",
    params=[
        "rotary",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("only the prompt", "latent")),
    ],
)
def model(request, tmp_path_factory):
    """Its first augment reads the anchor's bytes, its second features, its third other tokens."""
    anchor, text = random_decoder(palm(vocab_size=264)), random_decoder(palm(vocab_size=536), 1)
    augments = [random_decoder(palm(vocab_size=264), 2), Encoder(nnx.Rngs(1)), text]
    anchor.vocabulary = augments[0].vocabulary = load_vocabulary("bytes")
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("words"))
    text.vocabulary = vocabulary_of_folder(folder)
    composed = compose(anchor, augments, CONFIGS[request.param], rngs=nnx.Rngs(2))
    return tiny_models.randomised(composed)


@pytest.fixture(scope="module")
def encoder():
    """Its only augment reads features."""
    composed = compose(random_decoder(palm()), Encoder(nnx.Rngs(1)), CONFIG, rngs=nnx.Rngs(2))
    return tiny_models.randomised(composed)


def rows_of(prompts, seed=3):
    images = iter(random_items(seed, sum(prompt.count(PLACE) for prompt in prompts)))
    return [
        own_features.placed(prompt, PLACE, [next(images) for _ in range(prompt.count(PLACE))])
        for prompt in prompts
    ]


def from_scratch(model, rows, asked, placed, number):
    """Log-probabilities [B, T, V] of ids, of which the first `asked` of each row are its prompt."""
    found = {}
    if model.vocabulary is not None:
        vocabularies = [getattr(augment, "vocabulary", None) for augment in model.augments]
        found = own_tokens.alignments(model.vocabulary, vocabularies)
    batch = own_tokens.batch(found, rows, asked)
    shape = model.augments[number].item_shape
    batch |= own_features.own_arrays(number, shape, placed, batch)
    known = None if model.vocabulary is None else model.vocabulary.size
    return np.asarray(jax.nn.log_softmax(model(Inputs.of_batch(batch))[..., :known]))


def assert_greedy(model, prompts, placed, answers, number=1):
    answers = [answer for (answer,) in answers]
    rows = [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]
    whole = from_scratch(model, rows, list(map(len, prompts)), placed, number)
    for prompt, answer, logprobs_TV in zip(prompts, answers, whole, strict=True):
        expected_NV = logprobs_TV[len(prompt) - 1 :][: len(answer.tokens)]
        np.testing.assert_array_equal(answer.tokens, expected_NV.argmax(1))
        found = [one.logprob for one in answer.logprobs]
        np.testing.assert_allclose(found, expected_NV.max(1), atol=1e-5 * abs(whole).max())


def test_answers_are_those_of_the_whole_model_from_scratch(model):
    """Items in several chunks of the anchor's, and rows without any."""
    random = np.random.default_rng(0)
    long = random.integers(8, 24, 40).tolist()
    for place in (0, 15, 16, 31, 39):
        long[place] = PLACE
    prompts = [*PROMPTS, long, [*long[:20], 3], [9] * 17]
    rows = rows_of(prompts)
    generator = Generator(model, max_length=64, slots=2, prefill_chunk=16, eos_ids=())
    sampling, items = Sampling(max_new_tokens=6, logprobs=0), [{1: row} for row in rows]
    answers = generator.generate(prompts, sampling, items)
    assert all(len(answer.tokens) == 6 for (answer,) in answers)
    assert_greedy(model, prompts, rows, answers)
    again = generator.generate(prompts[::-1], sampling, items[::-1])[::-1]
    assert [a.tokens for (a,) in again] == [a.tokens for (a,) in answers]


def test_an_image_is_read_once_for_all_that_it_stands_in(encoder, monkeypatch):
    """Samples of a prompt, and prompts with the same beginning; not with other images in it."""
    read, step = [], steps.read_own
    monkeypatch.setattr(
        steps, "read_own", lambda *given, **sizes: read.append(1) or step(*given, **sizes)
    )
    prompt = [3, PLACE, *range(8, 23), PLACE, 9]
    generator = Generator(encoder, max_length=64, slots=2)
    (row,), options = rows_of([prompt]), {"max_new_tokens": 20, "logprobs": 0}
    (answers,) = generator.generate([prompt], Sampling(**options, n=4, temperature=1.0), [{0: row}])
    assert len(read) == 1 and len({tuple(answer.tokens) for answer in answers}) > 1
    prompts = [prompt, [*prompt, 4, 5], [*prompt[:-1], 4], [*prompt[:17], 4, 4]]
    rows = [row, row, row, Placed(row.items[:1], [1])]
    found = generator.generate(prompts, Sampling(**options), [{0: each} for each in rows])
    assert_greedy(encoder, prompts, rows, found, 0)
    assert len(read) == 1
    other = rows_of([prompt], seed=5)
    changed = generator.generate([prompt], Sampling(**options), [{0: other[0]}])
    assert_greedy(encoder, [prompt], other, changed, 0)
    assert len(read) == 2 and changed[0][0].logprobs != found[0][0].logprobs


def test_answers_to_images_alone_are_made_many_tokens_at_a_time(encoder, monkeypatch):
    made, step = [], steps.decode
    monkeypatch.setattr(
        steps, "decode", lambda *given, **sizes: made.append(1) or step(*given, **sizes)
    )
    rows = rows_of(PROMPTS)
    generator = Generator(encoder, max_length=64, slots=4)
    sampling = Sampling(max_new_tokens=30, logprobs=0)
    answers = generator.generate(PROMPTS, sampling, [{0: row} for row in rows])
    assert len(made) == 1
    assert_greedy(encoder, PROMPTS, rows, answers, 0)


def test_scores_and_streams_with_images(model):
    rows, continuations = rows_of(PROMPTS), [[8, 9], [3], [10, 11, 12]]
    generator = Generator(model, max_length=32, slots=2, eos_ids=())
    scores = generator.score(PROMPTS, continuations, [{1: row} for row in rows])
    whole = [[*a, *b] for a, b in zip(PROMPTS, continuations, strict=True)]
    expected = from_scratch(model, whole, list(map(len, PROMPTS)), rows, 1)
    for prompt, after, score, logprobs_TV in zip(
        PROMPTS, continuations, scores, expected, strict=True
    ):
        places = np.arange(len(prompt) - 1, len(prompt) - 1 + len(after))
        np.testing.assert_allclose(
            score.tokens_logprobs, logprobs_TV[places, after], atol=1e-5 * abs(expected).max()
        )
    sampling, items = Sampling(max_new_tokens=9), {1: rows[1]}
    ((answer,),) = generator.generate(PROMPTS[1:2], sampling, [items])
    assert "".join(generator.stream(PROMPTS[1], sampling, items)) == answer.text


def test_bytes_of_the_state_equal_the_formula(model):
    cache = model.init_cache(2, 32, own={1: 6, 2: 80})
    held = sum(x.nbytes for x in jax.tree.leaves(cache) if x.ndim > 2)
    assert held == 2 * bytes_per_row(model, 32, own={1: 6, 2: 80})


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
