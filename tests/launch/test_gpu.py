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


def test_each_group_of_an_experiment_is_an_array_after_the_one_before_it(tmp_path):
    file = shell_scripts.write_commands(tmp_path / "commands.txt", "/disk/runs")
    sbatch = f'#!/bin/sh\necho "$*" >>{tmp_path}/called\nwc -l <{tmp_path}/called\n'
    shell_scripts.write_program(tmp_path / "bin", "sbatch", sbatch)
    result = shell_scripts.run(
        "slurm_array.sh", "--gpus=2", "--time=60", "--", str(file), programs=tmp_path / "bin"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "group 1: 1 commands, array 1",
        "group 2: 2 commands, array 2",
        "group 3: 1 commands, array 3",
    ]
    called = (tmp_path / "called").read_text().splitlines()
    assert [re.findall("--(?:array|dependency)=([^ ]*)", line) for line in called] == [
        ["1-1"], ["1-2", "afterany:1"], ["1-1", "afterany:2"],
    ]  # fmt: skip
    for number, line in enumerate(called, start=1):
        assert "--parsable" in line and "--gpus-per-node=2" in line and "--time=60" in line
        assert line.endswith(f"launch/slurm_array_job.sh {file} {number}")


@pytest.mark.parametrize(
    ("status", "queued_again", "ends_with"), [(0, 0, 0), (75, 1, 0), (143, 1, 0), (2, 0, 2)]
)
def test_a_job_of_an_array_runs_the_command_of_its_number(
    tmp_path, status, queued_again, ends_with
):
    file = shell_scripts.write_commands(tmp_path / "commands.txt", "/disk/my runs")
    log = tmp_path / "called"
    shell_scripts.write_program(
        tmp_path, "srun", f'#!/bin/sh\nprintf "%s\\n" "$@" >>{log}\nexit {status}\n'
    )
    shell_scripts.write_program(tmp_path, "scontrol", f'#!/bin/sh\necho "scontrol $*" >>{log}\n')
    variables = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "6", "SLURM_ARRAY_TASK_ID": "2"}
    job = subprocess.run(
        ["bash", "launch/slurm_array_job.sh", str(file), "2"],
        cwd=shell_scripts.ROOT, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables,
    )  # fmt: skip
    assert job.returncode == ends_with, job.stderr
    # The second of group 2, and every word as it was.
    assert log.read_text().splitlines() == [
        "--cpus-per-task=6",
        ".venv/bin/calm",
        "train",
        "--config=configs/x.py:calm",
        "--workdir=/disk/my runs/seed_0/calm",
        "--config.train.seed=0",
        "--config.data.seed=0",
        "--config.anchor=/disk/my runs/seed_0/anchor/frozen",
        "--config.augments=('/disk/my runs/seed_0/anchor/frozen',)",
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
        ("slurm_array.sh", ("--", "x"), "--gpus is missing"),
        ("slurm_array.sh", ("--gpus=1", "--", "/nowhere"), "/nowhere: there is no such file"),
        ("slurm_array.sh", ("--gpus=1",), "one file follows --"),
        (
            "slurm_array.sh",
            ("--gpus=1", "--", str(shell_scripts.ROOT / "setup.py")),
            f"{shell_scripts.ROOT / 'setup.py'} is not what",
        ),
        ("slurm_array_job.sh", (), "SLURM runs this; bash launch/slurm_array.sh submits it"),
        ("slurm_job.sh", TRAIN[1:], "SLURM runs this; bash launch/slurm.sh submits it"),
        (
            "slurm.sh",
            ("--nodes=1", "--gpus=1", *TRAIN, "-overwrite"),
            "-overwrite: a training that is started again",
        ),
        ("gpu.sh", ("--", "--config=c"), "--workdir=DIR, a flag of `calm train`, is missing"),
        ("gpu.sh", ("--", "--config=c", "--workdir=d"), "--config=c: there is no such file in"),
        ("demo.sh", ("--quick",), "unknown flag --quick"),
        ("small.sh", ("--quick",), "unknown flag --quick"),
        ("real_pair.sh", ("--quick",), "--quick is not facts, translation or tokenizers"),
        ("real_pair.sh", ("facts", "--seeds=0"), "--seeds=0 stands where the folder does"),
    ],
)
def test_bad_input_is_one_line(script, arguments, message):
    result = shell_scripts.run(script, *arguments)
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {message}")
