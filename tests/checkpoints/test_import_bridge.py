"""Bridges for PyTorch, written and read back without PyTorch."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from flax import nnx

import calm_jax
from calm_jax.__main__ import main
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCAB, (2, 7)).astype(np.int32)
PLACES = {"anchor": "someone/anchor", "augments": ["someone/augment", "someone/other"]}
CONFIGS = [
    CompositionConfig(every=1, bias=True, rotary=True),  # in a loop: stacked arrays
    CompositionConfig(every=1, num_heads=2, head_dim=6, gate=True),
]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    root = tmp_path_factory.mktemp("frozen")
    for seed, width in enumerate((32, 16, 24)):
        calm_jax.save_frozen(tiny_models.decoder(seed, embed_dim=width), root / str(seed))
    return [root / "0", [root / "1", root / "2"]]


@pytest.fixture(scope="module")
def composed(frozen):
    anchor, *augments = map(calm_jax.load, (frozen[0], *frozen[1]))
    return tiny_models.randomised(calm_jax.compose(anchor, augments, CONFIGS, rngs=nnx.Rngs(0)))


@pytest.fixture
def exported(composed, tmp_path):
    folder = tmp_path / "pytorch"
    calm_jax.export_bridge(composed, folder, to="huggingface", **PLACES)
    return folder


def changed(folder, **tensors):
    path = folder / "model.safetensors"
    held = safetensors.numpy.load_file(path) | tensors
    safetensors.numpy.save_file({name: x for name, x in held.items() if x is not None}, path)


def test_back_again(composed, exported, frozen, tmp_path, capsys):
    flags = [f"--anchor={frozen[0]}", "--augments=" + ",".join(map(str, frozen[1]))]
    arguments = [f"--source={exported}", f"--target={tmp_path / 'back'}", *flags]
    assert main(["convert", *arguments]) == 0
    again = calm_jax.load_composed(tmp_path / "back")
    np.testing.assert_array_equal(again(TOKENS), composed(TOKENS))
    assert main(["convert", *arguments[:3]]) == 2
    assert "--augments is missing" in capsys.readouterr().err


NO_PLACES = ["a file", "/nowhere/model", "a/b/c", "./x", "~/x", "file.gguf"]


@pytest.mark.parametrize("place", NO_PLACES)
@pytest.mark.parametrize("key", PLACES)
def test_a_mistyped_path_is_no_name_on_the_hub(key, place, composed, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "file.gguf").touch()
    monkeypatch.chdir(tmp_path)
    places = PLACES | {key: place if key == "anchor" else [place, "someone/other"]}
    role = key.replace("augments", "augment 0")
    with pytest.raises(CalmError, match=f"the {role} '{place}' is neither a folder of Hugging Fac"):
        calm_jax.export_bridge(composed, "new", to="huggingface", **places)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.gguf", "models"]


def test_a_folder_that_is_not_in_its_owner_s_folder(composed, tmp_path, monkeypatch):
    """It may be mistyped, or a name on the hub."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalmError, match="models is a folder here and has no typo; if the hub is"):
        calm_jax.export_bridge(composed, "new", to="huggingface", anchor="models/typo")
    assert not (tmp_path / "new").exists()


def test_names_on_the_hub(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"anchor": "gpt2", "augments": ["Qwen/Qwen2.5-0.5B_x", "models/there-0"]}
    calm_jax.export_bridge(composed, "new", to="huggingface", **names)
    values = json.loads((tmp_path / "new/config.json").read_text())
    assert {key: values[key] for key in names} == names


def test_a_tensor_is_the_matrix_of_its_connection(composed, exported):
    """Written out for one connection of each kind: in which order axes are, and which is which."""
    held = safetensors.numpy.load_file(exported / "model.safetensors")
    assert [(c.augment, c.layer, c.anchor_layer) for c in composed.connections[2:4]] == [
        (0, 1, 1),
        (1, 1, 1),
    ]
    values = json.loads((exported / "config.json").read_text())
    assert values["connections"][2:4] == [[0, 1, 1], [1, 1, 1]]
    stacked, other = composed.bridge.rounds[0]
    query_DNH, output_NHD = stacked.query[...][1], other.output[...][1]
    np.testing.assert_array_equal(
        held["bridge.2.query.weight"], np.asarray(query_DNH).reshape(32, -1).T
    )
    np.testing.assert_array_equal(
        held["bridge.3.output.weight"], np.asarray(output_NHD).reshape(-1, 32).T
    )
    assert held["bridge.3.gate"].shape == ()


BAD = {
    "missing": ({"bridge.0.key.weight": None}, "tensor bridge.0.key.weight is missing"),
    "unknown": ({"bridge.9.key.weight": np.ones(3)}, "tensor bridge.9.key.weight is not one of"),
    "shape": ({"bridge.3.gate": np.ones(2)}, r"tensor bridge.3.gate has shape \(2,\), not \(\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_damaged_tensors(bad, exported, frozen, tmp_path):
    tensors, message = BAD[bad]
    changed(exported, **tensors)
    with pytest.raises(CalmError, match=message):
        calm_jax.import_bridge(exported, tmp_path / "new", anchor=frozen[0], augments=frozen[1])
    assert not (tmp_path / "new").exists()


def test_models_of_another_training(exported, frozen, tmp_path):
    def refused(message, source=exported, anchor=frozen[0], augments=frozen[1]):
        with pytest.raises(CalmError, match=message):
            calm_jax.import_bridge(source, tmp_path / "new", anchor=anchor, augments=augments)

    refused("has a bridge to 2 augments, not 1", augments=frozen[1][:1])
    refused("was trained with the augment 0", augments=frozen[1][::-1])
    with pytest.raises(CalmError, match="is a bridge for PyTorch; calm convert makes an exported"):
        calm_jax.load_composed(exported)
    (exported / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused("is a Hugging Face folder, not a bridge for PyTorch", source=exported)


FOREIGN = {
    "google-deepmind/calm": "cross_attention_hooks.0.cross_attention.in_proj_weight",
    "CALM-pytorch": "0.0.context_proj.weight",
}


@pytest.mark.parametrize("program", FOREIGN)
def test_bridges_of_other_programs_are_refused_by_name(program, frozen, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({FOREIGN[program]: np.ones(3, np.float32)}, path)
    with pytest.raises(CalmError, match=f"is a bridge of .*{program}: its tokens attend to all"):
        calm_jax.convert(path, tmp_path / "new")
    with pytest.raises(CalmError, match=f"is a bridge of .*{program}: its tokens attend to all"):
        calm_jax.import_bridge(path, tmp_path / "new", anchor=frozen[0], augments=frozen[1])
