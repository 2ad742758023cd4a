"""Writes GGUF files of published models as llama.cpp's converter does.

Its rules stand here a second time, by hand: names, interleaved queries and keys, norms plus one.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_SECOND_NORM = {"post_attention_layernorm": "ffn_norm"}
_SANDWICHED = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# Bytes of a block that hold its scales as float16.
_SCALES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
KINDS = (
    *(Kind.F32, Kind.F16, Kind.BF16),
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *_SCALES,
)


def write(
    path: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    stored_as: Kind = Kind.F32,
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a model of Llama, Mistral, Qwen 2 or 3, or Gemma 1, 2 or 3.

    Args:
        path: the file.
        config: config.json as transformers 5 writes it.
        tensors: by their names in transformers; float32.
        stored_as: how matrices are stored; other tensors are float32.
        tokenizer: metadata, keys without "tokenizer.".
        extra: metadata in place of what stands here, by whole keys; None: the key is left out.
    """
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(
        config["model_type"], config["model_type"]
    )
    metadata = _metadata(config, architecture)
    metadata |= {f"tokenizer.{key}": value for key, value in (tokenizer or {}).items()}
    metadata |= extra or {}
    writer = gguf.GGUFWriter(str(path), metadata.pop("general.architecture", architecture))
    for key, value in metadata.items():
        if value is not None:
            add(writer, key, value)
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, x in tensors.items():
        changed = _changed(name, x.astype(np.float32), config, architecture)
        kind = stored_as if x.ndim > 1 else Kind.F32
        writer.add_tensor(_renamed(name, architecture), stored(changed, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(x: np.ndarray, kind: Kind) -> np.ndarray:
    """The array as such a file holds it; of K-quants other values, which `gguf` cannot make."""
    if kind not in _SCALES:
        return gguf.quants.quantize(x, kind)
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (*x.shape[:-1], x.shape[-1] // block_values, block_bytes)
    generator = np.random.default_rng(math.prod(shape))
    blocks = generator.integers(256, size=shape, dtype=np.uint8)
    for start in _SCALES[kind]:
        scales = generator.uniform(0.001, 0.004, shape[:-1]).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*x.shape[:-1], -1)


def llama3_factors(config: Mapping[str, Any]) -> np.ndarray:
    """What frequencies are divided by, float32 [head width / 2]."""
    rope = config["rope_parameters"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    factors = []
    for pair in range(config["head_dim"] // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / config["head_dim"])
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _metadata(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if architecture == "llama":
        found["rope.dimension_count"] = config["head_dim"]
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if config["model_type"] not in ("qwen2", "qwen3"):
        found["attention.sliding_window"] = config.get("sliding_window")
    if architecture in ("gemma2", "gemma3"):
        found["attention.scale"] = config["query_pre_attn_scalar"] ** -0.5
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            found[key] = config.get(key)
    return {f"{architecture}.{key}": value for key, value in found.items()}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata as the type that llama.cpp writes."""
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _renamed(name: str, architecture: str) -> str:
    second = _SANDWICHED if architecture in ("gemma2", "gemma3") else _SECOND_NORM
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{suffix}"
    _, _, layer, within = stem.split(".", 3)
    return f"blk.{layer}.{(_NAMES | second)[within]}.{suffix}"


def _changed(name: str, x: np.ndarray, config: Mapping[str, Any], architecture: str) -> np.ndarray:
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return x + np.float32(1)
    for projection, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if architecture == "llama" and f".{projection}." in name:
            halves = x.reshape(config[key], 2, -1, *x.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))
    return np.ascontiguousarray(x)


def tokenizer_metadata(folder: pathlib.Path, **flags: Any) -> dict[str, Any]:
    """What such a file says of the tokenizer.json in a folder, keys without "tokenizer."."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    names = {
        **json.loads((folder / "tokenizer_config.json").read_text()),
        **_read_json(folder / "special_tokens_map.json"),
    }
    added = {token["content"]: token["special"] for token in whole["added_tokens"]}
    ids = whole["model"]["vocab"] | {t["content"]: t["id"] for t in whole["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    is_pieces = whole["model"]["byte_fallback"]
    found = {
        "ggml.model": "llama" if is_pieces else "gpt2",
        "ggml.tokens": tokens,
        "ggml.token_type": [_token_type(token, added) for token in tokens],
    }
    if is_pieces:
        found["ggml.scores"] = [-float(index) for index in range(len(tokens))]
    else:
        merges = whole["model"]["merges"]
        found["ggml.merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for role, name in roles.items():
        token = names.get(f"{role}_token")
        if token is not None:
            content = token["content"] if isinstance(token, dict) else token
            found[f"ggml.{name}_token_id"] = ids[content]
    template = names.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text()
    if isinstance(template, Sequence) and not isinstance(template, str):
        template = next(one["template"] for one in template if one["name"] == "default")
    return found | {"chat_template": template} | {f"ggml.{k}": v for k, v in flags.items()}


def _token_type(token: str, added: Mapping[str, bool]) -> int:
    if token in added:
        return gguf.TokenType.CONTROL if added[token] else gguf.TokenType.USER_DEFINED
    is_byte = len(token) == 6 and token.startswith("<0x")
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
