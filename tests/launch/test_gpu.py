"""Machines of GPUs: what SLURM is asked, and when a job queues itself again."""

import hashlib
import os
import re
import shutil
import subprocess

import pytest
import shell_scripts

TRAIN = ("--", "--config=configs/own_models.py", "--workdir=runs/mine")


def test_slurm_runs_a_process_a_gpu():
    assert shell_scripts.lines(
        "slurm.sh", "--nodes=4", "--gpus=8", "--time=12:00:00", "--partition=h100", "--dry-run",
        *TRAIN,
    ) == [
        "sbatch --job-name=calm --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 "
        "--time=12:00:00 --partition=h100 --signal=TERM@120 --requeue --open-mode=append "
        "--output=%x-%j.log launch/slurm_job.sh --config=configs/own_models.py "
        "--workdir=runs/mine",
        "srun --kill-on-bad-exit=0 --gpu-bind=none --cpus-per-task=8 .venv/bin/calm train "
        "--config=configs/own_models.py --workdir=runs/mine",
        "# after exit status 75:",
        "scontrol requeue JOB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "queued_again", "ends_with"), [(0, 0, 0), (75, 1, 0), (2, 0, 2)]
)
def test_a_job_queues_itself_again_after_75_alone(tmp_path, status, queued_again, ends_with):
    log = tmp_path / "called"
    shell_scripts.write_program(
        tmp_path, "srun", f'#!/bin/sh\necho "srun $*" >>{log}\nexit {status}\n'
    )
    shell_scripts.write_program(tmp_path, "scontrol", f'#!/bin/sh\necho "scontrol $*" >>{log}\n')
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.run(
        ["bash", "launch/slurm_job.sh", *TRAIN[1:]],
        cwd=shell_scripts.ROOT, capture_output=True, text=True,
        env=os.environ | {"PATH": path, "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "6"},
    )  # fmt: skip
    assert job.returncode == ends_with
    assert log.read_text().splitlines() == [
        "srun --kill-on-bad-exit=0 --gpu-bind=none --cpus-per-task=6 .venv/bin/calm train "
        "--config=configs/own_models.py --workdir=runs/mine",
        *["scontrol requeue 17"] * queued_again,
    ]


@pytest.fixture
def checkout(tmp_path):
    """One that is not installed."""
    shutil.copytree(shell_scripts.LAUNCH, tmp_path / "launch")
    (tmp_path / "setup.py").write_text("as it was installed")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/own_models.py").write_text("")
    return tmp_path


def gpu(checkout, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", checkout / "launch/gpu.sh", *arguments], capture_output=True, text=True
    )


def test_a_dry_run_shows_the_installation_that_is_needed(checkout):
    before = sorted(checkout.rglob("*"))
    train = (
        "exec env XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 .venv/bin/calm train "
        "--config=configs/own_models.py --workdir=runs/mine"
    )
    lines = gpu(checkout, "--dry-run", *TRAIN).stdout.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert re.fullmatch(r"python\S* -m venv --clear .venv", commands[0])
    assert commands[1:] == [
        ".venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda]'",
        train,
    ]
    assert sorted(checkout.rglob("*")) == before
    (checkout / ".venv").mkdir()
    installed = hashlib.sha256(b"as it was installed").hexdigest()
    (checkout / ".venv/installed-cuda").write_text(installed + "\n")
    lines = gpu(checkout, "--dry-run", *TRAIN).stdout.splitlines()
    assert lines == ["# .venv holds calm_jax[cuda] already", train]


def test_one_machine_ends_with_the_trainings_status(checkout):
    calm = '#!/bin/sh\necho "$XLA_PYTHON_CLIENT_MEM_FRACTION $*"\nexit 75\n'
    shell_scripts.write_program(checkout / ".venv/bin", "calm", calm)
    installed = hashlib.sha256(b"as it was installed").hexdigest()
    (checkout / ".venv/installed-cuda").write_text(installed + "\n")
    ended = gpu(checkout, *TRAIN)
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout == "0.9 train --config=configs/own_models.py --workdir=runs/mine\n"


@pytest.mark.parametrize("limit", ["90", "90:30", "12:00:00", "2-12", "2-12:00", "2-12:00:00"])
def test_every_form_of_a_time_limit_is_taken(limit):
    shown = shell_scripts.lines(
        "slurm.sh", "--nodes=1", "--gpus=1", f"--time={limit}", "--dry-run", *TRAIN
    )
    assert f" --time={limit} " in shown[0]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("slurm.sh", ("--gpus=8", *TRAIN), "--nodes is missing"),
        ("slurm.sh", ("--nodes=two", "--gpus=8", *TRAIN), "--nodes=two is not a number of nodes"),
        ("slurm.sh", ("--nodes=2", "--gpus=8"), "--config=FILE, a flag of `calm train`, is"),
        ("slurm.sh", ("--nodes=2", "--gpus=8", "--config=c"), "unknown flag --config=c"),
        ("slurm.sh", ("--nodes=2", "--gpus=8", "--time=forever", *TRAIN), "--time=forever is nei"),
        ("slurm.sh", ("--nodes=2", "--gpus=8", "--time=1:2:3:4", *TRAIN), "--time=1:2:3:4 is nei"),
        ("slurm_job.sh", TRAIN[1:], "SLURM runs this; bash launch/slurm.sh submits it"),
        ("gpu.sh", ("--", "--config=c"), "--workdir=DIR, a flag of `calm train`, is missing"),
        ("gpu.sh", ("--", "--config=c", "--workdir=d"), "--config=c: there is no such file in"),
        ("demo.sh", ("--quick",), "unknown flag --quick"),
        ("real_pair.sh", ("--quick",), "--quick is neither facts nor translation"),
        ("real_pair.sh", ("facts", "--seeds=0"), "--seeds=0 stands where the folder does"),
    ],
)
def test_bad_input_is_one_line(script, arguments, message):
    result = shell_scripts.run(script, *arguments)
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {message}")
