"""What is no checkpoint although it looks like one: each is named in one line."""

import pathlib

import pytest

import calm_jax
from calm_jax.errors import CalmError

POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs_in_a_folder(name, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CalmError, match=rf"/{name} is a Git LFS pointer, .* git lfs pull$"):
        calm_jax.convert(tmp_path, tmp_path / "model")


@pytest.mark.parametrize("name", ["palm.pt", "palm.bin", "palm.npz", "palm.safetensors"])
def test_pointers_of_git_lfs_alone(name, tmp_path):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CalmError, match=rf"/{name} is a Git LFS pointer, .* git lfs pull$"):
        calm_jax.convert(tmp_path / name, tmp_path / "model")


def test_a_tokenizer_that_is_a_pointer(tmp_path):
    golden = pathlib.Path(__file__).parents[1] / "convert/golden/llama"
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((golden / file).read_bytes())
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(CalmError, match=r"tokenizer.json is a Git LFS pointer"):
        calm_jax.convert(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CalmError, match=r"is an adapter, not a model; .* --adapter$"):
        calm_jax.convert(tmp_path, tmp_path / "model")


def test_the_name_of_a_model_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = r"org/m-1.5 is not a checkpoint: it does not exist; .* hf download org/m-1.5 "
    with pytest.raises(CalmError, match=message):
        calm_jax.convert("org/m-1.5", "model")
