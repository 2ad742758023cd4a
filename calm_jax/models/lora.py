"""Low-rank updates of frozen matrices (LoRA, arXiv 2106.09685): W + alpha / rank · A B.

The factors are attributes of the matrix's module: `query_lora_a` and `query_lora_b` of `query`. A
starts random and B zero, so a new update changes nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax.errors import CalmError
from calm_jax.models.origin import Origin
from calm_jax.models.quantized import kind_of, shape_of

A, B = "_lora_a", "_lora_b"


class LoRAParam(nnx.Param):
    """A factor of a low-rank update."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """A low-rank update of a model's layers. Raises `CalmError` for invalid values.

    Attributes:
        rank: r of A [..., r] and B [r, ...].
        alpha: the update is multiplied by alpha / rank; None: by 1.
        targets: names of matrices, such as ("query", "value"); empty: all.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise CalmError(f"lora.rank is {self.rank}; it must be at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise CalmError(f"lora.alpha is {self.alpha}; it must be a number above 0")

    @property
    def scale(self) -> float:
        """The factor of A B in the update."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which `lora_of` takes."""
        return {"rank": self.rank, "alpha": self.alpha or 0.0, "targets": list(self.targets)}


def lora_of(fields: Mapping[str, Any]) -> LoRAConfig | None:
    """The update that section `lora` of a run's config describes; None if its rank is 0."""
    if not fields["rank"]:
        return None
    return LoRAConfig(fields["rank"], fields["alpha"] or None, tuple(fields["targets"]))


def add_lora(decoder: nnx.Module, config: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Adds an update with float32 factors to matrices of a decoder's layers, in place.

    A is uniform as in the paper's code.

    Raises:
        CalmError: the layers lack a target, or the decoder already has an update.
    """
    if (before := lora_in(decoder)) is not None:
        raise CalmError(f"the decoder already has a LoRA update, {before}; merge it first")
    matrices = {
        name: (module, param)
        for _, module in nnx.iter_modules(decoder.layers)
        for name, param in vars(module).items()
        if isinstance(param, nnx.Param) and param.has_metadata("summed")
    }
    for name in config.targets:
        if name not in matrices:
            raise CalmError(f"lora.targets names {name!r}; the layers have {sorted(matrices)}")
    for name in config.targets or sorted(matrices):
        module, param = matrices[name]
        axes, summed = param.get_metadata("axes"), param.get_metadata("summed")
        shape = shape_of(param)
        stacked, size = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        inputs = [i for i in range(len(axes)) if i - len(axes) in summed]
        outputs = [i for i in range(len(axes)) if i - len(axes) not in summed]
        limit = math.prod(size[i] for i in inputs) ** -0.5
        a_shape = (*stacked, *(size[i] for i in inputs), config.rank)
        b_shape = (*stacked, config.rank, *(size[i] for i in outputs))
        a = jax.random.uniform(rngs.params(), a_shape, jnp.float32, -limit, limit)
        b = jnp.zeros(b_shape, jnp.float32)
        setattr(module, name + A, LoRAParam(a, axes=(*(axes[i] for i in inputs), "lora_rank")))
        setattr(module, name + B, LoRAParam(b, axes=("lora_rank", *(axes[i] for i in outputs))))
        module.lora_scale = config.scale


def lora_in(decoder: nnx.Module) -> LoRAConfig | None:
    """The update of a decoder; None if it has none."""
    names, ranks, scales = [], set(), set()
    for _, module in nnx.iter_modules(decoder.layers):
        for attribute, param in vars(module).items():
            if attribute.endswith(A):
                names.append(attribute.removesuffix(A))
                ranks.add(param.get_value().shape[-1])
                scales.add(module.lora_scale)
    if not names:
        return None
    (rank,), (scale,) = ranks, scales
    return LoRAConfig(rank, None if scale == 1 else scale * rank, tuple(sorted(names)))


def lora_product(equation: str, x: jax.Array, module: nnx.Module, name: str) -> jax.Array | None:
    """What the update adds to `einsum(equation, x, W)`, in the dtype of `x`; None without one."""
    if not hasattr(module, name + A):
        return None
    factors, result = equation.split("->")
    of_x, of_weight = factors.split(",")
    inputs = "".join(axis for axis in of_weight if axis not in result)
    outputs = "".join(axis for axis in of_weight if axis in result)
    kept = "".join(axis for axis in of_x if axis not in inputs)
    a, b = (getattr(module, name + factor)[...].astype(x.dtype) for factor in (A, B))
    low = jnp.einsum(f"{of_x},{inputs}r->{kept}r", x, a)
    return jnp.einsum(f"{kept}r,r{outputs}->{result}", low * module.lora_scale, b)


def merge_lora(decoder: nnx.Module) -> None:
    """Adds a decoder's update, if any, to its matrices and removes it, in place.

    It is then no longer the model it was loaded from: of its origin, only the vocabulary remains.

    Raises:
        CalmError: a matrix is int8 or int4 and cannot hold the sum.
    """
    if lora_in(decoder) is None:
        return
    for _, module in list(nnx.iter_modules(decoder.layers)):
        for attribute in [name for name in vars(module) if name.endswith(A)]:
            name = attribute.removesuffix(A)
            matrix = getattr(module, name)
            weight = matrix.get_value()
            if kind := kind_of(matrix):
                raise CalmError(f"{name} is {kind}; a LoRA update can only be merged into floats")
            axes = weight.ndim - len(matrix.get_metadata("axes"))
            a, b = getattr(module, name + A).get_value(), getattr(module, name + B).get_value()
            product = jnp.tensordot
            for _ in range(axes):
                product = jax.vmap(product, in_axes=(0, 0, None))
            update = module.lora_scale * product(a, b, 1)
            matrix.set_value((weight.astype(jnp.float32) + update).astype(weight.dtype))
            delattr(module, name + A)
            delattr(module, name + B)
        if hasattr(module, "lora_scale"):
            del module.lora_scale
    decoder.origin = Origin(decoder.vocabulary)
