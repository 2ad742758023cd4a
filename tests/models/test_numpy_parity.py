"""Decoders and composed models give the logits of a plain numpy CALM."""

import jax
import numpy as np
import numpy_calm
import pytest
from random_models import (
    as_inputs,
    assert_close,
    connection_parameters,
    gemma,
    llama,
    packed_batch,
    palm,
    random_composed,
    random_decoder,
)

from calm_jax.models import CompositionConfig, RopeScaling
from calm_jax.models.parameters import module_tree

DECODERS = {
    "palm": palm(),
    "llama": llama(),
    "gemma": gemma(),
    "gemma 2": gemma(
        num_layers=4, num_kv_heads=2, window=3, window_pattern=(True, False), post_norms=True,
        attention_logit_cap=2.0, final_logit_cap=3.0, query_scale=24**-0.5,
    ),
    "gemma 3": gemma(
        num_layers=4, num_kv_heads=1, qk_norm="rms", post_norms=True, window=2,
        window_pattern=(True, True, False), local_rope_base=30.0, rope_base=1000.0,
        rope_scaling=RopeScaling("linear", factor=8.0),
    ),
    "llama 3.1": llama(
        head_dim=16, rope_base=500.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, original_length=64),
    ),
    "mistral": llama(window=4),
    "qwen 2": llama(attention_bias=True, rope_base=1e6),
    "palm-rlhf": palm(
        norm="layer", norm_eps=1e-5, qk_norm="l2", xpos_scale_base=4.0, logit_scale=1.0,
    ),
    "gpt-j": palm(
        num_kv_heads=4, norm="layer", norm_bias=True, norm_offset=0.0, gated_mlp=False,
        activation="gelu_tanh", mlp_bias=True, rope="interleaved", rope_dim=4, tied_head=False,
        head_bias=True,
    ),
    "falcon": palm(
        norm="layer", norm_bias=True, norm_offset=0.0, gated_mlp=False, activation="gelu",
    ),
    "cohere": palm(
        num_kv_heads=2, norm="layer", norm_offset=0.0, rope="interleaved", logit_scale=0.0625,
    ),
    "all biases, no positions": llama(
        attention_bias=True, output_bias=True, mlp_bias=True, norm_bias=True, rope=None,
        embed_scale=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", DECODERS)
def test_decoder(family):
    config = DECODERS[family]
    model = random_decoder(config)
    batch = packed_batch()[:3]
    expected = numpy_calm.decoder_logits(config, jax.device_get(module_tree(model)), *batch)
    found = model(as_inputs(*batch))
    assert found.dtype == np.float32
    assert_close(found, expected)


def test_inputs_left_out_are_one_segment_without_padding():
    model = random_decoder(palm())
    tokens = packed_batch()[0]
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    expected = numpy_calm.decoder_logits(
        model.config, jax.device_get(module_tree(model)), tokens, positions, np.ones_like(tokens)
    )
    assert_close(model(tokens), expected)


every_2 = CompositionConfig(every=2)
COMPOSED = {
    "palm and palm, evenly spaced with a tail": (
        palm(num_layers=8), (palm(num_layers=6, embed_dim=12, head_dim=4),), (every_2,),
    ),
    "llama and llama, the paper's bridge": (
        llama(num_layers=4), (llama(num_layers=4, embed_dim=8),),
        (CompositionConfig.paper(every=1),),
    ),
    "palm anchor, gemma augment, every option": (
        palm(num_layers=3), (gemma(num_layers=7, window=3, window_pattern=(True, False)),),
        (CompositionConfig(bias=True, gate=True, rotary=True, num_heads=2),),
    ),
    "llama anchor, palm augment, many into one layer": (
        llama(num_layers=4), (palm(num_layers=5),),
        (CompositionConfig(
            connections=((0, 2), (3, 2), (1, 2), (1, 0), (3, 3)), output_projection=False, bias=True
        ),),
    ),
    "only the prompt is read, the paper's bridge without W_O": (
        palm(num_layers=3), (llama(num_layers=3),),
        (CompositionConfig.paper(every=1, encoder_only=True, output_projection=False),),
    ),
    "two augments, bridges of different forms": (
        llama(num_layers=5), (palm(embed_dim=8), gemma(num_layers=4)),
        (
            CompositionConfig(
                connections=((2, 1), (0, 4)), encoder_only=True, rotary=True, bias=True
            ),
            CompositionConfig(connections=((3, 1), (1, 2)), num_heads=3, head_dim=6, gate=True),
        ),
    ),
    "two augments, evenly spaced": (
        palm(num_layers=7), (palm(), llama(num_layers=6, embed_dim=8)),
        (CompositionConfig.paper(every=1), CompositionConfig(every=2, rotary=True)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=COMPOSED)
def composed_case(request):
    anchor, augments, configs = COMPOSED[request.param]
    composed = random_composed(anchor, augments, configs)
    expected = numpy_calm.composed_logits(
        (anchor, jax.device_get(module_tree(composed.anchor))),
        [
            (augment.config, jax.device_get(module_tree(augment)))
            for augment in composed.augments
        ],
        connection_parameters(composed),
        configs,
        *packed_batch(),
    )  # fmt: skip
    return composed, *expected


def test_composed_logits_and_norms(composed_case):
    composed, logits, seen = composed_case
    batch = packed_batch()

    @jax.jit
    def run(batch):
        x_BTD, norms = composed.perturbed(as_inputs(*batch), None)
        return composed.logits(x_BTD), norms

    found, norms = run(batch)
    assert found.dtype == np.float32
    assert_close(found, logits)
    real_BT = batch[2] != 0
    assert len(norms) == len(composed.connections) == len(seen)
    for c, pair in zip(composed.connections, norms, strict=True):
        values = seen[c.augment, c.layer, c.anchor_layer]
        assert_close(pair, [np.sum(values[key][real_BT] ** 2) for key in ("y", "h")])


@pytest.mark.parametrize(
    "composed_case",
    [name for name in COMPOSED if "tail" in name or "many" in name or "different" in name],
    indirect=True,
)
def test_attention_maps(composed_case):
    composed, _, seen = composed_case
    maps = composed.attention_maps(as_inputs(*packed_batch()))
    assert {(m["augment"], m["from"], m["to"]) for m in maps} == seen.keys()
    for m in maps:
        assert m["weights"].dtype == np.float32
        assert_close(m["weights"], seen[m["augment"], m["from"], m["to"]]["weights"])
