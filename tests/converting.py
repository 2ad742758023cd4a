"""A decoder straight from a source's arrays in memory: no folder is written."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm_jax.checkpoints.convert.table import check_names, check_shapes, sizes
from calm_jax.models import Decoder
from calm_jax.models.parameters import Structure, check_same_tree


def decoder_in_memory(family, source, dtype="float32", **options) -> Decoder:
    """The model that `family` reads from `source`."""
    reading = family.read(source, **options)
    config = dataclasses.replace(reading.config, dtype=dtype)
    where = str(source.path)
    check_names(reading.rules, reading.unused, config.num_layers, reading.tensors, where)
    check_shapes(reading.rules, config, reading.tensors, where)
    arrays: dict[str, list] = {}
    for rule in reading.rules:
        for name in rule.names(config.num_layers):
            if name in reading.tensors:
                tensor = np.asarray(reading.tensors[name][...])
            else:
                tensor = np.full(rule.source_shape(sizes(config)), rule.absent, np.float32)
            for target, array in rule.split(tensor, sizes(config)):
                arrays.setdefault(target, []).append(array.astype(dtype))
    tree: dict = {}
    for path, parts in arrays.items():
        *folders, leaf = path.split("/")
        if path.startswith("layers/"):
            whole = np.stack(parts)
        else:
            (whole,) = parts
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(whole)
    structure = Structure(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    check_same_tree(structure.abstract(), tree, where)
    return structure.merge(tree)
