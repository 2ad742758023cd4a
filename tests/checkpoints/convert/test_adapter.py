"""LoRA adapters merged at conversion: PEFT's own outputs, and what is no plain LoRA adapter."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch_files
from safetensors.numpy import load_file, save_file

import calm_jax
from calm_jax.__main__ import main
from calm_jax.checkpoints.convert.adapter import merged
from calm_jax.errors import CalmError

GOLDEN = pathlib.Path(__file__).parent / "golden"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def assert_golden(name, folder):
    """The logits are those of PEFT's merge_and_unload; see tests/parity/make_adapter_golden.py."""
    with np.load(GOLDEN / f"adapter_{name}" / "logits.npz") as golden:
        found = np.asarray(calm_jax.load(folder)(golden["tokens"]))
        assert np.max(np.abs(found - golden["logits"])) <= 1e-5 * np.max(np.abs(golden["logits"]))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_of_a_merged_model(name, tmp_path, capsys):
    """qwen2's has rsLoRA, and ranks and scales by pattern."""
    source, adapter = GOLDEN / name, GOLDEN / f"adapter_{name}"
    flags = [f"--source={source}", f"--adapter={adapter}", f"--target={tmp_path / 'model'}"]
    assert main(["convert", *flags]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert_golden(name, tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    """A copy of the adapter of the golden Llama, to be changed: of config and of tensors."""
    folder = tmp_path / "adapter"

    def make(config=None, tensors=None):
        shutil.copytree(GOLDEN / "adapter_llama", folder, dirs_exist_ok=True)
        path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        values = json.loads(path.read_text()) | (config or {})
        path.write_text(json.dumps(values))
        found = load_file(file) | (tensors or {})
        save_file({name: x for name, x in found.items() if x is not None}, file)
        return folder

    return make


def test_an_adapter_in_a_file_of_torch(adapter, tmp_path):
    folder = adapter()
    file = folder / "adapter_model.safetensors"
    torch_files.save_tensors(folder / "adapter_model.bin", load_file(file))
    file.unlink()
    calm_jax.convert(GOLDEN / "llama", tmp_path / "model", adapter=folder)
    assert_golden("llama", tmp_path / "model")


def test_the_merged_model_is_exported(adapter, tmp_path):
    calm_jax.convert(GOLDEN / "llama", tmp_path / "model", adapter=adapter())
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    calm_jax.convert(tmp_path / "exported", tmp_path / "again")
    assert_golden("llama", tmp_path / "again")


def test_a_matrix_is_merged_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("calm_jax.checkpoints.convert.adapter._BLOCK_ROWS", 3)
    random = np.random.default_rng(0)
    base, a, b = (random.normal(size=size).astype("f4") for size in ((7, 5), (2, 5), (7, 2)))
    matrix = merged(base, a, b, 0.5)
    expected = base + 0.5 * np.einsum("or,ri->oi", b, a)
    np.testing.assert_allclose(matrix[...], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(matrix[2:4, 1], matrix[...][2:4, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["experts.weight"]},
        {"alora_invocation_tokens": [1]},
        {"lora_bias": True},
        {"a_kind_of_tomorrow": {"strength": 2}},
        {"rank_pattern": ["q_proj"]},
        {"r": 0},
        {"lora_alpha": "ten"},
        {"use_rslora": "yes"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_plain_lora_adapter(change, adapter, tmp_path):
    ((key, value),) = change.items()
    message = f"{key} is {value!r}"
    with pytest.raises(CalmError, match=rf"adapter_config.json: {re.escape(message)}"):
        calm_jax.convert(GOLDEN / "llama", tmp_path / "model", adapter=adapter(change))
    assert not (tmp_path / "model").exists()


ZEROS = {
    rank: {
        f"{QUERY}.lora_A.weight": np.zeros((rank, 16), np.float32),
        f"{QUERY}.lora_B.weight": np.zeros((32, rank), np.float32),
    }
    for rank in (3, 4)
}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {f"{QUERY}.lora_B.weight": None}, r"module \S+q_proj has no lora_B"),
        ({}, dict.fromkeys(ZEROS[4]), "'q_proj', but no tensor adapts model.layers.1.self_attn.q_"),
        ({"target_modules": ["q_proj", "down_proj", "gate"]}, {}, "has 'gate', which no tensor ad"),
        ({}, ZEROS[3], r"lora_A \(3, 16\) and lora_B \(32, 3\), which with rank 4 do not fit \(32"),
        (
            {},
            {f"{QUERY}.lora_B.weight": np.zeros((31, 4), np.float32)},
            r"lora_B \(31, 4\), which with rank 4 do not fit \(32, 16\) in the base model",
        ),
        (
            {},
            {name.replace("q_proj", "qkv"): x for name, x in ZEROS[4].items()},
            "module model.layers.1.self_attn.qkv is not a matrix of the base model",
        ),
        (
            {},
            {name.replace("layers.1", "layers.3"): x for name, x in ZEROS[4].items()},
            "module model.layers.3.self_attn.q_proj is not a matrix of the base model",
        ),
        (
            {},
            {
                name.replace("self_attn.q_proj", "input_layernorm"): x
                for name, x in ZEROS[4].items()
            },
            r"module model.layers.1.input_layernorm has lora_A .* do not fit \(16,\)",
        ),
        (
            {},
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 64), "f4")},
            "embed_tokens.lora_embedding_A is not part of a plain LoRA adapter",
        ),
        (
            {},
            {"base_model.model.lm_head.base_layer.weight": np.zeros((64, 16), "f4")},
            "its copy of lm_head.weight differs from the base",
        ),
        ({}, {f"{QUERY}.lora_A.weight": np.zeros((4, 16), np.int8)}, "is int8, which is not supp"),
    ],
)
def test_what_does_not_fit(config, tensors, message, adapter, tmp_path):
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(GOLDEN / "llama", tmp_path / "model", adapter=adapter(config, tensors))
    assert not (tmp_path / "model").exists()


