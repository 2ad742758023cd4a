"""A folder of Hugging Face damaged in random ways is refused, or its reading is what files say.

The format has no checksums. What it does let one know: a header is whole and its tensors fill the
file; names, shapes and index are those that config.json asks for. A flipped bit of a weight is
another valid model, and so is a value of config.json that no tensor contradicts.
"""

import dataclasses
import json
import pathlib
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import calm_jax
from calm_jax.checkpoints.convert.registry import find_family
from calm_jax.checkpoints.convert.table import check_names, check_shapes, check_unused, sizes
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError

GOLDEN = pathlib.Path(__file__).parent / "golden"
LAYOUTS = ("one file", "shards", "files without an index", "tied, shards")
INDEX = "model.safetensors.index.json"
BIT, HEADER, LENGTH, CUT, LONGER, EMPTY, GONE, RENAMED, SWAPPED, COPIED, FOLDER, JSON = DAMAGES = (
    "a bit is flipped",
    "a bit of a header is flipped",
    "the length of a header is another",
    "a file is cut",
    "a file is longer",
    "a file is empty",
    "a file is gone",
    "a file is renamed",
    "two files are swapped",
    "a file is a copy of another",
    "a file is a folder",
    "a value in JSON is another",
)
# Fields of the config that no tensor's name or shape tells.
UNKNOWABLE = {"norm_eps", "rope_base", "rope_scaling", "activation", "window", "window_pattern"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of each layout, and what is read from it."""
    found = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp("sources") / "model"
        original = GOLDEN / ("qwen3" if layout.startswith("tied") else "llama")
        folder.mkdir()
        shutil.copy(original / "config.json", folder)
        if layout == "one file":
            shutil.copy(original / "model.safetensors", folder)
        else:
            save_shards(folder, load_file(original / "model.safetensors"), 3, "index" in layout)
        found[layout] = (folder, *read(folder))
    return found


def save_shards(folder, tensors, count, without_index):
    places = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[shard::count]  # of one layer, in several files
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if not without_index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def read(folder):
    """(layout, arrays by their paths and layers) of a source, checked as converting does."""
    source = open_source(folder)
    reading = find_family(source).read(source)
    config = reading.config
    check_names(reading.rules, reading.unused, config.num_layers, reading.tensors, str(folder))
    check_shapes(reading.rules, config, reading.tensors, str(folder))
    check_unused(reading.unused, reading.tensors, str(folder))
    arrays = {}
    for rule in reading.rules:
        for layer, name in enumerate(rule.names(config.num_layers)):
            for target, array in rule.split(reading.tensors[name][...], sizes(config)):
                arrays[target, layer] = array
    return config, arrays


def header_length(data) -> int:
    return int.from_bytes(data[:8], "little")


def changed_value(choose, value):
    """Another JSON value of the same document, somewhere inside `value`."""
    if isinstance(value, dict) and value:
        key = choose.choice(sorted(value))
        action = choose.randrange(4)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            return {(k + "x" if k == key else k): v for k, v in value.items()}
        if action == 2:
            return value | {key: value[choose.choice(sorted(value))]}
        return value | {key: changed_value(choose, value[key])}
    if isinstance(value, list) and value:
        return choose.choice([[], value[1:], value + value, [changed_value(choose, value[0])]])
    others = [None, True, False, 0, -1, 1, 2, 7, 0.5, 1e30, 10**400, "", "x", [], {}, [[]]]
    if isinstance(value, int | float):
        others += [value + 1, -value, value * 2, str(value), float(value)]
    return choose.choice(others)


def damage(folder, kind: str, choose: random.Random) -> pathlib.Path:
    """Damages one file, or two; returns the first."""
    files = sorted(folder.iterdir())
    if kind in (HEADER, LENGTH):
        files = [file for file in files if file.suffix == ".safetensors"]
    if kind == JSON:
        files = [file for file in files if file.suffix == ".json"]
    file, other = choose.choice(files), choose.choice(files)
    data = bytearray(file.read_bytes())
    if kind == BIT:
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == HEADER:
        data[choose.randrange(8 + header_length(data))] ^= 1 << choose.randrange(8)
    elif kind == LENGTH:
        near, far = header_length(data) + choose.randint(-9, 9), choose.randrange(2**64)
        length = choose.choice([max(0, near), far, 0, 2**64 - 1, len(data), len(data) - 8])
        data[:8] = length.to_bytes(8, "little")
    elif kind == CUT:
        del data[choose.randrange(len(data)) :]
    elif kind == LONGER:
        data += bytes(choose.randrange(256) for _ in range(choose.randint(1, 9)))
    elif kind == EMPTY:
        data.clear()
    elif kind == COPIED:
        data = other.read_bytes()
    elif kind == JSON:
        data = json.dumps(changed_value(choose, json.loads(data))).encode()
    if kind in (GONE, FOLDER):
        file.unlink()
        if kind == FOLDER:
            file.mkdir()
    elif kind == RENAMED:
        file.rename(file.with_name(choose.choice([file.name + "x", "x" + file.name])))
    elif kind == SWAPPED:
        theirs = other.read_bytes()
        other.write_bytes(data)
        file.write_bytes(theirs)
    else:
        file.write_bytes(data)
    return file


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_or_is_another_model_that_files_say(
    layout, kind, sources, tmp_path_factory
):
    original, config, arrays = sources[layout]

    @settings(max_examples=100 if kind in (BIT, HEADER, JSON) else 30)
    @given(st.randoms(use_true_random=False))
    def check(choose):
        folder = tmp_path_factory.mktemp("damaged") / "model"
        shutil.copytree(original, folder)
        try:
            file = damage(folder, kind, choose)
            try:
                found_config, found = read(folder)
            except CalmError as error:
                assert "\n" not in str(error)
                assert "model" in str(error) or str(error).startswith("decoder")
                return
            changed = changed_bits(arrays, found)
            if kind == BIT and file.suffix == ".safetensors" and changed:
                assert changed == 1 and found_config == config
                return
            assert changed == 0
            differing = {
                field.name
                for field in dataclasses.fields(config)
                if getattr(config, field.name) != getattr(found_config, field.name)
            }
            if kind in (BIT, JSON) and file.name == "config.json":
                assert differing <= UNKNOWABLE
            else:
                assert not differing
            assert not must_refuse(kind, file)
        finally:
            shutil.rmtree(folder.parent)

    check()


def must_refuse(kind, file) -> bool:
    """Whether damage of this kind to a file leaves no whole model behind."""
    if file.suffix == ".safetensors":
        indexed = (file.parent / INDEX).exists()
        return kind in (CUT, LONGER, EMPTY, GONE, FOLDER) or (kind == RENAMED and indexed)
    # Without the index, all files are read; text may lose or gain a blank at its end.
    return kind in (EMPTY, FOLDER) or (kind in (GONE, RENAMED) and file.name == "config.json")


def changed_bits(arrays, found) -> int:
    """In how many bits two readings differ, whose shapes and dtypes must be the same."""
    assert arrays.keys() == found.keys()
    total = 0
    for path, array in arrays.items():
        assert (found[path].shape, found[path].dtype) == (array.shape, array.dtype)
        one, other = (np.frombuffer(x.tobytes(), np.uint8) for x in (array, found[path]))
        total += int(np.unpackbits(one ^ other).sum())
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_most_damage_matters(layout, sources, tmp_path):
    """The property above would hold for a reader that looked at nothing."""
    original = sources[layout][0]
    refused = 0
    for seed, kind in enumerate([HEADER, LENGTH, CUT, LONGER, EMPTY, SWAPPED, JSON] * 6):
        folder = tmp_path / str(seed) / "model"
        shutil.copytree(original, folder)
        damage(folder, kind, random.Random(seed))
        try:
            read(folder)
        except CalmError:
            refused += 1
    assert refused >= 25


def test_a_weight_that_a_flipped_bit_makes_infinite_is_refused(sources, tmp_path):
    folder = shutil.copytree(sources["one file"][0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    bits = tensors[name].view(np.uint16)
    bits[3, 5] = 0x3F80  # one in bfloat16
    save_file(tensors, folder / "model.safetensors")
    calm_jax.convert(folder, tmp_path / "finite")
    bits[3, 5] ^= 0x4000
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CalmError, match=name):
        calm_jax.convert(folder, tmp_path / "infinite")
    assert not (tmp_path / "infinite").exists()
