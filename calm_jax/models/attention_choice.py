"""Chooses the backend of a model's attention: the best that the devices and the model allow.

Training chooses once, by the devices of its mesh; these may be absent, if a program is compiled
ahead of time for them. Otherwise each call chooses by the default device and the inputs.
"""

import dataclasses

import jax

from calm_jax.errors import CalmError
from calm_jax.models.attention_kernels import SPLASH_BLOCKS
from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.inputs import Inputs

BACKENDS = ("xla", "chunked", "splash", "cudnn")

# Up to this length the T x S logits are small enough for XLA's plain attention.
SHORT = 1024


@dataclasses.dataclass(frozen=True)
class Need:
    """What the attention of a model or of a bridge requires of a backend.

    Attributes:
        whose: the name of the model in messages.
        whole_rows: whether a query sees all earlier keys of its segment. False for `encoder_only`
            bridges, which see only the prompt.
        local_layers: whether some layers see only a window.
    """

    whose: str
    head_dim: int
    dtype: str
    logit_cap: float | None = None
    whole_rows: bool = True
    local_layers: bool = False

    @classmethod
    def of_decoder(cls, whose: str, config: DecoderConfig) -> "Need":
        return cls(
            whose,
            config.head_dim,
            config.dtype,
            config.attention_logit_cap,
            local_layers=any(config.local_layers),
        )

    @classmethod
    def of_bridge(
        cls, config: CompositionConfig, anchor: DecoderConfig, latent_dim: int | None = None
    ) -> "Need":
        """`latent_dim`: the width of keys that are latents, which takes the place of a head's."""
        head_dim = latent_dim or heads(config, anchor)[1]
        return cls("f_cross", head_dim, anchor.dtype, None, not config.encoder_only)


def choose(requested: str, device: jax.Device, need: Need, *, length: int, packed: bool) -> str:
    """The backend, one of `BACKENDS`.

    Args:
        requested: one of `BACKENDS`, or "auto".
        device: any device of the mesh, since all are of one kind; it may be absent.
        length: tokens in a row.
        packed: whether a row may hold several segments, or padding before its tokens.

    Raises:
        CalmError: `requested` is unknown or unsupported; the message says why.
    """
    if requested not in ("auto", *BACKENDS):
        raise CalmError(f"attention is {requested!r}; known are {('auto', *BACKENDS)}")
    if requested != "auto":
        reason = _refusal(requested, device, need, length, packed)
        if reason is not None:
            raise CalmError(f"attention {requested!r} {reason}")
        return requested
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform)
    if kernel is not None and _refusal(kernel, device, need, length, packed) is None:
        return kernel
    return "xla" if device.platform != "tpu" and length <= SHORT else "chunked"


def chosen(requested: str, need: Need, queries: Inputs, keys: Inputs) -> str:
    """The backend for these inputs: `requested` unless that is "auto"."""
    if requested != "auto":
        return requested
    T, S = queries.shape[1], keys.shape[1]
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):  # the name of a platform, or None
        device = jax.local_devices(backend=device)[0]
    if queries.order_BT is None and keys.order_BT is None and T == S:
        return choose("auto", device, need, length=T, packed=queries.packed)
    decodes = is_one_of_many(queries, keys) and not need.local_layers
    if decodes and _refusal("cudnn", device, need, T, packed=False) is None:
        return "cudnn"
    return "xla" if T * S <= SHORT * SHORT else "chunked"


def is_one_of_many(queries: Inputs, keys: Inputs) -> bool:
    """Whether each row has one query, and its segment alone in keys in the order of the array."""
    ordered = queries.order_BT is not None and keys.order_BT is None
    return queries.shape[1] == 1 and ordered and not queries.packed


def _refusal(backend: str, device: jax.Device, need: Need, length: int, packed: bool) -> str | None:
    """Why a backend does not support this; None if it does."""
    if backend == "splash":
        if device.platform != "tpu":
            return f"needs a TPU, the devices are {device.platform}"
        if length % SPLASH_BLOCKS[-1]:
            return f"needs a length divisible by {SPLASH_BLOCKS[-1]}, not {length}"
    if backend == "cudnn":
        capability = _cuda_capability(device)
        if capability is None:
            return f"needs an NVIDIA GPU, the devices are {device.platform}"
        widest = 256 if capability >= (9, 0) else 128
        if capability < (8, 0):
            return f"needs compute capability 8.0, the devices have {device.compute_capability}"
        if need.logit_cap is not None:
            return f"has no soft cap, {need.whose} has {need.logit_cap}"
        if packed:
            return "does not support packed rows, but data.pack is True"
        if not need.whole_rows:
            return f"cannot hide keys, as composition.encoder_only requires of {need.whose}"
        if need.dtype not in ("bfloat16", "float16"):
            return f"computes in bfloat16, {need.whose} has dtype {need.dtype}"
        if need.head_dim % 8 or need.head_dim > widest:
            return (
                f"needs a head_dim divisible by 8 and at most {widest}; "
                f"{need.whose} has {need.head_dim}"
            )
    return None


def _cuda_capability(device: jax.Device) -> tuple[int, ...] | None:
    """(major, minor) of an NVIDIA GPU; None for other devices (AMD's versions have letters)."""
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    if device.platform != "gpu" or not all(number.isdecimal() for number in numbers):
        return None
    return tuple(map(int, numbers))