def test_folders_that_are_no_adapter(adapter, tmp_path):
    for folder, message in (
        (tmp_path / "nowhere", "nowhere is not an adapter of PEFT: it does not exist"),
        (GOLDEN / "llama", "llama is not an adapter of PEFT: adapter_config.json is missing"),
    ):
        with pytest.raises(CalmError, match=message):
            calm_jax.convert(GOLDEN / "llama", tmp_path / "model", adapter=folder)
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CalmError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        calm_jax.convert(GOLDEN / "llama", tmp_path / "model", adapter=folder)


def test_an_adapter_for_another_kind_of_checkpoint(adapter, tmp_path):
    names = ("token_embedder/embedding", "layers_0/q_wi_fused/kernel", "layers_0/kv_fused/kernel")
    shapes = ((8, 4), (4, 2, 6), (4, 1, 4))
    tree = {f"decoder/{name}": np.ones(x, "f4") for name, x in zip(names, shapes, strict=True)}
    tree |= {"decoder/layers_0/o_wo_fused/kernel": np.ones((2, 4, 4), "f4")}
    np.savez(tmp_path / "palm.npz", **tree)
    with pytest.raises(CalmError, match="adapts models of transformers, not of the family palm"):
        calm_jax.convert(tmp_path / "palm.npz", tmp_path / "model", adapter=adapter())


def test_an_adapter_beside_its_model_is_not_ignored(adapter, tmp_path):
    folder = adapter()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "llama" / file, folder / file)
    message = r"holds a model and an adapter; give --adapter=\S+ to merge it, or move adapter_c"
    with pytest.raises(CalmError, match=message):
        calm_jax.convert(folder, tmp_path / "model")
    calm_jax.convert(folder, tmp_path / "model", adapter=folder)
    assert_golden("llama", tmp_path / "model")
