"""Answers of the server against the same model asked directly."""

import jax
import numpy as np
import openai
import pytest
from servers import running

from calm_jax import Generator, Sampling
from calm_jax.decoding.text_stream import HALF
from calm_jax.models import Inputs
from calm_jax.serving.parts import served_models


@pytest.fixture(scope="module")
def generator(pair):
    return Generator(pair, slots=4, max_length=128, prefill_chunk=32)


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")


def test_a_completion_is_what_the_generator_says(served, generator, vocabulary):
    prompts = ["Hello", "Wer reitet so spät"]
    expected = generator.generate(prompts, Sampling(max_new_tokens=9))
    answer = served.completion(prompt=prompts, max_tokens=9)
    assert answer["object"] == "text_completion" and answer["model"] == "pair"
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    for choice, (one,) in zip(answer["choices"], expected, strict=True):
        assert (choice["text"], choice["finish_reason"]) == (one.text, one.finish_reason)
    count = sum(len(vocabulary.encode_sequence(prompt)) for prompt in prompts)
    made = sum(len(one.tokens) for (one,) in expected)
    assert answer["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": made,
        "total_tokens": count + made,
    }
    ids = [vocabulary.encode_sequence(prompt) for prompt in prompts]
    by_ids = served.completion(prompt=ids, max_tokens=9)
    assert by_ids["choices"] == answer["choices"]
    assert served.completion(prompt=ids[0], max_tokens=9)["choices"] == answer["choices"][:1]


def test_sampling_options_reach_the_generator(served, generator):
    options = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "n": 3, "seed": 7}
    options["repetition_penalty"] = 1.2
    (expected,) = generator.generate(["Hello"], Sampling(max_new_tokens=8, **options))
    choices = served.completion(max_tokens=8, **options)["choices"]
    assert [choice["text"] for choice in choices] == [one.text for one in expected]
    assert len({choice["text"] for choice in choices}) > 1


def test_a_drafting_server_says_the_same_and_tells_its_acceptance(pair, generator):
    options = {"temperature": 0.9, "n": 2, "seed": 5}
    (expected,) = generator.generate(["Hello"], Sampling(max_new_tokens=20, **options))
    drafting = {"slots": 4, "max_length": 128, "prefill_chunk": 32, "draft": 2}
    with running(served_models(pair, "pair", drafting)) as here:
        choices = here.completion(max_tokens=20, **options)["choices"]
        assert [choice["text"] for choice in choices] == [one.text for one in expected]
        figures = here.get("/metrics").text
        assert here.completion(model="pair/augment")["choices"]
    assert 'calm_draft_length{model="pair"}' in figures
    assert 'calm_draft_acceptance_ratio{model="pair"}' in figures


def test_without_a_seed_answers_differ(served):
    texts = {served.completion(temperature=1.0, max_tokens=12)["choices"][0]["text"] for _ in "123"}
    assert len(texts) > 1


def test_the_defaults_are_those_of_openai(served):
    answer = served.post("/v1/completions", json={"prompt": "Hello", "seed": 3}).json()
    assert answer["usage"]["completion_tokens"] == 16
    again = served.completion(max_tokens=16, temperature=1.0, top_p=1.0, seed=3)
    assert again["choices"] == answer["choices"]


