"""Forms of published models, against their published config.json and sizes."""

import pytest
from flax import nnx

from calm_jax import Decoder
from calm_jax.checkpoints.convert.gemma import Gemma2
from calm_jax.checkpoints.frozen import load
from calm_jax.errors import CalmError
from calm_jax.models.parameters import Structure, count
from calm_jax.models.published import FORMS, form


def parameters(name):
    structure = Structure(nnx.eval_shape(lambda: Decoder(FORMS[name], nnx.Rngs(0))))
    return count(structure.abstract())


@pytest.mark.parametrize(
    "name, total",
    [
        ("gemma2_2b", 2_614_341_888),
        ("gemma2_9b", 9_241_705_984),
        ("gemma2_27b", 27_227_128_320),
        # Those of the paper, and the scale of a last norm, which PaLM's has not.
        ("palm_8b", 8_632_532_992 + 4096),
        ("palm_62b", 62_496_702_464 + 8192),
        ("palm_540b", 540_358_815_744 + 18_432),
    ],
)
def test_parameters(name, total):
    assert parameters(name) == total


@pytest.mark.parametrize(
    "name, width, mlp, layers, heads, kv_heads, head_dim, scale",
    [
        ("gemma2_2b", 2304, 9216, 26, 8, 4, 256, 256),
        ("gemma2_9b", 3584, 14_336, 42, 16, 8, 256, 256),
        ("gemma2_27b", 4608, 36_864, 46, 32, 16, 128, 144),
    ],
)
def test_gemma_is_what_its_config_says(name, width, mlp, layers, heads, kv_heads, head_dim, scale):
    published = {
        "vocab_size": 256_000,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scale,
        "sliding_window": 4096,
    }
    expected = Gemma2().decoder_config(published, name).to_dict() | {"dtype": "bfloat16"}
    assert form(f"form:{name}").to_dict() == expected


def test_an_unknown_form_is_refused():
    with pytest.raises(CalmError, match="'form:gemma_9b' is no known form; did you mean 'form:gem"):
        form("form:gemma_9b")


def test_a_form_has_no_weights_to_load():
    with pytest.raises(CalmError, match="form:gemma2_9b is a form without weights"):
        load("form:gemma2_9b")
