"""The flags with which a command's process joins others."""

from contextlib import AbstractContextManager

from absl import flags


def define(values: flags.FlagValues) -> None:
    """Defines what `joined` reads."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT on which process 0 listens", flag_values=values
    )
    flags.DEFINE_integer(
        "process_count", None, "number of processes in the run", flag_values=values
    )
    flags.DEFINE_integer(
        "process_index", None, "number of this process, from 0", flag_values=values
    )
    flags.DEFINE_integer(
        "coordinator_seconds",
        300,
        "how long to wait for all processes to find the coordinator",
        lower_bound=1,
        flag_values=values,
    )


def joined(values: flags.FlagValues) -> AbstractContextManager[None]:
    """`calm_jax.membership.joined` with the values of the flags."""
    from calm_jax import membership

    member = (values.coordinator, values.process_count, values.process_index)
    return membership.joined(*member, timeout=values.coordinator_seconds)
