"""`calm plan` as a whole: a real compilation, plans by formula, and bad input."""

import dataclasses
import importlib.util
import json

import pytest

from calm_jax import sharding
from calm_jax.__main__ import main
from calm_jax.chips import CHIPS
from calm_jax.cli.config import load_file, override
from calm_jax.planning import compiled_plan, formula, page, planner, program, topologies
from calm_jax.presets import PRESETS

CONFIG = """
from calm_jax.models import CompositionConfig, DecoderConfig
from calm_jax.presets import PRESETS
from calm_jax.training.configuration import composed_run

def get_config():
    PRESETS["small"] = DecoderConfig.llama(
        vocab_size=1024, embed_dim=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
        mlp_dim=512, dtype="bfloat16").to_dict()
    config = composed_run(CompositionConfig(every=2))
    config.name, config.anchor, config.augments = "small", "preset:small", ("preset:small",)
    config.data.train = ({"jsonl": "train.jsonl"},)
    config.data.length = 256
    config.mesh.fsdp = 2
    config.mesh.tensor = 2
    config.train.batch_size = 8
    return config
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    yield path
    PRESETS.pop("small", None)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU's compiler is not installed (pip install calm_jax[plan])",
)


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_step_compiled_for_a_slice(topology, config, tmp_path, capsys):
    command = ["plan", f"--config={config}", f"--topology={topology}", "--tokens=1e9"]
    assert main([*command, f"--output={tmp_path}", "--dollars_per_chip_hour=2"]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["mesh"] == {"slices": 1, "data": 1, "fsdp": 2, "tensor": 2}
    memory = found["memory"]
    trees = {tree["name"]: tree for tree in memory["trees"]}
    assert list(trees) == ["anchor", "augment 0", "bridge", "optimizer"]
    # Matrices are split four ways: bfloat16 frozen, float32 trained, twice that in Adam.
    for name, size in (("anchor", 2), ("augment 0", 2), ("bridge", 4), ("optimizer", 4)):
        quarter = trees[name]["parameters"] * size / 4
        assert quarter <= trees[name]["bytes"] < 1.02 * quarter
    held = sum(tree["bytes"] for tree in memory["trees"])
    assert held < memory["peak"] < 2**30
    assert memory["peak"] == memory["peak_of_step"] + memory["unused"]
    axes = {axis for row in found["collectives"] for axis in row["axes"]}
    assert axes == {"fsdp", "tensor"}
    # Weights are gathered: at least what a chip lacks of both models' layers, once.
    gathered = sum(row["bytes"] for row in found["collectives"] if row["kind"] == "all-gather")
    assert gathered > trees["anchor"]["bytes"]
    assert found["seconds"]["bound"] <= found["seconds"]["serial"]
    steps = -(-1_000_000_000 // (8 * 256))
    least, most = found["training"]["chip_hours"]
    assert found["training"]["steps"] == steps
    assert least == pytest.approx(4 * steps * found["seconds"]["bound"] / 3600)
    assert found["training"]["dollars"] == [2 * least, 2 * most]
    shown = capsys.readouterr().out
    assert shown in (tmp_path / "plan.md").read_text()
    assert "| anchor " in shown and "Training on 1 B tokens" in shown


@needs_compiler
def test_formulas_exchange_the_gradients_that_the_compiled_step_does(config):
    found = override(load_file(str(config)), ["--config.train.accumulate=2"])
    found.mesh = {"data": 4, "fsdp": 1, "tensor": 1}
    topology = topologies.find("v5e:2x2")
    guessed = formula.Formula(found, topology).plan(found, formula.mesh_of(found, topology))
    compiled = compiled_plan.make_plan(found, topology)
    links = guessed["seconds"]["links"]
    assert 0 < links == pytest.approx(compiled["seconds"]["links"], rel=0.02)


@needs_compiler
@pytest.mark.parametrize("name", ["v5e:4x8", "v5p:4x4x8", "v6e:2x4", "v5p:2x2x2*2"])
def test_every_mesh_fits_the_sides_of_a_slice(name):
    topology = topologies.find(name)
    devices = program.devices(topology)
    chips = topology.chips_per_slice
    for tensor in (1, 2, 4, 8):
        for fsdp in (1, 2, 4, 8, 16):
            if chips % (tensor * fsdp) == 0:
                mesh = sharding.make_mesh({"data": -1, "fsdp": fsdp, "tensor": tensor}, devices)
                assert len({device.id for device in mesh.devices.flat}) == topology.chips


def test_a_gpu_is_planned_by_formula(config, capsys):
    assert main(["plan", f"--config={config}", "--topology=h200:8", "--tokens=1e9"]) == 0
    shown = capsys.readouterr().out
    assert "preset:small + preset:small on h200:8" in shown and "by formula, not compiled" in shown
    assert "mesh data 2 × fsdp 2 × tensor 2" in shown
    assert "to rank ways of running: their times may be wrong by a factor of three" in shown


def test_presets_of_another_vocabulary_read_their_own_tokens_if_asked(config, tmp_path):
    command = ["plan", f"--config={config}", "--topology=h200:8", f"--output={tmp_path}"]
    load_file(str(config))  # makes "small" a preset
    PRESETS["other"] = PRESETS["small"] | {"vocab_size": 2048}
    try:
        for augment, length, own in (
            ("other", 320, 320),
            ("other", None, None),
            ("small", 320, None),
        ):
            flags = [f"--config.augments=('preset:{augment}',)"]
            flags += [f"--config.data.augment_length={length}"] if length else []
            assert main([*command, *flags]) == 0
            assert json.loads((tmp_path / "plan.json").read_text())["own_lengths"] == [own]
    finally:
        PRESETS.pop("other")


def test_integer_weights_are_told_in_bytes(config, tmp_path):
    """On a chip of eight: int8 with a float32 scale a channel, int4 with a float16 one for 32."""
    command = ["plan", f"--config={config}", "--topology=h200:8", f"--output={tmp_path}"]
    flops = []
    for kind, bits in (("bfloat16", 16), ("int8", 8), ("int4", 4.5)):
        assert main([*command, f"--config.anchor_dtype={kind}"]) == 0
        plan = json.loads((tmp_path / "plan.json").read_text())
        tree = {tree["name"]: tree for tree in plan["memory"]["trees"]}["anchor"]
        parameters = 1024 * 256 * 2 + 4 * (256 * 64 * 12 + 3 * 256 * 512)
        assert parameters * bits / 8 / 4 <= tree["bytes"] < 1.06 * parameters * bits / 8 / 4
        flops.append(plan["flops"])
    assert flops[0] == flops[1] == flops[2] > 0


def test_the_state_of_decoding_is_told(config, tmp_path, capsys):
    """A chip has 1 of 2 key heads of 64 features, 2 of f_cross' 4, and half of taps of 256."""
    command = ["plan", f"--config={config}", "--topology=h200:8", f"--output={tmp_path}"]
    assert main(command) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    trees = {tree["name"]: tree["bytes"] for tree in plan["memory"]["trees"]}
    free = plan["memory"]["available"] - sum(trees.values()) + trees["optimizer"]
    heads, taps = (2 * 64, 64 + 4), (2 * 128, 128 + 4)  # bfloat16, and int8 with its scales
    for found, head, tap in zip(plan["decoding"], heads, taps, strict=True):
        layers, latent = 4 * 2 * head, 2 * tap
        assert (found["anchor"], found["augments"]) == (layers, [layers])
        (cross,) = found["cross"]
        assert cross == {"kept": latent, "latent": True, "other": 2 * 2 * 2 * head}
        assert found["total"] == 2 * layers + latent
        assert found["rows"] == free // (256 * found["total"]) * 4
        assert found["tokens"] == 256 * found["rows"]
    assert "| rows of 256 tokens that fit all chips" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["train.remat=offload", "attention=cudnn"])
