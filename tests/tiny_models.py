"""Models and batches that a test trains in a second."""

import functools

import jax
import numpy as np
from flax import nnx

from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, DecoderConfig, compose
from calm_jax.models.parameters import Structure, module_tree, path_name

VOCAB = 64

# Tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)


def decoder(seed: int = 0, family: str = "palm", **fields) -> Decoder:
    """A random decoder of 4 layers; 8 divides every dimension that a mesh may split."""
    fields = (
        {
            "vocab_size": VOCAB,
            "embed_dim": 32,
            "num_layers": 4,
            "num_heads": 8,
            "head_dim": 4,
            "mlp_dim": 32,
        }
        | ({"num_kv_heads": 2} if family == "llama" else {})
        | fields
    )
    structure, init = _initialiser(getattr(DecoderConfig, family)(**fields))
    return structure.merge(init(jax.random.key(seed)))


@functools.cache
def _initialiser(config: DecoderConfig):
    """A decoder's structure, and its arrays as a compiled function of a key."""
    structure = Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    return structure, jax.jit(lambda key: module_tree(Decoder(config, nnx.Rngs(params=key))))


def composed(config: CompositionConfig | None = None, seed: int = 0, **fields) -> ComposedDecoder:
    """A Llama anchor, a PaLM augment of half its width, and a random bridge."""
    config = CompositionConfig(every=2) if config is None else config
    return nnx.clone(_composed(config, seed, tuple(fields.items())))


@functools.cache
def _composed(config: CompositionConfig, seed: int, fields) -> ComposedDecoder:
    anchor, augment = decoder(seed + 1, "llama", **dict(fields)), decoder(seed + 2, embed_dim=16)
    return compose(anchor, augment, config, rngs=nnx.Rngs(seed + 3))


def randomised(model: ComposedDecoder, seed: int = 0) -> ComposedDecoder:
    """The same with a bridge that has no zeros, as if it had been trained."""
    random = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), nnx.state(model.bridge)
    )
    nnx.update(model.bridge, state)
    return model


def batch(seed: int = 0, rows: int = 8, length: int = 12, packed: bool = False, vocab: int = VOCAB):
    """Random rows under the six decoder keys; numbers of weighted tokens differ between rows.

    Unpacked rows hold one sequence, packed ones two or three; all end in padding.
    """
    random = np.random.default_rng(seed)
    result = {
        "decoder_input_tokens": random.integers(1, vocab, (rows, length)).astype(np.int32),
        "decoder_target_tokens": random.integers(1, vocab, (rows, length)).astype(np.int32),
        "decoder_loss_weights": np.zeros((rows, length), np.float32),
        "decoder_positions": np.zeros((rows, length), np.int32),
        "decoder_segment_ids": np.zeros((rows, length), np.int32),
        "decoder_causal_attention": np.zeros((rows, length), np.int32),
    }
    for row in range(rows):
        start = 0
        for segment in range(1, 1 + (random.integers(2, 4) if packed else 1)):
            size = int(random.integers(3, 5 if packed else length))
            here, prompt = slice(start, start + size), int(random.integers(1, size))
            size = len(range(length)[here])
            result["decoder_segment_ids"][row, here] = segment
            result["decoder_positions"][row, here] = np.arange(size)
            result["decoder_causal_attention"][row, here] = np.arange(size) < prompt
            result["decoder_loss_weights"][row, here] = np.arange(size) >= prompt - 1
            start += size
    return result


def stored_bytes(tree) -> dict[str, bytes]:
    """Path and bytes of every array of a tree or a module."""
    tree = module_tree(tree) if isinstance(tree, nnx.Module) else tree
    return {
        path_name(path): np.asarray(jax.device_get(leaf)).tobytes()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
