"""What the benchmarks share: seconds and memory, processes of their own, how results are told."""

import concurrent.futures
import json
import multiprocessing
import pathlib
import resource
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


class PeakMemory:
    """The most anonymous memory that this process held in a `with` block, in bytes.

    Pages of files that are mapped or cached do not count: the system takes them back at will.
    `before` is what the process held when the block began, `whole` the peak of its life, file pages
    included.
    """

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, _anonymous())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, _anonymous())
        self.whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds that a `with` block took."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self._start


def in_process(function: Callable, *arguments) -> Any:
    """The result of a function that is run in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def short(value: float) -> float:
    """`value` to four significant digits."""
    return float(f"{value:.4g}")


def tell(name: str, rows: Sequence[Sequence[Any]], output: str | None) -> None:
    """Prints rows as a table, the first being its head, and saves them as JSON."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for number, row in enumerate(cells):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
        if number == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
    head, *body = rows
    values = {"benchmark": name, "rows": [dict(zip(head, row, strict=True)) for row in body]}
    if output is not None:
        pathlib.Path(output).write_text(json.dumps(values, indent=1) + "\n")


def _anonymous() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")
