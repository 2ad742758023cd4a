"""Runs in several real processes on this machine, started by the command line as a user would."""

import json
import os
import resource
import signal
import socket
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from child_processes import ends, free_address, start
from ml_collections import ConfigDict
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.composed import load_composed
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.training import config_keys, configuration, loop

STEPS = 40
VOCAB = 264  # of bytes, padded


# One of several, which saves at each of 20 steps; it prints how many threads that has left.
SAVES = """
import sys, threading
from calm_jax import membership, processes
from calm_jax.training.clock import EveryMinutes

with membership.joined(sys.argv[1], 3, int(sys.argv[2])):
    clock = EveryMinutes(60, 0)
    processes.is_first()
    threads = threading.active_count()
    for step in range(1, 21):
        clock.is_due(step)
        clock.restart(step)
    print(threading.active_count() - threads, flush=True)
"""

# The command line, in which the third save fails before it has told the other processes.
FAILS_TO_SAVE = """
import sys
import orbax.checkpoint as ocp
from calm_jax.__main__ import main

save, steps = ocp.CheckpointManager.save, []

def fail(self, step, **arguments):
    steps.append(step)
    if len(steps) == 3:
        raise OSError(28, "No space left on device")
    return save(self, step, **arguments)

ocp.CheckpointManager.save = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with data, two frozen models, the caches of every run, and configs."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(40):
            text = "".join(random.choice(list("abcd"), size=random.integers(1, 6)))
            file.write(json.dumps({"inputs": text + ">", "targets": text[::-1]}) + "\n")
    for seed, name in enumerate(("anchor", "augment")):
        decoder = tiny_models.decoder(
            seed, vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32
        )
        frozen.save_frozen(decoder, folder / name, vocabulary=load_vocabulary("bytes"))
    composed = configuration.composed_run(CompositionConfig(every=1))
    composed.anchor, composed.augments = str(folder / "anchor"), (str(folder / "augment"),)
    decoder = DecoderConfig.palm(
        vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=2, head_dim=4, mlp_dim=32
    )
    for name, config in {
        "composed": composed,
        "decoder": configuration.decoder_run(decoder),
    }.items():
        config.data.train = config.data.validation = ({"jsonl": str(folder / "data.jsonl")},)
        config.data.update(length=16, cache_dir=str(folder / "cache"))
        config.vocabulary = "bytes"
        config.train.update(num_steps=STEPS, batch_size=8, log_every=1, tensorboard=False)
        config.train.update(save_every=10, validate_every=20)
        config.cache_compiled = str(folder / "xla")
        values = json.dumps(config_keys.to_dict(config))
        (folder / f"{name}.json").write_text(values)
        (folder / f"{name}.py").write_text(
            "import json\nfrom ml_collections import ConfigDict\n\n\n"
            f"def get_config():\n    return ConfigDict(json.loads({values!r}))\n"
        )
    return folder


def config_of(shared, name):
    return ConfigDict(json.loads((shared / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def alone(shared):
    """The composed run in this one process, with 8 devices."""
    return loop.train(config_of(shared, "composed"), shared / "alone")


class Run:
    """`count` processes of one run, each with `devices` devices, and what they print."""

    def __init__(
        self,
        shared,
        workdir,
        count,
        devices,
        *arguments,
        name="composed",
        of_last=(),
        program_of_last=("-m", "calm_jax"),
    ):
        address = free_address()
        self.workdir, self.processes = Path(workdir), []
        for index in range(count):
            place_flags = [
                f"--coordinator={address}",
                f"--process_count={count}",
                f"--process_index={index}",
            ]
            last = index == count - 1
            command = [
                *(program_of_last if last else ("-m", "calm_jax")),
                "train",
                f"--config={shared / name}.py",
                f"--workdir={workdir}",
                *(place_flags if count > 1 else ()),
                *arguments,
                *(of_last if last else ()),
            ]
            self.processes.append(start(*command, devices=devices))

    def await_step(self, step):
        """Returns when the step is logged."""
        self._await(lambda: self._logged(step))

    def await_checkpoint(self, step):
        """Returns when the step's checkpoint is whole: it is written behind later steps."""
        self._await((self.workdir / "checkpoints" / str(step)).exists)

    def _await(self, happened):
        deadline = time.monotonic() + 300
        while not happened():
            ended = [p.communicate()[0] for p in self.processes if p.poll() is not None]
            assert not ended, ended[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _logged(self, step):
        path = self.workdir / "metrics.jsonl"
        return path.exists() and f'{{"step": {step}, "split": "train"' in path.read_text()

    def end(self):
        return ends(self.processes)

    def finish(self):
        statuses, outputs = self.end()
        assert statuses == [0] * len(statuses), "\n".join(outputs)
        return outputs


def losses(run, split="train"):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == split]
    assert len(steps) == len(set(steps))
    return {line["step"]: line["loss"] for line in lines if line["split"] == split}


