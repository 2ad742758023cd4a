"""A decoder-only language model; its family is determined by its `DecoderConfig`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.models.cache import DecoderCache, KeysValues, LayerCaches, Slots, filled
from calm_jax.models.calling import call, make_on_mesh_of
from calm_jax.models.config import DecoderConfig
from calm_jax.models.connections import evenly_spaced
from calm_jax.models.execution import Execution
from calm_jax.models.inputs import Inputs
from calm_jax.models.layer import ForwardPass, Layer, Norm
from calm_jax.models.layouts import residual_layout, whole_length
from calm_jax.models.origin import Origin, of_origin
from calm_jax.models.parameters import constant, matrix, stacked, weight
from calm_jax.models.products import biased, look_up, product
from calm_jax.models.quantized import quantize_module
from calm_jax.models.stack import are_stacked, run_groups, run_layers
from calm_jax.models.taps import Taps


class Decoder(nnx.Module):
    """A decoder with random parameters; `calm_jax.load` returns one with trained parameters.

    Parameters are float32; with `config.weights` "int8" or "int4" matrices are integers with
    scales (`calm_jax.models.quantized`).

    Attributes:
        layers: a `Layer` whose arrays have a leading axis of layers.
        vocabulary: a `calm_jax.data.vocabulary.Vocabulary`, or None.
        source: the frozen folder that the parameters were loaded from, or None.
        loaded_dtype: the dtype they were cast to when loaded, or None.
        fingerprint: identifies the frozen folder and `loaded_dtype`; None without a folder.
        execution: how the decoder is computed; may be set at any time.
    """

    vocabulary = of_origin("vocabulary")
    source = of_origin("source")
    loaded_dtype = of_origin("loaded_dtype")
    fingerprint = of_origin("fingerprint")

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.embed_dim
        self.config = config
        # Logits of a random model have unit variance, whatever scales its family uses.
        std = D**-0.5 / config.logit_scale if config.tied_head else 1.0 / config.embed_scale
        table_VD = std * jax.random.normal(rngs.params(), (V, D), jnp.float32)
        self.embedding = weight(table_VD, ("vocab", "embed"), summed=(-1,))
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stacked(lambda rngs: Layer(config, rngs), keys)
        self.final_norm = Norm(D, "embed", config)
        self.head = None if config.tied_head else matrix(rngs, (D, V), ("embed", "vocab"), inputs=1)
        self.head_bias = constant(0.0, (V,), ("vocab",)) if config.head_bias else None
        self.origin = Origin()
        self.execution = Execution()
        if config.weights is not None:
            quantize_module(self, config.weights)

    def __call__(self, inputs: Inputs | jax.Array) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            inputs: `Inputs`, or tokens, int32 [B, T].

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
        return call(self, "forward", inputs)

    @property
    def anchor(self) -> "Decoder":
        """Itself: like a composed model's anchor, it has the head."""
        return self

    @property
    def models(self) -> list[Any]:
        """A list of itself, as a composed model lists its anchor and augments."""
        return [self]

    @property
    def part_paths(self) -> dict[str, tuple[str, ...]]:
        """The path of its only part, the decoder itself: the root."""
        return {"decoder": ()}

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.config.embed_dim

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_layers

    def forward(self, inputs: Inputs | jax.Array) -> jax.Array:
        """`__call__` for use inside `jax.jit`."""
        return self.logits(self.residual(Inputs.of(inputs))[0])

    def residual(
        self, inputs: Inputs, cache: DecoderCache | None = None
    ) -> tuple[jax.Array, DecoderCache | None]:
        """The residual stream [B, T, D] that `logits` reads, and the updated cache."""
        forward, inputs, slots = self._forward_pass(inputs, cache)
        x_BTD, layers = run_layers(self.layers, self.embed(inputs), forward, _layers_of(cache))
        return x_BTD, None if cache is None else DecoderCache(layers, slots)

    def perturbed(
        self, inputs: Inputs, perturb: Callable[[jax.Array], jax.Array] | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The residual stream [B, T, D] for the loss; no connections, so an empty list.

        `perturb` is applied to the embeddings [B, T, D] before the first layer reads them.
        """
        if perturb is not None:
            inputs = inputs.replace(features_BTD=perturb(self.embed(inputs)))
        return self.residual(inputs)[0], []

    def taps(
        self, inputs: Inputs, layers: Sequence[int], cache: DecoderCache | None = None
    ) -> tuple[Taps, DecoderCache | None]:
        """The residual stream [B, T, D] after each of `layers`, ascending, and the updated cache.

        Later layers run only if the cache covers them. No gradient flows back into the decoder.
        """
        taps, _, cache = self.taps_and_residual(inputs, layers, cache, whole=False)
        return taps, cache

    def taps_and_residual(
        self,
        inputs: Inputs,
        layers: Sequence[int],
        cache: DecoderCache | None = None,
        *,
        whole: bool = True,
    ) -> tuple[Taps, jax.Array, DecoderCache | None]:
        """`taps`, the residual stream [B, T, D] after the last layer that runs, and the cache.

        All layers run if `whole` is set, otherwise those that the taps or the cache need.
        """
        forward, inputs, slots = self._forward_pass(inputs, cache)
        x_BTD, kept, taps = self.embed(inputs), _layers_of(cache), Taps({})
        first, apart = 0, tuple(layers)
        # The last tap stays outside the loop, as the last round stays outside a stacked round.
        if are_stacked(self.layers) and evenly_spaced([-1, *layers[:-1]]):
            in_loop, apart = apart[:-1], apart[-1:]
            first = in_loop[-1] + 1
            x_BTD, kept, outputs = run_groups(
                self.layers, x_BTD, forward, kept, groups=len(in_loop), size=in_loop[0] + 1
            )
            taps = Taps({}, in_loop, jax.lax.stop_gradient(outputs))
        for layer in apart:
            x_BTD, kept = run_layers(
                self.layers, x_BTD, forward, kept, first=first, count=layer + 1 - first
            )
            taps.by_layer[layer] = jax.lax.stop_gradient(x_BTD)
            first = layer + 1
        end = self.depth if whole else first if cache is None else cache.depth
        x_BTD, kept = run_layers(
            self.layers, x_BTD, forward, kept, first=first, count=max(0, end - first)
        )
        return taps, x_BTD, None if cache is None else DecoderCache(kept, slots)

    def run_alone(self, name: str, inputs: Inputs) -> jax.Array:
        """The result of a forward pass of the decoder, its only part."""
        del name
        return self.forward(inputs)

    def init_cache(
        self, batch: int, slots: int, layers: int | None = None, dtype: Any = None
    ) -> DecoderCache:
        """An empty cache for `batch` rows of up to `slots` tokens.

        Args:
            layers: number of layers to cache, from the first; default: all.
            dtype: that of keys and values; default: that of the config.
        """
        config = self.config
        stacked, layers = are_stacked(self.layers), layers or config.num_layers
        arguments = (config, layers, stacked, batch, slots, dtype or config.dtype)
        return make_on_mesh_of(self.embedding.get_value(), _empty_cache, arguments)

    def embed(self, inputs: Inputs) -> jax.Array:
        """The inputs' features, or their embeddings if None, [B, T, D] in the config's dtype."""
        if inputs.features_BTD is not None:
            return residual_layout(inputs.features_BTD.astype(self.config.dtype))
        x_BTD = look_up(
            self, "embedding", inputs.tokens_BT, self.config.dtype, self.execution.weight_sharding
        )
        # As Gemma does, rounds the scale to the compute dtype first.
        return residual_layout(x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Final norm and head: float32 [B, T, V] for a residual stream [B, T, D]."""
        x_BTD = whole_length(self.final_norm(x_BTD))
        if self.head is None:
            logits_BTV = product("BTD,VD->BTV", x_BTD, self, "embedding", dtype=jnp.float32)
        else:
            logits_BTV = product("BTD,DV->BTV", x_BTD, self, "head", dtype=jnp.float32)
        logits_BTV = biased(logits_BTV * self.config.logit_scale, self, "head")
        if self.config.final_logit_cap is not None:
            cap = self.config.final_logit_cap
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        return sharding.constrain(logits_BTV, "batch", "length", "vocab")

    def _forward_pass(
        self, inputs: Inputs, cache: DecoderCache | None
    ) -> tuple[ForwardPass, Inputs, Slots | None]:
        """What the layers share, the `filled` inputs, and the cache's slots with them included."""
        inputs, slots = filled(inputs, None if cache is None else cache.slots)
        return ForwardPass(self.config, self.execution, inputs, slots), inputs, slots


def _empty_cache(
    config: DecoderConfig, layers: int, stacked: bool, batch: int, slots: int, dtype: Any
) -> DecoderCache:
    each = [layers] if stacked else [1] * layers
    K, H = config.num_kv_heads, config.head_dim
    caches = tuple(KeysValues.empty(count, batch, K, slots, H, dtype) for count in each)
    return DecoderCache(caches[0] if stacked else caches, Slots.empty(batch, slots))


def _layers_of(cache: DecoderCache | None) -> LayerCaches | None:
    return None if cache is None else cache.layers
