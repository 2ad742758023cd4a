"""Answers that an augment drafts are the answers without a draft."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models  # noqa: F401, for its setting of the compiler
from cases import some_slow
from flax import nnx
from random_models import llama, palm, random_composed, random_decoder
from scipy import stats

from calm_jax.decoding import Generator, Sampling, draft_length
from calm_jax.decoding.draft_length import DraftLength, tokens_of_round
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, compose

FORMS = {
    "taps below the last layer": lambda: random_composed(
        llama(num_layers=2), (palm(num_layers=3),), CompositionConfig(((0, 0), (1, 1)))
    ),
    "regular": lambda: random_composed(
        llama(num_layers=5), (palm(num_layers=4),), CompositionConfig(every=2)
    ),
    "several": lambda: random_composed(
        palm(num_layers=2),
        (llama(num_layers=2), palm(num_layers=2)),
        (CompositionConfig(every=1), CompositionConfig(((0, 1), (1, 0)), rotary=True)),
    ),
    "only the prompt": lambda: random_composed(
        palm(), (palm(),), CompositionConfig(every=1, encoder_only=True)
    ),
}
ASKED = [  # greedy, sampled and penalised answers, of several lengths, in one batch
    ([9], Sampling(max_new_tokens=17, temperature=0.7, top_k=9, repetition_penalty=1.4)),
    ([3, 4], Sampling(max_new_tokens=21, logprobs=0)),
    (list(range(1, 13)), Sampling(max_new_tokens=9, logprobs=0)),
    ([7, 8], Sampling(max_new_tokens=21, temperature=1.0, seed=3, n=2)),
]


@pytest.mark.parametrize("form", some_slow(FORMS, [*FORMS][1:]))
def test_a_draft_changes_no_token(form, monkeypatch):
    monkeypatch.setattr(draft_length, "COMPARED", np.inf)  # it stays at its length
    model = FORMS[form]()
    sizes = {"max_length": 48, "slots": 3, "prefill_chunk": 16, "eos_ids": (11,)}
    prompts, samplings = map(list, zip(*ASKED, strict=True))
    expected = Generator(model, **sizes).generate(prompts, samplings)
    drafted = Generator(model, **sizes, draft=3)
    found = drafted.generate(prompts, samplings)
    for ours, theirs in zip(found, expected, strict=True):
        assert [a.tokens for a in ours] == [a.tokens for a in theirs]
        assert [a.finish_reason for a in ours] == [a.finish_reason for a in theirs]
        if theirs[0].logprobs is not None:
            np.testing.assert_allclose(
                [one.logprob for one in ours[0].logprobs],
                [one.logprob for one in theirs[0].logprobs],
                atol=2e-5,
            )
    assert drafted.drafting.compared > 0


def test_the_same_model_twice_accepts_every_token(monkeypatch):
    monkeypatch.setattr(draft_length, "COMPARED", np.inf)
    anchor = random_decoder(palm(num_layers=2))
    model = compose(anchor, anchor, CompositionConfig(every=1, init="zero"), rngs=nnx.Rngs(0))
    generator = Generator(model, max_length=64, slots=2, draft=4)
    sampling = Sampling(max_new_tokens=40, temperature=1.0)
    (one,), (two,) = generator.generate([[1, 2], [3]], sampling)
    assert len(one.tokens) == len(two.tokens) == 40
    drafting = generator.drafting
    assert drafting.accepted == drafting.compared > 40


@pytest.mark.parametrize("n", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_distribution_is_that_of_the_model(n, monkeypatch):
    """Answers of three tokens, counted against exact probabilities."""
    monkeypatch.setattr(draft_length, "COMPARED", np.inf)
    model = random_composed(
        llama(vocab_size=6, num_layers=2),
        (palm(vocab_size=6, num_layers=2),),
        CompositionConfig(every=1),
    )
    generator = Generator(model, max_length=16, slots=256, draft=2)
    sampling = Sampling(max_new_tokens=3, temperature=0.8, n=n, seed=1)
    (answers,) = generator.generate([[1, 4]], sampling)
    counts = collections.Counter(tuple(answer.tokens) for answer in answers)
    V = 6
    rows = jnp.asarray([[1, 4, a, b] for a in range(V) for b in range(V)], jnp.int32)
    probabilities_XTV = np.asarray(jax.nn.softmax(model(rows) / 0.8, axis=-1), np.float64)
    expected, found = [], []
    for (a, b), p_TV in zip(np.ndindex(V, V), probabilities_XTV, strict=True):
        for c in range(V):
            expected.append(p_TV[1, a] * p_TV[2, b] * p_TV[3, c])
            found.append(counts[a, b, c])
    expected, found = n * np.array(expected), np.array(found)
    assert found.sum() == n
    common = expected >= 5
    groups = [np.append(x[common], x[~common].sum()) for x in (found, expected)]
    groups = [x[: -1 if groups[1][-1] == 0 else None] for x in groups]
    assert stats.chisquare(groups[0], groups[1] * groups[0].sum() / groups[1].sum()).pvalue > 1e-3
    assert 0 < generator.drafting.accepted < generator.drafting.compared


def test_the_length_follows_what_was_measured(monkeypatch):
    """Clocks say what a round costs; the number that makes most tokens a second is taken."""
    for acceptance, cost, best in ((0.9, 0.1, 4), (0.1, 0.5, 0), (0.5, 0.12, 2)):
        length, clock = DraftLength(4), [0.0]
        monkeypatch.setattr("time.perf_counter", lambda clock=clock: clock[0])
        for _ in range(40):
            drafted = length.begin()
            clock[0] += 10 * (1 + cost * drafted)
            accepted = round(sum(acceptance**k for k in range(1, drafted + 1)) * 100)
            compared = round(sum(acceptance**k for k in range(drafted)) * 100)
            length.end((), 10, compared, accepted)
        expected = {k: tokens_of_round(k, acceptance) / (1 + cost * k) for k in (0, 1, 2, 4)}
        assert max(expected, key=expected.get) == best
        assert length.report.length == best
        if best != 4:
            assert "of drafted tokens are accepted" in length.report.reason


def test_the_length_follows_what_changes(monkeypatch):
    """A number between none and the most is left when the most becomes cheap."""
    length, clock, acceptance = DraftLength(4), [0.0], 0.5
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    found = []
    for cost in (0.12, 0.01):
        for _ in range(3 * draft_length.PROBE):
            drafted = length.begin()
            clock[0] += 10 * (1 + cost * drafted)
            accepted = round(sum(acceptance**k for k in range(1, drafted + 1)) * 100)
            compared = round(sum(acceptance**k for k in range(drafted)) * 100)
            length.end((), 10, compared, accepted)
        found.append(length.report.length)
    assert found == [2, 4]


def test_a_model_without_an_augment_cannot_draft():
    with pytest.raises(CalmError, match="draft is 2, but the model has no augment"):
        Generator(random_decoder(palm()), max_length=16, draft=2)
    with pytest.raises(CalmError, match="draft is -1; it must be an integer of at least 0"):
        Generator(random_decoder(palm()), max_length=16, draft=-1)
