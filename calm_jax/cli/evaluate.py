"""`calm evaluate`: score a model on tasks."""

from absl import flags
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, read_json
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, DECODER_RUN, FROZEN, kind_of
from calm_jax.cli import config, models
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu

USAGE = """Scores a model by exact match and writes every prediction.

  calm evaluate --workdir=runs/mine --parts
  calm evaluate --workdir=runs/kv/composed [--step=2000] [--limit=100]
  calm evaluate --model=models/anchor --tasks=test.jsonl [--output=scores/anchor]
  calm evaluate --model=models/anchor --tasks=test.parquet --columns=inputs:question,targets:answer

WORKDIR is a run of `calm train`. Tasks and lengths are those of its config unless flags say
otherwise: evaluate.tasks (where it is empty, the files of data.validation), evaluate.limit and
evaluate.max_new_tokens. --parts scores the anchor and each augment alone as well, so that the pair
can be compared with them. MODEL is a frozen folder or an exported bridge. Where the frozen models
of a bridge have moved since it was trained, --anchor and --augments say where they are.

Results go to the folder `evaluation` in WORKDIR or MODEL, in place of earlier ones. Nothing is done
where the same checkpoint has been scored with the same settings before. --mesh.fsdp=4 and the like
set the mesh."""

SECTIONS = ("evaluate", "mesh")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of a run", flag_values=values)
    flags.DEFINE_string("model", None, "frozen folder or exported bridge", flag_values=values)
    models.define(values)
    flags.DEFINE_list(
        "tasks", None, "Tasks or files of JSON lines, separated by commas", flag_values=values
    )
    flags.DEFINE_list(
        "columns", None, "FIELD:COLUMN of the files, separated by commas", flag_values=values
    )
    flags.DEFINE_integer(
        "limit", None, "examples of each task at most, 0 for all", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", None, "length of an answer at most", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool(
        "parts", False, "score the anchor and the augments alone as well", flag_values=values
    )
    flags.DEFINE_string("output", None, "folder of the results", flag_values=values)


def _load_config(values: flags.FlagValues) -> ConfigDict:
    """The keys of a run's config that an evaluation uses; of a model without a run, defaults."""
    if bool(values.workdir) == bool(values.model):
        raise CalmError("give either --workdir, a run, or --model, a frozen folder or a bridge")
    from calm_jax.training.config_keys import to_dict
    from calm_jax.training.configuration import composed_run

    folder = absolute(values.workdir or values.model)
    found = read_json(folder / "config.json", "a run, a frozen folder or an exported bridge")
    kind, is_run = kind_of(found), bool(values.workdir)
    if kind not in ((DECODER_RUN, COMPOSED_RUN) if is_run else (FROZEN, BRIDGE)):
        hint = "; give it as --model" if kind in (FROZEN, BRIDGE) else ""
        wanted = "a run" if is_run else "a frozen folder or an exported bridge"
        raise CalmError(f"{folder} is not {wanted} but {kind}{hint}")
    defaults = to_dict(composed_run())
    used = {section: found.get(section, defaults[section]) for section in SECTIONS}
    used["evaluate"] = used["evaluate"] | {"tasks": tuple(used["evaluate"]["tasks"])}
    for name in ("limit", "max_new_tokens"):
        if values[name].value is not None:
            used["evaluate"][name] = values[name].value
    if values.tasks is not None:
        used["evaluate"]["tasks"] = tuple(values.tasks)
    return ConfigDict(used)


def _columns(given: list[str] | None) -> dict[str, str]:
    """The flag --columns as a map from fields to columns."""
    pairs = [text.partition(":")[::2] for text in given or ()]
    for field, column in pairs:
        if not field or not column:
            raise CalmError(f"--columns={','.join(given)} is not FIELD:COLUMN,FIELD:COLUMN")
    return dict(pairs)


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    given = models.mesh_as_config(argv)
    values, settings = config.parse(given, USAGE, _define, load_config=_load_config)

    from calm_jax.evaluation import metrics, results, runner
    from calm_jax.membership import refuse_several

    quiet_libtpu()
    refuse_several("calm evaluate")
    folder = absolute(values.workdir or values.model)
    output = absolute(values.output) if values.output else results.evaluation_folder(folder)
    summary = runner.evaluate(
        folder,
        step=values.step,
        **models.moved(values),
        tasks=settings.evaluate.tasks,
        limit=settings.evaluate.limit,
        max_new_tokens=settings.evaluate.max_new_tokens,
        columns=_columns(values.columns),
        mesh=settings.mesh.to_dict(),
        parts=values.parts,
        output=output,
        command=config.command_line("evaluate", argv),
    )
    parts = summary.get(results.PARTS, {})
    for task, score in summary.items():
        if task in (results.SCORED, results.PARTS):
            continue
        print(f"{task}: {metrics.in_words(score)}")
        for part, scores in parts.items():
            print(f"{task}, {part} alone: {metrics.in_words(scores[task])}")
        print(results.predictions_file(output, task))
    return 0
