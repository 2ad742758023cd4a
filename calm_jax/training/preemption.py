"""SIGTERM and Ctrl-C as a request to stop: all processes finish the same step and save it."""

import os
import signal
import time
from types import FrameType
from typing import Self

from calm_jax.errors import Preempted
from calm_jax.processes import Appointment

STATUS = {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 130}  # exit status after each signal
BEFORE = "stopped before the first step; the same command starts again"
STOPPING = b"\nstopping after this step, which will be saved; a second signal ends at once\n"
# Seconds in which further signals count as the first one: a process that is told to stop with all
# others of a job may hear it again from the one that started it.
MOMENT = 1.0


class Preemption:
    """A context that handles SIGTERM and Ctrl-C. A second signal, a moment later, ends the process.

    Before the first step there is nothing to save, so the first signal raises `Preempted`.
    """

    def __init__(self):
        self._appointment: Appointment | None = None
        self._status = 0  # exit status of a signal received before the first step

    def __enter__(self) -> Self:
        # A shell's background job ignores Ctrl-C, and must continue to ignore it.
        heeded = [n for n in STATUS if signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._received) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, done: int) -> None:
        """Called after `done` steps: from now on a signal stops the run after the current step."""
        if self._status:  # Python drops exceptions that a handler raises in a destructor
            raise Preempted(BEFORE, self._status)
        self._appointment = Appointment(done)

    def is_due(self, done: int) -> bool:
        """Whether to stop after the step just dispatched; all processes get the same answer."""
        return self._appointment is not None and self._appointment.is_due(done)

    def stopped(self, line: str) -> Preempted:
        """The exception that ends the run once everything is saved."""
        return Preempted(line, self._status or os.EX_TEMPFAIL)

    def _received(self, number: int, frame: FrameType | None) -> None:
        for heeded in self._previous:
            signal.signal(heeded, signal.SIG_IGN)
        self._status = STATUS[number]
        if self._appointment is not None:
            os.write(2, STOPPING)  # a handler must not use Python's buffered streams
            self._appointment.ask()
        # Here and not by a timer, whose handler would wait as long as a step or an exchange hangs.
        time.sleep(MOMENT)
        for heeded in self._previous:
            signal.signal(heeded, signal.SIG_DFL)
        if self._appointment is None:
            raise Preempted(BEFORE, self._status)
