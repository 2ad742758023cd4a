"""Answers of a Generator against full recomputation, whatever rows, chunks and slots they take."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
import tokenizers
from cases import some_slow
from random_models import gemma, llama, palm, random_composed, random_decoder

from calm_jax import sharding
from calm_jax.data.vocabularies import vocabulary_of_folder
from calm_jax.decoding import Generator, Sampling, generate, requests, steps
from calm_jax.decoding.chunks import buckets
from calm_jax.decoding.memory import bytes_per_row
from calm_jax.decoding.requests import Request, by_beginning
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs
from calm_jax.models.parameters import Structure, module_tree

FORMS = {
    "palm": lambda: random_decoder(palm(num_layers=2)),
    "xpos, l2 norms": lambda: random_decoder(palm(num_layers=2, qk_norm="l2", xpos_scale_base=8.0)),
    "window": lambda: random_decoder(
        gemma(num_layers=4, window=7, window_pattern=(True, False), local_rope_base=100.0)
    ),
    "regular": lambda: random_composed(
        llama(num_layers=5), (palm(num_layers=4),), CompositionConfig(every=2)
    ),
    "several, rotary": lambda: random_composed(
        gemma(num_layers=2, window=5),
        (palm(num_layers=2), llama(num_layers=2)),
        (CompositionConfig(every=1), CompositionConfig(((0, 1), (1, 0)), rotary=True, bias=True)),
    ),
    "only the prompt": lambda: random_composed(
        palm(num_layers=2), (palm(num_layers=2),), CompositionConfig(every=1, encoder_only=True)
    ),
}


LONGEST = 80
# Generators of equal sizes share their programs, which take most of the time of these tests.
SIZES = {"max_length": LONGEST, "slots": 3, "prefill_chunk": 16}


@functools.cache
def model_of(name):
    return FORMS[name]()


def prompts_of(*sizes, seed=0):
    """Random prompts; those of sizes that differ by multiples of a chunk need the same programs."""
    random = np.random.default_rng(seed)
    return [random.integers(1, 24, size).tolist() for size in sizes]


def logprobs_of(model, prompt, tokens):
    """float32 [N, V], the distribution of each token after the prompt, recomputed at once."""
    row = [*prompt, *tokens[:-1]]
    # Nothing looks at the tokens behind it: with them one program recomputes rows of all lengths.
    row_T = np.pad(np.array(row, np.int32), (0, LONGEST - len(row)))
    mask_T = (np.arange(LONGEST) < len(prompt)).astype(np.int32)
    logits_TV = model(Inputs(jnp.asarray(row_T[None]), prompt_mask_BT=jnp.asarray(mask_T[None])))[0]
    return np.asarray(jax.nn.log_softmax(logits_TV))[len(prompt) - 1 : len(row)]


def assert_greedy(model, prompt, completion):
    """Every token is the most probable one after all before it, with that log-probability."""
    expected_NV = logprobs_of(model, prompt, completion.tokens)
    np.testing.assert_array_equal(completion.tokens, expected_NV.argmax(1))
    found = [one.logprob for one in completion.logprobs]
    np.testing.assert_allclose(found, expected_NV.max(1), atol=2e-5)


@pytest.mark.parametrize("name", some_slow(FORMS, ("several, rotary",)))
def test_cached_is_recomputed(name):
    """More prompts than rows, longer than windows and chunks, some with a shared beginning."""
    model = model_of(name)
    (beginning,) = prompts_of(40, seed=1)
    prompts = prompts_of(1, 2, 50, 17, 34)
    prompts += [[*beginning, 1, 2], [*beginning, 3], beginning[:30]]
    generator = Generator(model, **SIZES)
    sampling = Sampling(max_new_tokens=9, logprobs=0)
    answers = generator.generate(prompts, sampling)
    for prompt, (completion,) in zip(prompts, answers, strict=True):
        assert completion.finish_reason == "length"
        assert_greedy(model, prompt, completion)
    # What rows still hold from before changes nothing.
    again = generator.generate(prompts[::-1], sampling)[::-1]
    assert [a.tokens for (a,) in again] == [a.tokens for (a,) in answers]


@pytest.mark.parametrize(
    "chunk", [32, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 48))]
)
def test_every_boundary_of_chunks(chunk):
    model = model_of("regular")
    generator = Generator(model, **SIZES | {"prefill_chunk": chunk})
    prompts = prompts_of(15, 16, 17, 32, 33, 48, 49, 64)
    for prompt, (completion,) in zip(
        prompts,
        generator.generate(prompts, Sampling(max_new_tokens=3, logprobs=0)),
        strict=True,
    ):
        assert_greedy(model, prompt, completion)


def read_tokens(monkeypatch):
    """A list that gets the number of tokens of each prefill."""
    counts, prefill = [], steps.prefill

    def counted(graphdef, weights, state, chunk, *arguments, **options):
        counts.append(int(np.sum(chunk.length_P)))
        return prefill(graphdef, weights, state, chunk, *arguments, **options)

    monkeypatch.setattr(steps, "prefill", counted)
    return counts


def test_a_shared_beginning_is_read_once(monkeypatch):
    counts, copies, copy_row = read_tokens(monkeypatch), [], steps.copy_row
    monkeypatch.setattr(
        steps, "copy_row", lambda *given, **sizes: copies.append(1) or copy_row(*given, **sizes)
    )
    (beginning,) = prompts_of(100)
    prompts = [[*beginning, 1 + i % 20, 1 + i // 20] for i in range(40)]
    generator = Generator(model_of("palm"), max_length=128, slots=4)
    generator.generate(prompts, Sampling(max_new_tokens=2))
    assert sum(counts) <= 102 + 39 * 2
    assert len(copies) <= 3  # once for each other row
    counts.clear()
    generator.generate([beginning], Sampling(max_new_tokens=2, n=4, temperature=1.0))
    assert sum(counts) <= 4  # the last token for each answer


def test_continuations_of_other_lengths_share_their_prompts(monkeypatch):
    """Questions with a beginning in common, and choices that sorting by length would part."""
    counts = read_tokens(monkeypatch)
    beginning, *questions = prompts_of(60, *([30] * 6))
    prompts = [[*beginning, *question] for question in questions]
    choices = prompts_of(1, 9, 3, 6, seed=4)
    asked = [(prompt, choice) for choice in choices for prompt in prompts]
    Generator(model_of("palm"), max_length=128, slots=4).score(*zip(*asked, strict=True))
    least = 60 + 6 * 30 + 6 * sum(map(len, choices))
    assert least <= sum(counts) <= 1.3 * least


@hypothesis.given(
    st.lists(
        st.builds(
            lambda count, rest: [5] * count + rest,
            st.integers(0, 60),
            st.lists(st.integers(1, 3), max_size=40),
        ),
        max_size=12,
    )
)
def test_no_request_is_lost_in_order(prompts):
    requests = [Request(prompt, None, print) for prompt in prompts]
    ordered = by_beginning(requests)
    assert sorted(map(id, ordered)) == sorted(map(id, requests))


def test_prompts_that_continue_each_other_come_in_their_order(monkeypatch):
    """Each with all before it as its beginning: a family in a family, more than Python's stack."""
    monkeypatch.setattr(requests, "SHARED", 1)
    prompts = [list(range(length)) for length in range(1, 1200)]
    ordered = by_beginning([Request(prompt, None, print) for prompt in prompts[::-1]])
    assert [request.prompt for request in ordered] == prompts


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": 1.0}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, marks=pytest.mark.slow),
        {"temperature": 1.3, "min_p": 0.1, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_seeded_samples_are_the_same_in_any_batch(options):
    model, prompts = model_of("palm"), prompts_of(2, 18, 1, 17, 2)
    sampling = Sampling(max_new_tokens=6, seed=11, n=2, **options)
    together = Generator(model, **SIZES).generate(prompts, sampling)
    alone = Generator(model, **SIZES | {"slots": 2})
    for prompt, answers in zip(prompts, together, strict=True):
        (found,) = alone.generate([prompt], sampling)
        assert [answer.tokens for answer in found] == [answer.tokens for answer in answers]
    assert any(first.tokens != second.tokens for first, second in together)
    other = alone.generate(prompts, dataclasses.replace(sampling, seed=12))
    assert [a.tokens for (a, _) in other] != [a.tokens for (a, _) in together]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("window", "regular") else pytest.mark.slow)
        for name in FORMS
    ],
)
def test_scores_are_recomputed(name):
    """Two prompts at once, a continuation on both sides of a chunk's end, a shared beginning."""
    model = model_of(name)
    prompts = [*prompts_of(1, 3, 25), [7] * 30, [7] * 30]
    continuations = prompts_of(9, 9, 17, 18, 18, seed=1)
    scores = Generator(model, **SIZES | {"prefill_chunk": 32}).score(prompts, continuations)
    for prompt, continuation, score in zip(prompts, continuations, scores, strict=True):
        expected_NV = logprobs_of(model, prompt, continuation)
        expected_N = expected_NV[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(score.tokens_logprobs, expected_N, atol=2e-5)
        np.testing.assert_allclose(score.logprob, expected_N.sum(), atol=1e-4)
        assert score.is_greedy == bool(np.all(expected_NV.argmax(1) == continuation))


def test_a_greedy_answer_is_a_greedy_continuation():
    generator = Generator(model_of("palm"), **SIZES)
    ((answer,),) = generator.generate([[3, 4]], Sampling(max_new_tokens=4))
    (score,) = generator.score([[3, 4]], [answer.tokens])
    assert score.is_greedy


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_answer_as_one(mesh):
    config = CompositionConfig(every=2, num_heads=4)
    model = tiny_models.randomised(tiny_models.composed(config))
    structure = Structure(model)
    spread = structure.merge(
        jax.device_put(module_tree(model), structure.shardings(sharding.make_mesh(mesh)))
    )
    prompts = prompts_of(3, 4, 20, 36, 4, 3)
    sampling = Sampling(max_new_tokens=6, logprobs=0)
    options = {"max_length": 64, "slots": 4, "prefill_chunk": 16}
    alone = Generator(model, **options).generate(prompts, sampling)
    found = Generator(spread, **options).generate(prompts, sampling)
    for (ours,), (theirs,) in zip(found, alone, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(
            [x.logprob for x in ours.logprobs], [x.logprob for x in theirs.logprobs], atol=2e-5
        )


def test_int8_caches_differ_by_rounding_alone():
    """A vector's largest value is 127 steps, so scores move a little, and not by nothing."""
    model = model_of("regular")
    prompts, continuations = prompts_of(28, 32), prompts_of(15, 12, seed=1)
    options = {"max_length": 64, "slots": 2}
    exact, rounded = (
        Generator(model, cache_dtype=dtype, **options).score(prompts, continuations)
        for dtype in (None, "int8")
    )
    for ours, theirs in zip(rounded, exact, strict=True):
        difference = np.abs(np.subtract(ours.tokens_logprobs, theirs.tokens_logprobs))
        assert 0 < difference.max() < 0.1


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("name", FORMS)
def test_bytes_of_the_state_equal_the_formula(name, dtype):
    model = model_of(name)
    cache = model.init_cache(2, 48, dtype=dtype)
    held = sum(x.nbytes for x in jax.tree.leaves(cache) if x.ndim > 2)
    assert held == 2 * bytes_per_row(model, 48, dtype)


def test_few_programs_answer_many_lengths():
    model = model_of("palm")
    generator = Generator(model, max_length=144, slots=4, prefill_chunk=8)
    before = steps.prefill._cache_size() + steps.decode._cache_size()
    sizes = np.random.default_rng(1).integers(1, 140, 200)
    generator.generate(prompts_of(*sizes), Sampling(max_new_tokens=3))
    chunks, reads = len(buckets(16, 2)), 2
    programs = steps.prefill._cache_size() + steps.decode._cache_size() - before
    assert programs <= 2 * chunks * reads + reads


def test_the_first_prefill_is_compiled_once():
    generator = Generator(model_of("palm"), max_length=32, slots=1)
    before = steps.prefill._cache_size()
    for _ in range(2):
        generator.generate([[1, 2, 3]], Sampling(max_new_tokens=2))
    assert steps.prefill._cache_size() == before + 1


# Text.


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model whose vocabulary writes bytes, so that characters take several tokens."""
    path = tmp_path_factory.mktemp("tokenizer")
    vocabulary = vocabulary_of_folder(str(tiny_tokenizers.qwen(path)))
    model = tiny_models.decoder(num_layers=2, vocab_size=vocabulary.size)
    model.vocabulary = vocabulary
    return model


def test_a_stream_gives_the_text_of_generate(writer):
    generator = Generator(writer, max_length=64, slots=2)
    for seed in range(3):
        sampling = Sampling(max_new_tokens=30, temperature=2.0, seed=seed)
        pieces = list(generator.stream("Grüße", sampling))
        ((answer,),) = generator.generate(["Grüße"], sampling)
        assert "".join(pieces) == answer.text
        assert all(pieces)


def test_an_answer_ends_before_a_text_that_stops(writer):
    generator = Generator(writer, max_length=64, slots=2)
    free = Sampling(max_new_tokens=30, temperature=2.0, seed=3)
    ((answer,),) = generator.generate(["a"], free)
    stop = answer.text[8:10]
    ((stopped,),) = generator.generate(["a"], dataclasses.replace(free, stop=(stop, "never this")))
    assert stopped.text == answer.text[: answer.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert answer.tokens[: len(stopped.tokens)] == stopped.tokens
    assert len(stopped.tokens) < len(answer.tokens)
    assert "".join(generator.stream("a", dataclasses.replace(free, stop=(stop,)))) == stopped.text
    assert generator.scheduler.running == 0


@pytest.mark.parametrize(
    ("prompt", "continuation", "after"),
    [("mit ", "der", " der"), ("Es d", "er Wind", " der Wind"), ("mit", " der", " der")],
)
def test_a_token_with_text_of_prompt_and_continuation_is_scored(
    writer, prompt, continuation, after
):
    encode = writer.vocabulary.encode
    before = (prompt + continuation).removesuffix(after)
    # No token crosses this border, so both sides may be encoded alone.
    assert encode(before) + encode(after) == encode(prompt + continuation)
    (score,) = Generator(writer, max_length=64, slots=2).score([prompt], [continuation])
    expected_NV = logprobs_of(writer, encode(before), encode(after))
    expected_N = expected_NV[range(len(encode(after))), encode(after)]
    np.testing.assert_allclose(score.tokens_logprobs, expected_N, atol=2e-5)


def test_a_continuation_in_the_first_token_is_refused(writer):
    assert len(writer.vocabulary.encode("und")) == 1
    with pytest.raises(CalmError, match="prompt 1: 'nd' changes the first token of 'u'"):
        Generator(writer, max_length=64, slots=2).score(["a", "u"], [" b", "nd"])


def test_an_answer_ends_at_a_special_token_that_stops(tmp_path):
    folder = tiny_tokenizers.qwen(tmp_path)
    model = tiny_models.decoder(num_layers=2, vocab_size=vocabulary_of_folder(folder).size)
    free = Sampling(max_new_tokens=30, temperature=2.0, seed=3)
    generator = Generator(model, max_length=64, slots=2)
    ((answer,),) = generator.generate([[65]], free)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = next(n for n, t in enumerate(answer.tokens) if n > 5 and len(library.id_to_token(t)) > 1)
    library.add_special_tokens([stop := library.id_to_token(answer.tokens[end])])
    library.save(str(folder / "tokenizer.json"))
    generator.vocabulary = vocabulary_of_folder(folder)
    stopping = dataclasses.replace(free, stop=stop)
    ((stopped,),) = generator.generate([[65]], stopping)
    assert stopped.tokens == answer.tokens[: end + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == library.decode(answer.tokens[:end])
    assert "".join(generator.stream([65], stopping)) == stopped.text
    assert generator.scheduler.running == 0


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an integer"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": float("inf")}, "temperature is inf; it must be finite and at least 0"),
        ({"top_k": 5}, "top_k is 5, but temperature is 0"),
        ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20"),
        ({"n": True}, "n is True; it must be an integer"),
        ({"stop": ("",)}, "stop has ''"),
        ({"stop": 5}, "stop is 5; it must be a text or several"),
        ({"temperature": 1e300}, r"temperature is 1e\+300; it must be from 1e-30 to 1e\+30"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty is 1e-50; it must be from 1e-30"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_sampling_that_is_refused(options, message):
    with pytest.raises(CalmError, match=message):
        Sampling(**options)


def test_options_of_generate_that_would_do_nothing_are_refused():
    for options, message in (
        ({"logprobs": 5}, "generate returns no logprobs"),
        ({"eos_id": 10**6}, "an end id is 1000000; the model writes ids below 24"),
    ):
        with pytest.raises(CalmError, match=message):
            generate(model_of("palm"), [[1, 2]], max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1], [2]], [[3]], "1 continuations were given for 2 prompts"),
        ([[1]], [[]], "a continuation has no tokens"),
        ([[]], [[1]], "a prompt has no tokens"),
        ([[1]], ["a"], "a prompt of ids has a continuation of ids"),
    ],
)
def test_scores_that_are_refused(prompts, continuations, message):
    with pytest.raises(CalmError, match=message):
        Generator(model_of("palm"), max_length=32).score(prompts, continuations)


def test_answers_that_need_a_text_are_refused_without_a_vocabulary():
    generator = Generator(model_of("palm"), max_length=32)
    with pytest.raises(CalmError, match="no vocabulary to stream text with"):
        next(generator.stream([1]))
    with pytest.raises(CalmError, match="the model has no vocabulary"):
        generator.generate([[1]], Sampling(stop="a"))
    with pytest.raises(CalmError, match="1 samplings were given for 2 prompts"):
        generator.generate([[1], [2]], [Sampling()])


def test_prompts_that_are_refused():
    generator = Generator(model_of("palm"), max_length=32, slots=2)
    for prompts, message in (
        ([[1], []], "empty prompt"),
        ([[1], [1] * 30], "the prompt has 30 tokens and max_new_tokens is 5, together more than"),
        (["text"], "no vocabulary to encode 'text'"),
        ([[1], [10**6]], "1000000"),
    ):
        with pytest.raises(CalmError, match=message):
            generator.generate(prompts, Sampling(max_new_tokens=5))
        assert not generator.scheduler.step()


def test_logits_that_are_not_finite_end_one_row_alone():
    model = tiny_models.decoder(num_layers=2, tied_head=False)
    table = model.embedding.get_value()
    model.embedding.set_value(table.at[13].set(jnp.nan))
    generator = Generator(model, max_length=32, slots=2)
    (bad,), (good,) = generator.generate([[13, 2], [5, 2]], Sampling(max_new_tokens=4))
    assert bad.finish_reason == "error"
    assert "step 0: the logits are not finite" in bad.error
    assert good.finish_reason == "length"
    # What the row still holds spreads to no later answer.
    (again,) = generator.generate([[5, 2]] * 4, Sampling(max_new_tokens=4))[:1]
    assert again[0].tokens == good.tokens
    for answers in generator.generate([[5, 2]] * 4, Sampling(max_new_tokens=4)):
        assert answers[0].tokens == good.tokens
    with pytest.raises(CalmError, match="prompt 1, step 0: the logits are not finite"):
        generate(model, [[5, 2, 1], [13, 2]], max_new_tokens=2)
    with pytest.raises(CalmError, match="prompt 1: the logits of its continuation are NaN"):
        generator.score([[5], [13]], [[2], [2]])


def test_what_fails_before_a_prefill_leaves_no_trace(monkeypatch):
    model, (prompt,) = model_of("palm"), prompts_of(50)
    sampling = Sampling(max_new_tokens=8)
    generator = Generator(model, **SIZES)
    (expected,) = Generator(model, **SIZES).generate([prompt], sampling)

    def fails(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(steps, "prefill", fails)
        generator.generate([prompt], sampling)
    assert generator.generate([prompt], sampling)[0][0].tokens == expected[0].tokens


def test_a_request_may_be_cancelled_by_its_own_news():
    generator = Generator(model_of("palm"), **SIZES)
    seen = []

    def on_news(news):
        seen.append(news.sample)
        generator.scheduler.cancel(request)

    request = Request(
        [1, 2, 3], Sampling(max_new_tokens=8, n=3, logprobs=20, seed=np.int32(5)), on_news
    )
    generator.scheduler.submit(request)
    while generator.scheduler.step():
        pass
    assert seen[0] == 0
    assert generator.scheduler.running == generator.scheduler.waiting == 0


def test_caches_that_do_not_fit(monkeypatch):
    monkeypatch.setattr("calm_jax.decoding.memory.RESERVED", 0)
    monkeypatch.setattr("calm_jax.decoding.memory.free_bytes", lambda array: 100_000)
    model = model_of("palm")
    fit = 100_000 // bytes_per_row(model, 64)
    with pytest.raises(CalmError, match=f"; {fit} rows would fit"):
        Generator(model, max_length=64, slots=fit + 1)
    Generator(model, max_length=64, slots=fit)
    monkeypatch.setattr("calm_jax.decoding.memory.RESERVED", 0.5)
    with pytest.raises(CalmError, match=f"; {fit // 2} rows would fit"):
        Generator(model, max_length=64, slots=fit)
