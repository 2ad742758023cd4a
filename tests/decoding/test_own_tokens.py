"""Answers of pairs whose augments have tokenizers of their own, against models run from scratch."""

import jax
import numpy as np
import pytest
import tiny_tokenizers
from flax import nnx
from random_models import assert_close, llama, palm, random_decoder

from calm_jax.data import own_tokens
from calm_jax.data.vocabularies import load_vocabulary, vocabulary_of_folder
from calm_jax.decoding import Generator, Sampling, generate
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs, compose
from calm_jax.serving.parts import served_models

PROMPTS = ["Er sagt: ", "fox 12", "春 é"]
CONFIGS = {
    "paper": CompositionConfig(connections=((0, 0), (1, 1)), init="paper"),
    "only the prompt": CompositionConfig(
        connections=((1, 1),), init="paper", encoder_only=True, rotary=True
    ),
}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocabularies")
    return {
        "bytes": load_vocabulary("bytes"),
        "words": vocabulary_of_folder(tiny_tokenizers.llama3(root / "llama3")),
    }


def pair(vocabularies, names, config):
    """An anchor and augments with these vocabularies; the bridge is not zero."""
    models = []
    for seed, name in enumerate(names):
        make = llama if seed else palm
        model = random_decoder(make(vocab_size=536, num_layers=2), seed)
        model.vocabulary = vocabularies[name]
        models.append(model)
    return compose(models[0], models[1:], config, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module", params=[*CONFIGS, "several augments"])
def model(request, vocabularies):
    if request.param == "several augments":
        return pair(vocabularies, ("words", "bytes", "words"), CONFIGS["paper"])
    names = ("bytes", "words") if request.param == "paper" else ("words", "bytes")
    return pair(vocabularies, names, CONFIGS[request.param])


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, max_length=48, slots=2)


def logits_from_scratch(model, ids, prompt):
    """Log-probabilities [T, V] of one sequence of ids, all of whose first `prompt` are asked."""
    found = own_tokens.alignments(model.vocabulary, [one.vocabulary for one in model.augments])
    logits = model(Inputs.of_batch(own_tokens.batch(found, [ids], [prompt])))[0]
    return jax.nn.log_softmax(logits[:, : min(model.vocabulary.size, 536)], axis=-1)


def test_every_token_is_that_of_the_whole_model_from_scratch(model, generator):
    answers = generator.generate(PROMPTS, Sampling(max_new_tokens=6, logprobs=2))
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        ids = model.vocabulary.encode_sequence(prompt)
        asked = len(ids)
        assert answer.finish_reason == ("length" if len(answer.tokens) == 6 else "stop")
        whole = logits_from_scratch(model, [*ids, *answer.tokens], asked)
        for step, (token, said) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
            logprobs_V = whole[asked - 1 + step]
            assert token == int(np.argmax(logprobs_V))
            assert_close(said.logprob, logprobs_V[token], 1e-4)
            assert said.top[0][0] == token and len(said.top) == 2


def test_scores_are_those_of_the_whole_model(model, generator):
    found = generator.score(PROMPTS, ["ja", " 3!", "x"])
    for prompt, continuation, score in zip(PROMPTS, ["ja", " 3!", "x"], found, strict=True):
        ids = model.vocabulary.encode_sequence(prompt + continuation)
        asked = len(model.vocabulary.encode_sequence(prompt))
        whole = np.asarray(logits_from_scratch(model, ids, asked))
        expected = [whole[place - 1, ids[place]] for place in range(asked, len(ids))]
        assert_close(score.tokens_logprobs, expected, 1e-4)


def test_samples_do_not_depend_on_the_rows_beside_them(vocabularies):
    model = pair(vocabularies, ("bytes", "words"), CONFIGS["paper"])
    sampling = Sampling(max_new_tokens=5, temperature=1.0, n=2, seed=3, repetition_penalty=1.2)
    together = Generator(model, max_length=32, slots=4).generate(PROMPTS, sampling)
    alone = Generator(model, max_length=32, slots=1)
    for prompt, answers in zip(PROMPTS, together, strict=True):
        assert alone.generate([prompt], sampling)[0] == answers
    assert together[0][0].tokens != together[0][1].tokens


def test_text_is_streamed_and_stopped(vocabularies):
    model = pair(vocabularies, ("bytes", "words"), CONFIGS["paper"])
    generator = Generator(model, max_length=48)
    (whole,) = generator.generate(["a"], Sampling(max_new_tokens=12))[0]
    assert "".join(generator.stream("a", Sampling(max_new_tokens=12))) == whole.text
    np.testing.assert_array_equal(
        generate(model, ["a"], max_new_tokens=len(whole.tokens))[0], whole.tokens
    )
    stop = whole.text[-1]
    (stopped,) = generator.generate(["a"], Sampling(max_new_tokens=12, stop=(stop,)))[0]
    assert stopped.finish_reason == "stop" and stop not in stopped.text
    assert not generator.scheduler.running and not generator.scheduler.waiting


def test_what_is_not_supported_is_refused(vocabularies):
    model = pair(vocabularies, ("bytes", "words"), CONFIGS["paper"])
    for options in ({"draft": 2}, {"cache_dtype": "int8"}):
        ((name, value),) = options.items()
        with pytest.raises(CalmError, match=f"tokenizer than the anchor, which {name}={value} doe"):
            Generator(model, max_length=16, **options)
    with pytest.raises(CalmError, match="which calm serve does not support"):
        served_models(model, "pair", {"slots": 1, "max_length": 16})
    with pytest.raises(CalmError, match="together more than max_length 8"):
        Generator(model, max_length=8).generate(["abcdefg"])
    with pytest.raises(CalmError, match="slots is 0"):
        Generator(model, slots=0)
    model.augments[0].vocabulary = load_vocabulary("key_value")
    with pytest.raises(CalmError, match="augment 0's tokenizer has no token for 'É'"):
        Generator(model, max_length=80).generate(["É"])
