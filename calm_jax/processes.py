"""Messages between the processes of one run: they compare values, take turns, and agree on a step.

A lone process may call everything here, and never waits. Several processes talk through the
key-value store of JAX's coordination service, which process 0 hosts, and not through the public
functions of JAX and Orbax, for these reasons:

* `multihost_utils.assert_equal` and `broadcast_one_to_all` send arrays of equal shape through the
  devices, and do not say which value differs; `agree` compares JSON before a device is touched.
* `multihost_utils.reached_preemption_sync_point`, which Orbax's `reached_preemption` uses, handles
  only SIGTERM: no Ctrl-C, no clock, no lone process; and it hides the second SIGTERM.
"""

import contextlib
import functools
import itertools
import json
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # JAX has no public name for the coordination service's client

from calm_jax.errors import CalmError

FOREVER_MS = 7 * 24 * 3600 * 1000
LISTENER = "calm_jax listener"  # name of every thread that waits for the coordinator

_NUMBERS = itertools.count()  # number the keys: all processes do the same in the same order

Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, in process 0 only."""
    if is_first():
        print(text, flush=True)


def client() -> Any:
    """The coordination service's client; None in a lone process."""
    return distributed.global_state.client


def barrier() -> None:
    """Returns once every process has called it."""
    if (service := client()) is not None:
        service.wait_at_barrier(f"calm_jax/{next(_NUMBERS)}", FOREVER_MS)


def gather(value: Any, key: str | None = None) -> list[Any]:
    """The JSON values of all processes, by process index.

    Threads must name a `key`, since they call in no fixed order.
    """
    service = client()
    if service is None:
        return [value]
    key = key or f"calm_jax/{next(_NUMBERS)}"
    service.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    service.wait_at_barrier(f"{key}/whole", FOREVER_MS)
    found = {path.rpartition("/")[2]: text for path, text in service.key_value_dir_get(f"{key}/")}
    return [json.loads(found[str(index)]) for index in range(jax.process_count())]


def agree(facts: Mapping[str, Any]) -> None:
    """Compares JSON values with those of process 0.

    Raises `CalmError` with the process, the first fact that differs, and both values.
    """
    service = client()
    if service is None:
        return
    key, here = f"calm_jax/{next(_NUMBERS)}", json.loads(json.dumps(facts))
    if is_first():
        service.key_value_set(key, json.dumps(here))
    first = json.loads(service.blocking_key_value_get(key, FOREVER_MS))
    for name in sorted(here.keys() | first.keys()):
        if here.get(name) != first.get(name):
            raise CalmError(
                f"process {jax.process_index()} differs from process 0: {name} is "
                f"{here.get(name)!r}, in process 0 {first.get(name)!r}"
            )
    barrier()


def in_turns(function: Callable[[], Result]) -> Result:
    """Calls a function that writes shared files: in process 0, then in one process per machine.

    The other processes call it last and find the files, whether or not machines share a file
    system.
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
    """Something that all processes do after the same step, soon after one of them asks for it.

    Threads exchange how far their processes are, so steps never wait unless a process asks. `done`
    is the number of steps dispatched before the first call of `is_due`.
    """

    def __init__(self, done: int):
        self._key = f"calm_jax/{next(_NUMBERS)}"
        self._done, self._answered, self._step = done, False, None
        self._changed = threading.Condition()
        if client() is not None:
            listen(self._arrange)

    def ask(self) -> None:
        """Asks for it. May be called repeatedly, and by a signal handler."""
        service = client()
        if service is None:
            self._step = 0
            return
        listen(functools.partial(service.key_value_set, f"{self._key}/asked", "", True))

    def is_due(self, done: int) -> bool:
        """Whether to do it now. All processes must call this after every step."""
        with self._changed:
            self._done = done
            self._changed.wait_for(lambda: not self._answered or self._step is not None)
            return self._step is not None and done >= self._step

    def _arrange(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # raised when the run has ended
            client().blocking_key_value_get(f"{self._key}/asked", FOREVER_MS)
            with self._changed:
                self._answered = True
                # `is_due` holds back the next step until all processes have answered.
                soonest = self._done + 1
            step = max(gather(soonest, self._key))
            with self._changed:
                self._step = step
                self._changed.notify_all()


def listen(target: Callable[[], None]) -> None:
    """Calls a function that waits for the coordinator, in a thread."""
    threading.Thread(target=target, name=LISTENER, daemon=True).start()
