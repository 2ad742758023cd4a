"""Which model an evaluation scored, so that a later one knows whether it would score the same."""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from calm_jax.checkpoints.files import explained, read_json
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, DECODER_RUN, kind_of
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.errors import CalmError
from calm_jax.evaluation.results import read_optional


def scored_model(folder: epath.Path, step: int | None = None) -> dict[str, Any]:
    """What tells the model in a folder from every other that may come to lie there.

    Returns:
        "step" of a run, by default its best by validation; "trained", when the bridge was saved, in
        nanoseconds since 1970, since a run trained anew may end at the same step; "fingerprint" and
        "vocabulary" of a frozen folder, or of the one that a decoder's run has made. None where a
        model has none.

    Raises:
        CalmError: no model, a step that there is not, or a run without a checkpoint.
    """
    config = read_json(folder / "config.json", "a run, a frozen folder or an exported bridge")
    kind, trained = kind_of(config), None
    if kind in (DECODER_RUN, COMPOSED_RUN):
        step, trained = _checkpoint(folder, kind, step)
    elif step is not None:
        raise CalmError(f"--step={step}: {folder} is {kind}, which has no checkpoints")
    if kind == BRIDGE:
        trained = _saved_at(folder / "weights")
    if kind == DECODER_RUN:
        config = read_optional(folder / "frozen" / "config.json")
    frozen = {key: config.get(key) for key in ("fingerprint", "vocabulary")}
    if kind == COMPOSED_RUN:
        frozen = dict.fromkeys(frozen)
    return {"step": step, "trained": trained, **frozen}


def _checkpoint(folder: epath.Path, kind: str, step: int | None) -> tuple[int, int | None]:
    """The step of a run, and of a composed one when it was saved."""
    best = None
    if (folder / "checkpoints").exists():
        with TrainingCheckpoints(folder / "checkpoints", read_only=True) as checkpoints:
            best = checkpoints.best
            if kind == COMPOSED_RUN and best is not None:
                step = best if step is None else step
                return step, checkpoints.saved_at(step)
    if best is None:
        raise CalmError(f"{folder} has no checkpoint yet")
    if step not in (None, best):
        raise CalmError(
            f"--step={step}: a decoder's run is scored by its frozen folder, step {best}"
        )
    return best, None


def _saved_at(weights: epath.Path) -> int | None:
    with explained(f"cannot read {weights}"), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(weights).commit_timestamp_nsecs
