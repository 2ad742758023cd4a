"""Servers on free ports, in threads of this process, and a scheduler that is slow or fails."""

import contextlib
import dataclasses
import threading
import time

import httpx
import uvicorn

from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding.requests import News
from calm_jax.errors import CalmError
from calm_jax.serving.app import Server
from calm_jax.serving.engine_thread import ServedModel


@dataclasses.dataclass
class Running:
    server: Server
    url: str

    def post(self, path, **options):
        return httpx.post(f"{self.url}{path}", timeout=120, **options)

    def get(self, path, **options):
        return httpx.get(f"{self.url}{path}", timeout=120, **options)

    def completion(self, **body):
        """The answer; greedy and short unless the body says otherwise."""
        body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, **body}
        answer = self.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def rows_in_use(self) -> int:
        return sum(self.server.engine.usage(name).running for name in self.server.models)


def wait_until(condition, seconds=20):
    """Fails unless it is true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def running(models, limits=None, key=None):
    server = Server(models, limits, key)
    config = uvicorn.Config(server, port=0, log_level="warning", lifespan="on")
    listener = config.bind_socket()
    here = uvicorn.Server(config)
    thread = threading.Thread(target=here.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: here.started)
        yield Running(server, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        here.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        listener.close()


class Slow:
    """A scheduler that says "a" a token, each of which takes some time, or fails when told to."""

    waiting, drafting = 0, None

    def __init__(self, seconds=0.01):
        self.rows, self.seconds, self.failure, self.nan = {}, seconds, None, False

    @property
    def running(self):
        return len(self.rows)

    def submit(self, *requests):
        if any(request.prompt[0] == 2 for request in requests):
            raise CalmError("the prompt is not to my taste")
        for request in requests:
            for sample in range(request.sampling.n):
                self.rows[request, sample] = request.sampling.max_new_tokens

    def cancel(self, request, sample=None):
        self.rows = {
            row: left
            for row, left in self.rows.items()
            if row[0] is not request or sample not in (None, row[1])
        }

    def step(self, most=64):
        if not self.rows:
            return False
        time.sleep(self.seconds)
        if self.failure:
            raise self.failure
        for row, left in list(self.rows.items()):
            if self.nan:
                row[0].on_news(News(row[1], [], [], "error", "step 0: not finite"))
                del self.rows[row]
                continue
            row[0].on_news(News(row[1], [100], [], "length" if left == 1 else None))
            self.rows[row] = left - 1
            if left == 1:
                del self.rows[row]
        return True


class Slows:
    """Makes schedulers, and keeps them."""

    def __init__(self, **options):
        self.made, self.options = [], options

    def __call__(self):
        self.made.append(Slow(**self.options))
        return self.made[-1]

    def model(self, slots=2, max_length=10_000):
        return ServedModel("slow", ByteVocabulary(), slots, max_length, self)
