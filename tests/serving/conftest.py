"""A server of a tiny pair."""

import pytest
import tiny_models
import tiny_tokenizers
from flax import nnx
from servers import running

import calm_jax
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.serving.parts import served_models

OPTIONS = {"slots": 4, "max_length": 128, "prefill_chunk": 32, "cache_dtype": None}


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """Byte-level BPE with a chat template."""
    return load_vocabulary(
        tiny_tokenizers.llama3(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"
    )


@pytest.fixture(scope="session")
def pair(vocabulary):
    """A composed model of random weights that are large enough to say different things."""
    size = vocabulary.size
    anchor = tiny_models.decoder(1, "llama", num_layers=2, vocab_size=size)
    augment = tiny_models.decoder(2, num_layers=2, embed_dim=16, vocab_size=size)
    anchor.vocabulary = augment.vocabulary = vocabulary
    composed = calm_jax.compose(
        anchor, augment, calm_jax.CompositionConfig(every=1), rngs=nnx.Rngs(3)
    )
    return tiny_models.randomised(composed)


@pytest.fixture(scope="session")
def models(pair):
    return served_models(pair, "pair", OPTIONS)


@pytest.fixture(scope="session")
def served(models):
    with running(models) as here:
        yield here