def test_a_stop_text_ends_the_answer_before_it(served):
    whole = served.completion(max_tokens=20)["choices"][0]["text"]
    stop = whole[6:9]
    assert stop in whole
    answer = served.completion(max_tokens=20, stop=["not there", stop])
    choice = answer["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 20
    with_logprobs = served.completion(max_tokens=20, stop=stop, logprobs=0)["choices"][0]
    assert with_logprobs["text"] == choice["text"]
    offsets = with_logprobs["logprobs"]["text_offset"]
    assert all(offset < len(choice["text"]) for offset in offsets)


def logits(pair, ids):
    """Log-probabilities of every next token [T, V], by one forward pass without a cache."""
    # Nothing looks at the zeros behind it: with them few programs take rows of all lengths.
    row_T = np.pad(np.array(ids, np.int32), (0, -len(ids) % 32))
    values = pair(Inputs(row_T[None]))[0, : len(ids)]
    return np.asarray(jax.nn.log_softmax(values, axis=-1))


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("top", [1, 5])
def test_scores_as_lm_evaluation_harness_reads_them(served, pair, vocabulary, max_tokens, top):
    """Its `local-completions` sends ids, and reads token_logprobs from the continuation on."""
    prompts = [vocabulary.encode_sequence(text) for text in ("Hello, how are you", "Es ist der")]
    answer = served.completion(prompt=prompts, echo=True, logprobs=top, max_tokens=max_tokens)
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        told, expected = choice["logprobs"], logits(pair, ids)
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert len(told["token_logprobs"]) == len(ids) + max_tokens == len(told["tokens"])
        values = [expected[place, token] for place, token in enumerate(ids[1:])]
        np.testing.assert_allclose(told["token_logprobs"][1 : len(ids)], values, atol=2e-4)
        for place, (value, tops) in enumerate(
            zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
        ):
            assert max(tops.values()) == pytest.approx(expected[place].max(), abs=2e-4)
            assert value in tops.values() and top <= len(tops) <= top + 1
        assert choice["text"].startswith(vocabulary.decode(ids))
        assert told["text_offset"] == sorted(told["text_offset"])
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_echo_alone_repeats_the_prompt(served):
    said = served.completion()["choices"][0]["text"]
    assert served.completion(echo=True)["choices"][0]["text"] == f"Hello{said}"
    none = served.completion(echo=True, max_tokens=0)["choices"][0]
    assert (none["text"], none["finish_reason"]) == ("Hello", "length")


def test_offsets_point_into_an_echoed_prompt_with_special_tokens(served, vocabulary):
    prompt = "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|> dog"
    choice = served.completion(prompt=prompt, echo=True, logprobs=1, max_tokens=2)["choices"][0]
    told, text = choice["logprobs"], choice["text"]
    count = len(vocabulary.encode(prompt))
    asked = list(zip(told["tokens"], told["text_offset"], strict=True))[1:][:count]
    assert "".join(token for token, _ in asked) == prompt
    assert all(text.startswith(token, offset) for token, offset in asked)
    assert told["text_offset"][1 + count] == len(prompt)


def test_tokens_of_logprobs_are_the_text(served):
    choice = served.completion(max_tokens=20, logprobs=5)["choices"][0]
    told, text = choice["logprobs"], choice["text"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<")):
            # Bytes of no character, which random models say, count for the token behind them.
            assert text[offset:].lstrip(HALF).startswith(token)
    for tops in told["top_logprobs"]:
        assert 5 <= len(tops) <= 6
    assert served.completion(logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_openai_completions(client, served):
    expected = served.completion(max_tokens=12, n=2, temperature=0.8, seed=1, logprobs=2)
    options = {"max_tokens": 12, "n": 2, "temperature": 0.8, "seed": 1, "logprobs": 2}
    answer = client.completions.create(model="pair", prompt="Hello", **options)
    assert [c.text for c in answer.choices] == [c["text"] for c in expected["choices"]]
    texts, tokens, ends, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(
        model="pair",
        prompt="Hello",
        stream=True,
        stream_options={"include_usage": True},
        **options,
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [c["text"] for c in expected["choices"]]
    assert tokens == [c["logprobs"]["tokens"] for c in expected["choices"]]
    assert ends == [c["finish_reason"] for c in expected["choices"]]
    assert usage.completion_tokens == expected["usage"]["completion_tokens"]


def test_openai_chat(client, generator, vocabulary):
    messages = [{"role": "user", "content": "Hello"}]
    (expected,) = generator.generate([vocabulary.chat(messages)], Sampling(max_new_tokens=10))
    options = {"max_completion_tokens": 10, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(model="pair", messages=messages, **options)
    (choice,) = answer.choices
    assert choice.message.content == expected[0].text
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    for entry, token in zip(choice.logprobs.content, expected[0].tokens, strict=True):
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
        if entry.bytes is not None and "bytes:" not in entry.token:
            assert bytes(entry.bytes).decode() == entry.token
        assert vocabulary.decode([token]) in (entry.token, HALF, "")
    text, roles, content = "", [], []
    for chunk in client.chat.completions.create(
        model="pair", messages=messages, stream=True, **options
    ):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        roles.append(delta.role)
        content += chunk.choices[0].logprobs.content
    assert text == expected[0].text and roles[0] == "assistant" and not any(roles[1:])
    assert [entry.token for entry in content] == [e.token for e in choice.logprobs.content]


def test_parts_of_a_message_are_one_text(served):
    def said(content):
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": 5, "temperature": 0}
        return served.post("/v1/chat/completions", json=body).json()["choices"]

    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert said(parts) == said("Hello")


def test_each_part_of_the_pair_answers(served, pair, client):
    names = [model.id for model in client.models.list()]
    assert names == ["pair", "pair/anchor", "pair/augment"]
    assert client.models.retrieve("pair/augment").id == "pair/augment"
    for name, part in (("pair/anchor", pair.anchor), ("pair/augment", pair.augments[0])):
        ((expected,),) = Generator(part).generate(["Hello"], Sampling(max_new_tokens=6))
        answer = served.completion(model=name)
        assert (answer["choices"][0]["text"], answer["model"]) == (expected.text, name)
