"""The progress of a run: a line on the screen, metrics.jsonl and TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
from absl import logging
from etils import epath

from calm_jax import units
from calm_jax.checkpoints.files import is_bucket, storage
from calm_jax.errors import RunFailed
from calm_jax.quiet import import_tensorflow

TERMINAL_SECONDS = 0.2  # between updates of the line on a terminal
LOG_SECONDS = 5.0  # between lines of a log
BUCKET_SECONDS = 30.0  # between uploads to a bucket, which rewrite the whole object


class Progress:
    """Reports the steps of one call of `train`, in process 0 only. Steps count from 1.

    Raises `CalmError` if the folder cannot be written.

    Args:
        first_step: steps done before this call; later lines of metrics.jsonl are removed.
        tokens_per_step: tokens of the global batch, padding included.
        tensorboard: whether to write event files too, if TensorFlow is installed.
        screen: where the line is printed; default: standard output.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        num_steps: int,
        first_step: int,
        tokens_per_step: int,
        log_every: int,
        tensorboard: bool = True,
        screen: TextIO | None = None,
    ):
        self.num_steps, self.log_every = num_steps, log_every
        self.tokens_per_step = tokens_per_step
        self.active = jax.process_index() == 0
        if not self.active:
            return
        workdir = epath.Path(workdir)
        self._screen = _Screen(sys.stdout if screen is None else screen)
        self._metrics = MetricsFile(workdir / "metrics.jsonl", keep_to=first_step)
        self._events = _event_writer(workdir / "tensorboard") if tensorboard else None
        self._first_step, self._started = first_step, time.perf_counter()
        self._shown = _Interval(first_step)  # since the last line on the screen
        self._logged = _Interval(first_step)  # since the last line in metrics.jsonl

    def train(self, step: int, metrics: Mapping[str, float], seconds_waited: float) -> None:
        """Reports a finished step, which waited `seconds_waited` for its batch."""
        if not self.active:
            return
        for interval in (self._shown, self._logged):
            interval.add(step, seconds_waited)
        last = step == self.num_steps
        if last or step % self.log_every == 0:
            self._write("train", step, dict(metrics) | self._logged.speed(self.tokens_per_step))
            self._logged = _Interval(step)
        if last or self._screen.is_due():
            self._screen.show(self._line(step, metrics["loss"]))
            self._shown = _Interval(step)

    def anchor(self, metrics: Mapping[str, float]) -> None:
        """Reports the validation scores of the anchor alone, before step 1."""
        self._scores("anchor", 0, metrics, "the anchor alone, before step 1")
        self._started = time.perf_counter()  # what is done once says nothing of the time left

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports the validation scores after a step; their time does not count in later speeds."""
        self._scores("validation", step, metrics, f"validation after step {step:,}")

    def _scores(self, split: str, step: int, metrics: Mapping[str, float], what: str) -> None:
        if not self.active:
            return
        self._write(split, step, dict(metrics))
        shown = " · ".join(
            f"{name} {value:.4g}"
            for name, value in metrics.items()
            if name.startswith(("loss", "accuracy", "exact"))
        )
        self._screen.keep(f"{what}: {shown}")
        self._shown, self._logged = _Interval(step), _Interval(step)

    def close(self) -> None:
        """Closes the screen's line and the files."""
        if not self.active:
            return
        self._screen.close()
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    def _write(self, split: str, step: int, metrics: dict[str, float]) -> None:
        self._metrics.write({"step": step, "split": split, **metrics})
        if self._events is not None:
            named = {f"{split}/{name}": value for name, value in metrics.items()}
            self._events.write_scalars(step, named)

    def _line(self, step: int, loss: float) -> str:
        speed = self._shown.speed(self.tokens_per_step)
        elapsed = time.perf_counter() - self._started
        left = elapsed / (step - self._first_step) * (self.num_steps - step)
        return (
            f"step {step:,}/{self.num_steps:,} · loss {loss:.4f} · "
            f"{speed['tokens_per_second']:,.0f} tokens/s · "
            f"{1000 * speed['step_seconds']:.0f} ms a step, {speed['waiting']:.0%} waiting "
            f"for data · {duration(left)} left"
        )


