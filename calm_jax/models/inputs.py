"""What a model reads: tokens, with their segments, order, positions and prompt mask.

Axes: B batch, T position, D model width.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from calm_jax.data.dataset import features_key, own_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Rows of tokens, or of feature vectors. `filled` replaces None by defaults.

    Attributes:
        tokens_BT: int32 [B, T]; may be None if `features_BTD` is given.
        features_BTD: float [B, T, D], used instead of the tokens' embeddings.
        segments_BT: int32 [B, T]; a token sees only its own segment. 0 is padding, which no token
            sees.
        order_BT: int32 [B, T]; a query sees keys whose order is not above its own. None: the order
            of the array, which lets attention kernels skip blocks at compile time.
        positions_BT: int32 [B, T], the position of each token in its segment, for rotary angles.
        prompt_mask_BT: int32 [B, T], 1 on the prompt; read only by `encoder_only` bridges.
        augments: for each augment of a composed model its own inputs, or None if it reads the
            tokens of the anchor; augments without an entry do too. Segments are those of the
            anchor, and `order_BT` is the index in the anchor's row from which on a token, or a
            feature vector, is read.
        packed: whether a row may hold several segments, or padding before its tokens; some
            attention kernels support neither.
    """

    tokens_BT: jax.Array | None = None
    features_BTD: jax.Array | None = None
    segments_BT: jax.Array | None = None
    order_BT: jax.Array | None = None
    positions_BT: jax.Array | None = None
    prompt_mask_BT: jax.Array | None = None
    augments: tuple["Inputs | None", ...] = ()
    packed: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(cls, tokens_or_inputs: "jax.Array | Inputs") -> "Inputs":
        """Inputs unchanged, or the inputs of tokens, int32 [B, T]."""
        if isinstance(tokens_or_inputs, Inputs):
            return tokens_or_inputs
        return cls(jnp.asarray(tokens_or_inputs))

    @classmethod
    def of_batch(cls, batch: Mapping[str, jax.Array]) -> "Inputs":
        """The inputs of a batch of arrays [B, T] with seqio's decoder keys.

        An augment k with tokens of its own has arrays [B, S] with the keys `own_keys(k)`; with
        features, floats [B, S, F] with the key `features_key(k)` in place of the tokens.
        """
        return cls(
            batch["decoder_input_tokens"],
            segments_BT=batch["decoder_segment_ids"],
            positions_BT=batch["decoder_positions"],
            prompt_mask_BT=batch["decoder_causal_attention"],
            augments=cls.augments_of(batch),
        )

    @classmethod
    def augments_of(cls, batch: Mapping[str, jax.Array]) -> tuple["Inputs | None", ...]:
        """The own inputs of augments in a batch; None of one that reads the anchor's tokens."""
        own = {}
        for k in range(len(batch)):
            tokens, *rest = map(batch.get, own_keys(k))
            features = batch.get(features_key(k))
            if tokens is not None or features is not None:
                own[k] = cls(tokens, features, *rest)
        return tuple(own.get(k) for k in range(max(own, default=-1) + 1))

    def of_augment(self, number: int) -> "Inputs | None":
        """The own inputs of augment `number`; None if it reads the anchor's tokens."""
        return self.augments[number] if number < len(self.augments) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        known = (self.tokens_BT, self.features_BTD, self.segments_BT)
        return next(x for x in known if x is not None).shape[:2]

    def replace(self, **fields) -> "Inputs":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def filled(self, cached_B: jax.Array | None = None) -> "Inputs":
        """A copy with defaults: one segment in each row, no padding, positions of the array.

        Args:
            cached_B: int32 [B], the number of tokens of each row in a cache. Orders and positions
                then continue from it; padding is not counted.
        """
        segments_BT, order_BT, positions_BT = self.segments_BT, self.order_BT, self.positions_BT
        packed = self.packed and segments_BT is not None
        if segments_BT is None:
            segments_BT = jnp.ones(self.shape, jnp.int32)
        if order_BT is None and cached_B is not None:
            counted_BT = jnp.cumsum(segments_BT != 0, axis=1, dtype=jnp.int32)
            order_BT = cached_B[:, None] + counted_BT - 1
        if positions_BT is None:
            in_array_BT = jnp.broadcast_to(jnp.arange(self.shape[1]), self.shape)
            positions_BT = in_array_BT if order_BT is None else order_BT
        return self.replace(
            segments_BT=segments_BT, order_BT=order_BT, positions_BT=positions_BT, packed=packed
        )

    def prompt(self) -> "Inputs":
        """A copy in which all tokens outside the prompt are padding. Needs `prompt_mask_BT`."""
        return self.replace(segments_BT=jnp.where(self.prompt_mask_BT == 1, self.segments_BT, 0))
