"""Frozen folders: one trained decoder on disk, whole or absent.

folder/
  config.json    form of the decoder, fingerprint, vocabulary's fingerprint; written last
  weights/       Orbax; layers stacked [L, ...], names as in the modules
  vocabulary/    what `Vocabulary.save` wrote, if the decoder has one
"""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from calm_jax.checkpoints.files import (
    absolute,
    first_line,
    read_field,
    read_json,
    whole_folder,
    write_json,
)
from calm_jax.errors import CalmError
from calm_jax.models import Decoder, DecoderConfig
from calm_jax.models.parameters import Structure, Tree, check_same_tree, module_tree, path_name

FORMAT = "calm_jax frozen folder, version 1"
HASHED_BYTES = 2**28  # brought to the host at a time


def save_frozen(decoder: Decoder, target: epath.PathLike, *, vocabulary: Any = None) -> str:
    """Writes a decoder as a frozen folder, its weights in the config's dtype.

    Args:
        decoder: the model.
        target: a folder that does not exist yet.
        vocabulary: a `calm_jax.data.vocabulary.Vocabulary`; default: the decoder's own.

    Returns:
        the fingerprint of the weights.

    Raises:
        CalmError: `target` exists or cannot be written.

    An example stands at `load`.
    """
    vocabulary = decoder.vocabulary if vocabulary is None else vocabulary
    tree = canonical_tree(decoder)
    identity = fingerprint(tree)
    with whole_folder(target) as folder:
        save_tree(folder / "weights", tree)
        if vocabulary is not None:
            vocabulary.save(folder / "vocabulary")
        write_json(
            folder / "config.json",
            {
                "format": FORMAT,
                "decoder": decoder.config.to_dict(),
                "fingerprint": identity,
                "vocabulary": None if vocabulary is None else vocabulary.fingerprint,
            },
        )
    return identity


def load(
    target: epath.PathLike, *, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None
) -> Decoder:
    """Loads a frozen folder straight onto the mesh: each device reads its own part.

    Args:
        target: a folder made by `save_frozen`.
        mesh: where the weights go; default: the first device.
        dtype: "float32" or "bfloat16", of weights and compute; default: as stored.

    Raises:
        CalmError: not a frozen folder, damaged, or of another form than its config says.

    >>> import tempfile
    >>> from flax import nnx
    >>> import calm_jax
    >>> config = calm_jax.DecoderConfig.palm(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2,
    ...                                      head_dim=8, mlp_dim=32)
    >>> folder = tempfile.mkdtemp() + "/decoder"
    >>> fingerprint = calm_jax.save_frozen(calm_jax.Decoder(config, nnx.Rngs(0)), folder)
    >>> decoder = calm_jax.load(folder)
    >>> decoder.config == config, decoder.fingerprint == fingerprint
    (True, True)
    """
    described = describe(target)
    config = described.config
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    decoder = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    structure = Structure(decoder)
    if mesh is None:
        shardings = jax.tree.map(
            lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), structure.abstract()
        )
    else:
        shardings = structure.shardings(mesh)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, config.dtype, sharding=sharding),
        structure.abstract(),
        shardings,
    )
    tree = restore_tree(
        described.folder / "weights", _to_canonical(abstract), stored_dtype=described.config.dtype
    )
    decoder = structure.merge(_from_canonical(tree))
    decoder.vocabulary = described.vocabulary
    if config.dtype == described.config.dtype:
        # Cast weights are another model: a bridge trained on them fits no other.
        decoder.source, decoder.fingerprint = str(described.folder), described.fingerprint
    return decoder


@dataclasses.dataclass(frozen=True)
class Description:
    """All of a frozen folder but its weights."""

    folder: epath.Path
    config: DecoderConfig
    fingerprint: str
    vocabulary: Any


def describe(target: epath.PathLike) -> Description:
    """Reads everything of a frozen folder but the weights.

    Raises:
        CalmError: not a frozen folder, damaged, or with another vocabulary than it was made with.
    """
    folder = absolute(target)
    path = folder / "config.json"
    values = read_json(path, "a frozen folder")
    if values.get("format") != FORMAT:
        raise CalmError(
            f"{path}: format is {values.get('format')!r}, this version reads {FORMAT!r}"
        )
    config = DecoderConfig.from_dict(read_field(values, "decoder", path))
    vocabulary, recorded = None, read_field(values, "vocabulary", path)
    if recorded is not None:
        from calm_jax.data.vocabulary import Vocabulary

        vocabulary = Vocabulary.load(folder / "vocabulary")
        if vocabulary.fingerprint != recorded:
            raise CalmError(
                f"{folder / 'vocabulary'} is {vocabulary.fingerprint[:16]}, but the model was "
                f"saved with {recorded[:16]}"
            )
    return Description(folder, config, read_field(values, "fingerprint", path), vocabulary)


def save_tree(path: epath.Path, tree: Tree) -> None:
    """Writes a tree with Orbax. Raises `CalmError` when it cannot be written."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    except Exception as error:  # a full disk comes as one of many kinds
        raise CalmError(f"cannot write {path}: {first_line(error)}") from error


def restore_tree(path: epath.Path, abstract: Tree, *, stored_dtype: str | None = None) -> Tree:
    """Restores an Orbax tree to the shapes, dtypes and shardings of `abstract`.

    Raises `CalmError` naming the first array that is missing, unknown, of another shape, or not
    stored in `stored_dtype` where that is given.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise CalmError(f"{path} is missing or half-written")
            check_same_tree(abstract, metadata.tree, str(path), dtype=stored_dtype)
            return checkpointer.restore(path, abstract)
    except CalmError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        raise CalmError(f"{path} cannot be read: {first_line(error)}") from error


def canonical_tree(decoder: Decoder) -> Tree:
    """The decoder's arrays as on disk: uncut, layers stacked [L, ...], in the config's dtype."""
    whole = nnx.merge(*nnx.split(decoder))
    whole.layers.cut(((decoder.config.num_layers,),))
    tree = _to_canonical(module_tree(whole))
    return jax.tree.map(lambda x: x.astype(decoder.config.dtype), tree)


def fingerprint(tree: Tree) -> str:
    """Sha256 of names, shapes, dtypes and bytes; the same on every mesh. Hashes part by part."""
    digest = hashlib.sha256()
    for path, leaf in sorted((path_name(p), x) for p, x in jax.tree.leaves_with_path(tree)):
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        rows = leaf.reshape(-1) if leaf.ndim < 2 else leaf
        step = max(1, len(rows) * HASHED_BYTES // max(1, rows.nbytes))
        for start in range(0, len(rows), step):
            digest.update(np.asarray(jax.device_get(rows[start : start + step])).tobytes())
    return digest.hexdigest()


def model_fingerprint(decoder: Decoder) -> str:
    """The fingerprint of the decoder's frozen folder, computed if it has none."""
    if decoder.fingerprint is None:
        return fingerprint(canonical_tree(decoder))
    return decoder.fingerprint


def _to_canonical(tree: Tree) -> Tree:
    return {**tree, "layers": tree["layers"]["pieces"]["0"]}


def _from_canonical(tree: Tree) -> Tree:
    return {**tree, "layers": {"pieces": {"0": tree["layers"]}}}
