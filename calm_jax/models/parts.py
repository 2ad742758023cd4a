"""What of a model is trained: its arrays as a trainable and a frozen tree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models.lora import LoRAParam
from calm_jax.models.parameters import Structure, Tree, module_tree

# What can be asked for by name, as filters of `flax.nnx`: by path or by type of variable.
TRAINABLE: Mapping[str, nnx.filterlib.Filter] = {
    "all": ...,
    "bridge": nnx.PathContains("bridge"),
    "lora": LoRAParam,
}


class Parts:
    """How the arrays of a model fall into two trees: one is trained, one is frozen.

    Each has the paths of the whole model's tree; what one holds, the other lacks.

    Args:
        model: a decoder or a composed model, of which the shapes suffice.
        trainable: names of `TRAINABLE`, or filters of `flax.nnx`, of which an array must match one;
            default: the bridge and a low-rank update, whichever there is, else everything.

    Attributes:
        structure: the way back from arrays to the model.
        names: the path of each named part of the model: "decoder"; or "anchor", "augment 0", …,
            "bridge".

    Raises:
        CalmError: an unknown name, or a filter that no array matches.
    """

    def __init__(self, model: nnx.Module, trainable: Sequence[nnx.filterlib.Filter] | None = None):
        self.structure = Structure(model)
        self.names: Mapping[str, tuple[str, ...]] = model.part_paths
        variables = self.structure.variables()

        def matching(wanted: nnx.filterlib.Filter) -> set[tuple[str, ...]]:
            named = TRAINABLE.get(wanted, wanted) if isinstance(wanted, str) else wanted
            matches = nnx.filterlib.to_predicate(named)
            return {path for path, variable in variables.items() if matches(path, variable)}

        if not trainable:
            trainable = [name for name in ("bridge", "lora") if matching(name)] or ["all"]
        for wanted in trainable:
            if not matching(wanted):
                raise CalmError(f"train.trainable has {wanted!r}, of which the model has nothing")
        self._trained = set().union(*map(matching, trainable))

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """(trainable, frozen) of a whole model's tree."""
        trained = self._trained
        return (
            _filtered(tree, lambda path: path in trained),
            _filtered(tree, lambda path: path not in trained),
        )

    def merge(self, trainable: Tree, frozen: Tree) -> nnx.Module:
        """The model of the two trees."""
        return self.structure.merge(_union(trainable, frozen))

    def of(self, model: nnx.Module) -> tuple[Tree, Tree]:
        """(trainable, frozen) arrays of a model of this structure, what is trained in float32."""
        trainable, frozen = self.split(module_tree(model))
        return jax.tree.map(lambda x: x.astype(jnp.float32), trainable), frozen

    def abstract(self) -> tuple[Tree, Tree]:
        """(trainable, frozen) shapes and dtypes, what is trained in float32."""
        trainable, frozen = self.split(self.structure.abstract())
        in_float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
        return in_float32, frozen

    def shardings(
        self, mesh: jax.sharding.Mesh, rules: sharding.Rules = sharding.RULES
    ) -> tuple[Tree, Tree]:
        """(trainable, frozen) shardings."""
        return self.split(self.structure.shardings(mesh, rules))

    def named(self, tree: Tree) -> dict[str, Tree]:
        """The part of a trainable, frozen or whole tree that each name has in it, empty or not."""
        return {name: _at(tree, path) for name, path in self.names.items()}


def _filtered(tree: Any, keep: Callable[[tuple[str, ...]], bool], path=()) -> Any:
    """The leaves of nested dicts whose path is kept, without dicts that are empty."""
    result = {}
    for key, value in tree.items():
        below = (*path, key)
        if isinstance(value, Mapping):
            value = _filtered(value, keep, below)
            if value:
                result[key] = value
        elif keep(below):
            result[key] = value
    return result


def _union(one: Tree, other: Tree) -> Tree:
    """Nested dicts with the leaves of both."""
    result = dict(one)
    for key, value in other.items():
        result[key] = _union(result[key], value) if key in result else value
    return result


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for key in path:
        tree = tree.get(key, {})
    return tree
