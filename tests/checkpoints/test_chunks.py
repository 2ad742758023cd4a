"""How arrays are split into chunks, which is part of the format, and which chunks a slice needs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.checkpoints.chunk_layout import CHUNK_BYTES, Layout
from calm_jax.checkpoints.chunks import Digests, Reader, Writer

# Of Gemma 2 2B and Llama 3 8B in bfloat16: the longest side is halved, the first of several, until
# a chunk has at most 8 MiB.
CHUNKS = {
    ("embedding", (256_000, 2304)): (2000, 1152),
    ("layers/mlp/gate", (26, 2304, 9216)): (1, 1152, 2304),
    ("layers/attention/query", (32, 4096, 32, 128)): (1, 1024, 32, 128),
    ("layers/mlp_norm/scale", (26, 2304)): (1, 2304),
    ("final_norm/scale", (2304,)): (2304,),
}


def test_chunks_of_this_version_of_the_format():
    stacked = {name for name, _ in CHUNKS if name.startswith("layers/")}
    layout = Layout(dict(CHUNKS.keys()), stacked, "bfloat16")
    assert layout.chunks == {name: chunk for (name, _), chunk in CHUNKS.items()}
    assert CHUNK_BYTES == 8 * 2**20


def test_the_list_of_hashes_of_this_version_of_the_format():
    """A fingerprint is made of it: who changes it makes other models of all that exist."""
    layout = Layout({"layers/a": (2, 3), "b": (4,)}, {"layers/a"}, "float32")
    digests = Digests(layout)
    arrays = {"layers/a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    for path, array in arrays.items():
        for index, data in layout.split(path, array, None):
            digests.add(path, index, data)
    pinned = "f466e376e0b1340b1aaf994439556148c7a2ca80088d246566e2f91d90e957fc"
    assert digests.sha256() == pinned


@st.composite
def regions_of_an_array(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    sides = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    region = st.tuples(*sides).map(lambda ends: tuple(slice(*end) for end in ends))
    return tuple(shape), draw(st.lists(region, min_size=1, max_size=3)), draw(st.integers(4, 64))


@given(regions_of_an_array())
def test_slices_and_the_chunks_that_they_touch(tmp_path_factory, drawn):
    shape, regions, size = drawn
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calm_jax.checkpoints.chunk_layout.CHUNK_BYTES", size)
        layout = Layout({"a": shape}, set(), "float32")
    touched = layout.touched("a", regions)
    # Counted the long way: every entry of the slices is in one of the chunks, none is in vain.
    wanted, read = np.zeros(shape, bool), np.zeros(shape, int)
    for region in regions:
        wanted[region] = True
    for chunk in (layout.region("a", index) for index in touched):
        read[chunk] += 1
        assert wanted[chunk].any()
    assert np.array_equal(read[wanted], np.ones(wanted.sum()))
    folder = tmp_path_factory.mktemp("array")
    with Writer(folder / "weights", layout) as writer:
        writer.add("a", array)
    (folder / "chunks.json").write_text(writer.digests.text())
    with Reader(folder, layout, writer.digests.sha256()) as reader:
        for found, region in zip(reader.read("a", regions), regions, strict=True):
            np.testing.assert_array_equal(found, array[region])
