"""A decoder-only language model of any family, told apart by its `DecoderConfig` alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.models.attention import SelfAttentionInputs
from calm_jax.models.block import Norm, stream, whole
from calm_jax.models.config import DecoderConfig
from calm_jax.models.execution import Execution
from calm_jax.models.parameters import constant, matrix, weight
from calm_jax.models.quantized import product, quantize_module, rows
from calm_jax.models.stack import Stack


class Decoder(nnx.Module):
    """A decoder with random parameters; `calm_jax.load` makes one with trained ones.

    They are float32; with `config.weights="int8"` matrices are int8 (`calm_jax.models.quantized`).

    Attributes:
        vocabulary: a `calm_jax.data.vocabulary.Vocabulary`, or None when the model has none yet.
        source: the frozen folder that the parameters came from, or None.
        loaded_dtype: what they were cast to while they were loaded, or None.
        fingerprint: of the frozen folder and that dtype, or None.
        execution: how it is computed; may be set at any time.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.embed_dim
        self.config = config
        # Unit-variance logits of a random model, whichever scales the family applies.
        std = D**-0.5 / config.logit_scale if config.tied_head else 1.0 / config.embed_scale
        table_VD = std * jax.random.normal(rngs.params(), (V, D), jnp.float32)
        self.embedding = weight(table_VD, ("vocab", "embed"), summed=(-1,))
        self.layers = Stack(config, rngs)
        self.final_norm = Norm(D, "embed", config)
        self.head = None if config.tied_head else matrix(rngs, (D, V), ("embed", "vocab"), inputs=1)
        self.head_bias = constant(0.0, (V,), ("vocab",)) if config.head_bias else None
        self.vocabulary: Any = None
        self.source: str | None = None
        self.loaded_dtype: str | None = None
        self.fingerprint: str | None = None
        self.execution = Execution()
        if config.weights == "int8":
            quantize_module(self)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            tokens_BT: int32 [B, T].
            positions_BT: int32 [B, T], the position in its segment of each token; default 0 .. T-1.
            segment_ids_BT: int32 [B, T]; a token sees its own segment only, 0 is padding; default:
                all 1.

        Returns:
            float32 [B, T, V].

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from calm_jax import Decoder, DecoderConfig
        >>> config = DecoderConfig.llama(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
        ...                              num_kv_heads=1, head_dim=8, mlp_dim=32)
        >>> Decoder(config, nnx.Rngs(0))(jnp.ones((1, 5), jnp.int32)).shape
        (1, 5, 32)
        """
        graphdef, state = nnx.split(self)
        return _call(graphdef, state, tokens_BT, positions_BT, segment_ids_BT)

    def forward(self, tokens_BT, positions_BT=None, segment_ids_BT=None) -> jax.Array:
        """`__call__` without a compilation of its own: for use inside `jax.jit`."""
        return self.logits(self.residual(tokens_BT, positions_BT, segment_ids_BT))

    def residual(
        self, tokens_BT, positions_BT=None, segment_ids_BT=None, prompt_mask_BT=None
    ) -> jax.Array:
        """The residual stream [B, T, D] that `logits` reads; the prompt means nothing to it."""
        del prompt_mask_BT
        positions_BT, segment_ids_BT = fill_inputs(tokens_BT, positions_BT, segment_ids_BT)
        return self.hidden(self.embed(tokens_BT), positions_BT, segment_ids_BT)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """The residual stream's start, [B, T, D] in the config's dtype."""
        x_BTD = rows(
            self, "embedding", tokens_BT, self.config.dtype, self.execution.weight_sharding
        )
        # Gemma rounds the scale to the compute dtype before it multiplies.
        x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
        return stream(x_BTD)

    def hidden(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """The residual stream after all layers, before the final norm."""
        shared = SelfAttentionInputs(self.config, positions_BT, segment_ids_BT, self.execution)
        for piece in range(len(self.layers.shapes)):
            x_BTD, _ = self.layers.run(piece, x_BTD, shared)
        return x_BTD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and head: float32 [B, T, V] for a residual stream [B, T, D]."""
        x_BTD = whole(self.final_norm(x_BTD))
        if self.head is None:
            logits_BTV = product("BTD,VD->BTV", x_BTD, self, "embedding", dtype=jnp.float32)
        else:
            logits_BTV = product("BTD,DV->BTV", x_BTD, self, "head", dtype=jnp.float32)
        logits_BTV *= self.config.logit_scale
        if self.head_bias is not None:
            logits_BTV += self.head_bias[...].astype(jnp.float32)
        if self.config.final_logit_cap is not None:
            cap = self.config.final_logit_cap
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return sharding.constrain(logits_BTV, "batch", "length", "vocab")


def fill_inputs(tokens_BT, positions_BT, segment_ids_BT) -> tuple[jax.Array, jax.Array]:
    """Positions and segments, where the caller gave none: one segment a row, no padding."""
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    return positions_BT, segment_ids_BT


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef, state, tokens_BT, positions_BT, segment_ids_BT):
    return nnx.merge(graphdef, state).forward(tokens_BT, positions_BT, segment_ids_BT)
