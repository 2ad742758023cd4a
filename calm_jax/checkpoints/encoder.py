"""Image encoders, read from the folders in which transformers publishes them."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from calm_jax.checkpoints.convert import vit
from calm_jax.checkpoints.convert.table import Rule, check_names, check_shapes, sizes
from calm_jax.checkpoints.files import absolute, read_json
from calm_jax.checkpoints.frozen import STORED_DTYPES, checksum
from calm_jax.checkpoints.host_arrays import all_finite, contiguous
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.checkpoints.sources.source import Tensor
from calm_jax.errors import CalmError
from calm_jax.models.image_config import ImageEncoderConfig
from calm_jax.models.image_encoder import ImageEncoder
from calm_jax.models.parameters import Structure, insert, module_tree, path_name
from calm_jax.sharding import on_host

PREPROCESSOR = "preprocessor_config.json"


def load_encoder(
    folder: epath.PathLike, *, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None
) -> ImageEncoder:
    """Loads an image encoder, to be an augment: a ViT as transformers saves it.

    Layers, patches and positions are read; a pooler or a head of any kind is left out, since a
    bridge reads hidden states.

    Args:
        folder: holds config.json, the tensors, and preprocessor_config.json with the scale of
            pixels; without that, `ImageEncoder.item` raises an error.
        mesh: where the weights go; default: the first device.
        dtype: "float32" or "bfloat16", for weights and computation; default: the smaller that holds
            every tensor exactly.

    Raises:
        CalmError: the folder is damaged or holds another family; a key has a value that is not
            supported; a tensor is missing, unknown, not finite, or not of the config's shape. The
            message names the file, and the key or tensor.

    docs/senses.md has an example.
    """
    source = open_source(folder)
    if source.kind != "huggingface":
        raise CalmError(f"{source.path} is not a folder of Hugging Face with a config.json")
    where = str(source.path)
    config = vit.encoder_config(source.config, str(source.config_path))
    rules, tensors = vit.rules(config), vit.tensors(source)
    check_names(rules, vit.UNUSED, config.num_layers, tensors, where)
    check_shapes(rules, config, tensors, where)
    config = dataclasses.replace(config, dtype=_dtype(dtype, rules, config, tensors, where))
    structure, tree, digests = _structure(config), {}, {}
    shardings = None if mesh is None else _by_path(structure.shardings(mesh))
    device = jax.local_devices()[0]
    for path, array in _arrays(rules, config, tensors, where):
        digests[path] = _digest(array)
        place = device if shardings is None else shardings[path]
        insert(tree, path, jax.device_put(array, place))
    encoder = structure.merge(tree)
    encoder.source, encoder.loaded_dtype = where, dtype
    encoder.fingerprint = _identity(config, digests)
    scale = absolute(source.path) / PREPROCESSOR
    if scale.exists():
        values = read_json(scale, "an image encoder")
        encoder.pixel_scale = vit.pixel_scale(values, config.channels, str(scale))
    return encoder


def holds_encoder(folder: epath.PathLike) -> bool:
    """Whether a folder's config.json is that of an image encoder."""
    try:
        values = read_json(absolute(folder) / "config.json", "an image encoder")
    except CalmError:  # whatever reads the folder next says why
        return False
    return values.get("model_type") == vit.MODEL_TYPE


def encoder_fingerprint(encoder: ImageEncoder) -> str:
    """A hash of an encoder's config and weights, as loaded; the same on every mesh."""
    if encoder.fingerprint is not None:
        return encoder.fingerprint
    arrays = _by_path(module_tree(encoder))
    return _identity(encoder.config, {path: _digest(on_host(x)) for path, x in arrays.items()})


def _arrays(
    rules: tuple[Rule, ...], config: ImageEncoderConfig, tensors: Mapping[str, Tensor], where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) for every array of an encoder, in the config's dtype; layers are stacked."""
    axes, dtype = sizes(config), jnp.dtype(config.dtype)
    for line in rules:
        parts = []
        for name in line.names(config.num_layers):
            tensor = tensors[name][...]
            if not all_finite(tensor):
                raise CalmError(f"{where}: tensor {name} has entries that are not finite")
            ((path, array),) = line.split(tensor, axes)
            parts.append(contiguous(array, dtype))
        # Never a view of the mapped file, which may change later.
        yield path, np.stack(parts) if line.per_layer else parts[0].copy()


def _dtype(
    asked: str | None,
    rules: tuple[Rule, ...],
    config: ImageEncoderConfig,
    tensors: Mapping[str, Tensor],
    where: str,
) -> str:
    """The dtype to load: `asked`, or the smaller that holds every tensor exactly."""
    if asked is not None and asked not in STORED_DTYPES:
        raise CalmError(f"dtype {asked!r} is unknown; known are {', '.join(STORED_DTYPES)}")
    found = set()
    for line in rules:
        for name in line.names(config.num_layers):
            found.add(dtype := np.dtype(tensors[name].dtype).name)
            if dtype not in ("float32", "float16", "bfloat16"):
                raise CalmError(
                    f"{where}: tensor {name} is {dtype}; weights must be float32, float16 or "
                    "bfloat16"
                )
    return asked or ("bfloat16" if found == {"bfloat16"} else "float32")


@functools.cache
def _structure(config: ImageEncoderConfig) -> Structure:
    return Structure(nnx.eval_shape(lambda: ImageEncoder(config, nnx.Rngs(0))))


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()


def _identity(config: ImageEncoderConfig, digests: Mapping[str, str]) -> str:
    return checksum({"image_encoder": dataclasses.asdict(config), "arrays": digests})
