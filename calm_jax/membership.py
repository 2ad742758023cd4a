"""A run of several processes: they join, watch each other, and end together."""

import concurrent.futures
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax._src.clusters import ClusterEnv  # public JAX detects a cluster only by connecting to it

from calm_jax.errors import CalmError, outcome
from calm_jax.processes import FOREVER_MS, LISTENER, barrier, client, listen

CONNECT_SECONDS = 300  # for all processes to find the coordinator
HEARTBEAT_SECONDS = 20  # without a heartbeat, after which a process counts as lost
WATCH_SECONDS = 2  # between two checks of which processes are alive
FAREWELL_SECONDS = 2  # for the others to receive the last message of process 0
LOST = 1  # exit status of a process whose run has lost another

_ENDED = "calm_jax/ended"
_watch: "_Watch | None" = None  # set once this process has joined others


class Member(NamedTuple):
    """One process of several: HOST:PORT of process 0, the number of processes, its own index."""

    address: str
    count: int
    index: int

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    timeout: int = CONNECT_SECONDS,
) -> Iterator[None]:
    """Makes this process a member of its run until the block ends; call it before JAX runs.

    Without arguments JAX detects the cluster (Cloud TPU, GKE, SLURM, Open MPI); without a cluster
    the process stays alone. When one of several processes fails or is lost, all others end within a
    minute with a line that names it, by `os._exit`, since they may be waiting for it. Signal
    handlers run, and may raise, while the processes connect.

    Args:
        coordinator: HOST:PORT of process 0.
        timeout: seconds until all processes must have connected.

    Raises:
        CalmError: arguments that are incomplete or contradict each other.
    """
    global _watch
    member = _given(coordinator, process_count, process_index) or _detected(timeout)
    if member is None:
        yield
        return
    _watch = _Watch(member)
    try:
        _watch.connect(timeout)
        yield
        _watch.finish()
    except BaseException as error:
        _watch.fail(error)
    _watch = None


def end_all(error: BaseException) -> None:
    """Ends all processes of the run at once, from any thread; does nothing in a lone process.

    For a failure after which this process and the others would wait for each other.
    """
    if _watch is not None:
        _watch.fail(error)


def refuse_several(command: str) -> None:
    """Raises `CalmError` if the environment starts several processes of one program."""
    member = _detected(timeout=10)
    if member is not None:
        raise CalmError(
            f"{command} works in one process, but the environment starts {member.count}; run it on "
            "one machine only"
        )


def _given(coordinator: str | None, count: int | None, index: int | None) -> Member | None:
    """The member that the flags describe, checked; None without flags."""
    flags = {"--coordinator": coordinator, "--process_count": count, "--process_index": index}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return None
    if missing:
        raise CalmError(f"{missing[0]} is missing; {', '.join(flags)} go together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise CalmError(f"--coordinator={coordinator} is not of the form HOST:PORT")
    if not 0 <= index < count:
        raise CalmError(f"--process_index={index} is not from 0 to --process_count={count} minus 1")
    return Member(coordinator, count, index)


def _detected(timeout: int) -> Member | None:
    """The member that JAX detects in the environment; None if the process is alone."""
    try:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
        )
    except RuntimeError as error:
        raise CalmError(f"cannot find the other processes: {error}") from error
    return Member(address, count, index) if address and count and count > 1 else None


def _check_port(address: str) -> None:
    """Raises `CalmError` if a port is taken: JAX would crash."""
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise CalmError(f"process 0 cannot open port {port}: {os.strerror(error.errno)}") from error


