"""Which backend is chosen for which devices and models, and why another is refused."""

import types

import jax
import jax.numpy as jnp
import pytest
from random_models import gemma, llama

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, Inputs
from calm_jax.models.attention_choice import Need, choose, chosen

CPU = jax.devices()[0]
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H200 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
A100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
T4 = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
AMD = types.SimpleNamespace(platform="gpu", device_kind="AMD MI300", compute_capability="gfx942")

PLAIN = Need.of_decoder("the anchor", llama(dtype="bfloat16", head_dim=128))
WIDE = Need.of_decoder("the anchor", llama(dtype="bfloat16", head_dim=256))
CAPPED = Need.of_decoder("the anchor", gemma(dtype="bfloat16", attention_logit_cap=50.0))
FLOAT32 = Need.of_decoder("augment 0", llama())
ODD = Need.of_decoder("augment 0", llama(dtype="bfloat16", head_dim=12))
BRIDGE = Need.of_bridge(CompositionConfig(), llama(dtype="bfloat16", embed_dim=32))
PROMPT = Need.of_bridge(CompositionConfig(encoder_only=True), llama(dtype="bfloat16", embed_dim=32))


@pytest.mark.parametrize(
    ("device", "need", "length", "packed", "expected"),
    [
        (CPU, PLAIN, 512, True, "xla"),
        (CPU, PLAIN, 2048, True, "chunked"),
        (TPU, PLAIN, 2048, True, "splash"),
        (TPU, CAPPED, 128, True, "splash"),
        (TPU, PROMPT, 128, True, "splash"),
        (TPU, PLAIN, 200, False, "chunked"),
        (H200, PLAIN, 2048, False, "cudnn"),
        (H200, WIDE, 2048, False, "cudnn"),
        (H200, BRIDGE, 100, False, "cudnn"),
        (A100, PLAIN, 2048, False, "cudnn"),
        (A100, WIDE, 2048, False, "chunked"),
        (H200, PLAIN, 2048, True, "chunked"),
        (H200, PLAIN, 512, True, "xla"),
        (H200, CAPPED, 2048, False, "chunked"),
        (H200, FLOAT32, 2048, False, "chunked"),
        (H200, ODD, 2048, False, "chunked"),
        (H200, PROMPT, 2048, False, "chunked"),
        (T4, PLAIN, 2048, False, "chunked"),
        (AMD, PLAIN, 2048, False, "chunked"),
    ],
)
def test_auto(device, need, length, packed, expected):
    assert choose("auto", device, need, length=length, packed=packed) == expected
    assert choose(expected, device, need, length=length, packed=packed) == expected


@pytest.mark.parametrize(
    ("requested", "device", "need", "length", "packed", "message"),
    [
        ("flash", CPU, PLAIN, 128, True, "attention is 'flash'; known are ('auto', 'xla',"),
        ("splash", CPU, PLAIN, 128, True, "'splash' needs a TPU, the devices are cpu"),
        ("splash", TPU, PLAIN, 100, True, "'splash' needs a length divisible by 128, not 100"),
        ("cudnn", CPU, PLAIN, 128, False, "'cudnn' needs an NVIDIA GPU, the devices are cpu"),
        ("cudnn", AMD, PLAIN, 128, False, "'cudnn' needs an NVIDIA GPU, the devices are gpu"),
        ("cudnn", T4, PLAIN, 128, False, "needs compute capability 8.0, the devices have 7.5"),
        ("cudnn", H200, CAPPED, 128, False, "'cudnn' has no soft cap, the anchor has 50.0"),
        ("cudnn", H200, PLAIN, 128, True, "does not support packed rows, but data.pack is True"),
        ("cudnn", H200, PROMPT, 128, False, "cannot hide keys, as composition.encoder_only req"),
        ("cudnn", H200, FLOAT32, 128, False, "in bfloat16, augment 0 has dtype float32"),
        ("cudnn", H200, ODD, 128, False, "at most 256; augment 0 has 12"),
        ("cudnn", A100, WIDE, 128, False, "at most 128; the anchor has 256"),
    ],
)
def test_an_impossible_choice_says_why(requested, device, need, length, packed, message):
    with pytest.raises(CalmError) as error:
        choose(requested, device, need, length=length, packed=packed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


LOCAL = Need.of_decoder(
    "the anchor", gemma(dtype="bfloat16", window=4, window_pattern=(True, False))
)
WIDE_LATENT = Need.of_bridge(CompositionConfig(), llama(dtype="bfloat16", embed_dim=32), 2048)
QUERY = Inputs(jnp.ones((2, 1), jnp.int32), packed=False).filled(jnp.array([4, 6]))
KEYS = Inputs(segments_BT=jnp.ones((2, 9), jnp.int32))


@pytest.mark.parametrize(
    ("device", "need", "query", "expected"),
    [
        (H200, PLAIN, QUERY, "cudnn"),
        (H200, BRIDGE, QUERY, "cudnn"),
        (H200, LOCAL, QUERY, "xla"),
        (H200, WIDE_LATENT, QUERY, "xla"),
        (H200, PROMPT, QUERY, "xla"),
        (H200, FLOAT32, QUERY, "xla"),
        (H200, PLAIN, QUERY.replace(packed=True), "xla"),
        (T4, PLAIN, QUERY, "xla"),
        (TPU, PLAIN, QUERY, "xla"),
        (CPU, PLAIN, QUERY, "xla"),
    ],
)
def test_auto_of_one_query_to_a_cache(device, need, query, expected, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda **_: [device])
    assert chosen("auto", need, query, KEYS) == expected
