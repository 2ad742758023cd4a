"""What a scheduler does with requests: the order, the rows, and what it tells of a failed one."""

import time

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding import Generator, Sampling, steps
from calm_jax.decoding.requests import Request
from calm_jax.decoding.scheduler import Scheduler
from calm_jax.errors import CalmError


@pytest.fixture
def model():
    """One whose token 13 makes logits NaN."""
    model = tiny_models.decoder(tied_head=False, vocab_size=ByteVocabulary().size)
    model.embedding.set_value(model.embedding.get_value().at[13].set(jnp.nan))
    return model


def ask(prompt, told, new=3, **options):
    return Request(prompt, Sampling(max_new_tokens=new), told.append, **options)


def run(scheduler):
    while scheduler.step():
        pass


def test_a_prompt_of_several_chunks_fails_at_its_first_bad_one(model):
    """A client that hangs up before the last chunk must leave no NaN in its row."""
    scheduler, bad, good, alone = (
        Scheduler(model, max_length=64, slots=1, prefill_chunk=16),
        [],
        [],
        [],
    )
    scheduler.submit(ask([5, 2], alone))
    run(scheduler)
    request = ask([13] + [5] * 40, bad)
    scheduler.submit(request)
    scheduler.step()
    scheduler.cancel(request)
    scheduler.submit(ask([5, 2], good))
    run(scheduler)
    assert [news.finish_reason for news in bad] == ["error"]
    assert [news.tokens for news in good] == [news.tokens for news in alone]
    assert good[-1].finish_reason == "length"


def test_no_score_is_told_of_a_prompt_that_fails(model):
    scheduler, told = Scheduler(model, max_length=64, slots=2), []
    scheduler.submit(ask([5, 13, 2], told, score_from=1))
    run(scheduler)
    assert [(news.sample, news.finish_reason) for news in told] == [(0, "error")]


def test_prompts_that_cannot_share_are_read_together(model, monkeypatch):
    """A score of all tokens needs all of them read: to wait for another's beginning is no use."""
    counts, prefill = [], steps.prefill

    def counted(*arguments, **options):
        counts.append(1)
        return prefill(*arguments, **options)

    monkeypatch.setattr(steps, "prefill", counted)
    scheduler, told = Scheduler(model, max_length=64, slots=4, prefill_chunk=128), []
    scheduler.submit(*(ask([*range(14, 34), n], told, new=1, score_from=1) for n in range(4)))
    run(scheduler)
    assert len(counts) == 1
    assert [len(news.logprobs) for news in told if news.sample == -1] == [20] * 4


def test_one_refused_request_of_many_lets_none_wait(model):
    scheduler = Scheduler(model, max_length=64, slots=1)
    with pytest.raises(CalmError, match="empty prompt"):
        scheduler.submit(ask([1], []), ask([], []))
    assert scheduler.waiting == 0


def test_many_requests_are_cancelled_in_little_time(model):
    scheduler = Scheduler(model, max_length=64, slots=1)
    requests = [ask([1, 2], []) for _ in range(5000)]
    scheduler.submit(*requests)
    start = time.perf_counter()
    for request in requests[::-1]:
        scheduler.cancel(request)
    assert time.perf_counter() - start < 1
    assert scheduler.waiting == 0


def test_a_dispatch_that_fails_takes_the_answers_in_rows_alone(model, monkeypatch):
    """It has its state, which is donated, and keeps nothing of it."""
    scheduler, told, waited, expected = Scheduler(model, max_length=64, slots=1), [], [], []
    scheduler.submit(ask([5, 2], expected))
    run(scheduler)
    scheduler.submit(ask([5, 3], told), ask([5, 2], waited))
    scheduler.step()  # the first token of the first

    def fails(graphdef, weights, state, *arguments, **options):
        jax.tree.map(lambda x: x.delete(), state)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr(steps, "decode", fails)
        scheduler.step()
    assert [news.finish_reason for news in told] == [None]
    assert (scheduler.running, scheduler.waiting) == (0, 1)
    run(scheduler)
    assert [news.tokens for news in waited] == [news.tokens for news in expected]


def test_a_stream_that_another_call_has_lost_ends(model, monkeypatch):
    model.vocabulary = ByteVocabulary()
    generator = Generator(model, max_length=64, slots=2)
    stream = generator.stream([5, 2], Sampling(max_new_tokens=40, temperature=2.0))
    next(stream)

    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr(steps, "decode", fails)
        generator.generate([[7]], Sampling(max_new_tokens=3))
    with pytest.raises(CalmError, match="the answer is lost"):
        list(stream)
    assert len(generator.generate([[7]], Sampling(max_new_tokens=3))[0][0].tokens) > 0
