"""Machines of GPUs: what SLURM is asked, and when a job queues itself again."""

import hashlib
import os
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


def test_one_machine_runs_one_process():
    assert shell_scripts.lines("gpu.sh", "--dry-run", *TRAIN) == [
        "prepare cuda",
        "exec env XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 .venv/bin/calm train "
        "--config=configs/own_models.py --workdir=runs/mine",
    ]
    assert shell_scripts.lines("gpu.sh", "--install", "--dry-run") == ["prepare cuda"]


def test_one_machine_ends_with_the_trainings_status(tmp_path):
    shutil.copytree(shell_scripts.LAUNCH, tmp_path / "launch")
    (tmp_path / "setup.py").write_text("as it was installed")
    calm = '#!/bin/sh\necho "$XLA_PYTHON_CLIENT_MEM_FRACTION $*"\nexit 75\n'
    shell_scripts.write_program(tmp_path / ".venv/bin", "calm", calm)
    installed = hashlib.sha256(b"as it was installed").hexdigest()
    (tmp_path / ".venv/installed-cuda").write_text(installed + "\n")
    ended = subprocess.run(
        ["bash", tmp_path / "launch/gpu.sh", *TRAIN], capture_output=True, text=True
    )
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout == "0.9 train --config=configs/own_models.py --workdir=runs/mine\n"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("slurm.sh", ("--gpus=8", *TRAIN), "--nodes is missing"),
        ("slurm.sh", ("--nodes=two", "--gpus=8", *TRAIN), "--nodes=two is not a number of nodes"),
        ("slurm.sh", ("--nodes=2", "--gpus=8"), "--config=FILE, a flag of `calm train`, is"),
        ("slurm.sh", ("--nodes=2", "--gpus=8", "--config=c"), "unknown flag --config=c"),
        ("gpu.sh", ("--", "--config=c"), "--workdir=DIR, a flag of `calm train`, is missing"),
    ],
)
def test_bad_input_is_one_line(script, arguments, message):
    result = shell_scripts.run(script, *arguments)
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {message}")
