"""Runs the server in this process until it is told to stop."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from calm_jax.errors import CalmError
from calm_jax.serving.app import Server

_SECONDS = 0.1  # between two checks whether answers are left


class _Uvicorn(uvicorn.Server):
    """Stops when the last answer has ended; until then new requests get a refusal."""

    def __init__(self, server: Server, config: uvicorn.Config):
        super().__init__(config)
        self._server = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        # Told only now: whoever reads the address may connect at once.
        [listener] = sockets
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(self._server.models)} on http://{shown}:{port}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        yield

    def _stop(self, number: int) -> None:
        if self._server.draining:
            # The engine may be in a dispatch that takes minutes, which nothing else can end.
            os._exit(128 + number)
        self._server.draining = True
        left = self._server.open_answers
        print(f"stopping; answers still running: {left}", file=sys.stderr, flush=True)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        while self._server.open_answers:
            await asyncio.sleep(_SECONDS)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """The socket of an address, whose connections wait until `run`.

    Raises `CalmError` if the address is not available.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        # Until somebody listens, others may bind the address too.
        bound.listen()
    except OSError as error:
        bound.close()
        raise CalmError(
            f"--host={host} --port={port}: the address is not available: {error.strerror}"
        ) from None
    return bound


def run(server: Server, bound: socket.socket) -> None:
    """Listens until SIGTERM or SIGINT, and returns when all answers have ended."""
    config = uvicorn.Config(
        server,
        log_level="warning",
        access_log=False,
        lifespan="on",
        # A client that hangs up while its request is read must not keep the process.
        timeout_graceful_shutdown=5,
    )
    _Uvicorn(server, config).run(sockets=[bound])
