"""Answers of pairs whose augments have tokenizers of their own, against models run from scratch."""

import jax
import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
from cases import some_slow
from flax import nnx
from random_models import llama, palm, random_decoder

from calm_jax import sharding
from calm_jax.data import own_tokens
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.decoding import Generator, Sampling, generate, steps
from calm_jax.decoding.memory import bytes_per_row
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.models.parameters import Structure, module_tree

ROWS = 536
PAPER = CompositionConfig(connections=((0, 0), (1, 1)), init="paper")
ASKED = CompositionConfig(connections=((1, 1),), init="paper", encoder_only=True, rotary=True)
# The tokenizers of the anchor and of each augment, and how the augments are connected.
CONFIGS = {
    "paper": (("bytes", "words"), (PAPER,)),
    "rotary": (("words", "bytes"), (CompositionConfig(every=1, init="paper", rotary=True),)),
    "templates": (("words", "fallback"), (PAPER,)),
    "only the prompt": (("words", "bytes"), (ASKED,)),
    "several augments": (("words", "bytes", "words", "fallback"), (PAPER, PAPER, ASKED)),
}
TEXT = "The quick brown fox 12345 × 678; Grüße 👩🏽‍🚀🚀 春眠不覺曉, नमस्ते!  Где-то\nдалеко "
# A prompt ends within a word, a number, an emoji of several characters, and white space.
PROMPTS = [
    "Er sagt: ",
    "fox 12",
    "春 é",
    "👩🏽",
    TEXT[:30],
    TEXT[:35],
    TEXT[:52],
    TEXT,
    TEXT + "шумит",
]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    return {
        "bytes": load_vocabulary("bytes"),
        "words": vocabulary_of_folder(tiny_tokenizers.llama3(root / "llama3")),
        "fallback": vocabulary_of_folder(tiny_tokenizers.gemma(root / "gemma", size=ROWS)),
    }


def pair(vocabularies, name):
    """An anchor and augments with these vocabularies; the bridge is not zero."""
    names, configs = CONFIGS[name]
    models = []
    for seed, vocabulary in enumerate(names):
        model = random_decoder((llama if seed else palm)(vocab_size=ROWS, num_layers=2), seed)
        model.vocabulary = vocabularies[vocabulary]
        models.append(model)
    return tiny_models.randomised(compose(models[0], models[1:], configs, rngs=nnx.Rngs(2)))


@pytest.fixture(
    scope="module",
    params=some_slow(
        [name for name in CONFIGS if name != "templates"], ("rotary", "several augments")
    ),
)
def model(request, vocabularies):
    return pair(vocabularies, request.param)


@pytest.fixture(scope="module")
def paper(vocabularies):
    return pair(vocabularies, "paper")


SIZES = {"max_length": 176, "slots": 3, "prefill_chunk": 32}


def from_scratch(model, rows, asked):
    """Log-probabilities [B, T, V] of ids, of which the first `asked` of each row are its prompt."""
    found = own_tokens.alignments(model.vocabulary, [one.vocabulary for one in model.augments])
    logits = model(Inputs.of_batch(own_tokens.batch(found, rows, asked)))
    return np.asarray(jax.nn.log_softmax(logits[..., : min(model.vocabulary.size, ROWS)], axis=-1))


def assert_greedy(model, prompts, answers):
    """Every token is the most probable one, with its log-probability, of the whole model."""
    answers = [answer for (answer,) in answers]
    rows = [[*ids, *answer.tokens] for ids, answer in zip(prompts, answers, strict=True)]
    whole = from_scratch(model, rows, list(map(len, prompts)))
    for ids, answer, logprobs_TV in zip(prompts, answers, whole, strict=True):
        expected_NV = logprobs_TV[len(ids) - 1 :][: len(answer.tokens)]
        np.testing.assert_array_equal(answer.tokens, expected_NV.argmax(1))
        found = [one.logprob for one in answer.logprobs]
        np.testing.assert_allclose(found, expected_NV.max(1), atol=1e-5 * abs(whole).max())


