"""What is refused, how, and that the server answers on."""

import asyncio
import json
import random
import socket
import string

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from servers import Slows, running, wait_until

from calm_jax.errors import CalmError
from calm_jax.serving.app import MOST_BYTES, Limits
from calm_jax.serving.engine_thread import ServedModel
from calm_jax.serving.parts import built

LIMITS = Limits(max_queue=2, max_tokens=5000, request_seconds=60)


@pytest.fixture
def slow():
    slows = Slows()
    with running([slows.model()], LIMITS) as here:
        here.slows = slows
        yield here


def error_of(answer, status):
    """The error object, which has OpenAI's fields and one line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "prompt must be a text, a list"),
        ({"prompt": []}, 400, "prompt must be"),
        ({"prompt": ["a", 1]}, 400, "prompt must be"),
        ({"prompt": [[True]]}, 400, "prompt must be"),
        ({"prompt": [-1]}, 400, "prompt must be"),
        ({"prompt": [9999]}, 400, "prompt token 9999 is outside the 528 rows"),
        ({"prompt": [[]]}, 400, "an empty prompt"),
        ({"prompt": "\ud800"}, 400, "prompt has half of a surrogate pair"),
        ({"prompt": "a" * 500}, 400, "more than this model's limit 128"),
        ({"prompt": "a", "max_tokens": 127}, 400, "more than this model's limit 128"),
        ({"prompt": "a", "max_tokens": 9999}, 400, "max_tokens is 9999; it must be an integer"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens is 1.5"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature must be a finite number"),
        ({"prompt": "a", "temperature": 10**400}, 400, "temperature must be a finite number"),
        ({"prompt": "a", "top_p": 2}, 400, "top_p is 2"),
        ({"prompt": "a", "n": 0}, 400, "n is 0"),
        ({"prompt": "a", "n": 10**9}, 400, "the request is for 1000000000 answers"),
        ({"prompt": "a", "stop": list(17 * "a")}, 400, "stop must be a text or up to 16"),
        ({"prompt": "a", "temperature": 0, "top_p": 7}, 400, "top_p is 7"),
        ({"prompt": "a", "temperature": 0, "top_k": "all"}, 400, "top_k is 'all'"),
        ({"prompt": "a", "repetition_penalty": 1e-50}, 400, "as float32 can hold"),
        ({"prompt": "a", "stop": ""}, 400, "stop is an empty text"),
        ({"prompt": "a", "seed": 2**70}, 400, "seed is"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs is 6; it must be an integer from 0 to 5"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs is a truth value"),
        ({"prompt": "a", "stream": 1}, 400, "stream is a number"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": "a", "maxtokens": 1}, 400, "unknown field 'maxtokens'"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty is not supported"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "no model 'gpt-4'; there are pair, pair/anchor"),
    ],
)
def test_a_bad_body_is_named(served, body, status, message):
    data = json.dumps(body).encode()
    error = error_of(served.post("/v1/completions", content=data), status)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages must be a list that is not empty"),
        ({"messages": ["a"]}, "messages[0] is a text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null"),
        ({"messages": [{"content": "a"}]}, "messages[0].role is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content has a part that is not text",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3},
            "top_logprobs needs logprobs: true",
        ),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "unknown field 'weight'"),
    ],
)
def test_a_bad_chat_is_named(served, body, message):
    assert message in error_of(served.post("/v1/chat/completions", json=body), 400)["message"]


def test_text_without_a_token_is_named(served, vocabulary, monkeypatch):
    monkeypatch.setattr(type(vocabulary), "lost_character", lambda self, text: "€")
    error = error_of(served.post("/v1/completions", json={"prompt": "5 €"}), 400)
    assert error["message"] == "the vocabulary has no token for '€' in '5 €'"
    assert error["param"] == "prompt"


def test_neutral_fields_are_taken(served):
    neutral = {"frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "best_of": 1}
    assert served.completion(suffix=None, **neutral)["choices"]


def test_a_model_without_a_template_refuses_chats(slow):
    body = {"messages": [{"role": "user", "content": "a"}]}
    error = error_of(slow.post("/v1/chat/completions", json=body), 400)
    assert error["message"] == ("the vocabulary of slow has no chat template; use /v1/completions")


def test_what_is_not_there(served):
    error_of(served.get("/v1/nothing"), 404)
    error_of(served.get("/v1/models/other"), 404)
    error_of(served.get("/v1/completions"), 405)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"{",
        b"[" * 10_000,
        b'{"prompt":' * 10_000,
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": NaN}',
        b'{"prompt": ' + b"1" * 100_000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}',
        b"null",
    ],
)
def test_what_is_no_json_is_a_400(served, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        error_of(served.post(path, content=body), 400)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_large_body_is_a_413(served, in_parts):
    body = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    content = (body[at : at + 100_000] for at in range(0, len(body), 100_000))
    answer = served.post("/v1/completions", content=content if in_parts else body)
    assert str(MOST_BYTES) in error_of(answer, 413)["message"]
    assert served.completion()["choices"]


NAMES = ["prompt", "messages", "model", "max_tokens", "temperature", "top_p", "n", "seed", "stop"]
NAMES += ["echo", "logprobs", "top_logprobs", "stream", "stream_options", "top_k", "best_of"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    body=st.binary()
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(NAMES), VALUES).map(lambda x: json.dumps(x).encode()),
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
)
def test_garbage_is_a_4xx_or_answered(garbage_server, body, path):
    answer = garbage_server.client.post(f"{garbage_server.url}{path}", content=body)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500
        error_of(answer, answer.status_code)
    assert garbage_server.get("/health").status_code == 200


@pytest.fixture(scope="module")
def garbage_server():
    limits = Limits(max_tokens=100)
    with (
        running([Slows(seconds=0).model(max_length=300)], limits) as here,
        httpx.Client() as client,
    ):
        here.client = client
        yield here


BODY = {"prompt": "a", "max_tokens": 2000}


def test_a_full_queue_is_a_429(slow):
    """Two rows and two places in the queue."""
    with httpx.Client() as client:
        streams = [
            client.stream("POST", f"{slow.url}/v1/completions", json={**BODY, "stream": True})
            for _ in range(4)
        ]
        opened = [stream.__enter__() for stream in streams]
        answer = slow.post("/v1/completions", json=BODY)
        assert error_of(answer, 429)["code"] == "queue_full"
        assert int(answer.headers["Retry-After"]) >= 1
        opened[0].close()
        wait_until(lambda: slow.rows_in_use() == 3)
        assert slow.post("/v1/completions", json={**BODY, "max_tokens": 1}).status_code == 200
        for one in opened:
            one.close()
    wait_until(lambda: slow.rows_in_use() == 0)
    with pytest.raises(openai.BadRequestError, match="5 answers"):
        openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0).completions.create(
            model="slow", prompt="a", n=5
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows(slow, stream):
    address = slow.url.removeprefix("http://").split(":")
    body = json.dumps({**BODY, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(address) as client:
        client.sendall(head.encode() + body)
        wait_until(lambda: slow.rows_in_use() == 1)
    wait_until(lambda: slow.rows_in_use() == 0)
    assert slow.slows.made[0].rows == {}
    wait_until(lambda: slow.server.open_answers == 0)


@pytest.fixture
def hasty():
    slows = Slows()
    with running([slows.model()], Limits(max_tokens=5000, request_seconds=0.5)) as here:
        yield here


def test_a_late_answer_is_a_408(hasty):
    error = error_of(hasty.post("/v1/completions", json=BODY), 408)
    assert error["message"] == "the request took more than 0.5 seconds"
    wait_until(lambda: hasty.rows_in_use() == 0)
    assert hasty.post("/v1/completions", json={**BODY, "max_tokens": 1}).status_code == 200


def test_a_late_stream_ends_in_an_error(hasty):
    answer = hasty.post("/v1/completions", json={**BODY, "stream": True})
    *_, last = answer.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: hasty.rows_in_use() == 0)


def test_a_client_that_does_not_send_its_body_is_let_go(hasty):
    with socket.create_connection(hasty.url.removeprefix("http://").split(":")) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert b" 408 " in client.recv(1000)


def test_a_client_that_does_not_read_is_let_go(hasty):
    with socket.create_connection(hasty.url.removeprefix("http://").split(":")) as client:
        body = json.dumps({**BODY, "stream": True, "n": 2}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until(lambda: hasty.rows_in_use() == 2)
        wait_until(lambda: hasty.rows_in_use() == 0 and hasty.server.open_answers == 0)


def test_the_key(slow):
    with running([Slows().model()], LIMITS, key="schlüssel") as here:
        body = {"prompt": "a", "max_tokens": 1}
        for given in (None, "Bearer", "Bearer wrong", "Basic schlüssel", "schlüssel"):
            headers = {} if given is None else {"Authorization": given.encode()}
            answer = here.post("/v1/completions", json=body, headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            error_of(here.get("/v1/models", headers=headers), 401)
            error_of(here.get("/metrics", headers=headers), 401)
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert here.post("/v1/completions", json=body, headers=right).status_code == 200
        assert here.get("/health").status_code == here.get("/").status_code == 200


def test_a_failing_engine_is_a_500_and_the_next_request_is_answered(slow):
    body = {"prompt": "a", "max_tokens": 1}
    assert slow.post("/v1/completions", json=body).status_code == 200
    slow.slows.made[-1].failure = RuntimeError("out of memory\nand more")
    error = error_of(slow.post("/v1/completions", json=body), 500)
    assert error["message"] == "the engine failed: RuntimeError: out of memory"
    assert slow.post("/v1/completions", json=body).status_code == 200
    assert len(slow.slows.made) == 2  # buffers of the first may be gone
    slow.slows.made[-1].failure = RuntimeError("again")
    text = slow.post("/v1/completions", json={**body, "stream": True}).text
    assert "the engine failed: RuntimeError: again" in text


def test_logits_that_are_no_numbers_are_a_500(slow):
    body = {"prompt": "a", "max_tokens": 1}
    assert slow.post("/v1/completions", json=body).status_code == 200
    slow.slows.made[-1].nan = True
    error = error_of(slow.post("/v1/completions", json=body), 500)
    assert error["message"] == "the model failed: step 0: not finite"
    text = slow.post("/v1/completions", json={**body, "stream": True}).text
    assert '"code": "model_failed"' in text and "[DONE]" not in text


def test_a_scheduler_that_cannot_be_made_is_a_500(slow, monkeypatch):
    monkeypatch.setattr(slow.slows, "options", {"unknown": 1})
    error = error_of(slow.post("/v1/completions", json={"prompt": "a"}), 500)
    assert error["message"].startswith("the engine failed: ")
    monkeypatch.undo()
    assert slow.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_what_the_scheduler_refuses_is_a_400(slow):
    error = error_of(slow.post("/v1/completions", json={"prompt": [2]}), 400)
    assert error["message"] == "the prompt is not to my taste"
    assert slow.rows_in_use() == 0


def test_metrics(slow):
    for prompt in ("abc", [2]):
        slow.post("/v1/completions", json={"prompt": prompt, "max_tokens": 5})
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(slow.get("/metrics").text)
        for sample in family.samples
    }
    assert samples["calm_requests_total", "/v1/completions", "200"] == 1
    assert samples["calm_requests_total", "/v1/completions", "400"] == 1
    assert samples["calm_prompt_tokens_total", "slow"] == 3
    assert samples["calm_generated_tokens_total", "slow"] == 5
    assert samples["calm_waiting_answers", "slow"] == samples["calm_running_rows", "slow"] == 0
    assert samples["calm_time_to_first_token_seconds_count", "slow"] == 1
    assert samples["calm_request_seconds_count", "/v1/completions"] == 2


def test_many_clients_get_what_each_would_get_alone(served):
    """Some hang up; all others are answered as if nobody else were there."""
    bodies = []
    for number in range(16):
        draw = random.Random(number)
        body = {
            "prompt": "".join(draw.choices(string.ascii_letters, k=draw.randint(1, 40))),
            "max_tokens": draw.randint(1, 30),
            "temperature": draw.choice([0, 0.8]),
            "seed": number,
            "stream": number % 2 == 0,
        }
        bodies.append(body)

    async def one(client, body, answers):
        if body["seed"] % 5 == 0:
            try:
                await asyncio.wait_for(client.post("/v1/completions", json=body), 0.05)
            except TimeoutError:
                return
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        answers.append((body, text_of(answer, body)))

    def text_of(answer, body):
        if not body["stream"]:
            return answer.json()["choices"][0]["text"]
        events = [e.removeprefix("data: ") for e in answer.text.strip().split("\n\n")]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(e)["choices"][0]["text"] for e in events)

    async def all_at_once():
        answers = []
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            for _ in range(3):
                await asyncio.gather(*(one(client, body, answers) for body in bodies))
        return answers

    answers = asyncio.run(all_at_once())
    assert len(answers) >= 36
    alone = {
        body["seed"]: text_of(served.post("/v1/completions", json=body), body) for body in bodies
    }
    assert [text for _, text in answers] == [alone[body["seed"]] for body, _ in answers]
    wait_until(lambda: served.rows_in_use() == 0)


def test_a_part_whose_caches_do_not_fit_is_left_out(caplog):
    def fits():
        return "its scheduler"

    def does_not_fit():
        raise CalmError("the caches of 8 rows take 9 GiB, 1 GiB are free")

    def named(name, make):
        return ServedModel(name, None, 8, 64, make)

    parts = [named("pair", fits), named("pair/anchor", does_not_fit), named("pair/augment", fits)]
    assert list(built(parts)) == ["pair", "pair/augment"]
    assert "pair/anchor is not served: the caches of 8 rows take 9 GiB" in caplog.text
    with pytest.raises(CalmError, match="take 9 GiB"):
        built(parts[1:])