def test_a_plan_takes_what_training_on_such_a_gpu_does(config, setting):
    arguments = [f"--config.{setting}", "--config.data.pack=False"]
    assert main(["plan", f"--config={config}", "--topology=h200:8", *arguments]) == 0


def test_a_step_that_does_not_fit_is_told_with_what_to_change(config, capsys, monkeypatch):
    small = dataclasses.replace(CHIPS["h200"], hbm_bytes=8_000_000)
    monkeypatch.setitem(CHIPS, "h200", small)
    assert main(["plan", f"--config={config}", "--topology=h200:8"]) == 1
    shown = capsys.readouterr().out
    assert "**It does not fit.**" in shown
    assert "The fastest way that fits, by formula: --config.mesh.data=" in shown


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["--topology=v5e:64x64"],
            "--topology=v5e:64x64: there is no such slice; there are v5e:1x1",
        ),
        ([], "--topology is missing"),
        (
            ["--topology=h200:8", "--dollars_per_chip_hour=2"],
            "--dollars_per_chip_hour needs --tokens",
        ),
        (["--topology=h200:8", "--config.anchor=preset:tiny"], "did you mean 'preset:"),
        (["--topology=h200:8", "--config.anchor=nowhere"], "is not a frozen folder"),
        (["--topology=h200:8", "--config.mesh.fsdp=3"], "the 8 devices are not divisible by 6"),
        (["--topology=h200:8", "--config.train.batch_size=6"], "train.batch_size 6 is not divis"),
        (["--topology=h200:8", "--config.mesh.tensor=8", "--config.mesh.fsdp=1"], "heads of size"),
        (["--topology=h200:8", "--config.mesh.slices=2"], "mesh.slices is 2, but the devices form"),
        (["--topology=h200:8", "--config.attention=splash"], "needs a TPU, the devices are gpu"),
        (["--topology=h200:8", "--config.attention=cudnn"], "does not support packed rows, but d"),
        (["--topology=v5e:2x2", "--config.attention=cudnn", "--search"], "the devices are tpu"),
        (["--topology=v5e:2x2*x"], "'x' is not a number of slices"),
        (["--topology=h200:8", "--serach"], "did you mean --search?"),
    ],
)
def test_bad_input_is_one_line(config, capsys, arguments, said):
    assert main(["plan", f"--config={config}", *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


@pytest.mark.parametrize("output", ["/proc/nowhere/plan", "file", "file/below"])
def test_an_output_that_cannot_be_written_is_told_first(
    output, config, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(planner, "_plan", lambda *_: pytest.fail("planned all the same"))
    folder = tmp_path / output
    assert main(["plan", f"--config={config}", "--topology=h200:8", f"--output={folder}"]) == 2
    shown = capsys.readouterr().err
    assert f"cannot write {folder}: " in shown and shown.count("\n") == 1


def test_a_missing_compiler_is_told(config, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        program.importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name)
    )
    assert main(["plan", f"--config={config}", "--topology=v5e:2x2"]) == 2
    assert "pip install calm_jax[plan]" in capsys.readouterr().err


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out.replace(",", " ").split()
    assert {"llama3.1_8b", "qwen3_4b", "mistral_7b_v0.3", "gemma3_4b", *PRESETS} <= set(shown)


def test_training_does_not_take_a_preset(config, tmp_path, capsys):
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    meshes = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    assert main(["train", *arguments, *meshes]) == 2
    assert "preset:small is a preset: sizes without weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_of_a_page():
    shown = page.table(("what", "GiB"), [("anchor", "1.00"), ("a", "10.00")])
    assert shown.splitlines() == [
        "| what   |   GiB |",
        "| ------ | ----: |",
        "| anchor |  1.00 |",
        "| a      | 10.00 |",
    ]


def test_cost_of_tokens_counts_whole_steps():
    made = {
        "batch_size": 8,
        "length": 100,
        "chips": 4,
        "seconds": {"bound": 1.0, "serial": 3.0},
    }
    cost = compiled_plan.training_cost(made, 801, 1.5)
    assert cost["steps"] == 2
    assert cost["hours"] == [2 / 3600, 6 / 3600]
    assert cost["dollars"] == pytest.approx([1.5 * 8 / 3600, 1.5 * 24 / 3600])
