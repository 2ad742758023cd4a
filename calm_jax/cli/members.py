"""The flags with which a command's process joins others."""

from contextlib import AbstractContextManager

from absl import flags

from calm_jax.cli.config import Define


def define_flags(define: Define) -> None:
    define("string", "coordinator", "HOST:PORT on which process 0 listens")
    define("integer", "process_count", "number of processes in the run")
    define("integer", "process_index", "number of this process, from 0")
    waits = "how long to wait for all processes to find the coordinator"
    define("integer", "coordinator_seconds", waits, 300, lower_bound=1)


def joined(values: flags.FlagValues) -> AbstractContextManager[None]:
    """`calm_jax.membership.joined` with the values of the flags."""
    from calm_jax import membership

    member = (values.coordinator, values.process_count, values.process_index)
    return membership.joined(*member, timeout=values.coordinator_seconds)
