"""Every benchmark runs to its end at the smallest size, and its figures are numbers."""

import importlib.util
import math

import pytest

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed"
)


def assert_positive(rows, *columns) -> None:
    for row in rows:
        for column in columns:
            assert math.isfinite(row[column]) and row[column] > 0, (column, row)


def test_step(run_benchmark):
    rows = {row["what"]: row["figure"] for row in run_benchmark("step", "--steps=1")}
    assert rows["seconds a step"] > 0
    assert rows["tokens a second"] > 0
    assert 0 < rows["ideal FLOP/s / a large product's"] < 1
    assert 1 <= rows["FLOPs traced / ideal"] <= 1.03


def test_own_tokens(run_benchmark):
    rows = run_benchmark("own_tokens", "--steps=1")
    assert [row["tokenizers"] for row in rows] == ["one", "two"]
    assert_positive(rows, "seconds a step", "/ one")


@pytest.mark.slow
def test_remat(run_benchmark):
    rows = {row["policy"]: row for row in run_benchmark("remat", "--steps=1")}
    assert_positive(
        [rows[policy] for policy in ("none", "dots", "full")],
        "temporaries GiB",
        "FLOPs / ideal",
        "s a step",
    )
    assert rows["full"]["FLOPs / ideal"] > rows["none"]["FLOPs / ideal"]


@pytest.mark.slow
def test_compile_time(run_benchmark):
    rows = run_benchmark("compile_time", "--layers=4,8", "--repeats=1")
    assert [row["layers"] for row in rows] == [4, 8]
    assert_positive(rows, "processor seconds", "seconds", "/ fewest layers")


def test_attention(run_benchmark):
    rows = run_benchmark("attention", "--steps=1", "--lengths=32", "--rows=2")
    rows = {row["backend"]: row for row in rows}
    assert_positive([rows["xla"], rows["chunked"]], "forward s", "with gradient s")
    assert rows["chunked"]["error"] < 1e-5
    assert "needs a TPU" in rows["splash"]["note"]
    assert "NVIDIA" in rows["cudnn"]["note"]


@needs_torch
@pytest.mark.slow
def test_pytorch(run_benchmark):
    rows = run_benchmark("pytorch", "--steps=1")
    assert [row["version"] for row in rows] == ["calm_jax", "PyTorch, careful", "PyTorch, naive"]
    assert_positive(rows, "seconds a step", "tokens a second", "/ calm_jax")


@needs_libtpu
@pytest.mark.slow
def test_weak_scaling(run_benchmark):
    """From one slice to two: nobody has more to do."""
    rows = run_benchmark("weak_scaling", "--topologies=v5e:4x4,v5e:4x4*2")
    assert [row["chips"] for row in rows] == [16, 32]
    assert rows[1]["FLOPs / first"] == pytest.approx(1, abs=0.05)
    assert_positive(rows, "GFLOP a chip, loops once", "MB sent a chip", "bytes / first")


@pytest.mark.slow
def test_tokenization(run_benchmark):
    rows = run_benchmark("tokenization", "--examples=200", "--repeats=1", size="")
    assert [row["what"] for row in rows] == ["encode_batch", "open_dataset"]
    assert_positive(rows, "seconds", "examples a second", "tokens a second", "/ encode_batch")


@pytest.mark.slow
def test_serve(run_benchmark):
    rows = run_benchmark("serve", "--seconds=2", "--clients=4", "--tokens=8")
    rows = {row["what"]: row["figure"] for row in rows}
    assert rows["answered"] > 0 and rows["tokens a second"] > 0
    for name in ("errors", "lost", "mixed up", "changed"):
        assert rows[name] == 0
    assert rows["answered"] + rows["hung up"] == rows["requests"]


@pytest.mark.slow
def test_decode(run_benchmark):
    rows = run_benchmark(
        "decode", "--parts=pair,recomputing,beginning,evaluation", "--new=16", "--rounds=1"
    )
    assert [row["rows"] for row in rows] == [1, 8, 1, 8, 8]
    assert_positive(rows, "ours s", "other s", "ratio")
