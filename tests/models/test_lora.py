"""Low-rank updates: what they compute, what is trained, and how they are merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import as_inputs, assert_close, gemma, llama, packed_batch, palm, random_decoder

from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, compose
from calm_jax.models.lora import LoRAConfig, LoRAParam, add_lora, lora_in, merge_lora
from calm_jax.models.parameters import module_tree, path_name
from calm_jax.models.parts import Parts
from calm_jax.models.quantized import quantize_module

DECODERS = {"palm": palm(), "llama": llama(attention_bias=True), "gemma": gemma(post_norms=True)}


def updated(config, lora=None):
    """A decoder whose update is not zero."""
    decoder = random_decoder(config)
    add_lora(decoder, lora or LoRAConfig(rank=3, alpha=6.0), nnx.Rngs(1))
    random = np.random.default_rng(2)
    for path, variable in nnx.to_flat_state(nnx.state(decoder, LoRAParam)):
        variable.set_value(jnp.asarray(random.normal(size=variable.get_value().shape), jnp.float32))
        nnx.update(decoder, nnx.from_flat_state([(path, variable)]))
    return decoder


def paths(tree):
    return {path_name(path): x for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("name", DECODERS)
def test_an_update_computes_what_its_product_would(name):
    """Each matrix plus alpha / rank · A B, by numpy, in a decoder that knows no update."""
    inputs, decoder, plain = as_inputs(*packed_batch()[:3]), *map(updated, [DECODERS[name]] * 2)
    arrays = paths(module_tree(decoder))
    for path, a in arrays.items():
        if path.endswith("_lora_a"):
            b, matrix = arrays[path[:-1] + "b"], path.removesuffix("_lora_a")
            layers = [2.0 * np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)]
            assert np.shape(layers) == arrays[matrix].shape
            module, attribute = plain.layers, matrix.split("/")[1:]
            for part in attribute[:-1]:
                module = getattr(module, part)
            param = getattr(module, attribute[-1])
            param.set_value(param.get_value() + np.stack(layers).astype(np.float32))
            delattr(module, attribute[-1] + "_lora_a")
            delattr(module, attribute[-1] + "_lora_b")
    assert lora_in(plain) is None
    decoder.vocabulary, decoder.source = "words", "models/anchor"
    decoder.fingerprint, decoder.loaded_dtype = "abc", "bfloat16"
    found = decoder(inputs)
    assert_close(found, plain(inputs))
    merge_lora(decoder)
    assert_close(decoder(inputs), found)
    # It is not what it was loaded from any more.
    assert decoder.vocabulary == "words"
    assert decoder.source is decoder.fingerprint is decoder.loaded_dtype is None
    plain.fingerprint = "abc"
    merge_lora(plain)
    assert plain.fingerprint == "abc"
    assert paths(module_tree(decoder)).keys() == paths(module_tree(plain)).keys()


def test_a_fresh_update_changes_nothing():
    decoder, tokens = random_decoder(llama()), np.ones((1, 4), np.int32)
    before = np.asarray(decoder(tokens))
    add_lora(decoder, LoRAConfig(rank=2, targets=("query", "down")), nnx.Rngs(0))
    np.testing.assert_array_equal(decoder(tokens), before)
    assert lora_in(decoder) == LoRAConfig(rank=2, targets=("down", "query"))
    shapes = {path: x.shape for path, x in paths(module_tree(decoder)).items() if "lora" in path}
    assert shapes == {
        "layers/attention/query_lora_a": (3, 16, 2),
        "layers/attention/query_lora_b": (3, 2, 4, 8),
        "layers/mlp/down_lora_a": (3, 20, 2),
        "layers/mlp/down_lora_b": (3, 2, 16),
    }


def test_what_is_trained():
    anchor = random_decoder(llama(num_layers=4))
    add_lora(anchor, LoRAConfig(rank=2), nnx.Rngs(0))
    pair = compose(anchor, random_decoder(palm()), CompositionConfig(every=3), rngs=nnx.Rngs(1))
    everything = paths(module_tree(pair))
    lora = {path for path in everything if "_lora_" in path}
    bridge = {path for path in everything if path.startswith("bridge/")}
    embeddings = {"anchor/embedding", "augments/0/embedding"}
    assert lora and bridge
    for trainable, wanted in (
        (None, lora | bridge),
        (["bridge"], bridge),
        (["lora"], lora),
        ([LoRAParam, nnx.PathContains("embedding")], lora | embeddings),
        (["all"], set(everything)),
    ):
        parts = Parts(pair, trainable)
        trained, frozen = parts.of(pair)
        assert paths(trained).keys() == wanted
        assert paths(frozen).keys() == everything.keys() - wanted
        assert paths(module_tree(parts.merge(trained, frozen))).keys() == everything.keys()
        named = parts.named(trained)
        assert set(named) == {"anchor", "augment 0", "bridge"}
        assert bool(named["bridge"]) == bool(bridge & wanted)
    with pytest.raises(CalmError, match=r"train\.trainable has 'lora', which the model does not"):
        Parts(random_decoder(palm()), ["lora"])


def test_one_update_a_decoder():
    decoder = updated(llama(), LoRAConfig(rank=2, targets=("query",)))
    before = paths(module_tree(decoder))
    for other in (LoRAConfig(rank=2, targets=("value",)), LoRAConfig(rank=3, alpha=1.5)):
        with pytest.raises(CalmError, match=r"already has a LoRA update, LoRAConfig\(rank=2, "):
            add_lora(decoder, other, nnx.Rngs(0))
    assert paths(module_tree(decoder)).keys() == before.keys()
    merge_lora(decoder)
    add_lora(decoder, other, nnx.Rngs(0))
    assert (lora_in(decoder).rank, lora_in(decoder).scale) == (3, 0.5)
    plain = random_decoder(llama())
    with pytest.raises(CalmError, match=r"lora\.targets names 'q_proj'"):
        add_lora(plain, LoRAConfig(rank=2, targets=("query", "q_proj")), nnx.Rngs(0))
    assert lora_in(plain) is None


def test_an_update_of_an_augment_is_refused():
    augment = updated(palm())
    pair = compose(random_decoder(palm()), augment, CompositionConfig(every=3), rngs=nnx.Rngs(1))
    message = "augment 0 has a low-rank update, which no gradient reaches"
    for trainable in (None, ["bridge"]):
        with pytest.raises(CalmError, match=message):
            Parts(pair, trainable)
    merge_lora(pair.augments[0])
    assert {path for path, _ in Parts(pair).of(pair)[0].items()} == {"bridge"}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_beside_integers(kind):
    decoder = random_decoder(llama())
    quantize_module(decoder, kind)
    add_lora(decoder, LoRAConfig(rank=2), nnx.Rngs(0))
    before = np.asarray(decoder(np.ones((1, 3), np.int32)))
    factor = decoder.layers.mlp.up_lora_b
    factor.set_value(factor.get_value() + 1)
    assert np.any(np.asarray(decoder(np.ones((1, 3), np.int32))) != before)
    with pytest.raises(CalmError, match=f"is {kind}; a LoRA update can only be merged into floats"):
        merge_lora(decoder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0; it must be at least 1"),
        ({"rank": 1, "alpha": float("nan")}, r"lora\.alpha is nan"),
        ({"rank": 1, "targets": ("q_proj",)}, r"lora\.targets names 'q_proj'; .* have \['down', "),
    ],
)
def test_refused(fields, message):
    with pytest.raises(CalmError, match=message):
        add_lora(random_decoder(palm()), LoRAConfig(**fields), nnx.Rngs(0))
