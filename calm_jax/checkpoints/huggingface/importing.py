"""Reads a bridge that was trained further in PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from flax import nnx

from calm_jax.checkpoints.composed import (
    check_identities,
    export_bridge,
    identities,
    load_frozen_models,
)
from calm_jax.checkpoints.convert.registry import refuse_bridges
from calm_jax.checkpoints.files import read_field
from calm_jax.checkpoints.huggingface.tensors import put_tensors
from calm_jax.checkpoints.kinds import PYTORCH_BRIDGE, kind_of
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, compose


def import_bridge(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    anchor: epath.PathLike,
    augments: Sequence[epath.PathLike],
) -> None:
    """Turns a bridge for PyTorch back into an exported bridge, which `load_composed` reads.

    Args:
        source: a folder made by `export_bridge(to="huggingface")`, or by `save_pretrained` of the
            model that transformers loaded from one.
        target: a folder that does not exist yet.
        anchor, augments: the frozen folders of the models that the bridge joins.

    Raises:
        CalmError: `source` is no such folder, or lacks a tensor; a frozen folder does not hold the
            model that the bridge was exported with; `target` exists or cannot be written. Bridges
            of google-deepmind/calm and of lucidrains' CALM-pytorch compute something else, and are
            refused by name.
    """
    opened = open_source(source)
    refuse_bridges(opened)
    config, where = opened.config or {}, str(opened.path)
    if (kind := kind_of(config)) != PYTORCH_BRIDGE:
        raise CalmError(f"{where} is {kind}, not {PYTORCH_BRIDGE}")
    fingerprints = read_field(config, "fingerprints", opened.config_path)
    roles = ["anchor", *(f"augment {number}" for number in range(len(fingerprints) - 1))]
    recorded = [
        {"role": role, "place": place, "fingerprint": fingerprint}
        for role, place, fingerprint in zip(
            roles, [config["anchor"], *config["augments"]], fingerprints, strict=True
        )
    ]
    if len(augments) != len(recorded) - 1:
        raise CalmError(
            f"{where} has a bridge to {len(recorded) - 1} augments, not {len(augments)}"
        )
    configs = [_composition(config, number) for number in range(len(augments))]
    # What follows in a fingerprint is the dtype that the model was cast to.
    dtypes = [fingerprint.partition(" as ")[2] or None for fingerprint in fingerprints]
    models = load_frozen_models([anchor, *augments], dtypes, configs, None)
    composed = compose(models[0], models[1:], configs, rngs=nnx.Rngs(0))
    check_identities(recorded, identities(composed), where)
    put_tensors(composed, opened.tensors, where)
    export_bridge(composed, target)


def _composition(config: Mapping[str, Any], augment: int) -> CompositionConfig:
    pairs = tuple((i, j) for number, i, j in config["connections"] if number == augment)
    return CompositionConfig(connections=pairs, **config["bridges"][augment])