def assert_same_losses(run, other):
    assert losses(run) == pytest.approx(losses(other), rel=1e-4)
    assert list(losses(run)) == list(range(1, STEPS + 1))
    assert losses(run, "validation") == pytest.approx(losses(other, "validation"), rel=1e-4)


def saved_steps(run):
    with TrainingCheckpoints(Path(run) / "checkpoints", read_only=True) as checkpoints:
        return sorted(checkpoints.manager.all_steps())


def last_line(output):
    return output.strip().splitlines()[-1]


@pytest.mark.slow
def test_sigterm_to_one_of_two_then_four_go_on_as_one_process_would(shared, alone, tmp_path):
    run = Run(shared, tmp_path / "run", 2, 2, "--config.mesh.fsdp=2")
    run.await_step(3)
    run.processes[1].send_signal(signal.SIGTERM)
    statuses, outputs = run.end()
    assert statuses == [os.EX_TEMPFAIL] * 2, "\n".join(outputs)
    stopped = max(losses(run.workdir))
    assert 3 <= stopped < STEPS
    assert saved_steps(run.workdir)[-1] == stopped
    for output in outputs:
        assert f"stopped after step {stopped}, which is saved" in last_line(output)

    outputs = Run(shared, tmp_path / "run", 4, 1, "--config.mesh.tensor=2").finish()
    assert f"continues after step {stopped}" in outputs[0]
    # Only the first process speaks.
    assert all("step" not in output for output in outputs[1:])
    assert_same_losses(run.workdir, alone)
    here, there = (load_composed(path, step=STEPS).bridge for path in (run.workdir, alone))
    for key, value in stored_bytes(here).items():
        found, expected = np.frombuffer(value, "f4"), np.frombuffer(stored_bytes(there)[key], "f4")
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_killed_process_ends_the_other_and_a_restart_goes_on(shared, alone, tmp_path):
    run = Run(shared, tmp_path / "run", 2, 2, "--config.train.num_steps=100000")
    run.await_checkpoint(10)
    run.processes[1].kill()
    killed = time.monotonic()
    statuses, outputs = run.end()
    assert time.monotonic() - killed < 60
    assert statuses == [1, -signal.SIGKILL], outputs[0]
    assert last_line(outputs[0]).startswith("error: process 0 of 2 lost process 1; start all again")

    latest = saved_steps(run.workdir)[-1]
    assert latest >= 10
    assert latest % 10 == 0
    config = config_of(shared, "composed")
    config.train.num_steps = latest + 5
    loop.train(config, run.workdir)
    assert max(losses(run.workdir)) == latest + 5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["in a background write", "in the call"])
def test_a_process_that_cannot_save_ends_the_other_and_a_restart_goes_on(shared, tmp_path, fault):
    program = ("-c", FAILS_TO_SAVE) if fault == "in the call" else ("-m", "calm_jax")
    run = Run(
        shared, tmp_path / "run", 2, 2, "--config.train.num_steps=100000", program_of_last=program
    )
    if fault == "in a background write":
        run.await_checkpoint(10)
        # As of a full disk, to this process alone.
        resource.prlimit(run.processes[1].pid, resource.RLIMIT_FSIZE, (1000, 1000))
    else:
        run.await_step(30)
    failed = time.monotonic()
    statuses, outputs = run.end()
    assert time.monotonic() - failed < 60
    assert statuses == [1, 1], "\n".join(outputs)
    latest = saved_steps(run.workdir)[-1]
    told = f"cannot save a checkpoint in {run.workdir}/checkpoints: "
    assert last_line(outputs[1]).startswith(f"error: {told}")
    assert last_line(outputs[1]).endswith(f"(the last complete checkpoint is step {latest})")
    assert last_line(outputs[0]) == "process 1 ended: " + last_line(outputs[1])[len("error: ") :]
    Run(shared, run.workdir, 2, 2, f"--config.train.num_steps={latest + 5}").finish()
    assert saved_steps(run.workdir)[-1] == latest + 5


@pytest.mark.slow
def test_lost_coordinator_ends_the_others_and_fewer_go_on(shared, alone, tmp_path):
    run = Run(shared, tmp_path / "run", 4, 1, "--config.train.num_steps=100000")
    run.await_checkpoint(10)
    run.processes[0].kill()
    killed = time.monotonic()
    statuses, outputs = run.end()
    assert time.monotonic() - killed < 60
    assert statuses == [-signal.SIGKILL, 1, 1, 1], "\n".join(outputs)
    for index in (1, 2, 3):
        assert last_line(outputs[index]).startswith(f"error: process {index} of 4 lost process 0")
    latest = saved_steps(run.workdir)[-1]
    more = f"--config.train.num_steps={latest + 5}"
    Run(shared, tmp_path / "run", 2, 2, more).finish()
    assert max(losses(run.workdir)) == latest + 5


