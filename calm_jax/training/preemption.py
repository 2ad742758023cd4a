"""SIGTERM and Ctrl-C as a request to stop: all processes finish the same step and save it."""

import os
import signal
from types import FrameType
from typing import Self

from calm_jax.errors import Preempted
from calm_jax.processes import Appointment

STATUS = {signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGINT: 130}  # exit status after each signal
BEFORE = "stopped before the first step; the same command starts again"
TOLD = b"\nstopping: this step is finished and saved first; a second signal ends at once\n"


class Preemption:
    """Listens for SIGTERM and Ctrl-C while it is a context. The second one ends the process.

    Before the first step there is nothing to save: the first signal then raises `Preempted`.
    """

    def __init__(self):
        self._appointment: Appointment | None = None
        self._status = 0  # of the signal that was received before the first step

    def __enter__(self) -> Self:
        # A shell's background job ignores Ctrl-C, and so it must stay.
        heeded = [n for n in STATUS if signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._received) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, done: int) -> None:
        """From now on a signal stops the run after the step under way; `done` steps are behind."""
        if self._status:  # Python drops what a handler raises in a destructor
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
            signal.signal(heeded, signal.SIG_DFL)
        self._status = STATUS[number]
        if self._appointment is None:
            raise Preempted(BEFORE, self._status)
        os.write(2, TOLD)  # a handler must not use Python's buffered streams
        self._appointment.ask()
