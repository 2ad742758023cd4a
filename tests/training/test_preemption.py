"""SIGTERM and Ctrl-C in a lone process, which is this one."""

import json
import os
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest
import tiny_models  # noqa: F401 (compiles without optimisation)
from child_processes import environment

from calm_jax import sharding
from calm_jax.__main__ import main
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.errors import Preempted, outcome
from calm_jax.models import DecoderConfig
from calm_jax.training import configuration, loop
from calm_jax.training import preemption as preemption_module
from calm_jax.training.preemption import Preemption

STEPS = 8


@pytest.fixture(autouse=True)
def short_moment(monkeypatch):
    monkeypatch.setattr(preemption_module, "MOMENT", 0.01)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    shared = tmp_path_factory.mktemp("data")
    rows = [{"inputs": "a" * size, "targets": "b" * size} for size in range(1, 7)]
    (shared / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decoder = DecoderConfig.palm(
        vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, head_dim=4, mlp_dim=32
    )
    config = configuration.decoder_run(decoder)
    config.data.train = config.data.validation = ({"jsonl": str(shared / "data.jsonl")},)
    config.data.update(length=16, cache_dir=str(shared / "cache"))
    config.vocabulary, config.cache_compiled = "bytes", str(shared / "xla")
    config.train.update(num_steps=STEPS, batch_size=8, log_every=1, tensorboard=False)
    return config


def losses(run):
    """Of every step, exactly."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def signalled_at(number, monkeypatch, sent=signal.SIGTERM):
    """Sends a signal before the batch `number` is put on the mesh; batch 0 is also compiled for."""
    put_batch, calls = sharding.put_batch, []

    def put(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            os.kill(os.getpid(), sent)
        return put_batch(*arguments)

    monkeypatch.setattr(sharding, "put_batch", put)


@pytest.fixture
def handlers():
    """Those of the signals before the test; the tests' own runner may ignore Ctrl-C."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, was)


@pytest.mark.parametrize(
    ("sent", "status"),
    [pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_the_step_is_finished_and_saved_and_the_run_continues(
    config, tmp_path, monkeypatch, capfd, handlers, sent, status
):
    signalled_at(3, monkeypatch, sent)
    stopped = pytest.raises(Preempted, match=r"run stopped after step 3, which is saved")
    with stopped as caught, Preemption() as preemption:
        try:
            loop.train(config, tmp_path / "run", preemption=preemption)
        finally:
            # A second signal of either kind would have ended the process.
            assert {signal.getsignal(number) for number in handlers} == {signal.SIG_DFL}
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert outcome(caught.value) == (status, str(caught.value))
    assert capfd.readouterr().err.count("a second signal ends at once") == 1
    with TrainingCheckpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert list(checkpoints.manager.all_steps()) == [3]
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    monkeypatch.undo()
    loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "other")
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


def test_before_the_first_step_nothing_is_saved(config, tmp_path, monkeypatch, handlers):
    signalled_at(0, monkeypatch, signal.SIGINT)
    early = pytest.raises(Preempted, match="before the first step")
    with early as caught, Preemption() as preemption:
        loop.train(config, tmp_path / "run", preemption=preemption)
    assert caught.value.status == 130
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_while_a_checkpoint_is_read_it_is_no_bad_input(config, tmp_path, monkeypatch):
    """Much of what reads turns whatever went wrong into a line about the file."""
    config = config.copy_and_resolve_references()
    config.train.num_steps = 1
    loop.train(config, tmp_path / "run")
    restore = ocp.CheckpointManager.restore

    def terminated(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return restore(*arguments, **keywords)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", terminated)
    config.train.num_steps = 2
    with pytest.raises(Preempted, match="before the first step"), Preemption() as preemption:
        loop.train(config, tmp_path / "run", preemption=preemption)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_a_destructor_which_drops_exceptions():
    class Terminates:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="before the first step"), Preemption() as preemption:
        Terminates()
        preemption.start(0)


def test_a_background_job_goes_on_ignoring_ctrl_c(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        preemption.start(0)
        assert not preemption.is_due(1)


_TWICE = """
import os, signal, sys, threading, time
from calm_jax.training.preemption import Preemption

def kill():
    os.kill(os.getpid(), signal.SIGTERM)

with Preemption() as preemption:
    preemption.start(0)
    threading.Timer(0.2, kill).start()
    kill()
    print("stops", preemption.is_due(1), flush=True)
    kill()
    print("not reached", flush=True)
"""


def test_a_signal_that_comes_twice_within_a_moment_is_one():
    """As when all processes of a job are told to stop, and their parent hands it on too."""
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", _TWICE], env=environment(), capture_output=True, text=True
    )
    assert ended.stdout == "stops True\n"
    assert ended.stderr.count("a second signal ends at once") == 1
    assert ended.returncode == -signal.SIGTERM  # by the one that came later
    assert time.monotonic() - start > preemption_module.MOMENT


def test_exit_status(monkeypatch, capsys):
    def preempted(_):
        raise Preempted("stopped after step 3")

    monkeypatch.setattr("calm_jax.cli.train.main", preempted)
    assert main(["train"]) == 75
    assert capsys.readouterr().err == "stopped after step 3\n"
