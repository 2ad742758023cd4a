"""The training loop, for a decoder or a composed model."""

import contextlib
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from calm_jax import processes, sharding
from calm_jax.checkpoints import frozen as frozen_folders
from calm_jax.checkpoints.composed import check_identities
from calm_jax.checkpoints.files import write_json
from calm_jax.checkpoints.training import TrainingCheckpoints, abstract_like
from calm_jax.data.dataset import Dataset, TaskRows
from calm_jax.data.entries import open_splits, own_length
from calm_jax.data.stream import Stream, batches_once
from calm_jax.errors import CalmError
from calm_jax.models.lora import merge_lora
from calm_jax.models.parameters import Tree
from calm_jax.programs import cache_programs
from calm_jax.training import agreement, config_keys, configuration, probed_connections
from calm_jax.training.abstract_run import AbstractRun, abstract_run
from calm_jax.training.clock import EveryMinutes
from calm_jax.training.costs import tree_costs
from calm_jax.training.fitting import check_held, compile_to_fit
from calm_jax.training.flops import jaxpr_flops
from calm_jax.training.loss import as_numbers, means
from calm_jax.training.preemption import Preemption
from calm_jax.training.profiler import Profiler
from calm_jax.training.progress import Progress, costs_table
from calm_jax.training.run import check_run, closing_lines, frozen_step, is_finished, start_run
from calm_jax.training.run_model import (
    Described,
    composition_configs,
    describe_models,
    init_decoder,
    load_run_model,
)
from calm_jax.training.step import make_eval_step, make_train_step


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    overwrite: bool = False,
    preemption: Preemption | None = None,
    command: str = "",
) -> epath.Path:
    """Trains in `workdir` as the config says, or continues where an earlier call stopped.

    A decoder's run ends by writing its best checkpoint as a frozen folder, `workdir/frozen`. With
    several processes (`calm_jax.membership.joined`) all call this, with a shared `workdir`.

    Args:
        preemption: may ask the run to stop early; its context must be entered.
        command: the command line of this call, kept in commands.json for the report.

    Returns:
        the run's folder.

    Raises:
        CalmError: bad input, before anything is written or any weight is loaded; processes that
            disagree; or a loss that is not finite, naming its step, which is not saved.
        Preempted: the run was asked to stop, and its last step is saved.
    """
    configuration.validate(config)
    processes.agree(agreement.intention(config, workdir, overwrite))
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    chosen = None
    if probed_connections.is_asked(config):
        config, chosen = probed_connections.with_chosen(config, workdir, mesh, overwrite=overwrite)
    run = check_run(workdir, config, overwrite=overwrite)
    described = describe_models(config)
    datasets = open_splits(config.data, described.vocabulary, described.augments)
    processes.agree(agreement.origins(described, datasets))
    device = mesh.devices.flat[0]
    abstract = abstract_run(config, mesh, device)
    check_held(abstract, device)
    if processes.is_first():
        start_run(run, config, overwrite=overwrite, command=command)
        if chosen is not None:
            write_json(run / probed_connections.FILE, chosen)
    processes.barrier()
    agreement.check_visible(run / "config.json")
    for number, vocabulary in enumerate(described.augments):
        if vocabulary is not None:
            length = own_length(config.data)
            processes.say(f"augment {number} reads its own tokens, at most {length} in a row")
    cache_programs(config.cache_compiled)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            TrainingCheckpoints(run / "checkpoints", keep=config.train.keep)
        )
        if checkpoints.latest is not None:
            _check_resumed(run, checkpoints, described, datasets)
        if not is_finished(run, config, checkpoints):
            stack.enter_context(jax.set_mesh(mesh))
            session = _Session(config, run, abstract, mesh, checkpoints, described, datasets)
            session.run_all(preemption or Preemption())
            checkpoints.wait()
        processes.say(closing_lines(run, config, checkpoints))
    return run


def _check_resumed(run, checkpoints: TrainingCheckpoints, described: Described, datasets) -> None:
    """Raises `CalmError` if models or data are not those that the run started with."""
    state = checkpoints.read_state(checkpoints.latest)
    check_identities(state["frozen"], described.identities, str(run))
    for split, dataset in datasets.items():
        was = state["data"].get(split)
        if was is not None and was != dataset.fingerprint:
            now, remedy = dataset.fingerprint, "restore the data, or give another --workdir"
            if was.partition("-")[0] != now.partition("-")[0]:
                remedy = "an older version of calm_jax made its rows; give another --workdir"
            raise CalmError(
                f"{run} started with other data.{split}: its fingerprint was {was[:16]}, now it is "
                f"{now[:16]}; {remedy}"
            )


