"""Which arrays of a model are trained: a trainable and a frozen tree."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from calm_jax import sharding
from calm_jax.errors import CalmError
from calm_jax.models.lora import LoRAParam
from calm_jax.models.parameters import Structure, Tree, module_tree

# What `train.trainable` may name, as filters of `flax.nnx`.
TRAINABLE: Mapping[str, nnx.filterlib.Filter] = {
    "all": ...,
    "bridge": nnx.PathContains("bridge"),
    "lora": LoRAParam,
}


class Parts:
    """Splits the arrays of a model into a trainable and a frozen tree.

    Both trees keep the paths of the whole model's tree, and each array is in exactly one of them.

    Args:
        model: a decoder or a composed model; its arrays may be abstract.
        trainable: names of `TRAINABLE` or filters of `flax.nnx`; an array is trained if any of them
            matches. Default: the bridge and low-rank updates; if there are none, everything.

    Attributes:
        structure: rebuilds the model from its arrays.
        names: the path of each named part of the model: "decoder"; or "anchor", "augment 0", …,
            "bridge".

    Raises:
        CalmError: an unknown name, a filter that matches no array, or an augment with a low-rank
            update.
    """

    def __init__(self, model: nnx.Module, trainable: Sequence[nnx.filterlib.Filter] | None = None):
        self.structure = Structure(model)
        self.names: Mapping[str, tuple[str, ...]] = model.part_paths
        variables = self.structure.variables()
        for path, variable in variables.items():
            if path[0] == "augments" and isinstance(variable, LoRAParam):
                raise CalmError(
                    f"augment {path[1]} has a low-rank update, which no gradient reaches; merge it "
                    "into the augment (calm_jax.models.lora.merge_lora)"
                )

        def matching(wanted: nnx.filterlib.Filter) -> set[tuple[str, ...]]:
            named = TRAINABLE.get(wanted, wanted) if isinstance(wanted, str) else wanted
            matches = nnx.filterlib.to_predicate(named)
            return {path for path, variable in variables.items() if matches(path, variable)}

        if not trainable:
            trainable = [name for name in ("bridge", "lora") if matching(name)] or ["all"]
        for wanted in trainable:
            if not matching(wanted):
                raise CalmError(f"train.trainable has {wanted!r}, which the model does not have")
        self._trained = set().union(*map(matching, trainable))

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """(trainable, frozen) of a whole model's tree."""
        trainable, frozen = {}, {}
        for path, leaf in traverse_util.flatten_dict(tree).items():
            (trainable if path in self._trained else frozen)[path] = leaf
        return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)

    def merge(self, trainable: Tree, frozen: Tree) -> nnx.Module:
        """The model with the arrays of both trees."""
        flat = traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen)
        return self.structure.merge(traverse_util.unflatten_dict(flat))

    def of(self, model: nnx.Module) -> tuple[Tree, Tree]:
        """(trainable, frozen) arrays of a model of this structure; trainable ones in float32."""
        trainable, frozen = self.split(module_tree(model))
        return jax.tree.map(lambda x: x.astype(jnp.float32), trainable), frozen

    def abstract(self) -> tuple[Tree, Tree]:
        """(trainable, frozen) shapes and dtypes; trainable ones in float32."""
        trainable, frozen = self.split(self.structure.abstract())
        in_float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable)
        return in_float32, frozen

    def shardings(
        self, mesh: jax.sharding.Mesh, rules: sharding.Rules = sharding.RULES
    ) -> tuple[Tree, Tree]:
        """(trainable, frozen) shardings."""
        return self.split(self.structure.shardings(mesh, rules))

    def named(self, tree: Tree) -> dict[str, Tree]:
        """The subtree of each named part in a trainable, frozen or whole tree; it may be empty."""
        return {
            name: functools.reduce(lambda at, key: at.get(key, {}), path, tree)
            for name, path in self.names.items()
        }
