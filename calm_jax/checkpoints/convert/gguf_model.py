"""GGUF files, turned back into the published models that they were made from.

llama.cpp's converter renames a model's tensors and the keys of its config, interleaves the query
and key of Llama, and adds 1 to the norms of Gemma. All of that is undone here, so that the family's
own table reads the file. The `gguf` package knows how tensors are renamed.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from calm_jax.checkpoints.convert import huggingface_config as read
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.gguf_tokenizer import tokenizer_files
from calm_jax.checkpoints.convert.registry import FAMILIES
from calm_jax.checkpoints.sources.source import Computed, Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models.config import RopeScaling
from calm_jax.models.rotary import rope_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
# Keys of an architecture that are read, or that do not change what is computed.
_KEYS = frozenset(
    {
        "attention.causal",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "attn_logit_softcapping",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "final_logit_softcapping",
        "pooling_type",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "tensor_data_layout",
        "vocab_size",
    }
)
_ROPE_FACTORS = "rope_freqs.weight"
# Numbers of layers of the 27B models, whose query scale does not follow from the head's width.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def as_published(source: Source) -> Source:
    """The source with the names, values, config and tokenizer files that its family publishes.

    Raises:
        CalmError: the file is one of several, or is not a language model of a known architecture; a
            key or a tensor is missing, or a value is not supported.
    """
    metadata, where = source.config, str(source.path)
    read.refuse(metadata, where, "general.type", "model")
    read.refuse(metadata, where, "split.count", 0, 1)
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CalmError(
            f"{where}: general.architecture is {architecture!r}; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(metadata, architecture, where)
    keys.refuse_unknown()
    family, config = _config(keys, source.tensors)
    return dataclasses.replace(
        source,
        config=config,
        tensors=_published_tensors(keys, source.tensors, family, config),
        vocabulary_files=tokenizer_files(metadata, where),
    )


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The metadata of one architecture, by keys without its name; messages show full keys."""

    metadata: Mapping[str, Any]
    architecture: str
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        return read.whole_number(self.metadata, f"{self.architecture}.{key}", self.where, default)

    def number(self, key: str, default: float | None = None) -> float:
        return read.number(self.metadata, f"{self.architecture}.{key}", self.where, default)

    def refuse(self, key: str, *allowed: Any) -> None:
        read.refuse(self.metadata, self.where, f"{self.architecture}.{key}", *allowed)

    def refuse_unknown(self) -> None:
        """Raises `CalmError` on an unknown key whose value is not zero."""
        for key in self.metadata:
            name = key.removeprefix(f"{self.architecture}.")
            if name != key and name not in _KEYS:
                self.refuse(name, 0, "", [])


def _config(keys: _Keys, tensors: Mapping[str, Tensor]) -> tuple[HuggingFaceFamily, dict[str, Any]]:
    """The family and its config.json."""
    if "token_embd.weight" not in tensors:
        raise CalmError(f"{keys.where}: tensor token_embd.weight is missing")
    heads = keys.whole("attention.head_count")
    if keys.get("attention.key_length") is not None:
        head_dim = keys.whole("attention.key_length")
    else:
        head_dim = read.quotient(
            keys.metadata,
            f"{keys.architecture}.embedding_length",
            f"{keys.architecture}.attention.head_count",
            keys.where,
        )
    keys.refuse("attention.value_length", head_dim)
    keys.refuse("rope.dimension_count", head_dim)
    keys.refuse("attention.causal", True)
    own, name = _own_config(keys, head_dim)
    family = FAMILIES[name]
    config = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        "vocab_size": keys.whole("vocab_size", tensors["token_embd.weight"].shape[0]),
        "hidden_size": keys.whole("embedding_length"),
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        **own,
    }
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)}
        everywhere = _rope(keys, head_dim, 1e6, None)
        config["rope_parameters"] = {read.GLOBAL: everywhere, read.LOCAL: local}
    else:
        config["rope_parameters"] = _rope(keys, head_dim, 1e4, tensors.get(_ROPE_FACTORS))
    if name in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if name == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    for role in ("bos", "eos"):
        config[f"{role}_token_id"] = keys.metadata.get(f"tokenizer.ggml.{role}_token_id")
    return family, config


def _own_config(keys: _Keys, head_dim: int) -> tuple[dict[str, Any], str]:
    """The keys of config.json that differ between families, and the family's name."""
    window = None
    if keys.get("attention.sliding_window"):
        window = keys.whole("attention.sliding_window")
    family = FAMILIES[keys.architecture]
    if keys.architecture not in _LAYERS_OF_27B:
        for key in ("sliding_window_pattern", "scale"):
            keys.refuse(f"attention.{key}", 0)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            keys.refuse(key, 0)
        if keys.architecture == "llama":  # also Mistral, which has a window on every layer
            return ({"sliding_window": window}, "mistral") if window else ({}, "llama")
        keys.refuse("attention.sliding_window", 0)
        return {}, keys.architecture
    layers, pattern = keys.whole("block_count"), keys.get("attention.sliding_window_pattern")
    if keys.architecture == "gemma3" and window is None:
        raise CalmError(f"{keys.where}: gemma3.attention.sliding_window is missing")
    own: dict[str, Any] = {"sliding_window": window or 4096}
    if isinstance(pattern, list):
        own["layer_types"] = [read.LOCAL if local else read.GLOBAL for local in pattern]
    elif pattern is not None:
        period = keys.whole("attention.sliding_window_pattern")
        own["layer_types"] = [
            read.LOCAL if (layer + 1) % period else read.GLOBAL for layer in range(layers)
        ]
    own["query_pre_attn_scalar"] = head_dim
    if keys.get("attention.scale"):
        own["query_pre_attn_scalar"] = round(keys.number("attention.scale") ** -2, 3)
    elif layers == _LAYERS_OF_27B[keys.architecture]:
        width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
        own["query_pre_attn_scalar"] = width / heads
    for key, usual in family.caps.items():  # both kinds of file use the same names
        own[key] = keys.number(key, usual) if keys.get(key, usual) else None
    return own, keys.architecture


