"""A server of a pair whose augment has a tokenizer of its own."""

import json

import httpx
import numpy as np
import pytest
import tiny_models
from flax import nnx
from servers import running

import calm_jax
from calm_jax import Generator, Sampling
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.errors import CalmError
from calm_jax.serving.parts import served_models

OPTIONS = {"slots": 3, "max_length": 96, "prefill_chunk": 32}
PROMPTS = ["Wer reitet so spät", "12 fo", "春"]


@pytest.fixture(scope="module")
def pair(vocabulary):
    anchor = tiny_models.decoder(1, "llama", num_layers=2, vocab_size=vocabulary.size)
    augment = tiny_models.decoder(2, num_layers=2, embed_dim=16, vocab_size=264)
    anchor.vocabulary, augment.vocabulary = vocabulary, ByteVocabulary()
    config = calm_jax.CompositionConfig(every=1)
    return tiny_models.randomised(calm_jax.compose(anchor, augment, config, rngs=nnx.Rngs(3)))


@pytest.fixture(scope="module")
def generator(pair):
    return Generator(pair, **OPTIONS)


@pytest.fixture(scope="module")
def served(pair):
    with running(served_models(pair, "pair", OPTIONS)) as here:
        yield here


def test_completions_are_what_the_generator_says(served, generator):
    expected = generator.generate(PROMPTS, Sampling(max_new_tokens=9))
    choices = served.completion(prompt=PROMPTS, max_tokens=9)["choices"]
    assert [choice["text"] for choice in choices] == [one.text for (one,) in expected]
    options = {"temperature": 0.9, "top_p": 0.9, "n": 3, "seed": 7}
    (expected,) = generator.generate(PROMPTS[:1], Sampling(max_new_tokens=8, **options))
    choices = served.completion(prompt=PROMPTS[0], max_tokens=8, **options)["choices"]
    assert [choice["text"] for choice in choices] == [one.text for one in expected]


def test_a_chat_is_streamed(served, generator, vocabulary):
    messages = [{"role": "user", "content": "fox?"}]
    body = {"messages": messages, "max_tokens": 7, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=120) as got:
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    prompt = vocabulary.encode_sequence(vocabulary.chat(messages))
    ((expected,),) = generator.generate([prompt], Sampling(max_new_tokens=7))
    assert "".join(deltas) == expected.text


def test_an_echo_has_the_scores_of_the_prompt(served, generator, vocabulary):
    """The end of the prompt closes its last piece, for the answer alone."""
    ids = vocabulary.encode_sequence(PROMPTS[0])
    answer = served.completion(prompt=PROMPTS[0], max_tokens=3, echo=True, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    ((made,),) = generator.generate([ids], Sampling(max_new_tokens=3, logprobs=0))
    (score,) = generator.score([ids[:1]], [ids[1:]])
    assert logprobs[0] is None
    found = [*score.tokens_logprobs, *(one.logprob for one in made.logprobs)]
    np.testing.assert_allclose(logprobs[1:], found, atol=1e-4)


def test_each_part_has_a_tokenizer_of_its_own(served, pair):
    assert list(served.server.models) == ["pair", "pair/anchor", "pair/augment"]
    ((expected,),) = Generator(pair.augments[0], max_length=64).generate(
        ["é"], Sampling(max_new_tokens=4)
    )
    answer = served.completion(model="pair/augment", prompt="é", max_tokens=4)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["prompt_tokens"] == 2


def test_drafts_are_refused(pair):
    models = served_models(pair, "pair", OPTIONS | {"draft": 4})
    with pytest.raises(CalmError, match="another tokenizer than the anchor, which draft=4 does no"):
        models[0].make_scheduler()
