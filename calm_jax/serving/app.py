"""The routes of the server, and the checks of all of them: key, size, time, draining."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import importlib.resources
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from absl import logging
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from calm_jax.decoding.scheduler import Scheduler
from calm_jax.serving.answering import Answer, event
from calm_jax.serving.engine_thread import EngineThread, Flight, ServedModel
from calm_jax.serving.errors import Refused, one_line
from calm_jax.serving.metrics import Metrics
from calm_jax.serving.protocol import Asked, parse_chat, parse_completion
from calm_jax.serving.token_texts import TokenTexts

MOST_BYTES = 1_000_000  # largest body
LAST_SECONDS = 1.0  # for a slow client to read its last event
WITHOUT_KEY = ("/", "/health")


class _Gone(Exception):
    """The client has hung up."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one request."""

    max_queue: int = 64  # most answers of a model that wait for a row
    max_tokens: int = 1024  # most tokens of an answer
    request_seconds: float = 300.0  # most seconds from the start of a request to its end


class Server:
    """The ASGI application and its state.

    Args:
        models: the first one answers if a body names none.
        key: the key that clients must send; None: no key is needed.
        schedulers: those of models that are made already, by name.

    Attributes:
        draining: whether new requests are refused.
        open_answers: number of requests that are being answered.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        limits: Limits | None = None,
        key: str | None = None,
        schedulers: Mapping[str, Scheduler] = MappingProxyType({}),
    ):
        self.limits, self._key = limits or Limits(), key
        self.models = {model.name: model for model in models}
        self.engine = EngineThread(self.models, self.limits.max_queue, schedulers)
        self.metrics = Metrics(self.engine)
        self._texts = {id(m.vocabulary): TokenTexts(m.vocabulary) for m in models}
        self._page = importlib.resources.files(__package__).joinpath("page.html").read_text()
        self._created = int(time.time())
        self.draining, self.open_answers = False, 0
        routes = [
            ("/", "GET", self._show_page),
            ("/health", "GET", self._health),
            ("/metrics", "GET", self._metrics),
            ("/v1/models", "GET", self._list_models),
            ("/v1/models/{name:path}", "GET", self._show_model),
            ("/v1/completions", "POST", functools.partial(self._answered, parse_completion)),
            ("/v1/chat/completions", "POST", functools.partial(self._answered, parse_chat)),
        ]
        self._starlette = Starlette(
            routes=[Route(path, call, methods=[method]) for path, method, call in routes],
            exception_handlers=dict.fromkeys((404, 405, Refused, Exception), _refuse),
            lifespan=self._lifespan,
        )
        self._known = {path for path, _, _ in routes if "{" not in path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts, times, and checks the key of every request."""
        if scope["type"] != "http":
            await self._starlette(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # nginx's status for a client that hangs up
        path = scope["path"]

        async def send_counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path not in WITHOUT_KEY and not self._has_key(scope):
                refused = Refused(401, "the API key is missing or wrong", code="invalid_api_key")
                await _answer_refused(refused)(scope, receive, send_counted)
            else:
                await self._starlette(scope, receive, send_counted)
        except Exception as error:  # the client already has a response, unless a stream had begun
            logging.error("%s", "".join(traceback.format_exception(error)))
        finally:
            label = path if path in self._known else "other"
            self.metrics.requests.labels(label, str(status)).inc()
            self.metrics.seconds.labels(label).observe(time.perf_counter() - start)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = b" ".join(dict(scope["headers"]).get(b"authorization", b"").split())
        scheme, _, key = given.partition(b" ")
        right = hmac.compare_digest(key, self._key.encode())
        return scheme.lower() == b"bearer" and right

    @contextlib.asynccontextmanager
    async def _lifespan(self, _) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await self.engine.stop()

    async def _show_page(self, _: Request) -> Response:
        return HTMLResponse(self._page)

    async def _health(self, _: Request) -> Response:
        is_well = self.engine.is_alive and not self.draining
        status = "ok" if is_well else "draining" if self.draining else "failed"
        return JSONResponse({"status": status}, 200 if is_well else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _list_models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(self._model, self.models))})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.models:
            raise Refused(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "calm_jax",
            "max_model_len": model.max_length,
            "chat": model.vocabulary.chat_template is not None,
        }

    async def _answered(self, parse: Callable[..., Asked], request: Request) -> Response:
        if self.draining:
            raise Refused(503, "the server is stopping", code="stopping")
        start = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self.limits.request_seconds
        seconds = f"{self.limits.request_seconds:g}"
        late = Refused(408, f"the request took more than {seconds} seconds", code="timeout")
        with contextlib.ExitStack() as stack:
            self.open_answers += 1
            stack.callback(self._one_less)
            try:
                async with asyncio.timeout_at(deadline):
                    body = await _body(request)
                    asked = await asyncio.to_thread(
                        parse, body, self.models, self.limits.max_tokens
                    )
                    flight = stack.enter_context(self.engine.flight(asked.model, asked.answers))
                    watch = asyncio.create_task(_watch(request.receive, flight))
                    stack.callback(watch.cancel)
                    texts = self._texts[id(asked.model.vocabulary)]
                    answer = Answer(asked, flight, texts, self.metrics, start)
                    await answer.submit()
                    if not asked.stream:
                        return JSONResponse(await answer.whole())
            except TimeoutError:
                raise late from None
            except (_Gone, ClientDisconnect):
                return _Nothing()
            return _Events(answer.events(), deadline, late, stack.pop_all())

    def _one_less(self) -> None:
        self.open_answers -= 1


class _Nothing(Response):
    """The response to a client that has hung up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class _Events(Response):
    """Server-sent events until the deadline; `stack` is closed after the last one."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        deadline: float,
        late: Refused,
        stack: contextlib.ExitStack,
    ):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        # A proxy that first collects the whole answer would make a stream pointless.
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._deadline, self._late, self._stack = events, deadline, late, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        last = b""
        with self._stack:
            try:
                async with asyncio.timeout_at(self._deadline):
                    await send(head)
                    async with contextlib.aclosing(self._events) as events:
                        async for data in events:
                            await _send_body(send, data, more=True)
            except TimeoutError:
                last = event(self._late.body)
            except Refused as error:
                last = event(error.body)
            except _Gone:
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                await _send_body(send, last, more=False)


async def _send_body(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _body(request: Request) -> bytes:
    """The body. Even a body that is too large is read to its end, or its sender sees no answer."""
    body, count = bytearray(), 0
    async for part in request.stream():
        count += len(part)
        if count <= MOST_BYTES:
            body += part
    if count > MOST_BYTES:
        raise Refused(413, f"the body has {count} bytes; at most {MOST_BYTES} are allowed")
    return bytes(body)


async def _watch(receive: Callable[[], Awaitable[Any]], flight: Flight) -> None:
    """Ends a flight whose client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        continue
    flight.fail(_Gone())


def _answer_refused(error: Refused) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        line = f"{request.method} {request.url.path}: {error.detail}"
        error = Refused(error.status_code, line)
    elif not isinstance(error, Refused):
        error = Refused(500, f"the server failed: {one_line(error)}")
    return _answer_refused(error)
