"""What holds for every script, and for the image."""

import fnmatch
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import shell_scripts

from calm_jax.planning import topologies

SCRIPTS = sorted(shell_scripts.LAUNCH.glob("*.sh"))
SOURCED = {"environment.sh", "shared.sh"}
COMMANDS = ("gke.sh", "gpu.sh", "slurm.sh", "slurm_array.sh", "tpu.sh")
FLAGS = {  # with which a command of slices lacks its topology alone
    "tpu.sh": ("create", "--name=pair", "--zone=z", "--dry-run"),
    "gke.sh": ("pools", "--name=pair", "--cluster=c", "--location=l", "--dry-run"),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(pathlib.Path(sys.executable).parent)
    )
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(
        [shellcheck, "--external-sources", script.relative_to(shell_scripts.ROOT)],
        cwd=shell_scripts.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(script):
    text = script.read_text()
    assert script.name in SOURCED or re.search(r"^set -euo pipefail$", text, re.MULTILINE)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_names_every_flag(script):
    text = (shell_scripts.LAUNCH / script).read_text()
    names, switches = re.search(r'^parse_flags "(.*?)" "(.*?)"', text, re.MULTILINE).groups()
    shown = "\n".join(shell_scripts.lines(script, "--help"))
    for name in [*names.split(), *switches.split(), "dry-run"]:
        assert re.search(rf"^\s+--{name}\b", shown, re.MULTILINE), name


@pytest.mark.parametrize("script", sorted({path.name for path in SCRIPTS} - SOURCED))
def test_help_does_nothing_else(tmp_path, script):
    shutil.copytree(shell_scripts.LAUNCH, tmp_path / "launch")
    shell_scripts.write_program(tmp_path / ".venv/bin", "python", "#!/bin/sh\necho called\n")
    helped = subprocess.run(
        ["bash", f"launch/{script}", "--help"],
        cwd=tmp_path, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (helped.returncode, helped.stderr) == (0, "")
    head = (shell_scripts.LAUNCH / script).read_text().splitlines()[1]
    assert helped.stdout.startswith(head.removeprefix("# "))
    assert "called" not in helped.stdout
    assert not re.search(r"^(set|cd|source) ", helped.stdout, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"launch", ".venv"}


def test_arguments_of_the_tests_reach_pytest(tmp_path):
    shutil.copytree(shell_scripts.LAUNCH, tmp_path / "launch")
    (tmp_path / "setup.py").write_text("")
    python = '#!/bin/sh\n[ "$2" != pytest ] || echo "$*"\n'
    shell_scripts.write_program(tmp_path / ".venv/bin", "python", python)
    ended = subprocess.run(
        ["bash", tmp_path / "launch/test.sh", "-m", "slow"], capture_output=True, text=True
    )
    assert ended.stdout.splitlines()[-1].endswith("--dist=loadfile --max-worker-restart=0 -m slow")


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("script", FLAGS)
def test_slices_are_those_of_the_plan(script, chip):
    for shape in topologies.SHAPES[chip]:
        assert shell_scripts.lines(script, *FLAGS[script], f"--topology={chip}:{shape}*2")
    unknown = ["3x5", "1x2", "16x32", "6x16"] if chip != "v5p" else ["1x1x1", "3x4x4", "16x16x2"]
    for shape in unknown:
        assert shape not in topologies.SHAPES[chip]
        refused = shell_scripts.run(script, *FLAGS[script], f"--topology={chip}:{shape}")
        assert refused.returncode == 2 and not refused.stdout
        assert refused.stderr == (
            f"error: --topology={chip}:{shape}: no such slice; of {chip} there are "
            f"{' '.join(topologies.SHAPES[chip])}\n"
        )


def documented_commands() -> list[str]:
    """The lines of docs/pods.md that call these scripts, each as one line, its array put in."""
    text = (shell_scripts.ROOT / "docs/pods.md").read_text().replace("\\\n", " ")
    (training,) = re.findall(r"^training=\((.*?)\)$", text, re.MULTILINE | re.DOTALL)
    commands = re.findall(rf"^bash launch/(?:{'|'.join(COMMANDS)}) .*$", text, re.MULTILINE)
    return [
        command.replace('"${training[@]}"', training.replace("\n", " ")) for command in commands
    ]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_taken(command):
    _, script, *arguments = shlex.split(command, comments=True)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments.insert(end, "--dry-run")
    assert shell_scripts.lines(pathlib.Path(script).name, *arguments)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.lists(st.one_of(WORDS, WORDS.map("--flag=".__add__)), min_size=1))
def test_what_a_dry_run_shows_is_what_would_run(words):
    shown = subprocess.run(
        ["bash", "-c", 'source launch/shared.sh; quoted "$@"', "-", *words],
        cwd=shell_scripts.ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    read = subprocess.run(
        ["bash", "-c", b"printf '%s\\0' " + shown], capture_output=True, check=True
    )
    assert read.stdout.split(b"\0")[:-1] == [word.encode() for word in words]


def dockerfile() -> list[list[str]]:
    """The instructions of the Dockerfile, as words."""
    text = (shell_scripts.LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line and line[0] != "#"]


def test_the_image_copies_what_there_is_and_its_context_holds():
    ignore = (shell_scripts.ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    kept = [line[1:] for line in ignore if line.startswith("!")]
    copied = [source for word, *rest in dockerfile() if word == "COPY" for source in rest[:-1]]
    assert {"setup.py", "calm_jax", "configs"} <= set(copied)
    for source in copied:
        assert (shell_scripts.ROOT / source).exists(), source
        assert any(
            fnmatch.fnmatch(source, pattern + rest) for pattern in kept for rest in ("", "/*")
        )


def test_the_image_runs_as_nobody_special_and_installs_code_last():
    words = [line[0] for line in dockerfile()]
    assert dockerfile()[words.index("FROM")][1] == "python:3.12-slim"
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    code = dockerfile().index(["COPY", "calm_jax", "calm_jax"])
    installs = [i for i, line in enumerate(dockerfile()) if "pip install" in " ".join(line)]
    assert installs[0] < code < installs[1]


def test_the_images_first_layer_knows_all_dependencies(tmp_path):
    """It is built without the code, so setup.py must need no more than what is copied there."""
    lines = dockerfile()
    (tmp_path / "calm_jax").mkdir()
    for word, *rest in lines[: lines.index(["COPY", "calm_jax", "calm_jax"])]:
        for source in rest[:-1] if word == "COPY" else ():
            shutil.copy(shell_scripts.ROOT / source, tmp_path / source)
    subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", "egg_info"], cwd=tmp_path, check=True
    )
    needed = (tmp_path / "calm_jax.egg-info/requires.txt").read_text()
    assert "jax[tpu]" in needed and "jax[cuda12]" in needed and "orbax-checkpoint" in needed