def test_every_token_is_that_of_the_whole_model_from_scratch(model):
    """More prompts than rows, in chunks, some with a shared beginning."""
    ids = list(map(model.vocabulary.encode_sequence, PROMPTS))
    generator = Generator(model, **SIZES)
    sampling = Sampling(max_new_tokens=8, logprobs=2)
    answers = generator.generate(ids, sampling)
    assert all(a.finish_reason == "stop" or len(a.tokens) == 8 for (a,) in answers)
    assert_greedy(model, ids, answers)
    # What rows still hold from before changes nothing.
    again = generator.generate(ids[::-1], sampling)[::-1]
    assert [a.tokens for (a,) in again] == [a.tokens for (a,) in answers]
    assert generator.generate(PROMPTS[:1], sampling)[0][0].text == answers[0][0].text


@pytest.mark.parametrize("chunk", [16, pytest.param(48, marks=pytest.mark.slow)])
def test_every_boundary_of_chunks(paper, chunk):
    """Of the anchor's chunks and of the augment's, in prompts that are cut anywhere."""
    ids = paper.vocabulary.encode_sequence(TEXT)
    prompts = [ids[start : start + size] for start in (0, 39) for size in (15, 16, 17, 33, 48, 49)]
    generator = Generator(paper, **SIZES | {"prefill_chunk": chunk})
    assert_greedy(paper, prompts, generator.generate(prompts, Sampling(5, logprobs=0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "several augments"])
def test_random_tokens(vocabularies, name):
    """Special tokens and parts of characters, anywhere in prompts and answers."""
    model, random = pair(vocabularies, name), np.random.default_rng(0)
    known = min(model.vocabulary.size, ROWS)
    prompts = [random.integers(known, size=size).tolist() for size in (1, 2, 20, 41, 42)]
    prompts += [[*prompts[3], 5], [*prompts[3][:30], 7, 8]]
    generator = Generator(model, **SIZES, eos_ids=())
    sampling = Sampling(max_new_tokens=24, temperature=1.0, logprobs=0, seed=1)
    answers = generator.generate(prompts, sampling)
    rows = [[*ids, *answer.tokens] for ids, (answer,) in zip(prompts, answers, strict=True)]
    whole = from_scratch(model, rows, list(map(len, prompts)))
    for ids, (answer,), logprobs_TV in zip(prompts, answers, whole, strict=True):
        assert len(answer.tokens) == 24
        expected_N = logprobs_TV[np.arange(len(ids) - 1, len(ids) + 23), answer.tokens]
        found = [one.logprob for one in answer.logprobs]
        np.testing.assert_allclose(found, expected_N, atol=1e-5 * abs(whole).max())


def test_scores_are_those_of_the_whole_model(model):
    prompts, continuations = [*PROMPTS[:4], TEXT], ["ja", " 3!", "x", "‍🚀.", TEXT[:40]]
    encode = model.vocabulary.encode_sequence
    asked = [len(encode(prompt)) for prompt in prompts]
    rows = [encode(a + b) for a, b in zip(prompts, continuations, strict=True)]
    whole = from_scratch(model, rows, asked)
    scores = Generator(model, **SIZES).score(prompts, continuations)
    for ids, count, score, logprobs_TV in zip(rows, asked, scores, whole, strict=True):
        expected = [logprobs_TV[place - 1, ids[place]] for place in range(count, len(ids))]
        np.testing.assert_allclose(score.tokens_logprobs, expected, atol=1e-5 * abs(whole).max())


def test_chats_in_two_templates(vocabularies):
    """Prompts end anywhere in a chat, within headers too, and what is scored goes on from there."""
    model = pair(vocabularies, "templates")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So long"}]
    chat = model.vocabulary.encode_sequence(model.vocabulary.chat([*messages, messages[0]]))
    counts = range(1, len(chat), 3)
    scores = Generator(model, **SIZES).score(
        [chat[:count] for count in counts], [chat[count:] for count in counts]
    )
    whole = from_scratch(model, [chat] * len(counts), list(counts))
    for count, score, logprobs_TV in zip(counts, scores, whole, strict=True):
        expected = [logprobs_TV[place - 1, chat[place]] for place in range(count, len(chat))]
        np.testing.assert_allclose(score.tokens_logprobs, expected, atol=1e-5 * abs(whole).max())


def counted(monkeypatch, name, of):
    """A list that gets `of` the arguments of each call of a step."""
    found, step = [], getattr(steps, name)

    def call(*arguments, **options):
        found.append(of(*arguments))
        return step(*arguments, **options)

    monkeypatch.setattr(steps, name, call)
    return found


def test_what_is_shared_is_read_once(paper, monkeypatch):
    """Up to where another end of the prompt closes other text, by both models."""
    anchor = counted(monkeypatch, "prefill", lambda g, w, s, chunk, *_: int(chunk.length_P.sum()))
    augment = counted(monkeypatch, "read_own", lambda g, w, s, chunk: int(chunk.length_P.sum()))
    beginning = "The quick brown fox jumps over the lazy dog. How"
    prompts = [beginning, beginning + "ever", beginning + " are you", beginning + " is it"]
    ids = list(map(paper.vocabulary.encode_sequence, prompts))
    generator = Generator(paper, max_length=96, slots=2)
    answers = generator.generate(ids, Sampling(max_new_tokens=3, logprobs=0))
    assert_greedy(paper, ids, answers)
    assert sum(anchor) < len(beginning) + sum(len(p) - len(beginning) + 5 for p in prompts)
    assert sum(augment) < 60
    for read in (anchor, augment):
        read.clear()
    sampled = generator.generate(ids[:1], Sampling(max_new_tokens=3, temperature=1.0, n=4))
    assert len({tuple(answer.tokens) for answer in sampled[0]}) > 1
    assert sum(anchor) <= 5  # the last token for each answer, and what the end of the prompt closes


@pytest.mark.slow
def test_samples_do_not_depend_on_the_rows_beside_them(paper):
    sampling = Sampling(max_new_tokens=5, temperature=1.0, n=2, seed=3, repetition_penalty=1.2)
    together = Generator(paper, **SIZES | {"slots": 4}).generate(PROMPTS[:5], sampling)
    alone = Generator(paper, **SIZES | {"slots": 1})
    for prompt, answers in zip(PROMPTS[:5], together, strict=True):
        found = alone.generate([prompt], sampling)[0]
        assert [answer.tokens for answer in found] == [answer.tokens for answer in answers]
    assert together[0][0].tokens != together[0][1].tokens


def test_text_is_streamed_and_stopped(paper):
    generator = Generator(paper, max_length=48)
    (whole,) = generator.generate(["a"], Sampling(max_new_tokens=12))[0]
    assert "".join(generator.stream("a", Sampling(max_new_tokens=12))) == whole.text
    np.testing.assert_array_equal(
        generate(paper, ["a"], max_new_tokens=len(whole.tokens))[0], whole.tokens
    )
    stop = whole.text[-1]
    (stopped,) = generator.generate(["a"], Sampling(max_new_tokens=12, stop=(stop,)))[0]
    assert stopped.finish_reason == "stop" and stop not in stopped.text
    assert not generator.scheduler.running and not generator.scheduler.waiting


def test_slots_are_added_for_texts_that_need_more(vocabularies, monkeypatch):
    """Of words alone the augment has few bytes for a token of the anchor; of emoji many."""
    model = pair(vocabularies, "rotary")
    monkeypatch.setattr("calm_jax.data.alignment.Alignment.tokens_per_token", lambda self: 1.0)
    grown = counted(monkeypatch, "grow_own", lambda *given: 1)
    ids = list(map(model.vocabulary.encode_sequence, ["a", "quick brown fox jumps over the lazy"]))
    generator = Generator(model, max_length=32, slots=2)
    answers = generator.generate(ids, Sampling(max_new_tokens=12, logprobs=0))
    assert_greedy(model, ids, answers)
    assert grown
    state = generator.scheduler._state.cache
    assert state.own[0].order_BS.shape[1] == generator.scheduler._own.slots[0] > 32


@pytest.mark.parametrize("name", some_slow(["paper", "rotary"], ("paper",)))
def test_int8_caches_differ_by_rounding_alone(vocabularies, name):
    model = pair(vocabularies, name)
    exact, rounded = (
        Generator(model, cache_dtype=dtype, **SIZES).score(PROMPTS[4:6], [TEXT[30:], TEXT[35:]])
        for dtype in (None, "int8")
    )
    for ours, theirs in zip(rounded, exact, strict=True):
        difference = np.abs(np.subtract(ours.tokens_logprobs, theirs.tokens_logprobs))
        assert 0 < difference.max() < 0.2


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_bytes_of_the_state_equal_the_formula(model, dtype):
    numbers = [number for number, is_own in enumerate(model.own_tokens) if is_own]
    own = {number: 48 + 16 * number for number in numbers}
    cache = model.init_cache(2, 32, dtype=dtype, own=own)
    held = sum(x.nbytes for x in jax.tree.leaves(cache) if x.ndim > 2)
    assert held == 2 * bytes_per_row(model, 32, dtype, own=own)


@pytest.mark.slow
def test_few_programs_answer_many_lengths(paper):
    programs = (steps.prefill, steps.decode, steps.read_own)
    before = [step._cache_size() for step in programs]
    generator = Generator(paper, max_length=144, slots=4, prefill_chunk=8)
    ids = paper.vocabulary.encode_sequence(TEXT)
    sizes = np.random.default_rng(1).integers(1, 100, (20, 2))
    prompts = [ids[start : start + size] for start, size in sizes]
    generator.generate([prompt or ids for prompt in prompts], Sampling(max_new_tokens=3))
    chunks, reads = len(generator.scheduler._chunks), len(generator.scheduler._reads)
    most = (2 * chunks * reads, reads, 2 * chunks * reads)
    for step, old, bound in zip(programs, before, most, strict=True):
        assert step._cache_size() - old <= bound


@pytest.mark.slow
def test_eight_devices_answer_as_one(vocabularies):
    """The layers and rounds of a model on a mesh run in loops."""
    names, models = ("words", "bytes"), []
    for seed, name in enumerate(names):
        family, width = ("llama", 32) if seed == 0 else ("palm", 16)
        model = tiny_models.decoder(seed, family, vocab_size=ROWS, embed_dim=width, num_layers=2)
        model.vocabulary = vocabularies[name]
        models.append(model)
    config = CompositionConfig(every=1, num_heads=4)
    model = tiny_models.randomised(compose(*models, config, rngs=nnx.Rngs(2)))
    structure = Structure(model)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = structure.merge(jax.device_put(module_tree(model), structure.shardings(mesh)))
    prompts, sampling = [PROMPTS[0], *PROMPTS[3:6]], Sampling(max_new_tokens=5, logprobs=0)
    options = {"max_length": 96, "slots": 4, "prefill_chunk": 16}
    alone, found = (Generator(x, **options).generate(prompts, sampling) for x in (model, spread))
    for (ours,), (theirs,) in zip(found, alone, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(
            [x.logprob for x in ours.logprobs], [x.logprob for x in theirs.logprobs], atol=5e-5
        )


def test_what_is_not_supported_is_refused(paper, vocabularies, monkeypatch):
    with pytest.raises(CalmError, match="tokenizer than the anchor, which draft=2 does not supp"):
        Generator(paper, max_length=16, draft=2)
    with pytest.raises(CalmError, match="together more than max_length 8"):
        Generator(paper, max_length=8).generate(["abcdefg"])
    with pytest.raises(CalmError, match="slots is 0"):
        Generator(paper, slots=0)
    lacking = pair(vocabularies, "paper")
    lacking.augments[0].vocabulary = load_vocabulary("key_value")
    with pytest.raises(CalmError, match="augment 0's tokenizer has no token for 'É'"):
        Generator(lacking, max_length=80).generate(["É"])


def test_caches_that_do_not_fit(vocabularies, monkeypatch):
    model = pair(vocabularies, "rotary")
    generator = Generator(model, max_length=32, slots=2)
    room = generator.scheduler._own.slots
    row = bytes_per_row(model, 32, own=room)
    monkeypatch.setattr("calm_jax.decoding.memory.RESERVED", 0)
    monkeypatch.setattr("calm_jax.decoding.memory.free_bytes", lambda array: 2 * row)
    message = rf"of 3 rows of 32 tokens and {room[0]} inputs of augment 0 .*; 2 rows would fit"
    with pytest.raises(CalmError, match=message):
        Generator(model, max_length=32, slots=3)
    monkeypatch.setattr("calm_jax.decoding.memory.free_bytes", lambda array: 1000)
    prompt = [token for token in range(ROWS) if len(model.vocabulary.decode([token])) > 4][:20]
    assert len("".join(map(model.vocabulary.decode, ([x] for x in prompt)))) > room[0]
    with pytest.raises(CalmError, match=r"the caches of 2 rows of \d+ inputs of augment 0 take"):
        generator.generate([prompt], Sampling(max_new_tokens=4))
