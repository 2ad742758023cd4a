"""A small random pair on disk that reads bytes: two frozen folders and a bridge."""

from pathlib import Path

from flax import nnx

import calm_jax
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.models import CompositionConfig, Decoder, DecoderConfig


def frozen(folder: Path, width: int = 16, seed: int = 0) -> Path:
    # With a head of its own: a random model with a tied one repeats its last token.
    config = DecoderConfig.llama(
        vocab_size=264, embed_dim=width, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=32,
    )  # fmt: skip
    calm_jax.save_frozen(Decoder(config, nnx.Rngs(seed)), folder, vocabulary=ByteVocabulary())
    return folder


def pair(root: Path) -> Path:
    """The folder of a bridge between two frozen folders beside it."""
    anchor = calm_jax.load(frozen(root / "anchor"))
    augment = calm_jax.load(frozen(root / "augment", 8, 1))
    config = CompositionConfig(connections=((0, 0), (1, 1)), init="paper")
    composed = calm_jax.compose(anchor, augment, config, rngs=nnx.Rngs(2))
    calm_jax.export_bridge(composed, root / "pair")
    return root / "pair"
