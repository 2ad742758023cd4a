"""Runs the scripts of launch/ as a person would; programs of the test may hide the machine's."""

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def run(script: str, *arguments: str, programs: pathlib.Path | None = None, **environment: str):
    """Runs `launch/<script>`; `programs` is a folder of programs that hide the machine's."""
    path = f"{programs}:{os.environ['PATH']}" if programs else os.environ["PATH"]
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def lines(script: str, *arguments: str, **environment: str) -> list[str]:
    """What a script prints that must end well."""
    result = run(script, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.splitlines()


def write_program(folder: pathlib.Path, name: str, text: str) -> None:
    """Writes an executable file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def write_commands(path: pathlib.Path, workdir: str) -> pathlib.Path:
    """What `calm experiment --commands` prints of two arms, the second of which needs the first."""
    from etils import epath

    from calm_jax.experiment.arms import Arm, Experiment, groups, jobs
    from calm_jax.shell import command_line

    arms = (Arm("anchor", kind="part"), Arm("calm", anchor="anchor", augments=("anchor",)))
    experiment = Experiment("t", arms, ("math",), "calm")
    found = groups(list(jobs(experiment, "configs/x.py", epath.Path(workdir), {})))
    lines = []
    for number, group in enumerate(found, start=1):
        lines += [f"# group {number}", *(command_line(*each) for each in group)]
    path.write_text("\n".join(lines) + "\n")
    return path
