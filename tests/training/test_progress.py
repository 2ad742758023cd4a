import io
import json
import os
import sys

import pytest
from absl import logging
from hypothesis import given
from hypothesis import strategies as st

from calm_jax.errors import CalmError, RunFailed
from calm_jax.training import progress as progress_module
from calm_jax.training.progress import MetricsFile, Progress, costs_table, duration


class Clock:
    """Stands in for the time module."""

    now = 100.0

    def perf_counter(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def start(folder, screen, **options):
    options = {"num_steps": 10, "first_step": 0, "tokens_per_step": 100, "log_every": 2} | options
    return Progress(folder, tensorboard=False, screen=screen, **options)


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_those_of_every_nth_step_and_the_last(tmp_path, clock):
    progress = start(tmp_path, io.StringIO(), num_steps=5)
    for step in range(1, 6):
        clock.now += 0.5
        progress.train(step, {"loss": 1 / step}, 0.1)
    progress.validation(5, {"loss": 0.3, "exact": 0.5})
    progress.close()
    train = {"split": "train", "tokens_per_second": 200.0, "step_seconds": 0.5, "waiting": 0.2}
    assert read(tmp_path) == [
        pytest.approx({"step": step, "loss": 1 / step} | train) for step in (2, 4, 5)
    ] + [{"step": 5, "split": "validation", "loss": 0.3, "exact": 0.5}]


def test_the_line_says_speed_waiting_and_time_left(tmp_path, clock):
    screen = io.StringIO()
    progress = start(tmp_path, screen, first_step=1000, num_steps=1100)
    progress.train(1001, {"loss": 2.0}, 0.0)
    for step in (1002, 1003):  # shown together, five seconds after the first
        clock.now += 3.0
        progress.train(step, {"loss": 1.5}, 0.75)
    progress.close()
    # 2 steps of 100 tokens in 6 s, 1.5 s of them waiting; 3 steps in 6 s, 97 to go.
    assert screen.getvalue().splitlines()[1] == (
        "step 1,003/1,100 · loss 1.5000 · 33 tokens/s · 3000 ms a step, 25% waiting for data"
        " · 3 min 14 s left"
    )


def test_what_is_done_before_step_1_is_not_counted_as_steps(tmp_path, clock):
    screen = io.StringIO()
    progress = start(tmp_path, screen, num_steps=101)
    clock.now += 600.0
    progress.anchor({"loss": 1.0})
    clock.now += 2.0
    progress.train(1, {"loss": 1.0}, 0.0)
    progress.close()
    assert screen.getvalue().splitlines()[-1].endswith(" · 3 min 20 s left")


def test_validation_does_not_slow_the_steps_around_it(tmp_path, clock):
    progress = start(tmp_path, io.StringIO(), log_every=1)
    for step in (1, 2):
        clock.now += 1.0
        progress.train(step, {"loss": 1.0}, 0.0)
        clock.now += 60.0
        progress.validation(step, {"loss": 1.0})
    progress.close()
    speeds = [line["step_seconds"] for line in read(tmp_path) if line["split"] == "train"]
    assert speeds == [1.0, 1.0]


def test_a_terminal_shows_one_line_in_place_and_keeps_validations(tmp_path, clock):
    screen = Terminal()
    progress = start(tmp_path, screen, num_steps=4)
    for step in range(1, 4):
        clock.now += 1.0
        progress.train(step, {"loss": 1.0}, 0.0)
    progress.validation(3, {"loss": 1.25, "tokens": 7.0})
    progress.train(4, {"loss": 1.0}, 0.0)
    progress.close()
    lines = screen.getvalue().split("\n")
    assert [line.count("\r\x1b[Kstep") for line in lines] == [3, 0, 1, 0]
    assert lines[1] == "validation after step 3: loss 1.25"


def test_a_log_gets_a_line_every_few_seconds_and_the_last(tmp_path, clock):
    screen = io.StringIO()
    progress = start(tmp_path, screen, num_steps=100)
    for step in range(1, 101):
        clock.now += 0.25
        progress.train(step, {"loss": 1.0}, 0.0)
    progress.close()
    steps = [int(line.split()[1].split("/")[0]) for line in screen.getvalue().splitlines()]
    assert steps == [1, 21, 41, 61, 81, 100]


@given(
    steps=st.lists(st.integers(1, 20), max_size=6),
    cut=st.integers(0, 400),
    keep_to=st.integers(0, 20),
)
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path_factory, steps, cut, keep_to):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train", "loss": 0.5}) for step in steps]
    text = "".join(f"{line}\n" for line in lines)[:cut]
    path.write_text(text)
    file = MetricsFile(path, keep_to=keep_to)
    file.write({"step": keep_to + 1})
    file.close()
    # A line without its newline is whole when only the newline is missing.
    whole = [line for line in text.split("\n") if line in lines]
    kept = [record for record in map(json.loads, whole) if record["step"] <= keep_to]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [*kept, {"step": keep_to + 1}]
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match=r"cannot write .*file/metrics\.jsonl"):
        start(tmp_path / "file", io.StringIO())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_to=0)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(file, "_file", full)
        # Not a bad input: launchers start it again.
        with pytest.raises(RunFailed, match=r"cannot write .*metrics\.jsonl: No space left"):
            file.write({"step": 1})
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # its closing must succeed
    file.close()


def test_tensorboard_reads_what_was_reported(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    progress = Progress(
        tmp_path, num_steps=2, first_step=0, tokens_per_step=1, log_every=1, screen=io.StringIO()
    )
    progress.train(1, {"loss": 0.75}, 0.0)
    progress.validation(1, {"exact": 0.25})
    progress.train(2, {"loss": 0.5}, 0.0)
    progress.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def curve(tag):
        return [(e.step, float(make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]

    assert curve("train/loss") == [(1, 0.75), (2, 0.5)]
    assert curve("validation/exact") == [(1, 0.25)]


def test_without_tensorflow_only_tensorboard_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    progress = Progress(
        tmp_path, num_steps=1, first_step=0, tokens_per_step=1, log_every=1, screen=io.StringIO()
    )
    progress.train(1, {"loss": 0.75}, 0.0)
    progress.close()
    assert warnings == ["TensorFlow is not installed, so nothing is written for TensorBoard"]
    assert [line["loss"] for line in read(tmp_path)] == [0.75]
    assert not (tmp_path / "tensorboard").exists()


def test_costs_are_shown_as_a_table():
    costs = {
        "trees": [
            {"name": "anchor", "parameters": 1234567, "bytes": 2469134, "trained": False},
            {"name": "bridge", "parameters": 8, "bytes": 32, "trained": True},
            {"name": "optimizer", "parameters": 17, "bytes": 68, "trained": False},
        ],
        "memory_bytes": 3 * 2**30,
        "flops_per_step": 12_345_678_901,
        "connections": ["3→5", "7→11"],
        "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
        "global_batch": 64,
        "tokens_per_step": 65536,
    }
    assert costs_table(costs).splitlines() == [
        "tree       parameters      size",
        "anchor      1,234,567  2.35 MiB  frozen",
        "bridge              8      32 B  trained",
        "optimizer          17      68 B  state",
        "augment layer → anchor layer: 3→5, 7→11",
        "a step: 3 GiB of memory per device, compiled; 12.3 GFLOP",
        "mesh: data 4 × fsdp 2 × tensor 1; global batch: 64 rows, 65,536 tokens",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7380, "2 h 3 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
