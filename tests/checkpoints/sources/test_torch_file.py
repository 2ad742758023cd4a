"""Files of torch.save: views of storages, and no code."""

import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.checkpoints.sources import torch_file
from calm_jax.checkpoints.sources.opening import open_source
from calm_jax.errors import CalmError


def random_tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).normal
    return {
        "a.weight": draw(size=(5, 3)).astype(np.float32),
        "b.weight": draw(size=(4,)).astype(np.float16),
        "c.weight": draw(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
        "d": np.arange(6),
        "e": np.float32(3.5).reshape(()),
        "f": np.zeros((0, 3), np.float32),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype
        assert np.asarray(found[name][...]).tobytes() == array.tobytes(), name


def read(path) -> dict:
    return dict(torch_file.read(epath.Path(path)).tensors)


def with_prefix(prefix):
    return {prefix + name: array for name, array in random_tensors().items()}


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_state_dict(tmp_path, suffix, protocol):
    path = tmp_path / f"model.{suffix}"
    torch_files.save_tensors(path, random_tensors(), protocol=protocol)
    source = open_source(path)
    assert source.kind == "torch"
    assert_same(dict(source.tensors), random_tensors())
    np.testing.assert_array_equal(
        source.tensors["a.weight"][1:3, 2], random_tensors()["a.weight"][1:3, 2]
    )


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module"])
def test_wrapped_and_with_prefixes(tmp_path, wrapper, prefix):
    def wrap(pickled):
        step = torch_files.dictionary({"step": torch_files.number(3)})
        beside = torch_files.tensor("3", np.int64, 6, 0, (6,), (1,))
        items = {"optimizer": step, "rng_state": beside, wrapper: pickled}
        return torch_files.dictionary(items)

    torch_files.save_tensors(tmp_path / "model.pt", with_prefix(prefix), wrap)
    assert_same(read(tmp_path / "model.pt"), random_tensors())


def test_a_prefix_that_not_all_have_stays(tmp_path):
    tensors = random_tensors() | with_prefix("module.")
    torch_files.save_tensors(tmp_path / "model.pt", tensors)
    assert_same(read(tmp_path / "model.pt"), tensors)


def test_views_of_one_storage(tmp_path):
    data = np.arange(24, dtype=np.float32)
    views = {
        "whole": (0, (4, 6), (6, 1)),
        "transposed": (0, (6, 4), (1, 6)),
        "part": (7, (2, 3), (6, 1)),
        "repeated": (5, (3,), (0,)),
    }
    items = {k: torch_files.tensor("0", np.float32, 24, *view) for k, view in views.items()}
    items["whole"] = torch_files.parameter(items["whole"])
    items |= {"step": torch_files.number(3), "name": torch_files.text("other than a tensor")}
    torch_files.save(tmp_path / "m.pt", torch_files.dictionary(items), {"0": data.tobytes()})
    table = data.reshape(4, 6)
    expected = {"whole": table, "transposed": table.T.copy(), "part": table[1:3, 1:4].copy()}
    expected["repeated"] = np.full(3, 5, np.float32)
    assert_same(read(tmp_path / "m.pt"), expected)


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn", "bfloat16"])
def test_dtypes_that_are_not_their_storage_s(tmp_path, dtype):
    array = np.arange(12).astype(dtype)
    view = torch_files.tensor("0", dtype, array.nbytes, 2, (2, 3), (4, 1))
    torch_files.save(tmp_path / "m.pt", torch_files.dictionary({"w": view}), {"0": array.tobytes()})
    assert_same(read(tmp_path / "m.pt"), {"w": array[2:10].reshape(2, 4)[:, :3].copy()})


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ((20, (2, 3), (3, 1)), "reaches entry 25 of a storage of 24"),
        ((24, (), ()), "reaches entry 24 of a storage of 24"),
        # A reach of 2 ** 64 entries, which is 0 in 64 bits.
        ((0, (2**32 + 1,), (2**32,)), f"reaches entry {2**64} of a storage of 24"),
        ((0, (2, 3), (-3, 1)), "invalid shape or strides"),
        ((0, (2,), (1, 1)), "invalid shape or strides"),
        ((0, (10**15,), (0,)), "more bytes than the whole file"),
        ((0, (10**9, 10**9, 3), (0, 0, 1)), "more bytes than the whole file"),
        ((-1, (2,), (1,)), "invalid shape or strides"),
    ],
)
def test_views_beyond_their_storage(tmp_path, view, message):
    pickled = torch_files.dictionary({"w": torch_files.tensor("0", np.float32, 24, *view)})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(96)})
    with pytest.raises(CalmError, match=rf"model\.pt: tensor w.*{message}"):
        read(tmp_path / "model.pt")


