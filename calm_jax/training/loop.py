"""The one training loop: a lone decoder, or the bridge of a composed model."""

import contextlib
import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from calm_jax import sharding
from calm_jax.checkpoints import frozen as frozen_folders
from calm_jax.checkpoints.composed import check_identities
from calm_jax.checkpoints.files import write_json
from calm_jax.checkpoints.training import TrainingCheckpoints, abstract_like
from calm_jax.data.cache import Source, open_source
from calm_jax.data.stream import Stream, batches_once
from calm_jax.errors import CalmError
from calm_jax.training import configuration
from calm_jax.training.costs import matmul_flops, tree_costs
from calm_jax.training.loss import means
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.progress import Progress, costs_table
from calm_jax.training.run import open_run
from calm_jax.training.run_model import composition_configs, init_decoder, make_model
from calm_jax.training.step import Shardings, make_eval_step, make_train_step


def train(config: ConfigDict, workdir: epath.PathLike, *, overwrite: bool = False) -> epath.Path:
    """Trains what the config says, in `workdir`; goes on where an earlier call stopped.

    A decoder's run ends with its best checkpoint as a frozen folder, `workdir/frozen`.

    Returns:
        the run's directory.

    Raises:
        CalmError: bad input (see `calm_jax.training.configuration`), or a loss that is not finite:
        its
            step is named and not saved.
    """
    configuration.validate(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    run = open_run(workdir, config, overwrite=overwrite)
    cache_programs(config.cache_compiled)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            TrainingCheckpoints(run / "checkpoints", keep=config.train.keep)
        )
        if not _finished(run, config, checkpoints):
            stack.enter_context(jax.set_mesh(mesh))
            _Session(config, run, mesh, checkpoints).run_all()
    return run