class _Interval:
    """The time and number of steps since a given step."""

    def __init__(self, step: int):
        self.start_step = self.step = step
        self.start = time.perf_counter()
        self.waited = 0.0

    def add(self, step: int, waited: float) -> None:
        self.step = step
        self.waited += waited

    def speed(self, tokens_per_step: int) -> dict[str, float]:
        """Means over the interval: tokens per second, seconds per step, share of time waiting."""
        steps = self.step - self.start_step
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return {
            "tokens_per_second": steps * tokens_per_step / elapsed,
            "step_seconds": elapsed / steps,
            "waiting": min(self.waited / elapsed, 1.0),
        }


class _Screen:
    """A line that is updated in place on a terminal, and repeated every few seconds in a log."""

    def __init__(self, stream: TextIO):
        self._stream, self._terminal = stream, stream.isatty()
        self._every = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        self._last, self._open = -math.inf, False

    def is_due(self) -> bool:
        return time.perf_counter() - self._last >= self._every

    def show(self, line: str) -> None:
        self._last = time.perf_counter()
        self._print(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._open = self._terminal

    def keep(self, line: str) -> None:
        """Shows a line that stays."""
        self.close()
        self._print(f"{line}\n")

    def close(self) -> None:
        if self._open:
            self._print("\n")
        self._open = False

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class MetricsFile:
    """metrics.jsonl, whose last line may be incomplete if an earlier process was killed.

    Opening it atomically removes incomplete lines and those of steps after `keep_to`. Raises
    `RunFailed` if it cannot be written.
    """

    def __init__(self, path: epath.Path, *, keep_to: int):
        self.path = path
        self._file, self._bucket = None, is_bucket(path)
        self._lines = _lines_up_to(path, keep_to)
        with storage("write", path, failure=RunFailed):
            if self._bucket:
                self._upload()
                return
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(self._lines))
            temporary.replace(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - `close` closes it

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a line: on a disk at once, in a bucket within `BUCKET_SECONDS`."""
        line = json.dumps(record) + "\n"
        with storage("write", self.path, failure=RunFailed):
            if self._bucket:
                self._lines.append(line)
                if time.perf_counter() - self._uploaded > BUCKET_SECONDS:
                    self._upload()
            else:
                self._file.write(line)
                self._file.flush()

    def close(self) -> None:
        """Writes the remaining lines."""
        with storage("write", self.path, failure=RunFailed):
            if self._bucket:
                self._upload()
            else:
                self._file.close()

    def _upload(self) -> None:
        self.path.write_text("".join(self._lines))
        self._uploaded = time.perf_counter()


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().split("\n"):
        try:
            record = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    return kept


def _event_writer(folder: epath.Path) -> Any:
    """clu's threaded writer of TensorBoard event files; None without TensorFlow."""
    try:
        import_tensorflow()
    except ImportError:
        logging.warning("TensorFlow is not installed, so nothing is written for TensorBoard")
        return None
    from clu import metric_writers

    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(os.fspath(folder)))


def costs_table(costs: Mapping[str, Any]) -> str:
    """The content of costs.json as text: a row for each tree, then figures of the step and mesh."""
    rows = [("tree", "parameters", "size", "")]
    for tree in costs["trees"]:
        note = "trained" if tree["trained"] else "frozen"
        note = "state" if tree["name"] == "optimizer" else note
        rows.append((tree["name"], f"{tree['parameters']:,}", units.size(tree["bytes"]), note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:{widths[0]}}  {parameters:>{widths[1]}}  {bytes_:>{widths[2]}}  {note}".rstrip()
        for name, parameters, bytes_, note in rows
    ]
    if costs["connections"]:
        lines.append(f"augment layer → anchor layer: {', '.join(costs['connections'])}")
    mesh = " × ".join(f"{axis} {ways}" for axis, ways in costs["mesh"].items())
    return "\n".join(
        [
            *lines,
            f"a step: {units.size(costs['memory_bytes'])} of memory per device, compiled; "
            f"{units.flops(costs['flops_per_step'])}",
            f"mesh: {mesh}; global batch: {costs['global_batch']:,} rows, "
            f"{costs['tokens_per_step']:,} tokens",
        ]
    )


def duration(seconds: float) -> str:
    """Seconds as "12 s", "3 min 5 s" or "2 h 3 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