def test_a_storage_of_another_size_or_none(tmp_path):
    pickled = torch_files.dictionary({"w": torch_files.tensor("0", np.float32, 4, 0, (4,), (1,))})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(12)})
    with pytest.raises(CalmError, match=r"tensor w: storage 0 has 12 bytes, not 4 x 4"):
        read(tmp_path / "model.pt")
    torch_files.save(tmp_path / "model.pt", pickled, {})
    with pytest.raises(CalmError, match=r"tensor w: archive/data/0 is missing"):
        read(tmp_path / "model.pt")


def marker_pickles(marker) -> dict[str, bytes]:
    command = torch_files.text(f"touch {marker}")
    opening = torch_files.text(f"open({str(marker)!r}, 'w')")
    return {
        "os.system": torch_files.named("os.system") + b"(" + command + b"tR",
        "posix.system": torch_files.named("posix.system") + b"(" + command + b"tR",
        "builtins.eval": torch_files.named("builtins.eval") + b"(" + opening + b"tR",
        "torch.load": torch_files.named("torch.load")
        + b"("
        + torch_files.text(str(marker))
        + b"tR",
    }


@pytest.mark.parametrize("name", ["os.system", "posix.system", "builtins.eval", "torch.load"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused_and_did_not_run(tmp_path, name, inside, protocol):
    marker = tmp_path / "marker"
    pickled = marker_pickles(marker)[name]
    if inside:  # after a tensor that is fine
        fine = torch_files.tensor("0", np.float32, 4, 0, (4,), (1,))
        pickled = torch_files.dictionary({"w": fine, "x": pickled})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(16)}, protocol=protocol)
    with pytest.raises(CalmError, match=rf"asks for {name}, .*; it was not run"):
        read(tmp_path / "model.pt")
    assert not marker.exists()


FINE = torch_files.tensor("0", ml_dtypes.bfloat16, 4, 0, (4,), (1,))
# The state of a dtype that is big-endian, as numpy's own pickles set it.
DTYPE_STATE = b"(" + torch_files.number(3) + torch_files.text(">") + b"NNN"
DTYPE_STATE += torch_files.number(-1) * 2 + torch_files.number(0) + b"t"


def attributes(**values: bytes) -> bytes:
    """The state of an object with slots."""
    return b"(N" + torch_files.dictionary(values) + b"t"


# The opcode b sets what the pickle calls the object's state.
@pytest.mark.parametrize(
    "pickled",
    [
        torch_files.named("torch.BFloat16Storage") + DTYPE_STATE + b"b",
        torch_files.named("torch.bfloat16") + DTYPE_STATE + b"b",
        torch_files.named("torch.bfloat16") + attributes(name=torch_files.text("int8")) + b"b",
        torch_files.named("torch._utils._rebuild_tensor_v2")
        + attributes(__defaults__=b"()")
        + b"b",
        torch_files.named("torch._utils._rebuild_tensor_v2") + attributes(function=b"N") + b"b",
        torch_files.named("collections.OrderedDict") + attributes(get=b"N") + b"b",
        FINE + attributes(offset=torch_files.number(10**9)) + b"b",
        FINE + torch_files.dictionary({"offset": torch_files.number(10**9)}) + b"b",
        FINE + torch_files.numbers([0, 10**9]) + b"b",
        torch_files.named("torch.bfloat16") + b")R",
        b"(" + torch_files.text("module") + b"tQ",
        torch_files.text("not a tuple") + b"Q",
    ],
)
def test_objects_of_the_pickle_cannot_be_changed(tmp_path, pickled):
    path = tmp_path / "model.pt"
    torch_files.save(path, torch_files.dictionary({"x": pickled, "w": FINE}), {"0": bytes(8)})
    with pytest.raises(CalmError, match=r"model\.pt") as error:
        read(path)
    assert "\n" not in str(error.value)
    # The next file is read as if this one had never been.
    torch_files.save_tensors(path, random_tensors())
    assert_same(read(path), random_tensors())
    assert np.dtype(ml_dtypes.bfloat16).byteorder == "="


def test_methods_that_the_pickle_brings_along_are_not_used(tmp_path):
    state = torch_files.dictionary({"get": b"N", "items": b"N", "pop": b"N"})
    torch_files.save(tmp_path / "m.pt", torch_files.dictionary({"w": FINE}) + state + b"b", {})
    with pytest.raises(CalmError, match=r"m\.pt"):
        read(tmp_path / "m.pt")


def test_a_dictionary_within_itself(tmp_path):
    own = b"}\x94" + torch_files.text("model") + b"h\x00s"  # remembered as 0, and put into itself
    torch_files.save(tmp_path / "model.pt", own, {}, protocol=4)
    with pytest.raises(CalmError, match=r"holds no tensors, only \[\]"):
        read(tmp_path / "model.pt")