class _Watch:
    """Connects a member to the others, notices when they end, and announces its own end."""

    def __init__(self, member: Member):
        self.member = member
        self.closing = False
        self._client: Any = None  # until connected
        self._leaving = threading.Lock()
        threading.excepthook = self._print_failure_of_thread

    def connect(self, timeout: int) -> None:
        """Finds the coordinator and starts to listen."""
        address, _, index = self.member
        missing = (
            f"not all processes have connected to {address}"
            if index == 0
            else f"the coordinator {address} cannot be reached"
        )
        if index == 0:
            _check_port(address)
        # On its own timeout JAX would abort the process with a stack trace.
        line = f"error: {self.member}: {missing}; waited {timeout} s"
        timer = threading.Timer(timeout, self._leave, (2, line))
        timer.daemon = True
        timer.start()
        jax.config.update("jax_enable_recoverability", True)  # else a lost process aborts all
        # JAX's own SIGTERM handler would hide a second SIGTERM; see `processes`.
        jax.config.update("jax_enable_preemption_service", False)
        # This waits in C++ for minutes, during which the main thread would run no signal handler.
        connecting = concurrent.futures.ThreadPoolExecutor(1).submit(
            jax.distributed.initialize,
            *self.member,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        try:
            # A signal just before a wait without a time limit would not interrupt the wait.
            while not connecting.done():
                concurrent.futures.wait([connecting], timeout=1)
            connecting.result()
        except (RuntimeError, ValueError) as error:
            raise CalmError(f"{self.member}: {error}") from error
        finally:
            timer.cancel()
        self._client = client()
        self._explain_aborts()
        listen(self._hear_of_ends)
        listen(self._look_for_lost)

    def finish(self) -> None:
        """Leaves the run once all processes are done."""
        barrier()
        self.closing = True
        if self.member.index == 0:
            time.sleep(FAREWELL_SECONDS)  # the others lose the coordinator with this process
        jax.distributed.shutdown()
        # A thread that returns from C++ while Python ends would crash the process.
        for thread in threading.enumerate():
            if thread.name == LISTENER:
                thread.join()

    def fail(self, error: BaseException) -> None:
        """Ends this process and tells the others why."""
        index = self.member.index
        status, line = outcome(error)
        if line is None:
            # Another process may have ended and caused this; then the watches report it.
            print(
                f"process {index}: {type(error).__name__}; checking which processes are alive",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(HEARTBEAT_SECONDS + 2 * WATCH_SECONDS)
            traceback.print_exception(error)
            status, line = 1, f"error: {type(error).__name__}: {error}".splitlines()[0]
        if self._client is not None:
            # The key is already set if another process failed first.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(_ENDED, json.dumps([index, status, line]))
        self._leave(status, line)

    def _leave(self, status: int, line: str) -> None:
        """Prints the last line and ends the process, whatever its other threads wait for."""
        with self._leaving:
            print(line, file=sys.stderr, flush=True)
            # The logs of other threads and of C++ must not follow it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.stdout.flush()
            if self.member.index == 0 and self._client is not None:
                time.sleep(FAREWELL_SECONDS)
            os._exit(status)

    def _print_failure_of_thread(self, failure: threading.ExceptHookArgs) -> None:
        """Prints a thread's traceback in one piece: Python's own would mix with the last line."""
        lines = traceback.format_exception(failure.exc_value)
        with self._leaving:
            sys.stderr.write("".join(lines))

    def _hear_of_ends(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            told = self._client.blocking_key_value_get(_ENDED, FOREVER_MS)
            index, status, line = json.loads(told)
            if index != self.member.index:
                self._leave(status, f"process {index} ended: {line.removeprefix('error: ')}")

    def _look_for_lost(self) -> None:
        everyone = list(range(self.member.count))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not self.closing:
                alive = self._client.get_live_nodes(everyone)
                lost = sorted(set(everyone) - alive.keys())
                if lost and not self.closing:
                    self._leave(LOST, self._lost(", ".join(map(str, lost))))
                time.sleep(WATCH_SECONDS)

    def _lost(self, which: str) -> str:
        return (
            f"error: {self.member} lost process {which}; start all again: the run continues from "
            "its last checkpoint"
        )

    def _explain_aborts(self) -> None:
        """JAX aborts a process that loses the coordinator; this prints what that means."""
        line = f"{self._lost('0, the coordinator')}\n".encode()

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def handler(_: int) -> None:
            if not self.closing:
                os.write(2, line)
            os._exit(0 if self.closing else LOST)

        self._handler = handler  # ctypes keeps no reference
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
