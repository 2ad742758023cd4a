"""PaLM (arXiv 2204.02311) as T5X stores it: the fused parallel layer of flaxformer.

Each head's slice holds its attention and its share of the MLP (f = F / N hidden units):
 q_wi_fused [D, N, H + 2f]: query, gate (wi_0), up (wi_1);
 kv_fused [D, 1, 2H]: key, value;
 o_wo_fused [N, H + f, D]: output, down.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from calm_jax.checkpoints.convert.family import Family, Reading
from calm_jax.checkpoints.convert.table import Rule, Slice, rule
from calm_jax.checkpoints.convert.without_config import number, shape_of, shown_norm_offset
from calm_jax.checkpoints.sources.layers import unstack
from calm_jax.checkpoints.sources.source import Computed, Source, Tensor
from calm_jax.checkpoints.sources.t5x import parameters
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

EMBEDDING = "decoder/token_embedder/embedding"
HEAD = "decoder/logits_dense/kernel"
LAST_NORM = "decoder/decoder_norm/scale"
LAYER = "decoder/layers_{layer}/"
STACKED = "decoder/decoder/"
_QUERY_GATE_UP = (
    Slice("layers/attention/query", "D N H -> D N H"),
    Slice("layers/mlp/gate", "D N f -> D (N f)"),
    Slice("layers/mlp/up", "D N f -> D (N f)"),
)
_KEY_VALUE = (
    Slice("layers/attention/key", "D K H -> D K H"),
    Slice("layers/attention/value", "D K H -> D K H"),
)
_OUTPUT_DOWN = (
    Slice("layers/attention/output", "N H D -> N H D"),
    Slice("layers/mlp/down", "N f D -> (N f) D"),
)
_LAYER_NUMBER = r"decoder/layers_(\d+)/"


class Palm(Family):
    """Layers are stacked (`decoder/decoder/…`) or not (`decoder/layers_0/…`); int8 or floats."""

    name = "palm"
    options: ClassVar[Mapping[str, str]] = {
        "norm_offset": "added to every stored norm scale: 1.0 (PaLM's center_scale_at_zero) or 0.0 "
        "(default: 1.0 if scales average about 0, 0.0 if they average about 1; otherwise it must "
        "be given)",
        "scan_axis": "axis of stacked tensors that counts the layers (default 1, as T5X writes "
        "them; 0 if they were transposed)",
        "query_scale": "factor on queries (default: head width to the power of -1/2, "
        "rescale_logits of flaxformer; 1.0 without it)",
        "logit_scale": "factor on logits (default: model width to the power of -1/2 if the "
        "embedding is also the head, otherwise 1.0)",
    }

    def recognises(self, source: Source) -> bool:
        return any("q_wi_fused" in name for name in source.tensors) or _is_sequential(source)

    def read(
        self,
        source: Source,
        *,
        norm_offset: float | None = None,
        scan_axis: int = 1,
        query_scale: float | None = None,
        logit_scale: float | None = None,
    ) -> Reading:
        where = str(source.path)
        _refuse(source)
        named = parameters(source.tensors) or source.tensors  # names may be T5X's full paths
        tensors = _dequantised(_apart(named, scan_axis, where), where)
        config = _config(tensors, where)
        offset, warnings = shown_norm_offset(tensors, "/layer_norm/scale", norm_offset, 1.0, where)
        given = {
            "norm_offset": offset,
            "query_scale": query_scale,
            "logit_scale": 1.0 if logit_scale is None and not config.tied_head else logit_scale,
        }
        given = {option: number(option, x) for option, x in given.items() if x is not None}
        config = dataclasses.replace(config, **given)
        if LAST_NORM not in tensors:
            absent = f"tensor {LAST_NORM} is absent; the last norm is taken to have no scale"
            warnings = (absent, *warnings)
        return Reading(config, rules(config), tensors, warnings=warnings)


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """The table for a model whose layers are stored one by one."""
    head = () if config.tied_head else (rule(HEAD, "head", "D V -> D V"),)
    return (
        rule(EMBEDDING, "embedding", "V D -> V D"),
        *head,
        # Google's loaders of the largest models read no scale of the last norm: it has none.
        rule(LAST_NORM, "final_norm/scale", "D -> D", absent=1.0 - config.norm_offset),
        rule(LAYER + "layer_norm/scale", "layers/attention_norm/scale", "D -> D"),
        Rule(LAYER + "q_wi_fused/kernel", _QUERY_GATE_UP, axis=-1),
        Rule(LAYER + "kv_fused/kernel", _KEY_VALUE, axis=-1),
        Rule(LAYER + "o_wo_fused/kernel", _OUTPUT_DOWN, axis=1),
    )


def _is_sequential(source: Source) -> bool:
    return any("pre_self_attention_layer_norm" in name for name in source.tensors)


def _refuse(source: Source) -> None:
    for name in sorted(source.tensors):
        if "relpos_bias" in name:
            raise CalmError(
                f"{source.path}: tensor {name} is a relative position bias, which is not "
                "supported; PaLM has rotary positions"
            )
    if _is_sequential(source):
        raise CalmError(
            f"{source.path} is the sequential decoder of t5x/examples/decoder_only "
            "(pre_self_attention_layer_norm), which is not supported; PaLM has fused parallel "
            "layers (q_wi_fused)"
        )


def _apart(tensors: Mapping[str, Tensor], scan_axis: int, where: str) -> dict[str, Tensor]:
    """The tensors with stacked layers split, named like layers that are stored one by one."""
    if type(scan_axis) is not int or scan_axis not in (0, 1):
        raise CalmError(f"scan_axis is {scan_axis!r}; it must be 0 or 1")
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(STACKED)}
    stacked = {name: tensor for name, tensor in tensors.items() if name.startswith(STACKED)}
    _check_stacked(stacked, _width(tensors, where), scan_axis, where)
    for name, tensor in stacked.items():
        for layer, view in enumerate(unstack(tensor, scan_axis)):
            alone = LAYER.format(layer=layer) + name.removeprefix(STACKED)
            if alone in found:
                raise CalmError(f"{where}: tensor {alone} is also in {name}")
            found[alone] = view
    return found


def _check_stacked(stacked: Mapping[str, Tensor], width: int, scan_axis: int, where: str) -> None:
    """Raises `CalmError` if `scan_axis` contradicts the shapes, which may also allow both axes."""
    hint = f"try scan_axis={1 - scan_axis}"
    depths = {}
    for name, tensor in stacked.items():
        shape = tuple(tensor.shape)
        if len(shape) < 2:
            raise CalmError(f"{where}: tensor {name} has shape {shape}, without an axis of layers")
        depths[name] = shape[scan_axis]
        first = next(iter(depths))
        if depths[name] != depths[first]:
            raise CalmError(
                f"{where}: with scan_axis={scan_axis}, tensor {name} has {depths[name]} layers "
                f"and {first} {depths[first]}; {hint}"
            )
        starts_with_width = name.endswith(
            ("/layer_norm/scale", "kv_fused/kernel", "wi_fused/kernel")
        )
        if starts_with_width and shape[1 - scan_axis] != width:
            raise CalmError(
                f"{where}: with scan_axis={scan_axis}, tensor {name} of shape {shape} is for a "
                f"model width of {shape[1 - scan_axis]}, the embedding has {width}; {hint}"
            )


def _dequantised(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors, with a float `kernel` in place of each pair of `qkernel` and `qscale`."""
    found = dict(tensors)
    for name in tensors:
        path, _, leaf = name.rpartition("/")
        if leaf != "qkernel":
            continue
        kernel, scale = found.pop(name), found.pop(f"{path}/qscale", None)
        if scale is None:
            raise CalmError(f"{where}: tensor {path}/qscale is missing, which {name} needs")
        if np.dtype(kernel.dtype) != np.int8:
            raise CalmError(f"{where}: tensor {name} is {np.dtype(kernel.dtype)}, not int8")
        sizes = list(zip(scale.shape, kernel.shape, strict=False))
        if len(scale.shape) != len(kernel.shape) or any(s not in (1, size) for s, size in sizes):
            raise CalmError(
                f"{where}: tensor {path}/qscale of a layer has shape {tuple(scale.shape)}, which "
                f"does not scale {tuple(kernel.shape)}"
            )
        if f"{path}/kernel" in tensors:
            raise CalmError(f"{where}: tensor {path}/kernel is also there as int8")
        values = functools.partial(_product, kernel, scale)
        found[f"{path}/kernel"] = Computed(tuple(kernel.shape), np.dtype(np.float32), values)
    return found


