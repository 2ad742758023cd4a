"""`calm serve`: an OpenAI-compatible server of a model."""

import contextlib
import importlib.util
import os
import pathlib

from absl import flags

from calm_jax.cli import config, models
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu

USAGE = """Answers requests over HTTP as OpenAI's API does, until SIGTERM.

  calm serve --workdir=runs/kv/composed
  calm serve --workdir=models/gemma --host=0.0.0.0 --port=80 --slots=16 --max_length=4096

WORKDIR is a run of `calm train`, a frozen folder or an exported bridge. A composed model's anchor
and augments are served too, as NAME/anchor and NAME/augment. The page at / asks them all. If the
environment variable CALM_API_KEY is set, requests must carry it as a bearer token. On SIGTERM new
requests are refused and running answers are completed; a second SIGTERM ends the server at once.
The model runs on the first device; --mesh.tensor=8 and the like spread it over all."""

KEY = "CALM_API_KEY"
OF_SCHEDULERS = ("slots", "max_length", "prefill_chunk", "cache_dtype", "draft")


def _define_flags(define: config.Define) -> None:
    define("string", "workdir", "folder that holds a model")
    models.define_flags(define)
    define("string", "name", "the model's name; default: its folder's")
    define("string", "host", "address to listen on", "127.0.0.1")
    define("integer", "port", "port to listen on; 0: any free one", 8000)
    define("integer", "slots", "answers generated at once", 8)
    define("integer", "max_length", "most tokens of a prompt and its answer", 2048)
    define("integer", "prefill_chunk", "most tokens of prompts that are read at once", 512)
    define("enum", "cache_dtype", models.CACHE_DTYPE, enum_values=models.CACHE_DTYPES)
    define("integer", "draft", models.DRAFT, 0)
    define("integer", "max_queue", "answers that may wait; more are refused", 64)
    define("integer", "max_tokens", "most tokens of an answer", 1024)
    define("float", "request_seconds", "most seconds of a request", 300.0)


def main(argv: list[str]) -> int:
    values, mesh = models.parse(argv, USAGE, _define_flags)
    _check(values)
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise CalmError(f"{package} is not installed: pip install 'calm_jax[serve]'")

    from calm_jax.serving.app import Limits, Server
    from calm_jax.serving.parts import built, served_models
    from calm_jax.serving.running import bind, run

    quiet_libtpu()
    # Loading takes long; a taken address is told before.
    with contextlib.closing(bind(values.host, values.port)) as bound:
        model = models.load(values, mesh)
        name = values.name or pathlib.Path(values.workdir).resolve().name
        options = {name: values[name].value for name in OF_SCHEDULERS}
        served = served_models(model, name, options)
        limits = Limits(values.max_queue, values.max_tokens, values.request_seconds)
        schedulers = built(served)
        served = [one for one in served if one.name in schedulers]
        run(Server(served, limits, os.environ.get(KEY), schedulers), bound)
    return 0


def _check(values: flags.FlagValues) -> None:
    for name, least in (("port", 0), ("max_queue", 0), ("max_tokens", 1)):
        if getattr(values, name) < least:
            raise CalmError(f"--{name} is {getattr(values, name)}; it must be at least {least}")
    if values.port > 65535:
        raise CalmError(f"--port is {values.port}; it must be at most 65535")
    if not 0 < values.request_seconds < float("inf"):
        raise CalmError(f"--request_seconds is {values.request_seconds}; it must be above 0")
    if os.environ.get(KEY) == "":
        raise CalmError(f"{KEY} is set and empty; unset it to serve without a key")
