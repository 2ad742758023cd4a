"""The configs of a decoder and of a composition: frozen dataclasses without arrays.

A family of models (PaLM, Llama, Gemma, ...) is a choice of `DecoderConfig` fields, never a
subclass.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from calm_jax.errors import CalmError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for contexts longer than those of the first training.

    kind "linear" divides every frequency by `factor` (Gemma 3's global layers); "llama3" divides
    only low frequencies, and blends between `low_frequency_factor` and `high_frequency_factor`
    (Llama 3.1). `original_length` is in tokens.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise CalmError(
                f"decoder.rope_scaling.kind is {self.kind!r}; known are 'linear' and 'llama3'"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of one decoder. Raises `CalmError` if fields contradict each other.

    Widths are in features, lengths in tokens. Weights are stored as in the checkpoint: a norm's
    offset or an embedding's scale is a field here instead of being folded into them.

    >>> from calm_jax import DecoderConfig
    >>> config = DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
    ...                             head_dim=8, mlp_dim=32)
    >>> config.block, config.num_kv_heads, config.tied_head
    ('parallel', 1, True)
    """

    vocab_size: int  # rows of the embedding, padding rows included
    embed_dim: int  # features of the residual stream
    num_layers: int  # transformer layers
    num_heads: int  # query heads
    num_kv_heads: int  # 1: multi-query; num_heads: multi-head; between: grouped-query
    head_dim: int  # features of a head
    mlp_dim: int  # hidden features of the MLP

    # parallel: attention and MLP read the same normed input
    block: Literal["sequential", "parallel"] = "sequential"
    gated_mlp: bool = True  # SwiGLU or GeGLU; False: two matrices
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"  # activation of the MLP

    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_offset: float = 0.0  # added to the stored scale: 1.0 for zero-centred scales
    norm_eps: float = 1e-6  # added to the variance
    norm_bias: bool = False  # on every norm
    post_norms: bool = False  # a second norm on each branch's result (Gemma 2, 3)
    qk_norm: Literal["rms", "l2"] | None = None  # on each head's query and key, before rotary

    attention_bias: bool = False  # on query, key and value
    output_bias: bool = False  # on attention's output projection
    mlp_bias: bool = False  # on every matrix of the MLP
    head_bias: bool = False  # on the logits

    # Which features are rotated together: i and i + half, or neighbours; None: no rotary positions.
    rope: Literal["half", "interleaved"] | None = "half"
    rope_dim: int | None = None  # rotated features of each head; None: all
    rope_base: float = 10_000.0  # theta
    rope_scaling: RopeScaling | None = None  # longer contexts: kind, factor and the rest
    # Unscaled base of layers with a window; None: `rope_base` and `rope_scaling`.
    local_rope_base: float | None = None
    xpos_scale_base: float | None = None  # in tokens (xPos, PaLM-rlhf-pytorch: 512)

    window: int | None = None  # tokens that a query in a local layer sees, itself included
    window_pattern: tuple[bool, ...] = (True,)  # which layers are local; repeated over the depth
    attention_logit_cap: float | None = None  # soft cap by tanh; None: no cap
    final_logit_cap: float | None = None  # the same for the model's logits
    query_scale: float | None = None  # factor on queries; None: head_dim ** -0.5
    embed_scale: float = 1.0  # factor on embeddings
    logit_scale: float = 1.0  # factor on logits
    tied_head: bool = True  # the embedding is also the output matrix

    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of matmuls and the residual stream
    # Frozen matrices in int8 with a scale per output channel, or in int4 with one for each 32
    # weights; None: floats.
    weights: Literal["int8", "int4"] | None = None

    def __post_init__(self):
        for name in _SIZES:
            if not _is_whole(value := getattr(self, name)):
                raise CalmError(f"decoder.{name} is {value!r}; it must be a whole number")
            if value < 1:
                raise CalmError(f"decoder.{name} is {value}; it must be at least 1")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise CalmError(f"decoder.{name} is {getattr(self, name)!r}; known are {allowed}")
        if self.num_heads % self.num_kv_heads:
            raise CalmError(
                f"decoder.num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        rotated = self.head_dim if self.rope_dim is None else self.rope_dim
        if self.rope and (rotated % 2 or rotated > self.head_dim):
            raise CalmError(
                f"decoder: each head has {rotated} rotated features; they must be even and at most "
                f"head_dim {self.head_dim}"
            )
        if self.window is not None and self.window < 1:
            raise CalmError(f"decoder.window is {self.window}; it must be at least 1, or None")
        for name in ("logit_scale", "query_scale", "embed_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise CalmError(f"decoder.{name} is {value}; it must be a number above 0")
        if not self.window_pattern:
            raise CalmError("decoder.window_pattern is empty; give at least one of True and False")
        if self.xpos_scale_base is not None and (self.rope != "half" or rotated != self.head_dim):
            raise CalmError(
                f"decoder.xpos_scale_base needs rope 'half' on all of head_dim {self.head_dim}, "
                f"not {self.rope!r} on {rotated}"
            )
        if self.block == "parallel" and self.post_norms:
            raise CalmError("decoder.post_norms is True, but a parallel block has no post-norms")

    @property
    def scale(self) -> float:
        """Factor on queries before the softmax."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it sees only `window` tokens."""
        pattern = self.window_pattern if self.window else (False,)
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

    def as_computed(self) -> "DecoderConfig":
        """The same model with each field in one form: if two are equal, their models compute the
        same from the same weights, however their fields say it."""
        local = self.local_layers
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            # Only llama3 reads the other fields.
            scaling = None if scaling.factor == 1 else RopeScaling("linear", scaling.factor)
        same_base = scaling is None and self.local_rope_base == self.rope_base
        return dataclasses.replace(
            self,
            query_scale=self.scale,
            rope_dim=self.head_dim if self.rope_dim is None else self.rope_dim,
            rope_scaling=scaling,
            local_rope_base=self.local_rope_base if any(local) and not same_base else None,
            window=self.window if any(local) else None,
            window_pattern=local,
        )

    @classmethod
    def palm(cls, **fields) -> "DecoderConfig":
        """PaLM (arXiv 2204.02311 §2): parallel block, multi-query, SwiGLU, zero-centred RMSNorm."""
        defaults = {"block": "parallel", "num_kv_heads": 1, "norm_offset": 1.0}
        if "embed_dim" in fields:
            defaults["logit_scale"] = fields["embed_dim"] ** -0.5
        return cls(**{**defaults, **fields})

    @classmethod
    def llama(cls, **fields) -> "DecoderConfig":
        """Llama 2 and 3: sequential block, plain RMSNorm, SwiGLU, an untied head."""
        return cls(**{"norm_eps": 1e-5, "tied_head": False, **fields})

    @classmethod
    def gemma(cls, **fields) -> "DecoderConfig":
        """Gemma: sequential block, zero-centred RMSNorm, GeGLU, scaled embeddings."""
        defaults = {"norm_offset": 1.0, "activation": "gelu_tanh"}
        if "embed_dim" in fields:
            defaults["embed_scale"] = math.sqrt(fields["embed_dim"])
        return cls(**{**defaults, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DecoderConfig":
        """The inverse of `to_dict`; raises `CalmError` on unknown or missing fields."""
        values = dict(_known_fields(cls, values, "decoder"))
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(
                **_known_fields(RopeScaling, values["rope_scaling"], "decoder.rope_scaling")
            )
        if "window_pattern" in values:
            values["window_pattern"] = tuple(values["window_pattern"])
        return cls(**values)


# Sizes, and only they, have no default.
_SIZES = tuple(
    f.name for f in dataclasses.fields(DecoderConfig) if f.default is dataclasses.MISSING
)
_CHOICES = {
    "block": ("sequential", "parallel"),
    "activation": ("silu", "gelu_tanh", "gelu"),
    "norm": ("rms", "layer"),
    "qk_norm": (None, "rms", "l2"),
    "rope": (None, "half", "interleaved"),
    "dtype": ("float32", "bfloat16"),
    "weights": (None, "int8", "int4"),
}


PROBE = ("probe",)  # in place of connections: `calm train` chooses them by its data


@dataclasses.dataclass(frozen=True)
class CompositionConfig:
    """How an augment is connected to the anchor (CALM, arXiv 2401.02412 §3.1).

    The defaults are the paper's connections with two improvements: before training the composed
    model equals the anchor, and the inputs of the cross-attention are normed.
    `CompositionConfig.paper()` follows the paper exactly.

    >>> from calm_jax import CompositionConfig
    >>> CompositionConfig(every=2).resolve(augment_layers=6, anchor_layers=10)
    ((1, 2), (3, 5), (5, 8))
    """

    # (augment layer, anchor layer), 0-based; "probe": training chooses as many as `every` gives
    connections: tuple[tuple[int, int], ...] | tuple[str] | None = None
    every: int = 4  # without `connections`: 4 is every 4th augment layer, spread over the anchor
    num_heads: int | None = None  # None: the anchor's ("typically the same", paper §3.1)
    head_dim: int | None = None  # None: embed_dim of the anchor / num_heads, as in the paper
    # zero: the composed model starts as the anchor; paper: N(0, 1/fan_in)
    init: Literal["zero", "paper"] = "zero"
    bias: bool = False  # on f_proj, W_Q, W_V and W_O; the paper mentions none
    output_projection: bool = True  # W_O: in the paper's equation, not in its parameter count
    norms: bool = True  # RMSNorm on H_B before W_Q and on the tap before f_proj; not in the paper
    gate: bool = False  # a learned scalar on the result of f_cross; not in the paper
    rotary: bool = False  # rotary positions on Q and K of f_cross; not in the paper
    encoder_only: bool = False  # f_cross sees only prompt tokens (paper §4.4, Table 5)
    scan: bool = True  # False: evenly spaced connections are compiled one by one, not as a loop

    def __post_init__(self):
        for name in ("every", "num_heads", "head_dim"):
            value = getattr(self, name)
            if not _is_whole(value) and (value is not None or name == "every"):
                raise CalmError(f"composition.{name} is {value!r}; it must be a whole number")
        if self.init not in ("zero", "paper"):
            raise CalmError(f"composition.init is {self.init!r}; known are 'zero' and 'paper'")
        if self.connections in ("probe", PROBE, list(PROBE)):
            object.__setattr__(self, "connections", PROBE)
        elif self.connections is not None:
            pairs = tuple(
                tuple(pair) if isinstance(pair, Sequence) else pair for pair in self.connections
            )
            for pair in pairs:
                if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_whole, pair))):
                    raise CalmError(
                        f"composition.connections: {pair!r} is not a pair (augment layer, anchor "
                        "layer); write a single connection as ((3, 7),)"
                    )
            object.__setattr__(self, "connections", pairs)
            if not pairs:
                raise CalmError(
                    "composition.connections is empty; give at least one (augment, anchor) pair"
                )
            for pair in pairs:
                if pairs.count(pair) > 1:
                    raise CalmError(f"composition.connections lists {pair} twice")

    @classmethod
    def paper(cls, **fields) -> "CompositionConfig":
        """The paper's bridge: no norms, gate, biases or rotary positions; random matrices."""
        return cls(**{"init": "paper", "norms": False, **fields})

    def resolve(self, augment_layers: int, anchor_layers: int) -> tuple[tuple[int, int], ...]:
        """The connections of models with these depths, sorted by anchor layer, then augment layer.

        With `every=e` there are n = augment_layers // e connections, k = 0 .. n-1: augment layer
        e(k+1)-1 to anchor layer g(k+1)-1, where g = anchor_layers // n. Raises `CalmError` if a
        layer does not exist, or if n is 0 or more than `anchor_layers`.
        """
        if self.connections == PROBE:
            raise CalmError(
                "composition.connections is 'probe', which only training resolves, from its data; "
                "name the connections, or give every"
            )
        if self.connections is not None:
            for i, j in self.connections:
                for what, layer, depth in (
                    ("augment", i, augment_layers),
                    ("anchor", j, anchor_layers),
                ):
                    if not 0 <= layer < depth:
                        raise CalmError(
                            f"composition.connections: ({i}, {j}) names {what} layer {layer}, but "
                            f"the {what} has layers 0 to {depth - 1}"
                        )
            return tuple(sorted(self.connections, key=lambda pair: (pair[1], pair[0])))
        if self.every < 1 or not 1 <= augment_layers // self.every <= anchor_layers:
            raise CalmError(
                f"composition.every={self.every} gives no valid connections between an augment of "
                f"{augment_layers} layers and an anchor of {anchor_layers}"
            )
        count = augment_layers // self.every
        gap = anchor_layers // count
        return tuple((self.every * (k + 1) - 1, gap * (k + 1) - 1) for k in range(count))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CompositionConfig":
        """The inverse of `to_dict`; raises `CalmError` on unknown fields."""
        return cls(**_known_fields(cls, values, "composition"))


def heads(config: CompositionConfig, anchor: DecoderConfig) -> tuple[int, int]:
    """(number of heads, head width) of f_cross for an anchor.

    Raises `CalmError` if the number of heads does not divide the anchor's width and `head_dim` is
    not set, or if there is no output projection and the heads do not add up to that width.
    """
    N = anchor.num_heads if config.num_heads is None else config.num_heads
    if N < 1:
        raise CalmError(f"composition.num_heads is {N}; it must be at least 1")
    if config.head_dim is None and anchor.embed_dim % N:
        raise CalmError(
            f"composition.num_heads {N} does not divide the anchor's width {anchor.embed_dim}; "
            "give composition.head_dim, or another number of heads"
        )
    H = anchor.embed_dim // N if config.head_dim is None else config.head_dim
    if H < 1:
        raise CalmError(f"composition.head_dim is {H}; it must be at least 1")
    if not config.output_projection and anchor.embed_dim != N * H:
        raise CalmError(
            f"composition.output_projection=False needs num_heads x head_dim = {N} x {H} to be the "
            f"anchor's width {anchor.embed_dim}"
        )
    if config.rotary and H % 2:
        raise CalmError(f"composition.rotary needs an even head_dim, not {H}")
    return N, H


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number; for Python, True is one, but not here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _known_fields(cls, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise CalmError(f"{where}.{name} is not a known field; known are {sorted(fields)}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise CalmError(f"{where}.{name} is missing")
    return values
