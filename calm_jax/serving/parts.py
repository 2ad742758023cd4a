"""A model and its parts, by the names that clients use."""

import functools
from collections.abc import Sequence
from typing import Any

from absl import logging

from calm_jax.decoding.scheduler import Scheduler
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder
from calm_jax.serving.engine_thread import ServedModel


def served_models(
    model: Decoder | ComposedDecoder, name: str, options: dict[str, Any]
) -> list[ServedModel]:
    """The model as `name`; for a composed model also NAME/anchor, and NAME/augment or NAME/augment0
    and so on, with the same weights.

    Augments that are not decoders of text are left out.

    Args:
        options: arguments of every `Scheduler`; but parts do not draft.

    Raises:
        CalmError: the model has no vocabulary.
    """
    if model.vocabulary is None:
        raise CalmError(f"{name} has no vocabulary, so its answers have no text")
    parts = {name: model}
    if isinstance(model, ComposedDecoder):
        parts[f"{name}/anchor"] = model.anchor
        for number, augment in enumerate(model.augments):
            suffix = "" if len(model.augments) == 1 else str(number)
            if isinstance(augment, Decoder) and augment.vocabulary is not None:
                parts[f"{name}/augment{suffix}"] = augment
    return [
        ServedModel(
            part_name,
            part.vocabulary,
            options["slots"],
            options["max_length"],
            functools.partial(Scheduler, part, **options | ({} if part is model else {"draft": 0})),
        )
        for part_name, part in parts.items()
    ]


def built(models: Sequence[ServedModel]) -> dict[str, Scheduler]:
    """The schedulers of models by name; a part whose caches do not fit beside the others is left
    out with a warning.

    Raises:
        CalmError: the caches of the first model do not fit.
    """
    whole, *parts = models
    schedulers = {whole.name: whole.make_scheduler()}
    for part in parts:
        try:
            schedulers[part.name] = part.make_scheduler()
        except CalmError as error:
            logging.warning("%s is not served: %s", part.name, error)
    return schedulers
