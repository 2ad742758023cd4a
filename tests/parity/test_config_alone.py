"""config.json as a config's own `save_pretrained` writes it: without architectures."""

import json
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra [parity]")

from calm_jax.checkpoints.convert.registry import find_family  # noqa: E402
from calm_jax.checkpoints.sources.opening import open_source  # noqa: E402
from tests.converting import decoder_in_memory  # noqa: E402
from tests.parity.make_golden import GOLDEN, MODELS  # noqa: E402
from tests.parity.random_huggingface import logits_of  # noqa: E402


@pytest.mark.parametrize("name", MODELS)
def test_model_type_decides(name, tmp_path):
    transformers.AutoConfig.from_pretrained(GOLDEN / name).save_pretrained(tmp_path)
    path = pathlib.Path(tmp_path, "config.json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "architectures"}))
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / name / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.load(GOLDEN / name / "logits.npz")["tokens"]
    expected = logits_of(model, tokens)
    source = open_source(tmp_path)
    found = np.asarray(decoder_in_memory(find_family(source), source)(tokens))
    assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))
