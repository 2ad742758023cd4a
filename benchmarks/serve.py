"""Clients of `calm serve` at once: what goes wrong, how fast it is, whether answers stay theirs.

  python benchmarks/serve.py [--workdir=DIR | --size=small] [--clients=32] [--seconds=60]
                             [--slots=8] [--tokens=48] [--output=FILE.json]

Each client asks one request after the other and reads the answer as a stream; one in eight hangs up
in its midst. Afterwards every request is asked again alone. "changed" are answers that then differ,
"mixed up" those of them that are another request's, "lost" streams without an end, "errors" other
statuses than 200. Server and clients share this process and its processors. Without --workdir the
pair is random: 30 and 8 million parameters of bytes.
"""

import asyncio
import contextlib
import json
import logging
import random
import string
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import uvicorn
from absl import app, flags
from flax import nnx
from measuring import short, tell

from calm_jax import CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.checkpoints.any_model import load_model
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.serving.app import Limits, Server
from calm_jax.serving.parts import served_models

# Layers, width, heads, key heads, head width and MLP width of anchor and augment.
SIZES = {
    "tiny": ((4, 32, 4, 2, 8, 48), (4, 16, 2, 1, 8, 24)),
    "small": ((9, 512, 8, 8, 64, 1408), (10, 256, 8, 2, 32, 768)),
}
WORKDIR = flags.DEFINE_string("workdir", None, "folder of a model; default: a random pair")
SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "of the random pair")
CLIENTS = flags.DEFINE_integer("clients", 32, "that ask at once")
SECONDS = flags.DEFINE_float("seconds", 60.0, "in which requests begin")
SLOTS = flags.DEFINE_integer("slots", 8, "rows of the server")
TOKENS = flags.DEFINE_integer("tokens", 48, "of an answer at most")
OUTPUT = flags.DEFINE_string("output", None, "JSON file of the results")

BODIES = 32  # different requests
HANG_UP = 8  # one of so many does


def main(_) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request
    options = {
        "slots": SLOTS.value,
        "max_length": 64 + TOKENS.value,
        "prefill_chunk": 64,
        "cache_dtype": None,
    }
    model = _random_pair() if WORKDIR.value is None else load_model(WORKDIR.value)
    bodies = [_body(number) for number in range(BODIES)]
    with _serving(Server(served_models(model, "pair", options)[:1], Limits())) as url:
        asyncio.run(_clients(url, bodies, 0.0, least=4 * BODIES))  # all is compiled then
        start = time.perf_counter()
        asked = asyncio.run(_clients(url, bodies, SECONDS.value))
        seconds = time.perf_counter() - start
        alone = asyncio.run(_alone(url, bodies))
    tell("serve", [("what", "figure", "bound"), *_figures(asked, alone, seconds)], OUTPUT.value)


def _figures(asked: list[dict[str, Any]], alone: list[str], seconds: float) -> list[tuple]:
    whole = [one for one in asked if one["ended"]]
    changed = [one for one in whole if one["text"] != alone[one["number"]]]
    mixed_up = [one for one in changed if one["text"] in alone]
    lost = [one for one in asked if one["status"] == 200 and not one["ended"] and not one["left"]]
    first = [one["first"] for one in asked if one["first"] is not None]
    return [
        ("requests", len(asked), ""),
        ("answered", len(whole), ""),
        ("hung up", sum(one["left"] for one in asked), ""),
        ("errors", sum(one["status"] != 200 for one in asked), 0),
        ("lost", len(lost), 0),
        ("mixed up", len(mixed_up), 0),
        ("changed", len(changed), 0),
        ("tokens a second", short(sum(one["tokens"] for one in whole) / seconds), ""),
        *(
            (f"time to first token, {share:.0%}, s", short(float(np.quantile(first, share))), "")
            for share in (0.5, 0.9, 0.99)
        ),
    ]


async def _clients(
    url: str, bodies: list[dict[str, Any]], seconds: float, *, least: int = 0
) -> list[dict[str, Any]]:
    """What became of every request, of which there are at least so many."""
    end, asked = time.perf_counter() + seconds, []

    async def one_after_another(client: httpx.AsyncClient, draw: random.Random) -> None:
        while len(asked) < least or time.perf_counter() < end:
            number = draw.randrange(len(bodies))
            leaves = draw.randrange(HANG_UP) == 0
            asked.append(await _ask(client, bodies[number], number, 2 if leaves else None))

    async with _client(url) as client:
        draws = [random.Random(number) for number in range(CLIENTS.value)]
        await asyncio.gather(*(one_after_another(client, draw) for draw in draws))
    return asked


async def _alone(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    async with _client(url) as client:
        return [(await _ask(client, body, 0, None))["text"] for body in bodies]


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits)


async def _ask(
    client: httpx.AsyncClient, body: dict[str, Any], number: int, events: int | None
) -> dict[str, Any]:
    """Streams an answer; hangs up after so many events."""
    start = time.perf_counter()
    one = {"number": number, "text": "", "tokens": 0, "first": None, "ended": False, "left": False}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        one["status"] = answer.status_code
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                one["ended"] = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                one["first"] = one["first"] or time.perf_counter() - start
                one["text"] += "".join(choice["text"] for choice in event.get("choices", []))
                one["tokens"] = (event.get("usage") or {}).get("completion_tokens", 0)
                if events is not None and (events := events - 1) == 0:
                    one["left"] = True
                    break
    return one


def _body(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    return {
        "prompt": "".join(draw.choices(string.ascii_letters, k=draw.randint(1, 60))),
        "max_tokens": draw.randint(TOKENS.value // 4, TOKENS.value),
        "temperature": 0.8 if number % 2 else 0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _random_pair() -> Any:
    names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
    vocabulary, models = ByteVocabulary(), []
    for seed, sizes in enumerate(SIZES[SIZE.value]):
        sizes = dict(zip(names, sizes, strict=True))
        config = DecoderConfig.llama(vocab_size=vocabulary.size, **sizes)
        models.append(Decoder(config, nnx.Rngs(seed)))
        models[-1].vocabulary = vocabulary
    return compose(*models, CompositionConfig(init="paper"), rngs=nnx.Rngs(2))


@contextlib.contextmanager
def _serving(server: Server) -> Iterator[str]:
    """The address of the server, which runs in a thread."""
    config = uvicorn.Config(server, port=0, log_level="warning", lifespan="on")
    listener, here = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=here.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        here.should_exit = True
        thread.join()
        listener.close()


if __name__ == "__main__":
    app.run(main)
