"""The arms of an experiment, the models that it compares, and the commands that make them."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from etils import epath

from calm_jax.checkpoints.files import absolute
from calm_jax.errors import CalmError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FIELD = re.compile(r"\{([a-z0-9_]+)\}")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model that is trained and scored, or another way to score one.

    Attributes:
        name: letters, digits and `_`; also what `get_config` of the config's file is called with.
        label: its name in tables; default: `name`.
        anchor, augments: arms whose frozen folders a composed run joins.
        decoder: the arm whose frozen folder a decoder's run starts from.
        frozen: a frozen folder that exists already: nothing is trained, and there are no seeds.
        scored_from: the arm whose model is scored; nothing is trained then.
        flags: further flags of `calm evaluate`; {NAME} is the frozen folder of that arm.
        kind: "part", "calm", "baseline", "ablation" or "control": its place in the table.
        seeded: whether each seed trains one of its own, instead of one for all.
        x: its place on the axis of the experiment's curve; None: it is no point of it.
    """

    name: str
    label: str = ""
    anchor: str = ""
    augments: tuple[str, ...] = ()
    decoder: str = ""
    frozen: str = ""
    scored_from: str = ""
    flags: tuple[str, ...] = ()
    kind: str = "baseline"
    seeded: bool = True
    x: float | None = None

    def __post_init__(self):
        if self.frozen:
            object.__setattr__(self, "seeded", False)

    @property
    def is_trained(self) -> bool:
        """Whether it has a training of its own."""
        return not self.frozen and not self.scored_from

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.label or self.name

    def needs(self, known: Collection[str], flags: Sequence[str] = ()) -> tuple[str, ...]:
        """The arms that must be finished first.

        Fields of its own `flags` and the experiment's count if they are `known` arms.
        """
        named = [self.anchor, *self.augments, self.decoder, self.scored_from]
        fields = [name for flag in (*flags, *self.flags) for name in _FIELD.findall(flag)]
        named += [name for name in fields if name in known]
        return tuple(dict.fromkeys(filter(None, named)))


def control(name: str, label: str, of: str = "calm") -> Arm:
    """The arm `of` scored under a control of `calm evaluate`."""
    return Arm(name, label, scored_from=of, kind="control", flags=(f"--control={name}",))


KINDS = {
    "part": "Parts alone",
    "calm": "Composed",
    "baseline": "Baselines",
    "ablation": "Ablations",
    "control": "Controls: the augment destroyed",
}


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """Figures of the paper in the experiment's form, which the page shows beside its own."""

    name: str  # of the table in the paper
    columns: tuple[str, ...]  # what was scored, and how
    rows: Mapping[str, tuple[float | None, ...]]  # by the arm's name; None: the paper has none
    note: str = ""  # what differs


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config's file describes by `get_experiment()`.

    Attributes:
        title: of the page.
        arms: in the order in which they run: each after those that it needs.
        tasks: what every arm is scored on, the main one first.
        reference: the arm that the others are compared with.
        seeds: of initial values, noise and the order of data.
        flags: further flags of `calm evaluate`, for every arm.
        paper: tables of the paper that have the experiment's form.
        axis: what the `x` of arms is: the page draws the scores of those that have one over it.
        finetuned: the arm that fine-tunes the reference's anchor; trainings are told in its costs.

    Raises:
        CalmError: a name that is not one or is used twice, an arm that needs an unknown or a later
            one, or needs one of each seed but has none itself.
    """

    title: str
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...]
    reference: str
    seeds: tuple[int, ...] = (0,)
    flags: tuple[str, ...] = ()
    paper: tuple[PaperTable, ...] = ()
    axis: str = ""
    finetuned: str = ""

    def __post_init__(self):
        known: dict[str, Arm] = {}
        every = {arm.name for arm in self.arms}
        for arm in self.arms:
            if not _NAME.fullmatch(arm.name):
                raise CalmError(f"arm {arm.name!r}: a name has small letters, digits and _")
            if arm.name in known:
                raise CalmError(f"two arms are called {arm.name!r}")
            if arm.kind not in KINDS:
                raise CalmError(f"arm {arm.name}: kind {arm.kind!r}; known are {', '.join(KINDS)}")
            for name in arm.needs(every, self.flags):
                if name not in known:
                    earlier = ", ".join(known) or "none"
                    raise CalmError(f"arm {arm.name} needs {name!r}; the arms before it: {earlier}")
                if known[name].seeded and not arm.seeded:
                    raise CalmError(f"arm {arm.name} has no seeds, but {name}, which it needs, has")
            if bool(arm.anchor) != bool(arm.augments):
                raise CalmError(
                    f"arm {arm.name}: anchor {arm.anchor!r} and augments {arm.augments}; a pair "
                    "needs both"
                )
            if arm.frozen and (arm.anchor or arm.decoder or arm.scored_from):
                raise CalmError(
                    f"arm {arm.name} is {arm.frozen} already; it cannot be made of arms"
                )
            if arm.scored_from and known[arm.scored_from].scored_from:
                raise CalmError(
                    f"arm {arm.name}: {arm.scored_from} is not trained; name its source"
                )
            known[arm.name] = arm
        for table in self.paper:
            for name, figures in table.rows.items():
                if name not in known:
                    raise CalmError(
                        f"{table.name}: {name!r} is no arm; there are {', '.join(known)}"
                    )
                if len(figures) != len(table.columns):
                    raise CalmError(
                        f"{table.name}: {len(figures)} figures of {name}, but "
                        f"{len(table.columns)} columns"
                    )
        points = [arm.name for arm in self.arms if arm.x is not None]
        if bool(points) != bool(self.axis):
            raise CalmError(
                f"axis {self.axis!r}, but arms with an x are {', '.join(points) or 'none'}"
            )
        for field in ("reference", "finetuned"):
            name = getattr(self, field)
            if name not in known and (name or field == "reference"):
                raise CalmError(f"{field} {name!r} is no arm; there are {', '.join(known)}")
        if any(not field or len({*field}) < len(field) for field in (self.tasks, self.seeds)):
            raise CalmError(f"tasks {self.tasks} and seeds {self.seeds}: one at least, none twice")


@dataclasses.dataclass(frozen=True)
class Job:
    """An arm with one seed: its folder under the experiment's, and its commands."""

    arm: Arm
    seed: int
    folder: epath.Path
    train: tuple[str, ...]
    score: tuple[str, ...]
    needs: tuple["Job", ...]  # that must be done first
    config: str = ""  # of the arm's training, as JSON

    @property
    def commands(self) -> list[tuple[str, ...]]:
        return [command for command in (self.train, self.score) if command]

    @property
    def model(self) -> str:
        """The folder of the model that is scored."""
        return self.score[1].partition("=")[2]

    @property
    def results(self) -> epath.Path:
        """The folder of its scores and predictions."""
        return self.folder / "evaluation"

    @property
    def is_scored(self) -> bool:
        """Whether scores are there, whatever commands they are of."""
        return (self.results / "summary.json").exists()

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}" if self.arm.seeded else self.arm.name


