"""The thread that calls the schedulers of all served models, and its interface to the event loop.

The event loop sends commands through a queue; news return by `call_soon_threadsafe`. One thread
steps all models in turn, since they share the devices.
"""

import asyncio
import contextlib
import dataclasses
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from absl import logging

from calm_jax.decoding import Sampling
from calm_jax.decoding.draft_length import Drafting
from calm_jax.decoding.requests import News, Request
from calm_jax.decoding.scheduler import Scheduler
from calm_jax.errors import CalmError
from calm_jax.serving.errors import Refused, one_line

STEPS = 8  # tokens for each row between two checks for commands


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model under its name."""

    name: str
    vocabulary: Any  # encodes and decodes its texts
    slots: int  # number of rows of its scheduler
    max_length: int  # most tokens of a prompt and its answer
    # called in the engine's thread before the model's first request
    make_scheduler: Callable[[], Scheduler]


@dataclasses.dataclass(frozen=True)
class Usage:
    """A model's present load: answers without a row, rows in use, and how it drafts."""

    waiting: int = 0
    running: int = 0
    drafting: Drafting | None = None


class Flight:
    """The prompts of one HTTP request in the engine, and their news.

    Use it in a `with` block, whose end cancels unfinished answers. Call all methods in the event
    loop, unless they say otherwise.
    """

    def __init__(self, engine: "EngineThread", model: ServedModel, answers: int):
        self._engine, self._model = engine, model
        self._news: asyncio.Queue[tuple[int, News] | Exception | None] = asyncio.Queue()
        self.requests: list[Request] = []
        self.answers = answers  # number of unfinished answers

    async def submit(
        self, prompts: Sequence[list[int]], sampling: Sampling, score_from: int | None
    ) -> None:
        """Hands all prompts to the scheduler; raises `Refused` if it does not take them."""
        for number, prompt in enumerate(prompts):

            def on_news(news: News, number: int = number) -> None:
                self.tell((number, news))

            self.requests.append(Request(prompt, sampling, on_news, score_from))
        self._engine.command("submit", self._model, self)
        await self._next()

    async def next(self) -> tuple[int, News]:
        """The number of a prompt, and its news; raises `Refused` if the engine fails."""
        number, news = await self._next()
        if news.finish_reason is not None and self.answers:
            self._engine.release(self._model, self, 1)
        return number, news

    async def _next(self) -> Any:
        item = await self._news.get()
        if isinstance(item, Exception):
            raise item
        return item

    def tell(self, item: Any) -> None:
        """Called in the thread: gives an item to the waiting `submit` or `next`."""
        self._engine.call_in_loop(self._news.put_nowait, item)

    def fail(self, error: Exception) -> None:
        """Raises an error in the waiting `submit` or `next`."""
        self._news.put_nowait(error)

    def end_sample(self, number: int, sample: int) -> None:
        """Frees the row of one answer."""
        self._engine.command("cancel", self._model, self, self.requests[number], sample)

    def __enter__(self) -> "Flight":
        return self

    def __exit__(self, *_) -> None:
        self._engine.command("end", self._model, self)


class EngineThread:
    """Owns the thread and the schedulers; call its public methods in the event loop.

    Args:
        models: the models by name.
        max_queue: most answers of a model that wait for a row.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        max_queue: int,
        schedulers: Mapping[str, Scheduler] = MappingProxyType({}),
    ):
        self.models, self.max_queue = dict(models), max_queue
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._schedulers = dict(schedulers)
        self._flights: dict[str, set[Flight]] = {name: set() for name in self.models}
        self._answers = dict.fromkeys(self.models, 0)  # unfinished, as far as the loop knows
        self._usage = dict.fromkeys(self.models, Usage())
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which serves the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the current dispatch."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def usage(self, name: str) -> Usage:
        """A model's load; answers that the thread has not seen yet also count as waiting."""
        usage = self._usage[name]
        unseen = self._answers[name] - usage.waiting - usage.running
        return dataclasses.replace(usage, waiting=usage.waiting + max(0, unseen))

    def flight(self, model: ServedModel, answers: int) -> Flight:
        """Reserves room for this number of answers.

        Raises:
            Refused: there is no room now, or there never is.
        """
        most = model.slots + self.max_queue
        if answers > most:
            line = f"the request is for {answers} answers; this server takes at most {most}"
            raise Refused(400, line, param="n")
        if self._answers[model.name] + answers > most:
            raise Refused(429, "the queue is full; try again", code="queue_full")
        self._answers[model.name] += answers
        return Flight(self, model, answers)

    def release(self, model: ServedModel, flight: Flight, answers: int) -> None:
        """Frees the room of answers that have ended."""
        flight.answers -= answers
        self._answers[model.name] -= answers

    def command(self, kind: str, *values: Any) -> None:
        self._commands.put((kind, *values))

    def call_in_loop(self, function: Callable[..., None], *values: Any) -> None:
        """Called in the thread: calls a function in the event loop."""
        # In a closed loop nothing waits for the call.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *values)

    # The thread.

    def _run(self) -> None:
        busy = False
        while self._obey(wait=not busy):
            busy = False
            for name in list(self._schedulers):
                try:
                    busy |= self._schedulers[name].step(STEPS)
                    self._look(name)
                except Exception as error:
                    self._fail(name, error)

    def _obey(self, *, wait: bool) -> bool:
        """Does all commands, waiting for the first if `wait`; False: the thread must end."""
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            wait, (kind, model, *values) = False, command
            try:
                getattr(self, f"_{kind}")(model, *values)
                self._look(model.name)
            except Exception as error:
                self._fail(model.name, error)
        return True

    def _submit(self, model: ServedModel, flight: Flight) -> None:
        name = model.name
        self._flights[name].add(flight)
        if name not in self._schedulers:
            self._schedulers[name] = model.make_scheduler()
        try:
            self._schedulers[name].submit(*flight.requests)
        except CalmError as error:
            flight.tell(Refused(400, str(error), param="prompt"))
        else:
            flight.tell(None)

    def _cancel(self, model: ServedModel, flight: Flight, request: Request, sample: int) -> None:
        if flight in self._flights[model.name]:
            self._schedulers[model.name].cancel(request, sample)

    def _end(self, model: ServedModel, flight: Flight) -> None:
        # The flight of a failed scheduler is unknown here, and its rows are gone.
        if flight in self._flights[model.name]:
            self._flights[model.name].remove(flight)
            for request in flight.requests:
                self._schedulers[model.name].cancel(request)
        self.call_in_loop(lambda: self.release(model, flight, flight.answers))

    def _look(self, name: str) -> None:
        scheduler = self._schedulers.get(name)
        if scheduler is not None:
            self._usage[name] = Usage(scheduler.waiting, scheduler.running, scheduler.drafting)

    def _fail(self, name: str, error: Exception) -> None:
        """Ends all requests of a model; the next one gets a new scheduler.

        The state of the old one may be lost: a failed dispatch has consumed its buffers.
        """
        line = one_line(error)
        logging.error("%s: %s\n%s", name, line, "".join(traceback.format_exception(error)))
        traceback.clear_frames(error.__traceback__)  # its frames hold the scheduler's arrays
        self._schedulers.pop(name, None)
        self._usage[name] = Usage()
        for flight in self._flights[name]:
            flight.tell(Refused(500, f"the engine failed: {line}", code="engine_failed"))
        self._flights[name] = set()
