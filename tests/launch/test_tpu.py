"""Slices of TPUs: the very commands, and what is done when slices are taken away."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
import shell_scripts

HERE = pathlib.Path(__file__).parent
SLICE = ("--name=pair", "--zone=us-west4-a")
TRAIN = ("--", "--config=configs/own_models.py", "--workdir=gs://bucket/run")
AUGMENTS = "--config.augments=('gs://bucket/augment',)"
ARCHIVE = (
    "bash -c 'git ls-files -z --cached --others --exclude-standard | "
    "tar -czf calm_jax.tar.gz --null -T -'"
)
INSTALL = (
    "--command='rm -rf calm_jax && mkdir calm_jax && tar -xzf calm_jax.tar.gz -C calm_jax && "
    "bash calm_jax/launch/worker.sh install'"
)


def dry_run(command: str, *arguments: str) -> list[str]:
    return shell_scripts.lines("tpu.sh", command, *SLICE, "--dry-run", *arguments)


@pytest.mark.parametrize(
    ("topology", "accelerator", "version"),
    [
        ("v5e:4x8", "v5litepod-32", "v2-alpha-tpuv5-lite"),
        ("v5p:2x4x4", "v5p-64", "v2-alpha-tpuv5"),  # 32 chips of two cores
        ("v6e:16x16", "v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_a_slice_in_google_clouds_words(topology, accelerator, version):
    assert dry_run("create", f"--topology={topology}", "--spot", "--project=mine") == [
        "gcloud compute tpus tpu-vm create pair --zone=us-west4-a --project=mine --quiet "
        f"--version={version} --accelerator-type={accelerator} --spot --scopes=cloud-platform",
        "gcloud compute tpus tpu-vm describe pair --zone=us-west4-a --project=mine --quiet "
        "--format='value(state)'",
    ]


def test_create_queues_where_told():
    assert dry_run("create", "--topology=v5e:4x8", "--queued", "--runtime=v9") == [
        "gcloud compute tpus queued-resources create pair --zone=us-west4-a --quiet "
        "--runtime-version=v9 --accelerator-type=v5litepod-32 --scopes=cloud-platform "
        "--node-id=pair",
        "gcloud compute tpus queued-resources describe pair --zone=us-west4-a --quiet "
        "--format='value(state.state)'",
    ]


def test_several_slices_are_queued_and_all_reached():
    several = "--topology=v5e:16x16*2"
    assert dry_run("create", several, "--service-account=a@b.iam")[0] == (
        "gcloud compute tpus queued-resources create pair --zone=us-west4-a --quiet "
        "--runtime-version=v2-alpha-tpuv5-lite --accelerator-type=v5litepod-256 "
        "--service-account=a@b.iam --scopes=cloud-platform --node-count=2 --node-prefix=pair"
    )
    assert dry_run("install", several) == [
        ARCHIVE,
        *[
            f"gcloud compute tpus tpu-vm scp calm_jax.tar.gz pair-{node}: --zone=us-west4-a "
            "--quiet --worker=all"
            for node in (0, 1)
        ],
        *[
            f"gcloud compute tpus tpu-vm ssh pair-{node} --zone=us-west4-a --quiet --worker=all "
            + INSTALL
            for node in (0, 1)
        ],
    ]
    assert dry_run("delete", several) == [
        "gcloud compute tpus queued-resources delete pair --zone=us-west4-a --quiet --force"
    ]


def test_commands_of_one_slice():
    assert dry_run("install") == [
        ARCHIVE,
        "gcloud compute tpus tpu-vm scp calm_jax.tar.gz pair: --zone=us-west4-a --quiet "
        "--worker=all",
        f"gcloud compute tpus tpu-vm ssh pair --zone=us-west4-a --quiet --worker=all {INSTALL}",
    ]
    assert dry_run("train", *TRAIN) == [
        "gcloud compute tpus tpu-vm ssh pair --zone=us-west4-a --quiet --worker=all "
        "--command='bash calm_jax/launch/worker.sh start --config=configs/own_models.py "
        "--workdir=gs://bucket/run'"
    ]
    assert dry_run("logs", "--worker=3") == [
        "gcloud compute tpus tpu-vm ssh pair --zone=us-west4-a --quiet --worker=3 "
        "--command='tail -n 100 -F calm.log'"
    ]
    assert dry_run("status") == [
        "gcloud compute tpus tpu-vm describe pair --zone=us-west4-a --quiet "
        "--format='value(state)'",
        "gcloud compute tpus tpu-vm ssh pair --zone=us-west4-a --quiet --worker=all "
        "--command='bash calm_jax/launch/worker.sh status 2>/dev/null || echo none'",
    ]
    assert dry_run("stop") == [
        "gcloud compute tpus tpu-vm ssh pair --zone=us-west4-a --quiet --worker=all "
        "--command='bash calm_jax/launch/worker.sh stop'"
    ]
    assert dry_run("delete") == ["gcloud compute tpus tpu-vm delete pair --zone=us-west4-a --quiet"]


def test_flags_of_the_training_reach_the_worker_as_they_are():
    """Through two shells, this machine's and the worker's."""
    line = dry_run("train", *TRAIN, AUGMENTS)[0]
    command = next(x for x in shlex.split(line) if x.startswith("--command="))
    words = shlex.split(command.removeprefix("--command="))
    assert words == ["bash", "calm_jax/launch/worker.sh", "start", *TRAIN[1:], AUGMENTS]


def test_dry_run_of_resume_is_what_follows_a_preemption():
    shown = dry_run("resume", "--topology=v5e:4x8", *TRAIN)
    verbs = [shlex.split(line)[3:5] for line in shown if line.startswith("gcloud")]
    kinds = ["describe", "delete", "create", "scp", "ssh", "ssh", "ssh"]
    assert verbs == [["tpu-vm", kind] for kind in kinds]
    assert ARCHIVE in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fly",), "unknown command fly"),
        (("create", "--zone=z", "--topology=v5e:4x8"), "--name is missing"),
        (("create", *SLICE), "--topology is missing"),
        (("create", *SLICE, "--topology"), "--topology has no value; write --topology=VALUE"),
        (("create", *SLICE, "--topology=v7:4x4"), "--topology=v7:4x4 is not of the form"),
        (("create", *SLICE, "--topology=v5p:4x4"), "--topology=v5p:4x4 is not of the form"),
        (("create", *SLICE, "--topology=v5e:4x4*0"), "--topology=v5e:4x4*0 is not of the form"),
        (("create", *SLICE, "--topology=v5e:3x5"), "--topology=v5e:3x5: no such slice; of v5e"),
        (("status", *SLICE, "--retries=x"), "--retries=x is not a number"),
        (("status", *SLICE, "--poll=y"), "--poll=y is not a number"),
        (("status", *SLICE, "--worker=all"), "--worker=all is not a number"),
        (("create", *SLICE, "--sport"), "unknown flag --sport"),
        (("create", *SLICE, "--spot=no"), "unknown flag --spot=no"),
        (
            ("resume", *SLICE, "--topology=v5e:16x16", *TRAIN, "--overwrite"),
            "--overwrite: a training that is started again",
        ),
        (("train", *SLICE), "--config=FILE, a flag of `calm train`, is missing after --"),
        (("train", *SLICE, "--", "--config=c"), "--workdir=DIR, a flag of `calm"),
        (("train", *SLICE, "--", "--config=c", "--workdir=runs/x"), "--workdir=runs/x: workers"),
        (("train", *SLICE, "--", "--config=no.py", TRAIN[2]), "--config=no.py: there is no such"),
        (("train", *SLICE, "--", f"--config={__file__}", TRAIN[2]), f"--config={__file__}: name"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = shell_scripts.run("tpu.sh", *arguments, "--dry-run" if "--" not in arguments else "")
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {message}")


class Cloud:
    """The cloud of fake_gcloud.py."""

    def __init__(self, folder: pathlib.Path, *, queued: bool = False):
        self.path = folder / "cloud.json"
        self.programs = folder / "programs"
        self.arguments = ["--queued"] if queued else []
        self.values = {
            "queued": queued, "state": "ABSENT", "installed": False, "training": "none",
            "events": [], "calls": [],
        }  # fmt: skip
        program = f'#!/bin/sh\nexec {sys.executable} -S -E {HERE / "fake_gcloud.py"} "$@"\n'
        shell_scripts.write_program(self.programs, "gcloud", program)

    def run(self, command: str, *arguments: str, **values):
        self.path.write_text(json.dumps(self.values | values))
        result = shell_scripts.run(
            "tpu.sh", command, *SLICE, *self.arguments, *arguments,
            programs=self.programs, FAKE_CLOUD=str(self.path),
        )  # fmt: skip
        self.values = json.loads(self.path.read_text())
        return result

    def resume(self, *arguments: str, **values):
        return self.run("resume", "--topology=v5e:4x8", "--poll=0", *arguments, *TRAIN, **values)


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


INSTALLED = {"state": "READY", "installed": True, "training": "running"}
START = ["describe", "status", "scp", "install", "start"]


def test_resume_goes_from_nothing_to_the_end(cloud):
    result = cloud.resume(events=["none", "none", "none", "0"])
    assert result.returncode == 0, result.stderr
    assert "the training is finished" in result.stdout
    assert cloud.values["calls"] == [
        *("describe", "create"), *START, *("describe", "status"), *("describe", "status")
    ]  # fmt: skip
    assert cloud.values["state"] == "READY"


def test_resume_replaces_preempted_slices(cloud):
    events = ["none", "preempt", "none", "none", "preempt", "none", "none", "0"]
    result = cloud.resume(events=events, **INSTALLED)
    assert result.returncode == 0, result.stderr
    replaced = ["describe", "delete", "create", *START]
    assert cloud.values["calls"] == [
        *("describe", "status"), *replaced, *("describe", "status"), *replaced,
        *("describe", "status"), *("describe", "status"),
    ]  # fmt: skip
    assert "pair: PREEMPTED, replace" in result.stdout


def test_resume_waits_in_the_queue(tmp_path):
    cloud = Cloud(tmp_path, queued=True)
    result = cloud.resume(
        events=["preempt", "none", "none", "none", "0"], **INSTALLED | {"state": "ACTIVE"}
    )
    assert result.returncode == 0, result.stderr
    assert "pair: SUSPENDED, replace\npair: WAITING_FOR_RESOURCES\npair: ACTIVE" in result.stdout
    assert cloud.values["calls"] == [
        *("describe", "delete", "create"), "describe", *START,
        *("describe", "status"), *("describe", "status"),
    ]  # fmt: skip


def test_resume_starts_again_what_was_told_to_end_without_limit(cloud):
    result = cloud.resume("--retries=0", events=["75", "75", "75", "75", "0"], **INSTALLED)
    assert result.returncode == 0, result.stderr
    assert cloud.values["calls"].count("start") == 4
    assert "scp" not in cloud.values["calls"]


def test_resume_gives_up_a_training_that_keeps_breaking(cloud):
    result = cloud.resume("--retries=2", events=["1", "134", "1", "none"], **INSTALLED)
    assert result.returncode == 2
    assert "error: pair: broken, 3 times in a row" in result.stderr
    assert cloud.values["calls"].count("start") == 3


def test_resume_counts_only_failures_in_a_row(cloud):
    result = cloud.resume("--retries=1", events=["1", "none", "1", "none", "0"], **INSTALLED)
    assert result.returncode == 0, result.stderr


def test_resume_does_not_repeat_what_cannot_run(cloud):
    result = cloud.resume(events=["2"], **INSTALLED)
    assert result.returncode == 2
    assert "error: the training cannot run so" in result.stderr
    assert "start" not in cloud.values["calls"]


def test_resume_outlasts_a_service_that_does_not_answer(cloud):
    result = cloud.resume(events=["unreachable", "unreachable", "0"], **INSTALLED)
    assert result.returncode == 0, result.stderr
    assert cloud.values["calls"] == [*["describe"] * 3, "status"]


def test_create_waits_until_the_slices_are_there(tmp_path):
    cloud = Cloud(tmp_path, queued=True)
    result = cloud.run("create", "--topology=v5e:4x8", "--poll=0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["pair: WAITING_FOR_RESOURCES", "pair: ACTIVE"]


def test_installing_copies_the_checkout_without_what_git_ignores(cloud):
    if not (shell_scripts.ROOT / ".git").exists():
        pytest.skip("needs a checkout of git")
    result = cloud.run("install", state="READY")
    assert result.returncode == 0, result.stderr
    with tarfile.open(cloud.path.parent / "copied.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"setup.py", "calm_jax/__init__.py", "launch/worker.sh"} <= names
    assert not any(name.startswith((".venv/", ".git/")) for name in names)


def test_a_failed_copy_is_not_installed(cloud):
    result = cloud.run("install", state="PREEMPTED")
    assert result.returncode != 0
    assert cloud.values["calls"] == ["scp"]


@pytest.mark.slow
def test_gcloud_itself_takes_every_command(tmp_path):
    """Its own parser, without an account or a network, knows all flags and their values."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    one, several = ["--topology=v5e:4x8"], ["--topology=v5e:16x16*2", "--spot"]
    shown = [
        *dry_run("create", *one, "--spot", "--service-account=a@b.iam", "--project=mine"),
        *dry_run("create", *one, "--queued"),
        *dry_run("resume", *one, *TRAIN, AUGMENTS),
        *dry_run("resume", *several, *TRAIN),
        *dry_run("logs"),
        *shell_scripts.lines(
            "gke.sh", "pools", "--name=pair", "--cluster=c", "--location=us-west4", *one, "--spot",
            "--dry-run",
        ),
    ]  # fmt: skip
    for line in dict.fromkeys(line for line in shown if line.startswith("gcloud")):
        checked = subprocess.run(
            ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"],
            env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        (verdict,) = json.loads(checked.stdout)
        assert verdict["success"], (line, verdict["error_message"])