def cache_programs(place: str = "") -> None:
    """Keeps compiled programs on disk, so that no later process compiles them again."""
    place = place or epath.Path("~/.cache/calm_jax/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _finished(run: epath.Path, config: ConfigDict, checkpoints: TrainingCheckpoints) -> bool:
    done = checkpoints.latest is not None and checkpoints.latest >= config.train.num_steps
    if done and config.kind == "decoder":
        done = (run / "frozen").exists()
    if done:
        print(f"{run} has finished its {config.train.num_steps:,} steps", flush=True)
    return done


class _Session:
    """One call of `train`: everything that is built once, and the loop over it."""

    def __init__(self, config, run: epath.Path, mesh, checkpoints: TrainingCheckpoints):
        self.config, self.run, self.mesh, self.checkpoints = config, run, mesh, checkpoints
        self.model = make_model(config, mesh)
        self.parts = self.model.parts
        self.optimizer, self.schedule = make_optimizer(config.optimizer, config.train.num_steps)
        self.shardings = Shardings.of(self.parts, self.optimizer, mesh)
        self.stream, self.validation = self._open_data()
        self.first_step = self._restore_or_start()

    def run_all(self) -> None:
        """Compiles, prints what it will cost, and trains to the end."""
        num_steps = self.config.train.num_steps
        if self.first_step < num_steps:
            step = self._compile()
            self._loop(step)
        if not self.parts.composed:
            self._save_frozen()

    def _open_data(self) -> tuple[Stream, dict[str, Source]]:
        """The stream of batches, and the validation data of each set by its name."""
        config, vocabulary = self.config, self.model.vocabulary
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        source = open_source(config.data, "train", vocabulary)
        stream = Stream(
            source, batch_size=config.train.batch_size, seed=config.data.seed, **processes
        )
        if not config.data.validation:
            return stream, {}
        parts = open_source(config.data, "validation", vocabulary)
        one_set = functools.partial(dataclasses.replace, parts)
        return stream, {
            part.name.rpartition("/")[2]: one_set(parts=(part,)) for part in parts.parts
        }

    def _restore_or_start(self) -> int:
        """Fills in `trainable` and `opt_state`; returns the number of steps already done."""
        latest = self.checkpoints.latest
        init_opt = jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)
        if latest is None:
            if self.model.trainable is None:
                self.model.trainable = init_decoder(self.config, self.shardings.trainable)
            self.opt_state = init_opt(self.model.trainable)
            return 0
        self.model.trainable = None  # not beside the restored one
        abstract, _ = self.parts.split(self.parts.structure.abstract())
        restored = self.checkpoints.restore(
            latest,
            abstract_like(abstract, self.shardings.trainable),
            abstract_like(jax.eval_shape(self.optimizer.init, abstract), self.shardings.opt_state),
        )
        check_identities(restored.state["frozen"], self.model.identities, str(self.run))
        self.model.trainable, self.opt_state = restored.trainable, restored.opt_state
        print(f"{self.run} goes on after step {latest:,}", flush=True)
        return restored.state["batch_index"] + 1

    def _compile(self):
        """Compiles the step ahead, and writes and prints what it costs."""
        train = self.config.train
        step = make_train_step(
            self.parts,
            self.optimizer,
            self.shardings,
            schedule=self.schedule,
            accumulate=train.accumulate,
            seed=train.seed,
            noise=train.noise,
        )
        batch = sharding.put_batch(self.stream[0], self.mesh)
        index = jax.device_put(jnp.int32(0), self.shardings.replicated)
        arguments = (self.model.trainable, self.opt_state, self.model.frozen, batch, index)
        compiled = step.lower(*arguments).compile()
        memory = compiled.memory_analysis()
        costs = {
            "trees": tree_costs(
                self.parts, self.model.trainable, self.model.frozen, self.opt_state
            ),
            "flops_per_step": matmul_flops(step, *arguments),
            "memory_bytes": getattr(memory, "peak_memory_in_bytes", 0),
            "mesh": dict(self.mesh.shape),
            "global_batch": train.batch_size,
            "tokens_per_step": train.batch_size * self.config.data.length,
        }
        write_json(self.run / "costs.json", costs)
        print(costs_table(costs), flush=True)
        return compiled

    def _loop(self, train_step) -> None:
        train, first = self.config.train, self.first_step
        progress = Progress(
            self.run,
            num_steps=train.num_steps,
            first_step=first,
            tokens_per_step=train.batch_size * self.config.data.length,
            log_every=train.log_every,
            tensorboard=train.tensorboard,
        )
        eval_step = make_eval_step(self.parts, self.shardings)
        batches = self.stream.iterate(first)
        unseen = None  # the step whose metrics are not fetched yet: at most two are in flight
        with contextlib.closing(progress), _Profiler(self.run, train) as profiler:
            for index in range(first, train.num_steps):
                profiler.before(index)
                asked = time.perf_counter()
                _, batch = next(batches)
                waited = time.perf_counter() - asked
                batch = sharding.put_batch(batch, self.mesh)
                step = jax.device_put(np.int32(index), self.shardings.replicated)
                self.model.trainable, self.opt_state, metrics = train_step(
                    self.model.trainable, self.opt_state, self.model.frozen, batch, step
                )
                if unseen is not None:
                    _report(progress, *unseen)
                unseen = (index + 1, metrics, waited)
                done = index + 1
                last = done == train.num_steps
                validate = self.validation and (last or _due(done, train.validate_every))
                save = last or _due(done, train.save_every)
                if validate or save:
                    _report(progress, *unseen)  # a step that is not finite is never saved
                    unseen = None
                    scores = self._validate(eval_step) if validate else None
                    if validate:
                        progress.validation(done, scores)
                    if save:
                        self._save(done, index, scores)

    def _validate(self, eval_step) -> dict[str, float]:
        """Scores of the whole validation data, and exactness of each of its sets."""
        totals, scores = None, {}
        for name, source in self.validation.items():
            sums = None
            for batch in batches_once(
                source,
                self.config.train.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            ):
                batch = sharding.put_batch(batch, self.mesh)
                part = jax.device_get(eval_step(self.model.trainable, self.model.frozen, batch))
                sums = part if sums is None else jax.tree.map(np.add, sums, part)
            scores[f"exact/{name}"] = float(means(sums)["exact"])
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        return scores | {key: float(value) for key, value in means(totals).items()}

    def _save(self, done: int, index: int, scores: dict[str, float] | None) -> None:
        state = {
            "batch_index": index,
            "config": configuration.to_dict(self.config),
            "frozen": self.model.identities,
            "composition": [config.to_dict() for config in composition_configs(self.config)]
            if self.parts.composed
            else [],
        }
        metrics = None if scores is None else {"loss": scores["loss"]}
        self.checkpoints.save(done, self.model.trainable, self.opt_state, state, metrics)

    def _save_frozen(self) -> None:
        """The best checkpoint as a frozen folder."""
        target = self.run / "frozen"
        if target.exists():
            return
        self.checkpoints.wait()
        abstract, _ = self.parts.split(self.parts.structure.abstract())
        best = self.checkpoints.restore(
            self.checkpoints.best, abstract_like(abstract, self.shardings.trainable)
        )
        decoder = self.parts.merge(best.trainable, {})
        frozen_folders.save_frozen(decoder, target, vocabulary=self.model.vocabulary)


def _report(progress: Progress, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
    """Fetches a step's metrics and shows them; ends the run at a loss that is not finite."""
    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
    for key in ("loss", "grad_norm"):
        if not math.isfinite(values[key]):
            raise CalmError(
                f"step {step}: {key} is {values[key]}; nothing of this step was saved. Lower "
                "optimizer.learning_rate, or look at the data of that batch"
            )
    progress.train(step, values, waited)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


class _Profiler:
    """Writes a profile of the steps that the config names, for TensorBoard."""

    def __init__(self, run: epath.Path, train: ConfigDict):
        self.folder, self.start = run / "tensorboard", train.profile_start
        self.stop = self.start + train.profile_steps
        self.running = False

    def before(self, index: int) -> None:
        if self.stop > self.start and index == self.start:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and index == self.stop:
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self.running = False

    def __enter__(self) -> "_Profiler":
        return self

    def __exit__(self, *_):
        if self.running:
            self._end()
