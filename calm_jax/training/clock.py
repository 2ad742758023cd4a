"""Saving by the clock."""

import time

from calm_jax import processes


class EveryMinutes:
    """Saves by the first process' clock, after the same step in all. 0 minutes: never."""

    def __init__(self, minutes: float, done: int):
        self.minutes = minutes
        self.restart(done)

    def restart(self, done: int) -> None:
        self.since = time.monotonic()
        self.appointment = processes.Appointment(done) if self.minutes else None

    def is_due(self, done: int) -> bool:
        if self.appointment is None:
            return False
        if processes.is_first() and time.monotonic() - self.since >= 60 * self.minutes:
            self.appointment.ask()
        return self.appointment.is_due(done)