def _product(kernel: Tensor, scale: Tensor) -> np.ndarray:
    return np.asarray(kernel[...], np.float32) * np.asarray(scale[...], np.float32)


def _config(tensors: Mapping[str, Tensor], where: str) -> DecoderConfig:
    """The config that the shapes show: the last axes of the fused kernels give H and f."""
    layers = {int(found[1]) for name in tensors if (found := re.match(_LAYER_NUMBER, name))}
    first = LAYER.format(layer=0)
    q_wi = shape_of(tensors, f"{first}q_wi_fused/kernel", 3, where)
    o_wo = shape_of(tensors, f"{first}o_wo_fused/kernel", 3, where)
    hidden = q_wi[2] - o_wo[1]
    head_dim = o_wo[1] - hidden
    if hidden < 1 or head_dim < 1:
        raise CalmError(
            f"{where}: each head has {q_wi[2]} features in {first}q_wi_fused/kernel and {o_wo[1]} "
            f"in o_wo_fused; these must be H + 2f and H + f, so H = {head_dim}, f = {hidden}"
        )
    return DecoderConfig.palm(
        vocab_size=shape_of(tensors, EMBEDDING, 2, where)[0],
        embed_dim=_width(tensors, where),
        num_layers=max(layers) + 1,
        num_heads=q_wi[1],
        head_dim=head_dim,
        mlp_dim=hidden * q_wi[1],
        tied_head=HEAD not in tensors,
    )


def _width(tensors: Mapping[str, Tensor], where: str) -> int:
    return shape_of(tensors, EMBEDDING, 2, where)[1]
