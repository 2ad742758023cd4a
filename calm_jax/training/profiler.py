"""Profiles some steps of a run."""

import jax
from etils import epath
from ml_collections import ConfigDict


class Profiler:
    """Writes a TensorBoard profile of the steps given by `train.profile_*`."""

    def __init__(self, run: epath.Path, train: ConfigDict):
        self.folder = run / "tensorboard"
        self.start, self.stop = train.profile_start, train.profile_start + train.profile_steps
        self.running = False

    def before(self, index: int) -> None:
        """Starts or stops the profile as needed before step `index`, 0-based."""
        if self.start <= index < self.stop and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and index == self.stop:
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self.running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_):
        if self.running:
            self._end()