@pytest.mark.slow
def test_a_decoder_split_over_processes_ends_as_one_frozen_folder(shared, tmp_path):
    minutes = "--config.train.save_minutes=0.001"
    run = Run(shared, tmp_path / "run", 4, 2, "--config.mesh.fsdp=4", minutes, name="decoder")
    outputs = run.finish()
    config = config_of(shared, "decoder")
    one = loop.train(config, tmp_path / "one")
    assert_same_losses(run.workdir, one)
    found, expected = (stored_bytes(frozen.load(path / "frozen")) for path in (run.workdir, one))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_allclose(
            np.frombuffer(value, "f4"), np.frombuffer(expected[key], "f4"), atol=1e-4
        )
    assert "tree" in outputs[0]
    # The clock asked for more checkpoints than every tenth step.
    assert len(set(saved_steps(run.workdir)) - set(range(0, STEPS + 1, 10))) > 0


@pytest.mark.parametrize(
    ("owners", "shares"),
    [
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),  # each process half of the batch
        ([[0, 1], [0, 1]], [(0, 1), (0, 1)]),  # both hold all rows, half of each weight
        ([[0], [1], [0], [1]], [(0, 2), (1, 2)]),  # rows that are not neighbours
        ([[0, 1], [2, 3], [0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_share_of_the_batch(monkeypatch, owners, shares):
    mesh = mesh_of(owners)
    for index, share in enumerate(shares):
        monkeypatch.setattr(sharding.jax, "process_index", lambda index=index: index)
        assert sharding.batch_share(mesh) == share


def test_shares_that_overlap():
    with pytest.raises(CalmError, match="tensor 2 splits the batch 3 ways, which does not fit 3 "):
        sharding.batch_share(mesh_of([[0, 0], [0, 1], [1, 2]]))


def mesh_of(owners):
    """A mesh of data x tensor in which process `owners[i][j]` holds the device (i, j)."""
    devices = np.array(
        [[types.SimpleNamespace(process_index=owner) for owner in row] for row in owners]
    )[None, :, None, :]
    names = ("slices", "data", "fsdp", "tensor")
    return types.SimpleNamespace(
        devices=devices, axis_names=names, shape=dict(zip(names, devices.shape, strict=True))
    )


def test_processes_that_differ_are_refused(shared, tmp_path):
    run = Run(shared, tmp_path / "run", 2, 1, of_last=["--config.optimizer.learning_rate=0.5"])
    statuses, outputs = run.end()
    assert statuses == [2, 2]
    fact = "config.optimizer.learning_rate is 0.5, in process 0 0.001"
    told = f"process 1 differs from process 0: {fact}"
    assert last_line(outputs[0]) == f"process 1 ended: {told}"
    assert last_line(outputs[1]) == f"error: {told}"
    assert not run.workdir.exists()


def test_coordinator_that_is_not_there(shared, tmp_path):
    flags = ["--coordinator=localhost:1", "--process_count=2", "--process_index=1"]
    run = Run(shared, tmp_path / "run", 1, 1, *flags, "--coordinator_seconds=2")
    statuses, outputs = run.end()
    assert statuses == [2]
    assert outputs == [
        "error: process 1 of 2: the coordinator localhost:1 cannot be reached; waited 2 s\n"
    ]
    assert not run.workdir.exists()


def test_processes_that_finish_leave_no_thread_and_end_well():
    # Twice at a time: a thread that Python's end finds in C++ does not always crash it.
    runs = [free_address() for _ in range(2)]
    statuses, outputs = ends(
        [start("-c", SAVES, address, str(i)) for address in runs for i in range(3)]
    )
    assert statuses == [0] * 6, "\n".join(outputs)
    assert [last_line(output) for output in outputs] == ["0"] * 6


def test_sigterm_while_connecting(shared, tmp_path):
    with socket.create_server(("localhost", 0)) as coordinator:  # which never answers
        flags = ["--process_count=2", "--process_index=1"]
        address = f"localhost:{coordinator.getsockname()[1]}"
        run = Run(shared, tmp_path / "run", 1, 1, f"--coordinator={address}", *flags)
        coordinator.settimeout(60)
        with coordinator.accept()[0]:
            run.processes[0].send_signal(signal.SIGTERM)
            sent = time.monotonic()
            statuses, outputs = run.end()
    assert time.monotonic() - sent < 10
    assert statuses == [os.EX_TEMPFAIL]
    assert outputs == ["stopped before the first step; the same command starts again\n"]
    assert not run.workdir.exists()
