"""Runs the jobs of an experiment one after another, each in processes of its own."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from calm_jax.checkpoints.files import read_json, write_json
from calm_jax.errors import Preempted
from calm_jax.evaluation.results import SCORED, read_optional
from calm_jax.experiment.arms import Job
from calm_jax.shell import command_line
from calm_jax.training.preemption import STATUS
from calm_jax.units import seconds as in_words

DONE = "job.json"  # in a job's folder, once all its commands have ended well


def run(jobs: Sequence[Job], *, say: Callable[[str], Any] = print) -> dict[Job, str]:
    """Runs every job that is not done; a failed one stops only those that need it.

    The output of a job is in a file beside its folder, ARM.log. A training that was killed goes on
    from its checkpoint.

    Returns:
        what went wrong, by job; empty if all are done.

    Raises:
        Preempted: Ctrl-C or SIGTERM, which the running job gets too. The next call goes on.
    """
    wrong: dict[Job, str] = {}
    seconds: dict[str, list[float]] = {}
    waiting = [job for job in jobs if not is_done(job)]
    if done := len(jobs) - len(waiting):
        say(f"{done} of {len(jobs)} jobs are done already")
    for number, job in enumerate(waiting):
        if cause := next((need for need in job.needs if need in wrong), None):
            wrong[job] = f"not run, since {cause} failed"
        else:
            left = _left(waiting[number:], seconds)
            say(
                f"[{len(jobs) - len(waiting) + number + 1}/{len(jobs)}] {job} … {left}".rstrip(" …")
            )
            start = time.monotonic()
            error = _run(job)
            taken = time.monotonic() - start
            if error:
                wrong[job] = error
            else:
                seconds.setdefault(job.arm.name, []).append(taken)
                times = {"seconds": taken, "finished": time.time()}
                write_json(job.folder / DONE, _described(job) | times)
        if job in wrong:
            say(f"{job}: {wrong[job]}")
    return wrong


def is_done(job: Job) -> bool:
    """Whether a job was run with just these commands and this config, after those that it needs,
    and its scores are still those that it made."""
    path = job.folder / DONE
    if not path.exists() or not all(map(is_done, job.needs)):
        return False
    return _described(job).items() <= read_json(path, "a job").items()


def _described(job: Job) -> dict[str, Any]:
    needs = [read_json(need.folder / DONE, "a job")["finished"] for need in job.needs]
    commands = [command_line(*command) for command in job.commands]
    scored = read_optional(job.results / "summary.json").get(SCORED)
    return {"commands": commands, "config": job.config, "needs": needs, "scored": scored}


def _run(job: Job) -> str:
    """Runs the commands of a job; returns what went wrong, "" if nothing did."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which a training wants empty.
    path = job.folder.with_name(f"{job.folder.name}.log")
    with path.open("a") as log:
        for command in job.commands:
            log.write(f"$ {command_line(*command)}\n")
            log.flush()
            process = [sys.executable, "-m", "calm_jax", *command]
            with (
                subprocess.Popen(process, stdout=log, stderr=log, process_group=0) as child,
                _signals_to(child),
            ):
                status = child.wait()
            if status:
                lines = [line for line in path.read_text().splitlines() if line.strip()]
                return f"calm {command[0]} ended with status {status}: {lines[-1]} ({path})"
    return ""


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen) -> Iterator[None]:
    """Hands Ctrl-C and SIGTERM to a child, which may save first, and then ends this process."""
    received: list[int] = []

    def hand_over(number: int, frame: Any) -> None:
        received.append(number)
        child.send_signal(number)

    # A shell's background job ignores Ctrl-C, and must continue to ignore it.
    heeded = [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_over) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Preempted("stopped; the same command goes on", STATUS[received[0]])


def _left(waiting: Sequence[Job], seconds: dict[str, list[float]]) -> str:
    """About how long the waiting jobs take, from jobs of the same arms; "" if none is known."""
    known = [x for each in seconds.values() for x in each]
    if not known:
        return ""
    mean = sum(known) / len(known)
    each = [seconds.get(job.arm.name, [mean]) for job in waiting]
    return f"about {in_words(sum(sum(x) / len(x) for x in each))} left"
