"""The errors that end a command with one line, and the exit status of each."""

import os


class CalmError(ValueError):
    """Bad input: one clear line for the person who gave it."""

    status = 2


class RunFailed(CalmError):
    """What other input would not mend: the same command goes on once the cause is gone."""

    status = 1


class Preempted(BaseException):
    """A run was told to stop, and has saved what it had: the same command goes on.

    Raised by a handler of signals, amid any code: like `KeyboardInterrupt`, no `Exception`.
    """


def outcome(error: BaseException) -> tuple[int, str | None]:
    """The exit status after an error, and its line; None where only a traceback explains it."""
    if isinstance(error, CalmError):
        return error.status, f"error: {error}"
    if isinstance(error, Preempted):
        return os.EX_TEMPFAIL, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, None