def jobs(
    experiment: Experiment, file: str, workdir: epath.Path, configs: Mapping[str, str]
) -> Iterator[Job]:
    """All jobs: the arms without seeds, then those of one seed after another.

    `file` is the config's file, and `configs` are those of the trained arms as JSON.
    """
    arms = {arm.name: arm for arm in experiment.arms}
    first, made = experiment.seeds[0], {}

    def folder(name: str, seed: int) -> epath.Path:
        return workdir / (f"seed_{seed}" if arms[name].seeded else "all_seeds") / name

    def frozen(name: str, seed: int) -> epath.Path:
        return absolute(arms[name].frozen or folder(name, seed) / "frozen")

    def job(arm: Arm, seed: int) -> Job:
        place, train = folder(arm.name, seed), ()
        if arm.is_trained:
            train = ("train", f"--config={file}:{arm.name}", f"--workdir={place}")
            train += (f"--config.train.seed={seed}", f"--config.data.seed={seed}")
            if arm.anchor:
                train += (f"--config.anchor={frozen(arm.anchor, seed)}",)
                paths = ", ".join(repr(str(frozen(name, seed))) for name in arm.augments)
                train += (f"--config.augments=({paths},)",)
            if arm.decoder:
                train += (f"--config.decoder.from={frozen(arm.decoder, seed)}",)
        source = arms[arm.scored_from] if arm.scored_from else arm
        model = f"--workdir={folder(source.name, seed)}"
        if not source.anchor:
            model = f"--model={frozen(source.name, seed)}"
        flags = [
            _FIELD.sub(lambda x: str(frozen(x[1], seed)) if x[1] in arms else x[0], flag)
            for flag in (*experiment.flags, *arm.flags)
        ]
        score = ("evaluate", model, f"--tasks={','.join(experiment.tasks)}", *flags)
        score += (f"--output={place / 'evaluation'}",)
        needs = tuple(made[folder(name, seed)] for name in arm.needs(arms, experiment.flags))
        config = configs.get(arm.name, "")
        made[place] = Job(arm, seed, place, train, score, needs, config)
        return made[place]

    yield from (job(arm, first) for arm in experiment.arms if not arm.seeded)
    for seed in experiment.seeds:
        yield from (job(arm, seed) for arm in experiment.arms if arm.seeded)


def groups(all_jobs: Sequence[Job]) -> list[list[tuple[str, ...]]]:
    """The commands of jobs in groups, each of which needs only models of the groups before it.

    The commands of a group may run at the same time. `all_jobs` hold what they need, before them.
    """
    made: dict[Job, int] = {}  # the group after which a job's model is there
    found: dict[int, list[tuple[str, ...]]] = {}
    for job in all_jobs:
        made[job] = max((made[need] for need in job.needs), default=0) + bool(job.train)
        if job.train:
            found.setdefault(made[job], []).append(job.train)
        found.setdefault(made[job] + 1, []).append(job.score)
    return [found[number] for number in sorted(found)]