WEIGHT = {"w": FINE}


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (torch_files.number(3), "it holds a int, not a dictionary of tensors"),
        (FINE, "it holds a _View, not a dictionary"),
        (torch_files.dictionary({"a": torch_files.number(3)}), r"it holds no .*, only \['a'\]"),
        (
            torch_files.dictionary(
                {k: torch_files.dictionary(WEIGHT) for k in ("state_dict", "model")}
            ),
            "both 'model' and 'state_dict' are dictionaries; save one",
        ),
        (b"}" + torch_files.number(7) + FINE + b"s", "a tensor is called 7, which is not a name"),
        (
            torch_files.dictionary(
                {
                    "w": torch_files.tensor(
                        "0", np.float32, 4, 0, (4,), (1,),
                        torch_files.dictionary({"neg": b"\x88"}),
                    )
                }
            ),
            r"a tensor is stored as OrderedDict.*neg.*, which is not supported",
        ),
    ],
)  # fmt: skip
def test_what_is_no_state_dict(tmp_path, pickled, message):
    torch_files.save(tmp_path / "model.pt", pickled, {"0": bytes(16)})
    with pytest.raises(CalmError, match=rf"model\.pt: {message}"):
        read(tmp_path / "model.pt")


def test_what_torch_writes_otherwise(tmp_path):
    path = tmp_path / "model.pt"
    torch_files.save_tensors(path, random_tensors(), byteorder="big")
    with pytest.raises(CalmError, match=r"byteorder is b'big'"):
        read(path)
    torch_files.save_tensors(path, random_tensors(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CalmError, match=r"archive/\S+ is compressed"):
        read(path)
    path.write_bytes(torch_file._BEFORE_ZIP + b"more")
    with pytest.raises(CalmError, match=r"a torch before 1\.6; load it with a current torch and"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(CalmError, match=r"is not a complete zip file of torch\.save"):
        read(path)


def test_a_pickle_of_any_size_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    torch_files.save_tensors(path, random_tensors())
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("archive/data.pkl").file_size
    monkeypatch.setattr(torch_file, "_PICKLE_BYTES", size)
    assert read(path)
    monkeypatch.setattr(torch_file, "_PICKLE_BYTES", size - 1)
    with pytest.raises(CalmError, match=rf"data\.pkl has more than {size - 1} bytes"):
        read(path)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    monkeypatch.setattr(torch_file, "_PICKLE_BYTES", 2**24)
    tracemalloc.start()
    try:
        with pytest.raises(CalmError, match=r"archive/data\.pkl is compressed"):
            read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_damaged_storage_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "model.pt"
    torch_files.save_tensors(path, random_tensors())
    data = path.read_bytes()
    at = data.index(random_tensors()["a.weight"].tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    tensors = read(path)
    with pytest.raises(CalmError, match=r"model\.pt: tensor a\.weight is damaged: its CRC-32 is"):
        tensors["a.weight"][0]
    tensors["b.weight"][0]


def test_memory_is_the_file_s(tmp_path):
    size = 2**23
    view = torch_files.tensor("0", np.float32, size, 0, (2, size // 2), (size // 2, 1))
    pickled = torch_files.dictionary({"w": view})
    torch_files.save(tmp_path / "model.pt", pickled, {"0": np.ones(size, np.float32).tobytes()})
    tracemalloc.start()
    try:
        tensor = read(tmp_path / "model.pt")["w"]
        assert tensor[...].sum() == size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * size // 16


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    torch_files.save_tensors(path, random_tensors())
    return path.read_bytes()


def damaged(whole: bytes, data) -> bytes:
    at = data.draw(st.integers(0, len(whole) - 1), "at")
    kind = data.draw(st.sampled_from(["bits", "cut", "random", "longer", "turned"]), "kind")
    if kind == "bits":
        bits = data.draw(st.integers(1, 255), "bits")
        return whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    if kind == "cut":
        return whole[:at] + whole[at + data.draw(st.integers(1, 200), "length") :]
    if kind == "turned":
        return whole[at:] + whole[:at]
    more = data.draw(st.binary(min_size=1, max_size=20), "bytes")
    return whole[:at] + more + whole[at + (len(more) if kind == "random" else 0) :]


@settings(max_examples=500)
@given(data=st.data())
def test_damage_is_refused_or_changes_nothing(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(damaged(whole, data))
    try:
        found = {name: np.asarray(tensor[...]) for name, tensor in read(path).items()}
    except CalmError as error:
        assert "damaged.pt" in str(error) and "\n" not in str(error)
    else:
        assert_same(found, random_tensors())


@given(data=st.data())
def test_renamed_members_are_refused(tmp_path_factory, data):
    """Of the members that hold the content: those of the format's version are not needed."""
    path = tmp_path_factory.getbasetemp() / "renamed.pt"
    torch_files.save_tensors(path, random_tensors())
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    content = [name for name in members if name.endswith("data.pkl") or "/data/" in name]
    old = data.draw(st.sampled_from(content), "old")
    letters = st.text("0123456789abcdefgh/.", min_size=1, max_size=9)
    new = data.draw(letters.filter(lambda name: f"archive/{name}" not in members), "new")
    with zipfile.ZipFile(path, "w") as archive:
        for name, written in members.items():
            archive.writestr(f"archive/{new}" if name == old else name, written)
    with pytest.raises(CalmError, match=r"renamed\.pt"):
        read(path)
