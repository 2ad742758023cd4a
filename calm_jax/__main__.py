"""`python -m calm_jax COMMAND …`, installed as `calm COMMAND …`."""

import difflib
import importlib
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Sequence

from absl import logging as absl_logging

from calm_jax import __version__
from calm_jax.errors import CalmError, Preempted, outcome

PACKAGE = str(pathlib.Path(__file__).parent)

COMMANDS = {
    "train": "trains a decoder, or the bridge of a composed model",
    "evaluate": "scores a run on its tasks",
    "experiment": "trains and scores many models alike, and compares them",
    "convert": "turns published checkpoints into frozen folders, and back",
    "generate": "answers prompts with a trained model",
    "serve": "answers requests as an OpenAI-compatible server",
    "report": "turns the runs of an experiment into one page",
    "plan": "says what training needs on TPUs or GPUs that you do not have",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status, 0 or one of `calm_jax.errors`.

    Without `argv` it takes the arguments of the process, and also sets up its logs.
    """
    if argv is None:
        _show_own_logs()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads on, as in `calm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is buffered
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt, Preempted) as error:
        status, line = outcome(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return status


def _run(arguments: Sequence[str]) -> int:
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # how Python marks bytes
            raise CalmError(f"the argument {argument!r} is not UTF-8 text")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"calm_jax {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(COMMANDS)}"
        raise CalmError(f"unknown command {name!r}; {hint}")
    return importlib.import_module(f"calm_jax.cli.{name}").main(arguments[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: calm COMMAND --flag=value …",
            "",
            *lines,
            "",
            "calm COMMAND --help explains a command; calm --version prints the version.",
        ]
    )


def _show_own_logs() -> None:
    """Shows the notes of this package, and only errors of the libraries that share its logger."""
    handler = logging.StreamHandler()
    handler.addFilter(_worth_showing)
    logger = absl_logging.get_absl_logger()
    logger.handlers, logger.propagate = [handler], False
    absl_logging.set_verbosity(absl_logging.INFO)


def _worth_showing(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.pathname.startswith(PACKAGE)


if __name__ == "__main__":
    sys.exit(main())
