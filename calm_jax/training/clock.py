"""Saving at regular times."""

import time

from calm_jax import processes


class EveryMinutes:
    """Says when to save, by process 0's clock, and after the same step in all processes.

    With 0 minutes it never says so. `done` is the number of steps done.
    """

    def __init__(self, minutes: float, done: int):
        self.minutes, self.since = minutes, time.monotonic()
        self.appointment = processes.Appointment(done) if minutes else None

    def restart(self, done: int) -> None:
        """Starts counting again, after a save for any reason."""
        self.since = time.monotonic()
        # An appointment holds a thread and a request, so it is replaced only when it is due.
        if self.appointment is not None and self.appointment.is_due(done):
            self.appointment = processes.Appointment(done)

    def is_due(self, done: int) -> bool:
        """Whether to save after the step just dispatched."""
        if self.appointment is None:
            return False
        if processes.is_first() and time.monotonic() - self.since >= 60 * self.minutes:
            self.appointment.ask()
        return self.appointment.is_due(done)
