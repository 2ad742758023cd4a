"""A worker of a slice: the training outlives its ssh, runs once, and leaves its status."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest
import shell_scripts

# A training that saves and ends when it is told to; told "fail", it ends at once.
CALM = """#!/usr/bin/env bash
echo "calm $*"
[[ $* != *fail* ]] || exit 7
trap 'echo saved; exit 75' TERM
while :; do sleep 0.05; done
"""


@pytest.fixture
def home(tmp_path):
    shutil.copytree(shell_scripts.LAUNCH, tmp_path / "calm_jax/launch")
    shell_scripts.write_program(tmp_path / "calm_env/bin", "calm", CALM)
    yield tmp_path
    worker(tmp_path, "stop")
    assert until(tmp_path, lambda status: status != "running")


def worker(home: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "calm_jax/launch/worker.sh", *arguments],
        cwd=home, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def until(home: pathlib.Path, wanted) -> bool:
    for _ in range(300):
        if wanted(worker(home, "status").stdout.strip()):
            return True
        time.sleep(0.05)
    return False


def test_a_training_runs_once_and_is_told_to_end(home):
    assert worker(home, "status").stdout == "none\n"
    # With its output in a pipe this would not return if the training held the pipe open.
    started = worker(home, "start", "--config=c", "--config.augments=('a b',)")
    assert started.returncode == 0, started.stderr
    assert worker(home, "status").stdout == "running\n"
    again = worker(home, "start", "--config=c")
    assert again.returncode == 2
    assert again.stderr == "error: a training is running on this worker\n"
    session = int((home / "calm.pid").read_text())
    assert os.getsid(session) == session != os.getsid(0)  # no hang-up of the ssh reaches it

    log = home / "calm.log"
    assert until(
        home, lambda _: log.read_text() == "calm train --config=c --config.augments=('a b',)\n"
    )
    assert worker(home, "stop").returncode == 0
    assert until(home, lambda status: status == "exit 75")
    assert log.read_text().endswith("saved\n")


def test_a_status_is_of_the_last_training(home):
    worker(home, "start", "fail")
    assert until(home, lambda status: status == "exit 7")
    assert worker(home, "start", "go").returncode == 0
    assert worker(home, "status").stdout == "running\n"
    # As after a reboot: neither a process nor a status.
    os.killpg(int((home / "calm.pid").read_text()), 9)
    assert until(home, lambda status: status == "none")


def test_install_makes_an_environment_of_the_checkout(home):
    uv = f'#!/bin/sh\necho "$PWD: uv $*" >>{home}/called\n'
    shell_scripts.write_program(home / ".local/bin", "uv", uv)
    assert worker(home, "install").returncode == 0
    checkout, python = home / "calm_jax", home / "calm_env/bin/python"
    assert (home / "called").read_text().splitlines() == [
        f"{checkout}: uv venv --quiet --python=3.12 --allow-existing {home}/calm_env",
        f"{checkout}: uv pip install --quiet --python={python} .[tpu]",
    ]
