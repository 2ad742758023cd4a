"""The commands as a person calls them."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from flax import nnx

import calm_jax
from calm_jax import sharding
from calm_jax.__main__ import COMMANDS, main
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.decoding import Completion
from calm_jax.quiet import quiet_libtpu
from calm_jax.training import loop
from calm_jax.training.preemption import Preemption

CONFIG = """
from calm_jax.training.configuration import decoder_run

def get_config():
    return decoder_run()
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "frozen"
    vocabulary = ByteVocabulary()
    decoder = tiny_models.decoder(vocab_size=vocabulary.size)
    calm_jax.save_frozen(decoder, folder, vocabulary=vocabulary)
    return folder


def test_calm_alone_lists_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_holds_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"\n  calm {name} --" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"calm_jax {calm_jax.__version__}\n"


def test_a_reader_that_ends_early_sees_no_traceback():
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "calm_jax", "train", "--help"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


def test_help_does_not_wait_for_jax():
    program = """
import contextlib, os, sys
from calm_jax.__main__ import COMMANDS, main
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    for name in sorted(COMMANDS, key="convert".__eq__):
        light = set(sys.modules)
        with contextlib.suppress(SystemExit):
            main([name, "--help"])
print(*{name for name in light if "." not in name}, "|", *sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    before_convert, after = (set(part.split()) for part in run.stdout.split("|"))
    assert "calm_jax" in before_convert
    assert not {"jax", "flax", "orbax", "tensorflow"} & before_convert
    # It lists the options of every family, whose modules need some of JAX.
    assert not {"flax", "orbax", "tensorflow"} & after


@pytest.mark.parametrize("chips", [False, True])
def test_libtpu_is_told_what_it_complains_of_where_there_is_no_tpu(monkeypatch, chips):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "")  # so that it is undone, whatever it was
        monkeypatch.delenv(name)
    if not chips:
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX sets it when it finds no chip
    quiet_libtpu()
    assert ("TPU_ACCELERATOR_TYPE" in os.environ) is not chips
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) is not chips


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_nothing_is_printed_of_a_tpu_that_is_not_there(frozen):
    arguments = [f"--workdir={frozen}", "--prompt=a", "--max_new_tokens=1"]
    run = subprocess.run(
        [sys.executable, "-m", "calm_jax", "generate", *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_bad_input_is_one_line_and_status_2(config, tmp_path, capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; did you mean 'train'?\n"
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, "--config.trian.num_steps=3"]) == 2
    shown = capsys.readouterr().err
    assert shown == (
        "error: unknown config key 'trian.num_steps'; did you mean 'train.num_steps'?\n"
    )
    assert main(arguments) == 2  # no data is named
    assert capsys.readouterr().err.startswith("error: data.train is empty")
    assert not (tmp_path / "run").exists()


def test_the_status_reaches_the_shell():
    run = subprocess.run(
        [sys.executable, "-m", "calm_jax", "generate", "--workdir=/nowhere/at/all", "--prompt=a"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr == (
        "error: /nowhere/at/all is not a run, a frozen folder or an exported bridge: "
        "it does not exist\n"
    )


def test_train_hands_config_and_flags_to_the_loop(config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop, "train", lambda *args, **options: calls.append((args, options)))
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--config.optimizer.name=adafactor", "--overwrite"]
    assert main(arguments) == 0
    ((given, workdir), options) = calls[0]
    assert isinstance(options.pop("preemption"), Preemption)
    assert shlex.split(options.pop("command")) == ["calm", *arguments]
    assert (given.optimizer.name, workdir, options) == (
        "adafactor",
        str(tmp_path / "run"),
        {"overwrite": True},
    )


def test_overwriting_leaves_the_config_s_file(config, capsys):
    folder = config.parent
    assert main(["train", f"--config={config}", f"--workdir={folder}", "--overwrite"]) == 2
    assert capsys.readouterr().err == (
        f"error: --overwrite would remove {config} with the run {folder}\n"
    )
    assert config.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=host:1"], "--process_count is missing; --coordinator, --process_count"),
        (["--process_index=0"], "--coordinator is missing"),
        (
            ["--coordinator=host", "--process_count=2", "--process_index=0"],
            "--coordinator=host is not of the form HOST:PORT",
        ),
        (
            ["--coordinator=host:1", "--process_count=2", "--process_index=2"],
            "--process_index=2 is not from 0 to --process_count=2 minus 1",
        ),
    ],
)
def test_flags_of_a_process_that_contradict_each_other(config, tmp_path, capsys, flags, message):
    assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_report_of_a_run_names_the_folder_above(tmp_path, capsys):
    (tmp_path / "asis").mkdir()
    (tmp_path / "asis/config.json").write_text('{"kind": "composed"}')
    assert main(["report", f"--experiment={tmp_path / 'asis'}"]) == 2
    message = (
        f"{tmp_path}/asis is itself a composed run; name the folder that holds the runs, such as "
    )
    assert capsys.readouterr().err == f"error: --experiment={message}{tmp_path}\n"


def test_evaluate_refuses_several_processes(tmp_path, monkeypatch, capsys):
    run = {"kind": "composed", "evaluate": {"tasks": []}, "mesh": {"data": -1}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "host",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert "calm evaluate works in one process, but the environment starts 2" in (
        capsys.readouterr().err
    )


def test_generate_prints_prompts_and_answers(frozen, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("two\nthree words here\n")
    arguments = [f"--workdir={frozen}", "--prompt=one", "--max_new_tokens=5"]
    assert main(["generate", *arguments, f"--prompts_file={tmp_path / 'prompts.txt'}"]) == 0
    decoder = calm_jax.load(frozen)
    prompts = ["one", "two", "three words here"]
    answers = calm_jax.generate(decoder, prompts, max_new_tokens=5)
    expected = [
        prompt + decoder.vocabulary.decode(answer)
        for prompt, answer in zip(prompts, np.asarray(answers).tolist(), strict=True)
    ]
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in expected)


def test_generate_with_a_bridge_whose_models_moved(frozen, tmp_path, capsys):
    models = [shutil.copytree(frozen, tmp_path / name) for name in ("anchor", "augment")]
    composed = calm_jax.compose(*map(calm_jax.load, models), rngs=nnx.Rngs(0))
    calm_jax.export_bridge(composed, tmp_path / "bridge")
    for model in models:
        model.rename(tmp_path / f"new {model.name}")
    arguments = ["generate", f"--workdir={tmp_path / 'bridge'}", "--prompt=a", "--max_new_tokens=2"]
    assert main(arguments) == 2
    assert "if it has moved, give --anchor" in capsys.readouterr().err
    arguments += [f"--anchor={tmp_path}/new anchor", f"--augments={tmp_path}/new augment"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("a")
    assert main(["generate", f"--workdir={frozen}", "--prompt=a", f"--anchor={frozen}"]) == 2
    assert "which has no anchor and no augments" in capsys.readouterr().err


def test_generate_on_a_mesh(frozen, capsys, monkeypatch):
    meshes, make_mesh = [], sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda shape: meshes.append(shape) or make_mesh(shape)
    )
    arguments = [
        "generate",
        f"--workdir={frozen}",
        "--prompt=a",
        "--prompt=b",
        "--max_new_tokens=2",
    ]
    assert main(arguments) == 0
    expected = capsys.readouterr().out
    assert main([*arguments, "--mesh.fsdp=4"]) == 0
    assert capsys.readouterr().out == expected
    assert main([*arguments, "--config.mesh.fsdp=4"]) == 0
    assert capsys.readouterr().out == expected
    assert meshes == 2 * [{"slices": 0, "data": -1, "fsdp": 4, "tensor": 1}]
    assert main([*arguments, "--mesh.tensr=4"]) == 2
    assert "'mesh.tensr'; did you mean 'mesh.tensor'?" in capsys.readouterr().err


def test_an_empty_answer_is_told(frozen, capsys, monkeypatch):
    nothing = [(0, [Completion([], "", "stop")])]
    monkeypatch.setattr("calm_jax.decoding.Generator.as_completed", lambda *_: iter(nothing))
    assert main(["generate", f"--workdir={frozen}", "--prompt=one"]) == 0
    assert capsys.readouterr() == ("one\n", "the answer to 'one' is empty\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts_file=/dev/null"], "/dev/null: the file has no prompts"),
        (["--prompts_file=/nowhere/prompts"], "/nowhere/prompts: No such file"),
        (["--prompt=a\udcff"], r"argument '--prompt=a\udcff' is not UTF-8 text"),
        (["--prompt=a", "--step=3"], "so there is no step 3"),
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens is 0"),
    ],
)
def test_generate_names_what_is_wrong(frozen, arguments, message, capsys):
    assert main(["generate", f"--workdir={frozen}", *arguments]) == 2
    assert message in capsys.readouterr().err
