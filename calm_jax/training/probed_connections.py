"""Runs whose connections a probe of their own data chooses (`composition.connections="probe"`)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from calm_jax import processes, sharding
from calm_jax.checkpoints.files import absolute, read_json
from calm_jax.data.entries import open_splits
from calm_jax.data.stream import Stream
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig
from calm_jax.models.config import PROBE
from calm_jax.training.configuration import composed_run
from calm_jax.training.probe import gains
from calm_jax.training.run import check_run
from calm_jax.training.run_model import composition_configs, describe_models, load_run_model

FILE = "probe.json"  # in the run's folder
BATCHES = 96  # micro-batches, if there are as many different rows
LEAST = 3  # one for what the anchor knows by itself, and one for each half


def is_asked(config: ConfigDict) -> bool:
    """Whether a run's config leaves its connections to the probe."""
    return config.kind == "composed" and any(
        each.connections == PROBE for each in composition_configs(config)
    )


def with_chosen(
    config: ConfigDict, workdir: epath.PathLike, mesh: jax.sharding.Mesh, *, overwrite: bool
) -> tuple[ConfigDict, dict[str, Any]]:
    """A config with the probe's connections, and the record to write into the run's `FILE`.

    The record of an earlier call in `workdir` is used again. Raises `CalmError` as training does
    for models and data that do not fit.
    """
    path = absolute(workdir) / FILE
    if path.exists() and not overwrite:
        record = read_json(path, "a probe")
        if len(record["augments"]) != len(config.augments):
            check_run(workdir, config)  # refuses what is another config
    else:
        check_run(workdir, config, overwrite=overwrite)
        record = _probed(config, mesh)
    pairs = zip(composition_configs(config), record["augments"], strict=True)
    return _with(config, [_connected(each, of["connections"]) for each, of in pairs]), record


def _probed(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Loads the models of a config, probes them on its training data, and says what was found."""
    wanted = composition_configs(config)
    # The bridge is not run; the probe chooses as many connections as there are by default.
    evenly = [_connected(each, None) for each in wanted]
    known = _with(config, evenly)
    described = describe_models(known)
    if any(described.augments):
        raise CalmError(
            "composition.connections='probe' does not support augments with another tokenizer "
            "than the anchor; give connections or every"
        )
    dataset = open_splits(config.data, described.vocabulary)["train"]
    run = load_run_model(known, mesh)
    model = run.parts.merge(run.trainable, run.frozen)
    share, shares = sharding.batch_share(mesh)
    rows = config.train.batch_size // config.train.accumulate
    stream = Stream(
        dataset,
        batch_size=rows,
        seed=config.data.seed,
        process_index=share,
        process_count=shares,
    )
    # A row in both halves would be predicted from itself.
    count = min(BATCHES, stream.first_epoch)
    if count < LEAST:
        raise CalmError(
            f"composition.connections='probe' needs {LEAST} batches of {rows} rows, but data.train "
            f"has {len(dataset)} rows; give connections or every"
        )
    found = []
    of_each = zip(model.augments, wanted, evenly, strict=True)
    for number, (augment, composition, spaced) in enumerate(of_each):
        if composition.connections != PROBE:
            found.append({"connections": composition.connections})
            continue
        processes.say(f"Probing the taps of augment {number} on {count} batches of {rows} rows …")
        batches = (sharding.put_batch(stream[index], mesh) for index in range(count))
        of_augment = gains(model.anchor, augment, batches, chunk=config.train.loss_chunk)
        chosen = of_augment.choose(len(spaced.resolve(augment.depth, model.anchor.depth)))
        processes.say(
            "Gain of a connection in thousandths of a nat a token: a row for each augment layer, a "
            f"column for each anchor layer; brackets: chosen\n{of_augment.table(chosen)}"
        )
        found.append(
            {
                "connections": chosen,
                "gain": of_augment.gain_IJ.tolist(),
                "explained": of_augment.explained_IJ.tolist(),
            }
        )
    return {"batches": count, "augments": found}


def _connected(composition: CompositionConfig, connections: Any) -> CompositionConfig:
    """With these connections, if it leaves them to the probe."""
    if composition.connections != PROBE:
        return composition
    return dataclasses.replace(composition, connections=connections)


def _with(config: ConfigDict, compositions: Sequence[CompositionConfig]) -> ConfigDict:
    """A copy of a run's config with one composition for each augment, or one for all if equal."""
    config = config.copy_and_resolve_references()
    same = len(set(compositions)) == 1
    with config.unlocked(), config.ignore_type():
        config.composition = composed_run(*(compositions[:1] if same else compositions)).composition
    return config
