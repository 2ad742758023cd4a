"""LoRA adapters merged at conversion, against PEFT's own `merge_and_unload`."""

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra [parity]")
pytest.importorskip("peft", reason="needs the extra [parity]")

import calm_jax
from tests.parity.make_adapter_golden import ADAPTERS, GOLDEN, save_adapter


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_of_a_merged_model(name, tmp_path):
    tokens, logits = save_adapter(name, tmp_path / "adapter")
    base = GOLDEN / ADAPTERS[name][0]
    calm_jax.convert(base, tmp_path / "model", adapter=tmp_path / "adapter")
    found = np.asarray(calm_jax.load(tmp_path / "model")(tokens))
    assert np.max(np.abs(found - logits)) <= 1e-5 * np.max(np.abs(logits))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about itself
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), ("bfloat16", 0.1)])
def test_a_conversion_is_verified_with_its_adapter(dtype, tolerance, tmp_path):
    save_adapter("llama", tmp_path / "adapter")
    calm_jax.convert(
        GOLDEN / "llama",
        tmp_path / "model",
        adapter=tmp_path / "adapter",
        dtype=dtype,
        verify=True,
    )
    told = json.loads((tmp_path / "model/verification.json").read_text())
    assert told["compared_with"]["difference"] <= tolerance
