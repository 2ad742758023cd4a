"""Checkpoints of a run: trained weights, optimizer state and progress, but no frozen weights."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from calm_jax import membership, processes
from calm_jax.checkpoints.files import absolute, explained, first_line, storage
from calm_jax.errors import CalmError, RunFailed
from calm_jax.models.parameters import Tree, check_same_tree

METRIC = "loss"  # the validation loss; the lowest is the best
RETRY_SECONDS = (1, 5, 25)  # pauses before the retries of a failed write


@dataclasses.dataclass
class Checkpoint:
    """One restored checkpoint; `state` is the JSON that was saved with it."""

    step: int
    trainable: Tree
    opt_state: Any
    state: dict[str, Any]


class _Manager(ocp.CheckpointManager):
    """Calls `failed` as soon as a write fails; Orbax would first wait minutes for all processes.

    Set `failed` before the first save. It is called from another thread.
    """

    failed: Callable[[Exception], Any]

    def _wait_for_checkpointers(self) -> None:  # Orbax raises every error of a write here
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failed(error)
            raise


class TrainingCheckpoints:
    """The checkpoints of one run, written asynchronously: the latest `keep` and the best.

    Use it as a context manager; leaving it waits for the writes. After a failed write `tell` gets a
    line, and the latest state is written again. With several processes, a failed write ends all of
    them; the same command resumes from the last complete checkpoint.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int = 3,
        read_only: bool = False,
        tell: Callable[[str], None] = processes.say,
    ):
        self.folder, self._tell = absolute(folder), tell
        self._wanted: dict[str, Any] = {}  # the arguments of the write in progress
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="min",
            # Orbax's own `read_only` has the same effect, but logs two warnings.
            create=not read_only,
            enable_async_checkpointing=not read_only,
        )
        with storage("write", self.folder):
            self.manager = _Manager(
                self.folder,
                options=options,
                # Without handlers a manager does not recognise an earlier manager's checkpoints.
                item_handlers={
                    "trainable": ocp.StandardCheckpointHandler(),
                    "opt_state": ocp.StandardCheckpointHandler(),
                    "state": ocp.JsonCheckpointHandler(),
                },
            )
        self.manager.failed = self._failed

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.wait()
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the best validation loss; the latest if nothing was validated."""
        best = self.manager.best_step()
        return self.latest if best is None else best

    @property
    def best_loss(self) -> float:
        """The best validation loss so far; infinite before the first."""
        best = self.manager.best_step()
        metrics = None if best is None else self.manager.metrics(best)
        return float("inf") if not metrics else metrics[METRIC]

    def saved_at(self, step: int) -> int:
        """When the checkpoint of a step was completed, in nanoseconds since 1970.

        Raises `CalmError` if there is none.
        """
        self._check_step(step)
        return self.manager.metadata(step).commit_timestamp_nsecs

    def save(
        self,
        step: int,
        trainable: Tree,
        opt_state: Any,
        state: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint; if the previous write failed, also waits for this one.

        Raises `RunFailed` naming the folder if every retry fails.
        """
        failure = self._finish()
        self._wanted = {
            "step": step,
            "args": ocp.args.Composite(
                trainable=ocp.args.StandardSave(trainable),
                opt_state=ocp.args.StandardSave(opt_state),
                state=ocp.args.JsonSave(state),
            ),
            "metrics": metrics,
        }
        self._retry(failure or self._start())

    def wait(self) -> None:
        """Returns when everything is on disk. Raises `RunFailed` if every retry fails.

        The arrays of the last `save` must still exist.
        """
        self._retry(self._finish())

    def _retry(self, failure: str | None) -> None:
        for pause in RETRY_SECONDS:
            if failure is None:
                return
            self._tell(f"{failure}; trying again in {pause} s")
            time.sleep(pause)
            self.manager.reload()  # else the manager counts the failed write as saved
            failure = self._start() or self._finish()
        if failure is not None:
            raise RunFailed(failure)

    def _start(self) -> str | None:
        return self._failure_of(lambda: self.manager.save(**self._wanted, force=True))

    def _finish(self) -> str | None:
        return self._failure_of(self.manager.wait_until_finished)

    def _failure_of(self, action: Callable[[], Any]) -> str | None:
        try:
            action()
        except Exception as error:
            return self._failed(error)
        return None

    def _failed(self, error: Exception) -> str:
        """The message. Ends all of several processes: others would wait for this one forever."""
        complete = set(self.manager.all_steps()) - {self._wanted.get("step")}
        kept = (
            f"the last complete checkpoint is step {max(complete)}"
            if complete
            else "none is complete"
        )
        line = f"cannot save a checkpoint in {self.folder}: {first_line(error)} ({kept})"
        membership.end_all(RunFailed(line))
        return line

    def _check_step(self, step: int) -> None:
        steps = sorted(self.manager.all_steps())
        if step not in steps:
            raise CalmError(f"{self.folder} has no checkpoint of step {step}; it has {steps}")

    def read_state(self, step: int) -> dict[str, Any]:
        """The JSON saved with `step`. Raises `CalmError` if it is missing or cannot be read."""
        self._check_step(step)
        with explained(f"{self.folder / str(step)} cannot be read"):
            args = ocp.args.Composite(state=ocp.args.JsonRestore())
            return self.manager.restore(step, args=args).state

    def restore(self, step: int, trainable: Tree, opt_state: Any = None) -> Checkpoint:
        """Restores arrays with the shapes, dtypes and shardings of the abstract trees.

        Without `opt_state` the optimizer state is not read.

        Raises:
            CalmError: there is no such step, or an array is missing or has another shape.
        """
        state = self.read_state(step)
        path = self.folder / str(step)
        items = {"trainable": trainable} | ({} if opt_state is None else {"opt_state": opt_state})
        with explained(f"{path} cannot be read"):
            found = self.manager.item_metadata(step).trainable
            check_same_tree(trainable, found.tree, str(path / "trainable"))
            args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        return Checkpoint(step, restored["trainable"], restored.get("opt_state"), state)


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct` of every array, with its sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