class _Session:
    """One call of `train`: everything that is built once, and the loop."""

    def __init__(
        self,
        config: ConfigDict,
        run: epath.Path,
        abstract: AbstractRun,
        mesh: jax.sharding.Mesh,
        checkpoints: TrainingCheckpoints,
        described: Described,
        datasets: dict[str, Dataset],
    ):
        self.config, self.run, self.mesh, self.checkpoints = config, run, mesh, checkpoints
        self.described, self.datasets = described, datasets
        self.optimizer, self.schedule = abstract.optimizer, abstract.schedule
        self.shardings = abstract.shardings
        self.model = load_run_model(config, mesh)
        self.parts = self.model.parts
        share, shares = sharding.batch_share(mesh)
        self.share = {"process_index": share, "process_count": shares}
        self.stream = Stream(
            datasets["train"],
            batch_size=config.train.batch_size,
            seed=config.data.seed,
            **self.share,
        )
        self.best_loss = checkpoints.best_loss
        self.first_step = self._restore_or_start()

    def run_all(self, preemption: Preemption) -> None:
        """Compiles the step, prints its costs, and trains to the end."""
        num_steps = self.config.train.num_steps
        if self.first_step < num_steps:
            step = self._compile()
            self._loop(step, preemption)
        if self.config.kind == "decoder":
            self._save_frozen()

    def _restore_or_start(self) -> int:
        """Sets `trainable` and `opt_state`; returns the number of steps already done."""
        latest = self.checkpoints.latest
        init_opt = jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)
        if latest is None:
            if self.model.trainable is None:
                self.model.trainable = init_decoder(self.config, self.shardings.trainable)
            self.opt_state = init_opt(self.model.trainable)
            return 0
        self.model.trainable = None  # frees it before another is restored
        abstract, _ = self.parts.abstract()
        restored = self.checkpoints.restore(
            latest,
            abstract_like(abstract, self.shardings.trainable),
            abstract_like(jax.eval_shape(self.optimizer.init, abstract), self.shardings.opt_state),
        )
        self.model.trainable, self.opt_state = restored.trainable, restored.opt_state
        processes.say(f"{self.run} continues after step {latest:,}")
        return restored.state["batch_index"] + 1

    def _compile(self):
        """Compiles the step, and writes and prints its costs."""
        train = self.config.train
        step = make_train_step(
            self.parts,
            self.optimizer,
            self.shardings,
            schedule=self.schedule,
            accumulate=train.accumulate,
            seed=train.seed,
            noise=train.noise,
            loss_chunk=train.loss_chunk,
        )
        batch = sharding.put_batch(self.stream[0], self.mesh)
        index = sharding.put_replicated(np.int32(0), self.mesh)
        arguments = (self.model.trainable, self.opt_state, self.model.frozen, batch, index)
        traced = step.trace(*arguments)
        compiled = compile_to_fit(traced.lower(), jax.local_devices()[0])
        costs = {
            "trees": tree_costs(
                self.parts, self.model.trainable, self.opt_state, self.model.frozen
            ),
            "connections": self.described.connections,
            "flops_per_step": jaxpr_flops(traced.jaxpr.jaxpr),
            "memory_bytes": getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0),
            "mesh": dict(self.mesh.shape),
            "global_batch": train.batch_size,
            "tokens_per_step": train.batch_size * self.config.data.length,
        }
        if processes.is_first():
            write_json(self.run / "costs.json", costs)
        processes.say(costs_table(costs))
        return compiled

    def _loop(self, train_step, preemption: Preemption) -> None:
        train, first = self.config.train, self.first_step
        progress = Progress(
            self.run,
            num_steps=train.num_steps,
            first_step=first,
            tokens_per_step=train.batch_size * self.config.data.length,
            log_every=train.log_every,
            tensorboard=train.tensorboard,
        )
        eval_step = make_eval_step(self.parts, self.shardings, loss_chunk=train.loss_chunk)
        if first == 0 and self.config.kind == "composed" and "validation" in self.datasets:
            progress.anchor(self._anchor_scores(eval_step))
        batches = self.stream.iterate(first)
        preemption.start(first)
        by_clock = EveryMinutes(train.save_minutes, first)
        unseen = None  # the step whose metrics are not fetched yet; at most two steps are in flight
        with contextlib.closing(progress), Profiler(self.run, train) as profiler:
            for index in range(first, train.num_steps):
                profiler.before(index)
                asked = time.perf_counter()
                _, batch = next(batches)
                waited = time.perf_counter() - asked
                batch = sharding.put_batch(batch, self.mesh)
                step = sharding.put_replicated(np.int32(index), self.mesh)
                self.model.trainable, self.opt_state, metrics = train_step(
                    self.model.trainable, self.opt_state, self.model.frozen, batch, step
                )
                if unseen is not None:
                    _report(progress, *unseen)
                unseen = (index + 1, metrics, waited)
                done = index + 1
                last = done == train.num_steps
                validate = "validation" in self.datasets and (
                    last or _due(done, train.validate_every)
                )
                stop = preemption.is_due(done)
                save = last or stop or by_clock.is_due(done) or _due(done, train.save_every)
                if validate or save:
                    _report(progress, *unseen)  # raises if not finite, before that step is saved
                    unseen = None
                    scores = None
                    if validate:
                        scores = self._validate(eval_step, self.model.trainable, f"step {done}")
                        progress.validation(done, scores)
                    best = scores is not None and scores["loss"] < self.best_loss
                    self.best_loss = scores["loss"] if best else self.best_loss
                    if save or best:
                        self._save(done, index, scores)
                        by_clock.restart(done)
                if stop and not last:
                    self.checkpoints.wait()
                    raise preemption.stopped(
                        f"{self.run} stopped after step {done:,}, which is saved; the same "
                        "command continues it (without --overwrite)"
                    )

    def _anchor_scores(self, eval_step) -> dict[str, float]:
        """Validation scores of the anchor alone.

        A bridge of zeros adds exactly nothing to the anchor, whatever its initial values, so the
        compiled `eval_step` of the composed model can be used.
        """
        zeros = jax.jit(
            lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=self.shardings.trainable
        )
        scores = self._validate(eval_step, zeros(self.model.trainable), "the anchor alone")
        return {key: score for key, score in scores.items() if not key.startswith("connection/")}

    def _validate(self, eval_step, trainable: Tree, what: str) -> dict[str, float]:
        """Scores on all validation data, with "exact" for each data set if there are several.

        Plain text has no answers and so no "exact". Raises `CalmError`, naming `what`, if the loss
        is not finite.
        """
        validation = self.datasets["validation"]
        sums = [self._sums(eval_step, trainable, part) for part in validation.parts]
        totals = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
        scores = as_numbers(means(totals))
        if not math.isfinite(scores["loss"]):
            raise CalmError(
                f"{what}: the validation loss is {scores['loss']}; nothing is saved. Lower "
                "optimizer.learning_rate, or check the validation data"
            )
        exact = {
            f"exact/{name}": float(of_set["exact"] / of_set["sequences"])
            for name, of_set in zip(validation.names, sums, strict=True)
            if len(sums) > 1 and of_set["sequences"]
        }
        return scores | exact

    def _sums(self, eval_step, trainable: Tree, part: TaskRows) -> dict[str, np.ndarray]:
        """Sums over all rows of one set, in batches of a micro-batch's size."""
        dataset = dataclasses.replace(self.datasets["validation"], parts=(part,))
        rows = self.config.train.batch_size // self.config.train.accumulate
        sums = [
            jax.device_get(
                eval_step(trainable, self.model.frozen, sharding.put_batch(batch, self.mesh))
            )
            for batch in batches_once(dataset, rows, **self.share)
        ]
        return jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)

    def _save(self, done: int, index: int, scores: dict[str, float] | None) -> None:
        state = {
            "batch_index": index,
            "config": config_keys.to_dict(self.config),
            "frozen": self.described.identities,
            "data": {split: dataset.fingerprint for split, dataset in self.datasets.items()},
            "composition": [config.to_dict() for config in composition_configs(self.config)]
            if self.config.kind == "composed"
            else [],
        }
        metrics = None if scores is None else {"loss": scores["loss"]}
        self.checkpoints.save(done, self.model.trainable, self.opt_state, state, metrics)

    def _save_frozen(self) -> None:
        """Writes the best checkpoint as a frozen folder, replacing an earlier one."""
        self.checkpoints.wait()
        step = self.checkpoints.best
        if frozen_step(self.run) == step:
            return
        abstract, _ = self.parts.abstract()
        best = self.checkpoints.restore(step, abstract_like(abstract, self.shardings.trainable))
        decoder = self.parts.merge(best.trainable, self.model.frozen)
        merge_lora(decoder)
        if processes.is_first():
            for stale in (self.run / "frozen_step.json", self.run / "frozen"):
                if stale.exists():
                    stale.rmtree() if stale.is_dir() else stale.unlink()
            frozen_folders.save_frozen(
                decoder, self.run / "frozen", vocabulary=self.described.vocabulary
            )
            write_json(self.run / "frozen_step.json", {"step": step})
        else:
            frozen_folders.gather_weights(decoder)
        processes.barrier()


def _report(progress: Progress, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
    """Fetches and shows a step's metrics; raises `CalmError` if one is not finite."""
    values = as_numbers(jax.device_get(metrics))
    for key in ("loss", "grad_norm", "parameter_norm"):
        if not math.isfinite(values[key]):
            raise CalmError(
                f"step {step}: {key} is {values[key]}; this step is not saved. Lower "
                "optimizer.learning_rate, or check the data of this batch"
            )
    progress.train(step, values, waited)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
