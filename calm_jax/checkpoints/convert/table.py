"""A family's table: which of our arrays each source tensor holds, used in both directions.

A rule names one source tensor and our arrays that are slices of it, each with an einops pattern
from its layout in the source to ours; the export reverses the patterns. The sizes of the axes come
from the model's config, so every shape is known before any weight is read.

Axes: V vocabulary, D model width, N heads, K key heads, H head width, F MLP width, f = F / N; of
image encoders, C channels, h and w height and width of a patch, P positions of an image.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import einops
import numpy as np

from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig
from calm_jax.models.image_config import ImageEncoderConfig


@dataclasses.dataclass(frozen=True)
class Slice:
    """One of our arrays as a slice of a source tensor.

    If the source has one tensor for each layer, the slice has no axis of layers.
    """

    target: str  # the array's path in the canonical tree
    pattern: str  # for `einops.rearrange`, from the source's layout to ours

    def source_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(
            math.prod(1 if name == "1" else sizes[name] for name in group)
            for group in _groups(self.pattern)
        )

    def to_ours(self, x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """`x` in our layout; a view where numpy can make one."""
        return einops.rearrange(x, self.pattern, **self._used(sizes))

    def to_source(self, x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse of `to_ours`."""
        left, right = self.pattern.split("->")
        return einops.rearrange(x, f"{right} -> {left}", **self._used(sizes))

    def _used(self, sizes: Mapping[str, int]) -> dict[str, int]:
        names = {name for group in _groups(self.pattern) for name in group}
        return {name: size for name, size in sizes.items() if name in names}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One source tensor, or one for each layer, in a family's table."""

    source: str  # the tensor's name, with "{layer}" for the number of its layer
    slices: tuple[Slice, ...]  # its contents, side by side along `axis`
    axis: int = 0
    absent: float | None = None  # fills the slices if there is no such tensor; None: it must exist
    first_layer: int = 0  # the number of the first layer in the source

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.source

    def names(self, num_layers: int) -> Iterator[str]:
        """The names of the source tensors: one for each layer, or a single one."""
        for layer in range(num_layers if self.per_layer else 1):
            yield self.source.format(layer=self.first_layer + layer)

    def source_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that each of the source tensors must have."""
        shapes = [list(one.source_shape(sizes)) for one in self.slices]
        axis = self.axis % len(shapes[0])
        whole = list(shapes[0])
        whole[axis] = sum(shape[axis] for shape in shapes)
        return tuple(whole)

    def split(
        self, tensor: np.ndarray, sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(target, array in our layout) of each slice; views of `tensor` where possible."""
        start = 0
        axis = self.axis % tensor.ndim
        for one in self.slices:
            stop = start + one.source_shape(sizes)[axis]
            yield (
                one.target,
                one.to_ours(tensor[(slice(None),) * axis + (slice(start, stop),)], sizes),
            )
            start = stop

    def join(self, arrays: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """The source tensor made of its slices: the inverse of `split`."""
        found = [one.to_source(x, sizes) for one, x in zip(self.slices, arrays, strict=True)]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=self.axis)


@dataclasses.dataclass(frozen=True)
class Unused:
    """Tensors that a source may hold although the model does not need them."""

    pattern: str  # a regular expression for the whole name
    must: Literal["anything", "zero", "same"] = "anything"  # "same": the entries of tensor `other`
    other: str = ""

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def rule(source: str, target: str, pattern: str, **fields) -> Rule:
    """A `Rule` of one slice."""
    return Rule(source, (Slice(target, pattern),), **fields)


def sizes(config: DecoderConfig | ImageEncoderConfig) -> dict[str, int]:
    """The size of every axis that patterns may name."""
    if isinstance(config, ImageEncoderConfig):
        (h, w), (P, _) = config.patch_size, config.item_shape
        return {**sizes(config.of_layers), "C": config.channels, "h": h, "w": w, "P": P}
    found = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_dim,
    }
    if config.mlp_dim % config.num_heads == 0:
        found["f"] = config.mlp_dim // config.num_heads
    return found


def check_names(
    rules: Sequence[Rule],
    unused: Sequence[Unused],
    num_layers: int,
    tensors: Mapping[str, object],
    where: str,
) -> None:
    """Raises `CalmError` naming the first tensor that is missing, or that no rule reads."""
    known = set()
    for line in rules:
        for name in line.names(num_layers):
            known.add(name)
            if name not in tensors and line.absent is None:
                raise CalmError(f"{where}: tensor {name} is missing")
    for name in sorted(tensors):
        if name not in known and not any(entry.matches(name) for entry in unused):
            raise CalmError(
                f"{where}: tensor {name} is not part of the model that its config describes "
                f"({num_layers} layers)"
            )


def check_shapes(
    rules: Sequence[Rule],
    config: DecoderConfig | ImageEncoderConfig,
    tensors: Mapping[str, object],
    where: str,
) -> None:
    """Raises `CalmError` naming the first tensor whose shape does not fit the config."""
    for line in rules:
        expected = line.source_shape(sizes(config))
        for name in line.names(config.num_layers):
            if name in tensors and tuple(tensors[name].shape) != expected:
                raise CalmError(
                    f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, the config "
                    f"says {expected}"
                )


def check_unused(unused: Sequence[Unused], tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises `CalmError` naming the first unused tensor that would change what is computed."""
    for entry in unused:
        if entry.must == "anything":
            continue
        for name in filter(entry.matches, sorted(tensors)):
            found = tensors[name][...]
            if entry.must == "zero" and np.any(found):
                raise CalmError(
                    f"{where}: tensor {name} is not zero, but the model has no place for it"
                )
            if entry.must == "same":
                other = tensors[entry.other][...]
                if found.dtype != other.dtype or not np.array_equal(found, other):
                    raise CalmError(
                        f"{where}: tensors {name} and {entry.other} differ; the model has only one"
                    )


def _groups(pattern: str) -> list[list[str]]:
    left = pattern.split("->")[0]
    return [(inside or alone).split() for inside, alone in re.findall(r"\(([^)]*)\)|(\S+)", left)]
