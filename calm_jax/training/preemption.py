"""SIGTERM as a wish to stop: the step is finished and saved first, by all processes the same."""

import signal
from types import FrameType
from typing import Self

from calm_jax.errors import Preempted
from calm_jax.processes import Appointment

BEFORE = "stopped before the first step; the same command begins again"


class Preemption:
    """Listens for SIGTERM while it is a context. A second one ends the process at once.

    Before the first step there is nothing to save: SIGTERM then raises `Preempted`.
    """

    def __init__(self):
        self._appointment: Appointment | None = None
        self._early = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGTERM, self._received)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def start(self, done: int) -> None:
        """From here on a run is asked to stop, after `done` steps or more."""
        if self._early:  # raised where Python drops every exception, as in a destructor
            raise Preempted(BEFORE)
        self._appointment = Appointment(done)

    def is_due(self, done: int) -> bool:
        """Whether to stop after the step just dispatched, the same in all processes."""
        return self._appointment is not None and self._appointment.is_due(done)

    def _received(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._appointment is None:
            self._early = True
            raise Preempted(BEFORE)
        self._appointment.ask()
