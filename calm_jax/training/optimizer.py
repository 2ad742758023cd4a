"""Optimizers by name, as optax chains."""

import math
from collections.abc import Mapping

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

from calm_jax.errors import CalmError
from calm_jax.models.parameters import Tree, path_name

# Suffixes of parameters that are not matrices, although stacking gives them two axes.
_NOT_DECAYED = ("bias", "norm", "scale")

# For each matrix the axes that its product sums over, and its others, as negative indices.
Projections = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def make_optimizer(
    config: ConfigDict, num_steps: int, projections: Projections
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run and its learning rate by step.

    Moments are float32, like the trained weights. Weight decay is decoupled, multiplied by the
    learning rate, and applied only to matrices.

    Args:
        config: the section `optimizer` of a run's config.
        num_steps: the step at which the schedule ends.
        projections: the matrices that "muon" makes orthogonal steps of, by path, as
            `calm_jax.models.parameters.Structure.projections` tells them.

    Raises:
        CalmError: the name of the optimizer or schedule is unknown.
    """
    schedule = make_schedule(config, num_steps)
    if config.name == "adamw":
        scale = [optax.scale_by_adam(b1=config.b1, b2=config.b2)]
    elif config.name == "adafactor":
        # Shazeer and Stern 2018, without momentum, and without scaling steps by a parameter's size:
        # a parameter that starts at 0, such as a new bridge's output, would hardly move.
        scale = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    elif config.name == "muon":
        scale = [_muon(config, projections)]
    else:
        raise CalmError(
            f"optimizer.name {config.name!r} is none of 'adamw', 'adafactor' and 'muon'"
        )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    decay = []
    if config.weight_decay:
        decay = [optax.add_decayed_weights(config.weight_decay, mask=_decayed)]
    return optax.chain(*clip, *scale, *decay, optax.scale_by_learning_rate(schedule)), schedule


def make_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """The learning rate by step, from 0: linear warm-up, then the config's schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = num_steps - warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, config.final_fraction * peak, rest)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise CalmError(
            f"optimizer.schedule {config.schedule!r} is none of 'cosine', 'linear' and 'constant'"
        )
    if not warmup:
        return after
    # The warm-up does not start at 0, which would waste the first step.
    before = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([before, after], [warmup])


def _muon(config: ConfigDict, projections: Projections) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for projections, and Adam for all else.

    Its steps are as large as Adam's (Liu et al. 2025, section 2.2), so both have one learning rate.
    """

    def axes(path, x: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        summed, others = (
            tuple(x.ndim + axis for axis in group) for group in projections[path_name(path)]
        )
        return optax.contrib.MuonDimensionNumbers(summed, others)

    def sized(path, x: jax.Array) -> jax.Array:
        rows, columns = (math.prod(x.shape[axis] for axis in group) for group in axes(path, x))
        return 0.2 * math.sqrt(max(rows, columns)) * x

    orthogonal = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map_with_path(axes, tree)
    )
    sizes = optax.stateless(lambda tree, _: jax.tree.map_with_path(sized, tree))
    return optax.partition(
        {
            "muon": optax.chain(orthogonal, sizes),
            "adam": optax.scale_by_adam(b1=config.b1, b2=config.b2),
        },
        lambda tree: jax.tree.map_with_path(
            lambda path, _: "muon" if path_name(path) in projections else "adam", tree
        ),
    )


def _decayed(parameters: Tree) -> Tree:
    return jax.tree.map_with_path(
        lambda path, x: x.ndim > 1 and not path_name(path).endswith(_NOT_DECAYED), parameters
    )
