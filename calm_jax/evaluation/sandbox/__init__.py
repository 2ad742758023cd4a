"""Runs programs that nobody has read, such as a model's, and says whether they pass their tests.

Bubblewrap puts each into Linux namespaces of its own: no network, no other processes, and of the
file system only Python itself, read-only, and an empty folder. Inside, limits hold for time,
memory, processes and files, and a seccomp filter refuses what such a program never needs.
docs/sandbox.md says what this stops, and what not.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import random
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time

from calm_jax.errors import CalmError
from calm_jax.evaluation.sandbox import system_calls

log = logging.getLogger("absl")
_INSIDE = pathlib.Path(__file__).with_name("inside.py").read_text()
_MOST_TOLD = 4096  # bytes that are read of what comes out
_DEVICES = ("null", "zero", "random", "urandom")
_NOBODY, _ALL_IDS = 65534, 2**32 - 1
_GONE = 5.0  # seconds at most


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0  # of a processor, for each process
    # seconds from its start to its end; more, since a busy machine makes it wait
    wait: float = 30.0
    memory: int = 2**30  # bytes of the address space of each process
    processes: int = 32  # and threads, at once
    # bytes of its folder, which is in memory; a file has a quarter of it at most
    folder: int = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether the tests passed; and in words, such as "AssertionError: ", or "timed out …"."""

    passed: bool
    told: str


def run(program: str, tests: str, limits: Limits | None = None) -> Outcome:
    """Runs a Python program and then its tests, in one namespace.

    It has passed if both end without an exception. That is told by a token, which is read through a
    pipe after the last test: neither what the program prints nor how it exits can say it.

    Raises:
        CalmError: there is no sandbox on this machine (`check`).
    """
    _need("a program")
    limits = limits or Limits()
    token = secrets.token_hex(16)
    told, in_time, status, _ = _tried(program, tests, token, limits, _form()[0], limits.wait)
    if told == token:
        return Outcome(True, "passed")
    if not in_time:
        return Outcome(False, f"timed out after {limits.wait:g} s")
    if not told and status == 128 + signal.SIGKILL:
        return Outcome(False, f"killed, as after {limits.seconds:g} s of a processor")
    return Outcome(False, told or "ended before its tests did")


def check(what: str) -> None:
    """Raises `CalmError`, saying what is lacking, unless programs can be run for `what`.

    Warns of what is `missing`.
    """
    _need(what)
    for lack in missing():
        log.warning("The sandbox of this machine has %s", lack)


def missing() -> list[str]:
    """What the sandbox of this machine lacks, of what it has on others."""
    found = []
    if problem := system_calls.problem():
        found.append(f"no filter of system calls: {problem}")
    is_root, (has_namespace, _) = os.geteuid() == 0, _form()
    if is_root and not has_namespace and _uid() == _NOBODY:
        found.append("no user ids to spare: programs share that of nobody, and its processes")
    if is_root and has_namespace and _id_map() == [0, 0, _ALL_IDS]:
        found.append("no limit of processes, since Linux sets none for root")
    return found


def _need(what: str) -> None:
    if sys.platform != "linux":
        problem = f"it needs Linux, and this is {sys.platform}"
    elif shutil.which("bwrap") is None:
        problem = "bubblewrap is not installed (apt-get install bubblewrap)"
    else:
        problem = _form()[1]
    if problem:
        raise CalmError(
            f"{what} is run in a sandbox only, which this machine does not offer: {problem}"
        )


@functools.cache
def _form() -> tuple[bool, str | None]:
    """Whether sandboxes are in a user namespace; and why there are none, None if there are.

    Root needs no such namespace, and takes another user's id inside; root of a container may not.
    """
    for has_namespace in (False, True) if os.geteuid() == 0 else (True,):
        problem = _probe(has_namespace)
        if problem is None:
            break
    return has_namespace, problem


def _probe(has_namespace: bool) -> str | None:
    """Why the smallest program does not pass; None if it does."""
    told, _, _, errors = _tried("", "", "token", Limits(), has_namespace, 20.0)
    if told == "token":
        return None
    lines = errors.decode(errors="replace").strip().splitlines() or [told or "it does not answer"]
    return lines[-1]


def _tried(
    program: str, tests: str, token: str, limits: Limits, has_namespace: bool, wait: float
) -> tuple[str, bool, int, bytes]:
    """What `_talk` returns of a job; the sandbox's exit status, and its errors."""
    process, result = _start(limits, has_namespace)
    job = {
        "program": program,
        "tests": tests,
        "token": token,
        "seconds": math.ceil(limits.seconds),
        "memory": limits.memory,
        "processes": limits.processes,
        "file": limits.folder // 4,
        "uid": None if has_namespace else _uid(),
    }
    told, in_time = _talk(process, result, json.dumps(job), wait)
    _, errors = process.communicate()
    return told, in_time, process.returncode, errors


def _start(limits: Limits, has_namespace: bool) -> tuple[subprocess.Popen, int]:
    """The sandbox, which waits for a job, and the descriptor that its result comes from."""
    result, inner = os.pipe()
    fds = [inner]
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
               "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv",
               "--hostname", "sandbox"]  # fmt: skip
    if has_namespace:
        command += ["--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"]
    for path in ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", path, path]
    prefix = pathlib.Path(sys.base_prefix)
    if not prefix.is_relative_to("/usr"):
        for parent in [*prefix.parents][-2::-1]:  # bubblewrap would make them for root alone
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", str(prefix), str(prefix)]
    for device in _DEVICES:
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--perms", "0777", "--size", str(limits.folder), "--tmpfs", "/tmp"]
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    if (calls := system_calls.filter_file()) is not None:
        fds.append(calls)
        command += ["--seccomp", str(calls)]
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    command += [python, "-I", "-S", "-c", _INSIDE, str(inner)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # of bubblewrap: the program's own goes nowhere
            env={},
            cwd="/",
            pass_fds=fds,
            executable=shutil.which("bwrap"),
        )
    except BaseException:
        os.close(result)
        raise
    finally:
        for fd in fds:
            os.close(fd)
    return process, result


def _talk(process: subprocess.Popen, result: int, job: str, seconds: float) -> tuple[str, bool]:
    """Hands over the job; returns the first line that comes back, and whether it came in time.

    The sandbox is gone after that: the end of its first process ends all that it started.
    """
    end, told = time.monotonic() + seconds, b""
    try:
        # Where it has ended already, its errors say why.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.encode(errors="surrogatepass") + b"\n")
            process.stdin.close()
        process.stdin = None
        while b"\n" not in told and len(told) < _MOST_TOLD:
            ready, _, _ = select.select([result], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return "", False
            piece = os.read(result, _MOST_TOLD)
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                break
            told += piece
        return told.partition(b"\n")[0].decode(errors="replace")[:200], True
    finally:
        process.kill()
        _await_end(result)
        os.close(result)


def _await_end(result: int) -> None:
    """Waits until all that could write the result are gone: the kernel is about to end them."""
    end = time.monotonic() + _GONE
    while select.select([result], [], [], max(0.0, end - time.monotonic()))[0]:
        if not os.read(result, 2**16):
            return


def _uid() -> int:
    """A user's id that nobody else has, where there are such."""
    start, _, count = _id_map()
    return random.randrange(2**30, 2**31) if start + count > 2**31 else _NOBODY


def _id_map() -> list[int]:
    """The last range of users' ids: the first here, what it is outside, and their number."""
    return [*map(int, pathlib.Path("/proc/self/uid_map").read_text().split()[-3:])]