def _rope(
    keys: _Keys, head_dim: int, default_base: float, factors: Tensor | None
) -> dict[str, Any]:
    """`rope_parameters` of config.json; `factors`, if the file has them, divide each frequency.

    Defaults of the file's own scaling are those of llama.cpp: type "linear", factor 1.
    """
    base = keys.number("rope.freq_base", default_base)
    keys.refuse("rope.scaling.type", "none", "linear")
    keys.refuse("rope.scaling.attn_factor", 0, 1)
    older = "rope.scale_linear"
    factor_key = older if keys.get("rope.scaling.factor") is None else "rope.scaling.factor"
    is_scaled = keys.get("rope.scaling.type", "linear") == "linear" and keys.get(factor_key)
    factor = keys.number(factor_key) if is_scaled else 1.0
    if factors is not None:
        if factor != 1.0:
            raise CalmError(
                f"{keys.where}: there are both {_ROPE_FACTORS} and {keys.architecture}."
                f"{factor_key} {factor}"
            )
        scaling = _llama3_scaling(factors[...], head_dim, base, keys.where)
        return read.rope_parameters(base, scaling)
    return read.rope_parameters(base, RopeScaling("linear", factor) if factor != 1.0 else None)


def _llama3_scaling(
    factors_R: np.ndarray, head_dim: int, base: float, where: str
) -> RopeScaling | None:
    """The scaling of Llama 3.1 that divides frequencies by these factors.

    Between the frequencies that stay and those divided by `factor`, 1 / factors is a line over the
    frequency. The line gives the limits and the length, up to one common factor, which is chosen so
    that the low limit is 1, as published. If fewer than two frequencies lie between, the high limit
    is taken to be 4; if none does, the length is taken to be 8192.
    """
    factors_R = factors_R.astype(np.float64)
    frequencies_R = base ** (-np.arange(0, head_dim, 2) / head_dim)
    if factors_R.shape != frequencies_R.shape or not (factors_R >= 1).all():
        raise CalmError(
            f"{where}: tensor {_ROPE_FACTORS} of shape {factors_R.shape} is not one factor, of at "
            f"least 1, for each of {head_dim // 2} frequencies"
        )
    factor = round(float(factors_R.max()), 4)
    if factor == 1:
        return None
    between = (factors_R > 1 + 1e-6) & (factors_R < factor - 1e-6)
    smooth = (1 / factors_R[between] - 1 / factor) / (1 - 1 / factor)
    high, length = 4.0, 8192
    if len(smooth) > 1:
        slope, intercept = np.polyfit(frequencies_R[between], smooth, 1)
        with np.errstate(all="ignore"):  # factors of other scalings may divide by zero
            high = round(float(1 - 1 / intercept), 3)
            length = -2 * math.pi * slope / intercept
    elif len(smooth) == 1:
        turns = 1 + 3 * smooth[0]
        length = 2 * math.pi * turns / float(frequencies_R[between][0])
    if math.isfinite(length) and high > 1 and round(length) >= 1:
        scaling = RopeScaling("llama3", factor, 1.0, high, round(length))
        scaled_R = rope_frequencies(head_dim, base, scaling)
        if np.allclose(frequencies_R / scaled_R, factors_R, rtol=1e-4):
            return scaling
    raise CalmError(
        f"{where}: tensor {_ROPE_FACTORS} is not a scaling of Llama 3.1, the only supported one"
    )


def _published_tensors(
    keys: _Keys,
    tensors: Mapping[str, Tensor],
    family: HuggingFaceFamily,
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Tensors by the family's names; a tensor without one keeps its own name."""
    layers, architecture = config["num_hidden_layers"], keys.architecture
    last = f"blk.{layers - 1}.attn_norm.weight"
    if last not in tensors:
        raise CalmError(f"{keys.where}: tensor {last} is missing ({layers} layers)")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture], layers)
    others = dict(tensors)
    others.pop(_ROPE_FACTORS if architecture == "llama" else "", None)
    found = {}
    for rule in family.rules(family.checked_config(config, keys.where)):
        for published in rule.names(layers):
            stem, _, suffix = published.rpartition(".")
            # The package does not name the head of families that always tie it.
            renamed = "output" if stem == "lm_head" else known.get_name(stem)
            name = f"{renamed}.{suffix}"
            if name not in others:
                raise CalmError(f"{keys.where}: tensor {name} is missing")
            found[published] = _published(others.pop(name), name, architecture, config)
    return found | others


def _published(tensor: Tensor, name: str, architecture: str, config: Mapping[str, Any]) -> Tensor:
    if architecture == "llama" and ".attn_q." in name:
        values = functools.partial(_halves, tensor, config["num_attention_heads"])
    elif architecture == "llama" and ".attn_k." in name:
        values = functools.partial(_halves, tensor, config["num_key_value_heads"])
    elif architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = functools.partial(_minus_one, tensor)
    else:
        return tensor
    return Computed(tensor.shape, tensor.dtype, values)


def _halves(tensor: Tensor, heads: int) -> np.ndarray:
    """Reorders each head's rows from interleaved rotary pairs to first halves, then second."""
    pairs = tensor[...].reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _minus_one(tensor: Tensor) -> np.ndarray:
    return tensor[...] - np.asarray(1, tensor.dtype)
