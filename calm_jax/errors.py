"""The errors that end a command with one line, and the exit status of each."""

import os


class CalmError(ValueError):
    """Bad input: one line that says what is wrong and what to do."""

    status = 2


class RunFailed(CalmError):
    """A failure that other input would not prevent: once its cause is gone, rerun the command."""

    status = 1


class Preempted(BaseException):
    """A run was told to stop and has saved its state: the same command continues it.

    A signal handler raises it in the middle of any code, so like `KeyboardInterrupt` it is not an
    `Exception`.
    """

    def __init__(self, line: str, status: int = os.EX_TEMPFAIL):
        super().__init__(line)
        self.status = status


def outcome(error: BaseException) -> tuple[int, str | None]:
    """The exit status after an error, and its line; None if only a traceback explains it."""
    if isinstance(error, CalmError):
        return error.status, f"error: {error}"
    if isinstance(error, Preempted):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, None
