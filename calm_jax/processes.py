"""Several processes as one run: they join, agree before they start, take turns, and end together.

Everything here also holds of a lone process, which has nobody to wait for. Words between processes
go through the key-value store of jax's coordinator, which process 0 hosts.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # its client has no public name
from jax._src.clusters import ClusterEnv

from calm_jax.errors import CalmError, outcome

CONNECT_SECONDS = 300  # until all processes must have found the coordinator
HEARTBEAT_SECONDS = 20  # without a sign of life, after which a process counts as lost
WATCH_SECONDS = 2  # between two looks at who is alive
FAREWELL_SECONDS = 2  # that process 0 gives the others to hear its last word
LOST = 1  # exit status of a process whose run has lost another

_FOREVER_MS = 7 * 24 * 3600 * 1000
_ENDED = "calm_jax/ended"
_LISTENER = "calm_jax listener"  # name of every thread that talks with the coordinator
_NUMBERS = itertools.count()  # all processes do the same in the same order
_watch: "_Watch | None" = None  # of a process that has joined others

Result = TypeVar("Result")


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    *,
    timeout: int = CONNECT_SECONDS,
) -> Iterator[None]:
    """Makes this process one of its run's, before jax touches a device, until the block ends.

    Without arguments, jax's detection of clusters decides (Cloud TPU, GKE, SLURM, Open MPI); a
    process that is alone stays so. Of several processes, one that fails or is lost ends all others
    within a minute: with a line that names it, by `os._exit`, since they may be waiting for it.
    Handlers of signals run, and may raise, while the processes connect.

    Args:
        coordinator: HOST:PORT of process 0.
        timeout: seconds until all processes must have connected.

    Raises:
        CalmError: arguments that contradict each other.
    """
    global _watch
    place = _given(coordinator, process_count, process_index) or _detected(timeout)
    if place is None:
        yield
        return
    _watch = _Watch(*place)
    try:
        _watch.connect(timeout)
        yield
        _watch.finish()
    except BaseException as error:
        _watch.fail(error)
    _watch = None


def end_all(error: BaseException) -> None:
    """Ends the run's processes at once, from any thread; a lone process returns.

    For failures after which others wait for this process, and it would wait for them.
    """
    if _watch is not None:
        _watch.fail(error)


def refuse_several(command: str) -> None:
    """Raises `CalmError` where the environment starts several processes of one program."""
    place = _detected(timeout=10)
    if place is not None:
        raise CalmError(
            f"{command} works in one process, but the environment starts {place[1]}; run it on "
            "one machine alone"
        )


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once a run."""
    if is_first():
        print(text, flush=True)


def barrier() -> None:
    """Returns when every process has come here."""
    if (client := _client()) is not None:
        client.wait_at_barrier(f"calm_jax/{next(_NUMBERS)}", _FOREVER_MS)


def gather(value: Any, key: str | None = None) -> list[Any]:
    """Every process' JSON value, in their order. Threads name a `key`: they come in any order."""
    client = _client()
    if client is None:
        return [value]
    key = key or f"calm_jax/{next(_NUMBERS)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(f"{key}/whole", _FOREVER_MS)
    found = {path.rpartition("/")[2]: text for path, text in client.key_value_dir_get(f"{key}/")}
    return [json.loads(found[str(index)]) for index in range(jax.process_count())]


def agree(facts: Mapping[str, Any]) -> None:
    """Compares JSON values with those of process 0.

    Raises `CalmError` naming the process, the first fact that differs, and both values.
    """
    client = _client()
    if client is None:
        return
    key, here = f"calm_jax/{next(_NUMBERS)}", json.loads(json.dumps(facts))
    if is_first():
        client.key_value_set(key, json.dumps(here))
    first = json.loads(client.blocking_key_value_get(key, _FOREVER_MS))
    for name in sorted(here.keys() | first.keys()):
        if here.get(name) != first.get(name):
            raise CalmError(
                f"process {jax.process_index()} is not as process 0: {name} is "
                f"{here.get(name)!r}, in process 0 {first.get(name)!r}"
            )
    barrier()


def in_turns(function: Callable[[], Result]) -> Result:
    """Calls what writes files that processes share: first process 0, then one on each machine.

    The others come last, to find the files there, whether machines share a file system or not.
    """
    hosts = gather(socket.gethostname())
    index = jax.process_index()
    turn = 0 if index == 0 else 1 if hosts.index(hosts[index]) == index else 2
    for now in range(3):
        if now == turn:
            result = function()
        barrier()
    return result


