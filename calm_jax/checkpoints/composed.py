"""Composed models on disk: a training run, or an exported bridge, a small folder to share.

An exported bridge holds only the bridge, and records which frozen models it was trained with:

    folder/
      config.json    composition, folder and fingerprint of each frozen model; written last
      weights/       an Orbax checkpoint of `ComposedDecoder.bridge`
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.convert.export import FORMATS
from calm_jax.checkpoints.encoder import encoder_fingerprint, holds_encoder, load_encoder
from calm_jax.checkpoints.files import (
    absolute,
    explained,
    read_field,
    read_json,
    whole_folder,
    write_json,
)
from calm_jax.checkpoints.huggingface.bridge import base_models, write_bridge
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, PYTORCH_BRIDGE, kind_of
from calm_jax.checkpoints.training import TrainingCheckpoints, abstract_like
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, CompositionConfig, Decoder, compose
from calm_jax.models.connections import plan_connections
from calm_jax.models.image_encoder import ImageEncoder
from calm_jax.models.lora import add_lora, lora_in, lora_of
from calm_jax.models.parameters import Tree, check_same_tree
from calm_jax.models.parts import Parts
from calm_jax.sharding import RULES, Rules, mesh_holding

FORMAT = "calm_jax bridge, version 2"


def load_composed(
    run_or_bridge: epath.PathLike,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    anchor: Decoder | epath.PathLike | None = None,
    augments: Sequence[Decoder | ImageEncoder | epath.PathLike] | None = None,
) -> ComposedDecoder:
    """Restores a composed model from a run's directory or an exported bridge.

    Args:
        run_or_bridge: a `--workdir` of `calm train`, or a folder made by `export_bridge`.
        step: which checkpoint of a run; default: the best by validation. A bridge has only one.
        mesh: where all arrays go; default: the mesh of `anchor` if that is a model, else the first
            device.
        anchor, augments: the frozen models or their folders; default: the recorded folders. The
            folder of an image encoder is that of `calm_jax.load_encoder`.

    Raises:
        CalmError: the folder or step does not exist or is damaged, or the frozen models are not
            those that the bridge was trained with (the message names both fingerprints).

    >>> import tempfile
    >>> from flax import nnx
    >>> import calm_jax
    >>> config = calm_jax.DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=4, num_heads=2,
    ...                                      head_dim=8, mlp_dim=32)
    >>> anchor, augment = (calm_jax.Decoder(config, nnx.Rngs(seed)) for seed in (0, 1))
    >>> folder = tempfile.mkdtemp() + "/bridge"
    >>> calm_jax.export_bridge(calm_jax.compose(anchor, augment, rngs=nnx.Rngs(2)), folder)
    >>> composed = calm_jax.load_composed(folder, anchor=anchor, augments=[augment])
    >>> [(c.layer, c.anchor_layer) for c in composed.connections]
    [(3, 3)]
    """
    folder = absolute(run_or_bridge)
    if mesh is None and isinstance(anchor, Decoder):
        mesh = mesh_holding(anchor.embedding.get_value())
    if (folder / "checkpoints").exists():
        with TrainingCheckpoints(folder / "checkpoints", read_only=True) as checkpoints:
            step = checkpoints.best if step is None else step
            if step is None:
                raise CalmError(f"{folder} has no checkpoint yet")
            state = checkpoints.read_state(step)
            if not state.get("composition"):
                raise CalmError(f"{folder} trains one decoder; load its frozen folder instead")
            state["lora"] = state.get("config", {}).get("lora")
            composed = _untrained(state, anchor, augments, mesh, str(folder))
            trained = checkpoints.restore(step, _abstract_trained(composed)).trainable
    else:
        values = read_json(folder / "config.json", "a run or an exported bridge")
        if values.get("format") != FORMAT:
            raise CalmError(_other_kind(folder, values))
        if step is not None:
            raise CalmError(f"{folder} is an exported bridge, so there is no step {step}")
        for key in ("frozen", "composition"):
            read_field(values, key, folder / "config.json")
        composed = _untrained(values, anchor, augments, mesh, str(folder))
        trained = _restored(folder / "weights", _abstract_trained(composed))
    parts = Parts(composed)
    return parts.merge(trained, parts.of(composed)[1])


def export_bridge(
    run_or_composed: epath.PathLike | ComposedDecoder,
    target: epath.PathLike,
    *,
    step: int | None = None,
    to: str | None = None,
    anchor: str | None = None,
    augments: Sequence[str] | None = None,
) -> None:
    """Writes a small folder to share: bridge, config and fingerprints of the frozen models.

    Args:
        run_or_composed: a composed model, or a run's directory (its best checkpoint, or `step`).
        target: a folder that does not exist yet.
        to: None: for `load_composed`; "huggingface": for PyTorch, where the folder is loaded by
            `AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)`.
        anchor, augments: for PyTorch, where the frozen models are: folders of Hugging Face or names
            on its hub; default: the folders that they were converted from.

    Raises:
        CalmError: `target` exists or cannot be written, the run cannot be read, the anchor has a
            low-rank update but no frozen folder, or an augment is neither a decoder nor an image
            encoder. For PyTorch also: the anchor has a low-rank update; an augment does not read
            the anchor's tokens; it is not known where a frozen model is; or a folder does not hold
            the model that the bridge was trained with.

    See `load_composed` for an example.
    """
    if to not in (None, *FORMATS):
        raise CalmError(f"--to={to} is unknown; known are {', '.join(FORMATS)}")
    if to is None and not (anchor is augments is None):
        raise CalmError("anchor and augments have no effect without to='huggingface'")
    composed, run = run_or_composed, None
    if not isinstance(composed, ComposedDecoder):
        folder = absolute(run_or_composed)
        if (folder / "checkpoints").exists():
            run = folder
            with TrainingCheckpoints(folder / "checkpoints", read_only=True) as checkpoints:
                step = checkpoints.best if step is None else step
        composed = load_composed(folder, step=step)
    elif step is not None:
        raise CalmError(f"a composed model has no steps, so there is no step {step}")
    update = lora_in(composed.anchor)
    if update and to == "huggingface":
        raise CalmError(
            "the anchor has a low-rank update, which the form of transformers does not hold: train "
            "a bridge alone"
        )
    if update and composed.anchor.fingerprint is None:
        raise CalmError(
            "the anchor has a low-rank update and was never saved without it, so this bridge could "
            "not be loaded; call save_frozen on the anchor and load it before add_lora"
        )
    frozen_models = identities(composed)
    if to == "huggingface":
        places = base_models(composed, anchor, augments)
        with whole_folder(target) as folder:
            name = absolute(target).name
            write_bridge(folder, name, composed, places, frozen_models, run, step)
        return
    with whole_folder(target) as folder:
        weights = folder / "weights"
        with explained(f"cannot write {weights}"), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(weights, Parts(composed).of(composed)[0])
        write_json(
            folder / "config.json",
            {
                "format": FORMAT,
                "composition": [config.to_dict() for config in composed.configs],
                "lora": update and update.to_dict(),
                "frozen": frozen_models,
            },
        )


def load_frozen_models(
    sources: Sequence[Decoder | ImageEncoder | frozen.Description | epath.PathLike],
    dtypes: Sequence[str | None],
    configs: Sequence[CompositionConfig],
    mesh: jax.sharding.Mesh | None,
    rules: Rules = RULES,
) -> list[Decoder | ImageEncoder]:
    """The anchor and the augments for `compose`; models among the `sources` do not change.

    Raises `CalmError` as `calm_jax.load` does, and if `configs` do not fit the models, which is
    checked before any weight is read.
    """
    found = [_described(source) for source in sources]
    depths = [model.config.num_layers for model in found]
    plan_connections(configs, depths[0], depths[1:])
    return [
        model
        if isinstance(model, nnx.Module)
        else frozen.load_described(model, mesh=mesh, dtype=dtype, rules=rules)
        for model, dtype in zip(found, dtypes, strict=True)
    ]


def identities(composed: ComposedDecoder) -> list[dict[str, Any]]:
    """Role, folder, fingerprint and dtype after loading of each frozen model, the anchor first.

    The folder's key is "place", as in all runs and exported bridges. Raises `CalmError` for an
    augment that is neither a decoder nor an image encoder.
    """
    found = []
    for number, model in enumerate(composed.models):
        role = f"augment {number - 1}" if number else "anchor"
        _check_kind(role, model)
        dtype, fingerprint = model.loaded_dtype, _fingerprint(model)
        found.append(
            {"role": role, "place": model.source, "dtype": dtype, "fingerprint": fingerprint}
        )
    return found


def check_identities(
    recorded: list[dict[str, Any]], found: list[dict[str, Any]], where: str
) -> None:
    """Raises `CalmError` if a frozen model is not the recorded one, naming both."""
    if len(recorded) != len(found):
        raise CalmError(
            f"{where} was trained with {len(recorded) - 1} augments, not {len(found) - 1}"
        )
    for was, now in zip(recorded, found, strict=True):
        if was["fingerprint"] != now["fingerprint"]:
            raise CalmError(
                f"{where} was trained with the {was['role']} {_short(was['fingerprint'])} "
                f"({was['place']}), but {now['place'] or 'the one given'} is "
                f"{_short(now['fingerprint'])}"
            )


def _other_kind(folder: epath.Path, values: Mapping[str, Any]) -> str:
    """The message for a folder that holds neither checkpoints nor a bridge of this version."""
    kind = kind_of(values)
    if kind == BRIDGE:
        found = values["format"]
        return f"{folder / 'config.json'}: format is {found!r}, this version reads {FORMAT!r}"
    if kind == COMPOSED_RUN:
        return f"{folder} has no checkpoint yet"
    if kind == PYTORCH_BRIDGE:
        return f"{folder} is {kind}; calm convert makes an exported bridge of it"
    return f"{folder} is {kind}, not a composed run or an exported bridge"


def _untrained(values, anchor, augments, mesh, where: str) -> ComposedDecoder:
    """The composed model that was recorded, with its frozen models and a random bridge."""
    count = len(values["frozen"]) - 1
    given = [anchor, *(augments if augments is not None else [None] * count)]
    if len(given) - 1 != count:
        raise CalmError(f"{where} was trained with {count} augments, not {len(given) - 1}")
    for entry, model in zip(values["frozen"], given, strict=True):
        _check_kind(entry["role"], model)
        if isinstance(model, Decoder) and lora_in(model):
            raise CalmError(
                f"the {entry['role']} that is given has a low-rank update, but {where} was trained "
                "with a frozen model; give that one"
            )
    dtypes = [entry.get("dtype") for entry in values["frozen"]]
    found = []
    for entry, model, dtype in zip(values["frozen"], given, dtypes, strict=True):
        place = entry["place"] if model is None else model
        # An encoder is small, and says what it is only when it is read.
        if isinstance(place, str | os.PathLike) and holds_encoder(place):
            model = load_encoder(place, mesh=mesh, dtype=dtype)
            _check_kind(entry["role"], model)
        found.append(_recorded(entry, where) if model is None else _described(model))
    # Checked first: if a model is not the recorded one, an error about connections misleads.
    check_identities(values["frozen"], list(map(_found_identity, found, dtypes)), where)
    configs = [CompositionConfig.from_dict(config) for config in values["composition"]]
    models = load_frozen_models(found, dtypes, configs, mesh)
    update = values.get("lora") and lora_of(values["lora"])
    if update:
        # A given anchor belongs to the caller and must not change.
        models[0] = nnx.merge(*nnx.split(models[0]))
        add_lora(models[0], update, nnx.Rngs(0))
    return compose(models[0], models[1:], configs, rngs=nnx.Rngs(0))


def _restored(path: epath.Path, abstract: Tree) -> Tree:
    """Restores a tree with the shapes, dtypes and shardings of `abstract`.

    Raises `CalmError` naming the first array that is missing, is unknown or has another shape.
    """
    # Orbax and TensorStore raise many exceptions on a damaged folder.
    with explained(f"{path} cannot be read"), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise CalmError(f"{path} is missing or half-written")
        check_same_tree(abstract, metadata.tree, str(path))
        return checkpointer.restore(path, abstract)


def _check_kind(role: str, model: Any) -> None:
    """Raises `CalmError` for a model that no folder identifies; `model` may be a folder or None."""
    if not isinstance(model, nnx.Module) or isinstance(model, Decoder):
        return
    kind = type(model).__name__
    if role == "anchor":
        raise CalmError(f"{role} is a {kind}; it must be a Decoder")
    if not isinstance(model, ImageEncoder):
        raise CalmError(
            f"{role} is a {kind}; only decoders and image encoders have a folder that identifies "
            "them"
        )


def _recorded(entry: Mapping[str, Any], where: str) -> frozen.Description:
    """The frozen model in the folder that `where` was trained with."""
    role = entry["role"]
    flag = "--anchor (anchor=)" if role == "anchor" else "--augments (augments=)"
    if entry["place"] is None:
        raise CalmError(f"{where}: the {role} was never on disk; give it with {flag}")
    try:
        return frozen.describe(entry["place"])
    except CalmError as error:
        raise CalmError(f"{where}: the {role}: {error}; if it has moved, give {flag}") from error


def _short(fingerprint: str) -> str:
    """Enough of a fingerprint to recognise it, and the dtype that the model was cast to."""
    weights, cast, dtype = fingerprint.partition(" as ")
    return weights[:16] + cast + dtype


def _described(
    model: Decoder | ImageEncoder | frozen.Description | epath.PathLike,
) -> Decoder | ImageEncoder | frozen.Description:
    known = isinstance(model, nnx.Module | frozen.Description)
    return model if known else frozen.describe(model)


def _found_identity(
    found: Decoder | ImageEncoder | frozen.Description, dtype: str | None
) -> dict[str, Any]:
    """Folder and fingerprint of a loaded model, or of a folder to load with `dtype`."""
    if isinstance(found, nnx.Module):
        return {"place": found.source, "fingerprint": _fingerprint(found)}
    return {"place": str(found.folder), "fingerprint": frozen.loaded_fingerprint(found, dtype)}


def _fingerprint(model: Decoder | ImageEncoder) -> str:
    is_encoder = isinstance(model, ImageEncoder)
    return encoder_fingerprint(model) if is_encoder else frozen.model_fingerprint(model)


def _abstract_trained(composed: ComposedDecoder) -> Tree:
    """Shapes, dtypes and shardings of the bridge and of the anchor's low-rank update, if any."""
    parts = Parts(composed)
    trained, _ = parts.of(composed)
    mesh = mesh_holding(composed.anchor.embedding.get_value())
    if mesh is None:
        return abstract_like(trained, jax.tree.map(lambda x: x.sharding, trained))
    return abstract_like(trained, parts.shardings(mesh)[0])
