"""Writes a composed model as a folder that plain transformers loads, without the frozen models.

folder/
  model.safetensors    the bridge in float32; `bridge.K.…` belongs to connection K
  modeling_calm.py     the code
  README.md            the model card
  …                    the anchor's tokenizer
  config.json          where the frozen models are, and how they are connected; written last
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.convert.family import HuggingFaceFamily
from calm_jax.checkpoints.convert.registry import FAMILIES, find_family
from calm_jax.checkpoints.convert.table import sizes
from calm_jax.checkpoints.files import write_json, write_text
from calm_jax.checkpoints.huggingface.card import model_card
from calm_jax.checkpoints.huggingface.tensors import tensors_of
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError
from calm_jax.models import ComposedDecoder, Decoder
from calm_jax.models.config import heads
from calm_jax.models.matching import check_shared
from calm_jax.models.parameters import module_tree, path_name
from calm_jax.sharding import on_host

CODE = pathlib.Path(__file__).with_name("modeling_calm.py")
# Fields of `CompositionConfig` that `modeling_calm.CrossAttention` reads, besides its heads.
OPTIONS = ("bias", "output_projection", "norms", "gate", "rotary", "encoder_only")
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def base_models(
    composed: ComposedDecoder, anchor: str | None, augments: Sequence[str] | None
) -> list[str]:
    """Folders or names on the hub of the anchor and the augments; by default what they came from.

    Raises:
        CalmError: an augment does not read the anchor's tokens; a place is not known, or neither a
            folder nor a name on the hub; a folder does not hold the model of the bridge's training;
            the number of augments is another one.
    """
    check_shared(composed, "the form of transformers")
    count = len(composed.augments)
    if augments is not None and len(augments) != count:
        raise CalmError(f"{len(augments)} augments are given, but the bridge reads {count}")
    roles = ["anchor", *(f"augment {number}" for number in range(count))]
    given = [anchor, *([None] * count if augments is None else augments)]
    return [
        _checked(role, model, _origin(role, model) if place is None else os.fspath(place))
        for role, model, place in zip(roles, composed.models, given, strict=True)
    ]


def write_bridge(
    folder: epath.Path,
    name: str,
    composed: ComposedDecoder,
    places: Sequence[str],
    identities: Sequence[Mapping[str, Any]],
    run: epath.Path | None,
    step: int | None,
) -> None:
    """Fills an empty folder that will be called `name`; `places` are those of `base_models`.

    For the other arguments see `model_card`.
    """
    weights = safetensors.numpy.save(tensors_of(composed), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    (folder / CODE.name).write_bytes(CODE.read_bytes())
    if composed.vocabulary is not None:
        composed.vocabulary.save_published(folder)
    config = _config(composed, places, [entry["fingerprint"] for entry in identities])
    write_text(folder / "README.md", model_card(name, config, composed, identities, run, step))
    write_json(folder / "config.json", config)


def _config(
    composed: ComposedDecoder, places: Sequence[str], fingerprints: Sequence[str]
) -> dict[str, Any]:
    anchor = composed.config
    bridges = []
    for config in composed.configs:
        N, H = heads(config, anchor)
        options = {name: getattr(config, name) for name in OPTIONS}
        bridges.append({"num_heads": N, "head_dim": H, **options})
    return {
        "architectures": ["CalmForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.CalmConfig",
            "AutoModelForCausalLM": f"{CODE.stem}.CalmForCausalLM",
        },
        "model_type": "calm",
        "anchor": places[0],
        "augments": places[1:],
        "sizes": [[model.width, model.depth] for model in composed.models],
        "fingerprints": fingerprints,
        "dtypes": [model.config.dtype for model in composed.models],
        "connections": [[c.augment, c.layer, c.anchor_layer] for c in composed.connections],
        "bridges": bridges,
        "vocab_size": anchor.vocab_size,
        "dtype": "float32",
    }


def _origin(role: str, model: Decoder) -> str:
    """The Hugging Face folder that a frozen model was converted from."""
    flag = "--anchor (anchor=)" if role == "anchor" else "--augments (augments=)"
    origin = model.source and frozen.describe(model.source).origin
    if not origin:
        told = "is not known to come from a model of transformers"
    elif not isinstance(FAMILIES[origin["family"]], HuggingFaceFamily) or origin["adapter"]:
        told = f"was converted from {origin['source']}, which transformers does not load as it is"
    elif not epath.Path(origin["source"]).is_dir():
        told = f"was converted from {origin['source']}, which is not a folder"
    else:
        return origin["source"]
    raise CalmError(
        f"the {role} {told}; give {flag}, a folder of Hugging Face or a name on its hub (calm "
        "convert --to=huggingface writes such a folder from a frozen one)"
    )


def _checked(role: str, model: Decoder, place: str) -> str:
    """`place`; of a local folder the absolute path, once every weight in it has been compared."""
    folder = epath.Path(place).expanduser()
    if not folder.is_dir():
        if folder.exists() or not _HUB_NAME.fullmatch(place):
            raise CalmError(
                f"the {role} {place!r} is neither a folder of Hugging Face nor a name on its hub, "
                "NAME or OWNER/NAME"
            )
        if "/" in place and folder.parent.is_dir():
            raise CalmError(
                f"the {role} {place!r} may be a name on Hugging Face's hub, but {folder.parent} is "
                f"a folder here and has no {folder.name}; if the hub is meant, start from elsewhere"
            )
        return place
    source = open_source(folder)
    reading = find_family(source).read(source)
    unlike, found = (
        {**config.as_computed().to_dict(), "dtype": "", "weights": None}
        for config in (model.config, reading.config)
    )
    for key, value in unlike.items():
        if found[key] != value:
            raise CalmError(f"{folder}: {key} is {found[key]!r}, but the {role} has {value!r}")
    ours = {path_name(path): array for path, array in jax.tree.leaves_with_path(module_tree(model))}
    axes = sizes(reading.config)
    for rule in () if model.config.weights else reading.rules:  # quantised weights are rounded
        for layer, name in enumerate(rule.names(reading.config.num_layers)):
            if name not in reading.tensors:
                continue
            for target, theirs in rule.split(reading.tensors[name][...], axes):
                own = ours[target][layer] if rule.per_layer else ours[target]
                if not np.array_equal(on_host(own), np.asarray(theirs).astype(own.dtype)):
                    raise CalmError(
                        f"{folder}: tensor {name} is not that of the {role}, with which the bridge "
                        "was trained"
                    )
    return os.path.abspath(folder)
