"""Parameters with logical axes, and modules as plain trees.

A parameter carries the names of its axes, which `calm_jax.sharding.RULES` maps to the mesh. Code
outside `models/` sees nested dicts of arrays with string keys, as optax, Orbax and `jax.jit` do.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from calm_jax import sharding
from calm_jax.errors import CalmError

Tree = dict[str, Any]

SCALE = "_scale"  # ends the name of the scales of a quantized matrix


def matrix(rngs: nnx.Rngs, shape, axes, *, inputs: int, scale: float = 1.0) -> nnx.Param:
    """A float32 matrix, N(0, 1/fan_in) times `scale`, whose first `inputs` axes are summed over."""
    std = scale * math.prod(shape[:inputs]) ** -0.5
    summed = tuple(range(-len(shape), inputs - len(shape)))
    return weight(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes, summed)


def weight(value: jax.Array, axes, summed: tuple[int, ...]) -> nnx.Param:
    """A matrix; `summed` are the axes that its product sums over, as negative indices."""
    return nnx.Param(value, axes=axes, summed=summed)


def constant(value: float, shape, axes) -> nnx.Param:
    """A float32 array filled with `value`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], keys: jax.Array) -> nnx.Module:
    """One module per key, with parameters stacked along leading axes of the shape of `keys`."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key):
        return nnx.state(make(nnx.Rngs(params=key)))

    for _ in range(keys.ndim):
        init = jax.vmap(init)
    return nnx.merge(graphdef, init(keys))


class Structure:
    """A module without its arrays, which turns a tree of arrays back into the module."""

    def __init__(self, module: nnx.Module):
        self.graphdef, state = nnx.split(module)
        self.state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def merge(self, tree: Mapping[str, Any]) -> nnx.Module:
        """The module with the arrays of `tree`."""
        state = jax.tree.map(lambda x: x, self.state)
        nnx.replace_by_pure_dict(state, nnx.statelib.restore_int_paths(tree))
        return nnx.merge(self.graphdef, state)

    def variables(self) -> dict[tuple[str, ...], nnx.Variable]:
        """Every variable by its path in the tree."""
        flat = nnx.to_flat_state(self.state)
        return {tuple(map(str, path)): variable for path, variable in flat}

    def abstract(self) -> Tree:
        """`jax.ShapeDtypeStruct` of every array."""
        return _string_keys(nnx.to_pure_dict(self.state))

    def summed(self) -> dict[str, tuple[int, ...]]:
        """The axes that the product of each matrix sums over, as negative indices, by path."""
        return {
            "/".join(path): variable.get_metadata("summed")
            for path, variable in self.variables().items()
            if variable.has_metadata("summed")
        }

    def projections(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The axes that each matrix's product sums over, and its others, by path.

        As negative indices, since stacked layers have axes in front of them. Embeddings and heads,
        which have a row for each token, are left out.
        """
        found, variables = {}, self.variables()
        for path, summed in self.summed().items():
            axes = variables[tuple(path.split("/"))].get_metadata("axes")
            if "vocab" not in axes:
                others = tuple(axis for axis in range(-len(axes), 0) if axis not in summed)
                found[path] = (summed, others)
        return found

    def shardings(self, mesh: jax.sharding.Mesh, rules: sharding.Rules = sharding.RULES) -> Tree:
        """`NamedSharding` of every array; raises `CalmError` as `sharding.array_sharding`."""
        found = {}
        for path, variable in self.variables().items():
            # An augment that is not a decoder may have arrays without axes, which are not split.
            axes, shape = variable.get_metadata("axes", ()), variable.get_value().shape
            found[path] = sharding.array_sharding("/".join(path), shape, axes, mesh, rules)
        return traverse_util.unflatten_dict(found)


def module_tree(module: nnx.Module) -> Tree:
    """The module's arrays as nested dicts with string keys; nothing is copied."""
    return _string_keys(nnx.to_pure_dict(nnx.state(module)))


def path_name(path) -> str:
    """`a/b/c` for a key path of `jax.tree`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def insert(tree: Tree, path: str, leaf: Any) -> None:
    """Sets the leaf at `a/b/c`, creating dicts as needed."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def check_same_tree(expected: Tree, found: Tree, where: str) -> None:
    """Raises `CalmError` at the first path whose presence or shape differs."""
    expected, found = (
        {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (expected, found)
    )
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            raise CalmError(f"{where}: {path} is missing")
        if path not in expected:
            raise CalmError(f"{where}: {path} is not part of the model")
        if expected[path].shape != found[path].shape:
            raise CalmError(
                f"{where}: {path} has shape {tuple(found[path].shape)}, the model needs "
                f"{tuple(expected[path].shape)}"
            )


def count(tree: Tree) -> int:
    """Number of parameters: two to a byte in uint8, as int4 has them; scales are none."""
    return sum(
        math.prod(leaf.shape) * (2 if leaf.dtype == jnp.uint8 else 1)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if not path_name(path).endswith(SCALE)
    )


def size_in_bytes(tree: Any) -> int:
    """Bytes of all arrays together, each counted once however many devices hold it."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _string_keys(tree):
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _string_keys(value) for key, value in tree.items()}
