"""The bytes that a plan's models cache for each token in decoding, and how many rows fit."""

from typing import Any

from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.decoding.memory import token_bytes
from calm_jax.planning import formula
from calm_jax.planning.compiled_plan import Plan
from calm_jax.training.abstract_run import decoder_configs
from calm_jax.training.run_model import composition_configs


def of_plan(config: ConfigDict, plan: Plan) -> list[dict[str, Any]]:
    """The cached bytes of a token on a chip, in the models' own dtypes and in int8.

    Models are split over the plan's mesh as in training, without the optimizer's state.

    Returns:
        for each dtype, "dtype"; in bytes, "anchor", "augments" (a token that the augment reads) and
        "total" (a token of the anchor, with the augments' tokens beside it); "cross" of each
        augment, with "kept", "latent" (whether that form is kept) and "other", the bytes of the
        other form or None; "rows" of the plan's length that fit on all chips, and their "tokens".
    """
    mesh = formula.abstract_mesh(plan["mesh"])
    anchor, *augments = decoder_configs(config)
    compositions = composition_configs(config) if augments else []
    trees = plan["memory"]["trees"]
    weights = sum(tree["bytes"] for tree in trees if tree["name"] != "optimizer")
    free = max(0, plan["memory"]["available"] - weights)
    length = plan["length"]
    own = {number: count for number, count in enumerate(plan["own_lengths"]) if count}
    found = []
    for dtype in (None, "int8"):
        token = token_bytes(anchor, augments, compositions, dtype, mesh)
        row = token.of_row(length, own)
        rows = free // row * sharding.ways("batch", mesh.size, mesh)
        found.append(
            {
                "dtype": dtype or "models' dtype",
                "anchor": token.anchor,
                "augments": list(token.augments),
                "cross": [
                    {
                        "kept": each.kept,
                        "latent": each.is_latent,
                        "other": each.projected if each.is_latent else each.latent,
                    }
                    for each in token.cross
                ],
                "total": round(row / length),
                "rows": rows,
                "tokens": rows * length,
            }
        )
    return found
