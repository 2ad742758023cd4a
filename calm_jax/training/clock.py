"""Saving by the clock."""

import time

from calm_jax import processes


class EveryMinutes:
    """Saves by the first process' clock, after the same step in all. 0 minutes: never."""

    def __init__(self, minutes: float, done: int):
        self.minutes, self.since = minutes, time.monotonic()
        self.appointment = processes.Appointment(done) if minutes else None

    def restart(self, done: int) -> None:
        """Counts the minutes anew, after a save for whatever reason."""
        self.since = time.monotonic()
        # An appointment holds a thread and a request: one that was not kept stays.
        if self.appointment is not None and self.appointment.is_due(done):
            self.appointment = processes.Appointment(done)

    def is_due(self, done: int) -> bool:
        if self.appointment is None:
            return False
        if processes.is_first() and time.monotonic() - self.since >= 60 * self.minutes:
            self.appointment.ask()
        return self.appointment.is_due(done)
