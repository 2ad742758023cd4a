"""Loads a model from any kind of folder that holds one."""

from collections.abc import Sequence

import jax
from etils import epath

from calm_jax.checkpoints import composed, frozen
from calm_jax.checkpoints.files import absolute, read_json
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, DECODER_RUN, kind_of
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder
from calm_jax.models.taps import item_shape


def load_model(
    path: epath.PathLike,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    anchor: epath.PathLike | None = None,
    augments: Sequence[epath.PathLike] | None = None,
) -> Decoder | ComposedDecoder:
    """Loads a run's directory, a frozen folder or an exported bridge.

    Args:
        path: the folder. A decoder's run gives its finished model.
        step: which checkpoint of a composed run; default: the best by validation.
        mesh: the devices that hold the weights; default: the first device.
        anchor, augments: folders of a composed model's frozen models; default: those recorded.

    Raises:
        CalmError: the folder does not exist or is damaged; a decoder's run has not finished; `step`
            is given for anything but a composed run; frozen models are not those of the training,
            or are given for a single decoder; an augment reads features.
    """
    folder = absolute(path)
    config = read_json(folder / "config.json", "a run, a frozen folder or an exported bridge")
    kind = kind_of(config)
    if kind in (COMPOSED_RUN, BRIDGE):
        model = composed.load_composed(
            folder, step=step, mesh=mesh, anchor=anchor, augments=augments
        )
        for number, augment in enumerate(model.augments):
            if item_shape(augment) is not None:
                raise CalmError(
                    f"{folder}: augment {number} reads items, such as images, which no command "
                    "gives it; load the pair with calm_jax.load_composed"
                )
        return model
    if anchor is not None or augments is not None:
        raise CalmError(f"{folder} is {kind}, which has no anchor and no augments")
    if step is not None:
        raise CalmError(f"{folder} holds one finished decoder, so there is no step {step}")
    if kind == DECODER_RUN:
        folder /= "frozen"
        if not folder.exists():
            raise CalmError(f"{folder.parent} has not finished: it has no {folder.name} folder yet")
    return frozen.load(folder, mesh=mesh)
