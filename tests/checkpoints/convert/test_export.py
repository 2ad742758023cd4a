"""Export goes by what a model computes, not by how the fields of its config say it."""

import json

import numpy as np
import pytest
from flax import nnx
from random_models import decoder_structure, gemma, llama, palm, random_decoder, random_tree

import calm_jax
from calm_jax.checkpoints.huggingface.bridge import base_models
from calm_jax.models import CompositionConfig, RopeScaling

_BIASED = {"norm": "layer", "norm_bias": True, "mlp_bias": True, "head_bias": True}
_UNGATED = {"block": "parallel", "gated_mlp": False, "norm": "layer", "norm_bias": True}
# For each family, a model whose fields say something in another form than reading the family does.
OTHER_FORMS = {
    "llama": llama(query_scale=8**-0.5, rope_dim=8, local_rope_base=9.0),
    "llama without a window": llama(window=3, window_pattern=(False,)),
    "llama, scaled by 2": llama(rope_scaling=RopeScaling("linear", 2.0, original_length=3)),
    "mistral": llama(window=3, window_pattern=(True, True)),
    "qwen2": llama(attention_bias=True, window=3, window_pattern=(False, True, True, False)),
    "gemma": gemma(query_scale=8**-0.5),
    "gemma3": gemma(
        post_norms=True, qk_norm="rms", window=3, window_pattern=(True, False) * 2,
        local_rope_base=10_000.0,
    ),
    "gptj": palm(
        **_UNGATED | _BIASED, norm_offset=0.0, norm_eps=1e-5, num_kv_heads=4, embed_dim=32,
        rope="interleaved", logit_scale=1.0, activation="gelu_tanh", tied_head=False,
        rope_scaling=RopeScaling("linear", 1.0),
    ),
    "falcon": palm(
        **_UNGATED, norm_offset=0.0, embed_dim=32, rope_dim=8, logit_scale=1.0, activation="gelu"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_what_a_field_means_counts_not_how_it_says_it(name, tmp_path):
    decoder = random_decoder(OTHER_FORMS[name])
    calm_jax.save_frozen(decoder, tmp_path / "model")
    calm_jax.export(tmp_path / "model", tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model_type"].startswith(name.partition(",")[0].partition(" ")[0])
    calm_jax.convert(tmp_path / "exported", tmp_path / "again")
    again = calm_jax.load(tmp_path / "again")
    tokens_BT = np.random.default_rng(0).integers(0, 24, (2, 9)).astype(np.int32)
    np.testing.assert_array_equal(again(tokens_BT), decoder(tokens_BT))
    # A bridge may name the folder as its anchor's.
    composed = calm_jax.compose(decoder, decoder, CompositionConfig(every=1), rngs=nnx.Rngs(0))
    folder = str(tmp_path / "exported")
    assert base_models(composed, folder, [folder]) == [folder, folder]


@pytest.mark.parametrize(
    "fields",
    [
        {"query_scale": 0.3},
        {"rope_dim": 4},
        {"window": 3, "window_pattern": (False, False, True)},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_base": 9.0},
    ],
)
def test_what_computes_something_else_is_another_model(fields):
    """Each changes the logits, so each is more than another form."""
    random = random_tree(decoder_structure(llama()), 0)
    plain, other = (
        decoder_structure(config).merge(random) for config in (llama(), llama(**fields))
    )
    tokens_BT = np.random.default_rng(0).integers(0, 24, (1, 9)).astype(np.int32)
    assert np.abs(plain(tokens_BT) - other(tokens_BT)).max() > 1e-3
    assert plain.config.as_computed() != other.config.as_computed()