class Appointment:
    """Something that all processes do after the same step, soon after any of them asks for it.

    The processes' own threads tell each other how far they are, so no step waits for an answer
    while nobody asks. `done` is the number of steps dispatched before the first `is_due`.
    """

    def __init__(self, done: int):
        self._key = f"calm_jax/{next(_NUMBERS)}"
        self._done, self._posted, self._step = done, False, None
        self._changed = threading.Condition()
        if _client() is not None:
            _listen(self._arrange)

    def ask(self) -> None:
        """May be called more than once, and by a handler of signals."""
        client = _client()
        if client is None:
            self._step = 0
            return
        setting = functools.partial(client.key_value_set, f"{self._key}/asked", "", True)
        _listen(setting)

    def is_due(self, done: int) -> bool:
        """Whether it is to be done now. To be called after every step, by all processes."""
        with self._changed:
            self._done = done
            self._changed.wait_for(lambda: not self._posted or self._step is not None)
            return self._step is not None and done >= self._step

    def _arrange(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the run has ended
            _client().blocking_key_value_get(f"{self._key}/asked", _FOREVER_MS)
            with self._changed:
                self._posted = True
                # Beyond the next one no step is dispatched until all have answered.
                soonest = self._done + 1
            step = max(gather(soonest, self._key))
            with self._changed:
                self._step = step
                self._changed.notify_all()


def _client() -> Any:
    """The coordinator's client; None of a lone process."""
    return distributed.global_state.client


def _listen(target: Callable[[], None]) -> None:
    """Calls it in a thread, until the run ends."""
    threading.Thread(target=target, name=_LISTENER, daemon=True).start()


def _given(
    coordinator: str | None, count: int | None, index: int | None
) -> tuple[str, int, int] | None:
    """What flags say of the place of this process, checked."""
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
        raise CalmError(f"--process_index={index} is not from 0 to --process_count={count} less 1")
    return coordinator, count, index


def _detected(timeout: int) -> tuple[str, int, int] | None:
    """The place of this process in a cluster that jax knows; None of one that is alone."""
    try:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
        )
    except RuntimeError as error:
        raise CalmError(f"cannot find the other processes: {error}") from error
    return (address, count, index) if address and count and count > 1 else None


def _check_port(address: str) -> None:
    """Raises `CalmError` where a port is taken: jax would crash on it."""
    port = int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise CalmError(f"process 0 cannot open port {port}: {os.strerror(error.errno)}") from error


class _Watch:
    """This process among the others of its run, from the first word to the last."""

    def __init__(self, address: str, count: int, index: int):
        self.address, self.count, self.index = address, count, index
        self.closing = False
        self._client = None  # until connected
        self._leaving = threading.Lock()

    def connect(self, timeout: int) -> None:
        """Finds the coordinator and starts to listen."""
        whom = (
            f"not all processes have come to {self.address}"
            if self.index == 0
            else f"the coordinator {self.address} cannot be reached"
        )
        line = f"process {self.index} of {self.count}: {whom}; waited {timeout} s"
        if self.index == 0:
            _check_port(self.address)
        # jax would end the process by an abort and a stack trace.
        timer = threading.Timer(timeout, self._leave, (2, f"error: {line}"))
        timer.daemon = True
        timer.start()
        jax.config.update("jax_enable_recoverability", True)  # else a lost process aborts all
        # Its handler of SIGTERM would hide a second one, and knows nothing of a lone process.
        jax.config.update("jax_enable_preemption_service", False)
        # In C++ for minutes: in the main thread no handler of signals would run until then.
        connecting = concurrent.futures.ThreadPoolExecutor(1).submit(
            jax.distributed.initialize,
            self.address,
            self.count,
            self.index,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        try:
            connecting.result()
        except (RuntimeError, ValueError) as error:
            raise CalmError(f"process {self.index} of {self.count}: {error}") from error
        finally:
            timer.cancel()
        self._client = _client()
        self._explain_aborts()
        _listen(self._hear_of_ends)
        _listen(self._look_for_lost)

    def finish(self) -> None:
        """Leaves when all have come so far."""
        barrier()
        self.closing = True
        if self.index == 0:
            time.sleep(FAREWELL_SECONDS)  # the others lose the coordinator with this process
        jax.distributed.shutdown()
        # A thread that comes back from C++ while Python ends would crash the process.
        for thread in threading.enumerate():
            if thread.name == _LISTENER:
                thread.join()

    def fail(self, error: BaseException) -> None:
        """Ends this process, and tells the others why."""
        status, line = outcome(error)
        if line is None:
            # It may be no more than the echo of another's end, which the watches would tell of.
            print(
                f"process {self.index}: {type(error).__name__}; asking who is alive",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(HEARTBEAT_SECONDS + 2 * WATCH_SECONDS)
            traceback.print_exception(error)
            status, line = 1, f"error: {type(error).__name__}: {error}".splitlines()[0]
        if self._client is not None:
            # Another was first, or all is lost.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(_ENDED, json.dumps([self.index, status, line]))
        self._leave(status, line)

    def _leave(self, status: int, line: str) -> None:
        """Prints the last line and ends the process, whatever its other threads wait for."""
        with self._leaving:
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
            if self.index == 0 and self._client is not None:
                time.sleep(FAREWELL_SECONDS)
            os._exit(status)

    def _hear_of_ends(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            told = self._client.blocking_key_value_get(_ENDED, _FOREVER_MS)
            index, status, line = json.loads(told)
            if index != self.index:
                self._leave(status, f"process {index} ended: {line.removeprefix('error: ')}")

    def _look_for_lost(self) -> None:
        everyone = list(range(self.count))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while not self.closing:
                alive = self._client.get_live_nodes(everyone)
                lost = sorted(set(everyone) - alive.keys())
                if lost and not self.closing:
                    self._leave(LOST, self._lost(", ".join(map(str, lost))))
                time.sleep(WATCH_SECONDS)

    def _lost(self, whom: str) -> str:
        return (
            f"error: process {self.index} of {self.count} lost process {whom}; start all again: "
            "the run goes on after its last checkpoint"
        )

    def _explain_aborts(self) -> None:
        """jax aborts a process that loses the coordinator: a line then says what that means."""
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
