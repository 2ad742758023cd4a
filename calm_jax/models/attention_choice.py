"""Which backend computes a model's attention: the best that the devices and the model allow.

A training chooses once, by the devices of its mesh: while a program is compiled for devices that
are not here, JAX's default device is another. A model for which nothing was chosen takes what suits
the default device and the inputs at hand.
"""

import dataclasses

import jax

from calm_jax.errors import CalmError
from calm_jax.models.attention_kernels import SPLASH_BLOCKS
from calm_jax.models.config import CompositionConfig, DecoderConfig, heads
from calm_jax.models.inputs import Inputs

BACKENDS = ("xla", "chunked", "splash", "cudnn")

# Up to this length the square of it is small: XLA's attention, which the others are held against.
SHORT = 1024


@dataclasses.dataclass(frozen=True)
class Need:
    """What the attention of one model, or of a bridge, asks of a backend.

    `whose` names it in messages; `whole_rows`: all keys of a token's segment before it are seen,
    as nothing but the prompt is with `encoder_only`.
    """

    whose: str
    head_dim: int
    dtype: str
    logit_cap: float | None = None
    whole_rows: bool = True

    @classmethod
    def of_decoder(cls, whose: str, config: DecoderConfig) -> "Need":
        return cls(whose, config.head_dim, config.dtype, config.attention_logit_cap)

    @classmethod
    def of_bridge(cls, config: CompositionConfig, anchor: DecoderConfig) -> "Need":
        return cls("f_cross", heads(config, anchor)[1], anchor.dtype, None, not config.encoder_only)


def choose(requested: str, device: jax.Device, need: Need, *, length: int, packed: bool) -> str:
    """The backend, one of `BACKENDS`.

    Args:
        requested: one of them, or "auto".
        device: one of the mesh's, which are all of a kind; it need not be here.
        length: tokens of a row.
        packed: whether a row may hold several segments, or padding before its tokens.

    Raises:
        CalmError: `requested` is unknown or impossible; says why.
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
    if queries.order_BT is not None or T != S:
        return "xla" if T * S <= SHORT * SHORT else "chunked"
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return choose("auto", device, need, length=T, packed=queries.packed)


def _refusal(backend: str, device: jax.Device, need: Need, length: int, packed: bool) -> str | None:
    """Why a backend cannot compute this; None when it can."""
    if backend == "splash":
        if device.platform != "tpu":
            return f"needs a TPU, the devices are {device.platform}"
        if length % SPLASH_BLOCKS[-1]:
            return f"needs a length that {SPLASH_BLOCKS[-1]} divides, not {length}"
    if backend == "cudnn":
        capability = _cuda_capability(device)
        if capability is None:
            return f"needs an NVIDIA GPU, the devices are {device.platform}"
        widest = 256 if capability >= (9, 0) else 128
        if capability < (8, 0):
            return f"needs compute capability 8.0, the devices' is {device.compute_capability}"
        if need.logit_cap is not None:
            return f"has no soft cap, {need.whose}'s is {need.logit_cap}"
        if packed:
            return "keeps no segments apart, and data.pack is True"
        if not need.whole_rows:
            return f"hides no keys, as composition.encoder_only asks of {need.whose}"
        if need.dtype not in ("bfloat16", "float16"):
            return f"computes in bfloat16, {need.whose}'s dtype is {need.dtype}"
        if need.head_dim % 8 or need.head_dim > widest:
            return (
                f"needs a head_dim that 8 divides, at most {widest}; "
                f"{need.whose}'s is {need.head_dim}"
            )
    return None


def _cuda_capability(device: jax.Device) -> tuple[int, ...] | None:
    """(major, minor) of an NVIDIA GPU; AMD's are named by letters."""
    numbers = str(getattr(device, "compute_capability", "")).split(".")
    if device.platform != "gpu" or not all(number.isdecimal() for number in numbers):
        return None
    return tuple(map(int, numbers))
