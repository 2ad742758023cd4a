"""`calm evaluate`: score a model on tasks."""

import dataclasses
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from calm_jax.checkpoints.files import absolute, read_json
from calm_jax.checkpoints.kinds import BRIDGE, COMPOSED_RUN, DECODER_RUN, FROZEN, kind_of
from calm_jax.cli import config, models
from calm_jax.errors import CalmError
from calm_jax.programs import cache_programs
from calm_jax.quiet import quiet_libtpu
from calm_jax.shell import command_line

USAGE = """Scores a model on tasks and writes every prediction.

  calm evaluate --workdir=runs/mine --parts
  calm evaluate --workdir=runs/kv/composed [--step=2000] [--limit=100]
  calm evaluate --model=models/anchor --tasks=test.jsonl [--output=scores/anchor]
  calm evaluate --model=models/anchor --tasks=test.parquet --columns=inputs:question,targets:answer
  calm evaluate --workdir=runs/mine --parts --tasks=gsm8k:data/gsm8k,mgsm/sw+th:data/mgsm
  calm evaluate --workdir=runs/mine --tasks=humaneval:data/human_eval --samples=10 --temperature=0.8
  calm evaluate --workdir=runs/mine --tasks=test.jsonl --metric=contains,chrf1
  calm evaluate --workdir=runs/mine --harness=my_task --include_path=my_tasks

WORKDIR is a run of `calm train`. Tasks and lengths are those of its config unless flags say
otherwise: evaluate.tasks (or, if that is empty, the files of data.validation), evaluate.limit and
evaluate.max_new_tokens.

--tasks takes TASK:FOLDER, or TASK/LANGUAGE+LANGUAGE:FOLDER for some of its languages, where TASK is
gsm8k, mgsm, ntrex, flores, humaneval, mbpp or codexglue; choices:FILE or text:FILE; the name of a
seqio Task; or a file of JSON lines or Parquet, whose answers --metric scores; see docs/tasks.md.
--harness names tasks of lm-evaluation-harness instead; its results go to harness.json.

--control=zeroed scores a pair whose augment is destroyed: its taps are zeroed, shuffled between
rows or replaced by noise, or its weights permuted. --mix=AUGMENT and --hand_over=AUGMENT score
baselines of two decoders, MODEL as the anchor: mixed probabilities, and the augment's answer put
into the prompt. Their results go to evaluation/NAME.

--parts also scores the anchor and each augment alone, so that the pair can be compared with them.
MODEL is a frozen folder or an exported bridge. If the frozen models of a bridge have moved since it
was trained, --anchor and --augments say where they are.

Results replace earlier ones in the folder `evaluation` in WORKDIR or MODEL. A checkpoint that has
already been scored with the same settings is not scored again. --mesh.fsdp=4 and the like set the
mesh."""

SECTIONS = ("evaluate", "mesh")
CONTROLS = ("shuffled", "zeroed", "noise", "permuted")  # of `evaluation.controls`
_OF_TASKS = ("tasks", "metric", "stop", "columns", "max_new_tokens", "drop_shots")
_OF_VARIANTS = ("control", "mix", "hand_over")
_OF_ANSWERS = ("samples", "temperature", "top_p", "seed")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of a run", flag_values=values)
    flags.DEFINE_string("model", None, "frozen folder or exported bridge", flag_values=values)
    models.define(values)
    flags.DEFINE_list(
        "tasks", None, "TASK:FOLDER, seqio Tasks or files, separated by commas", flag_values=values
    )
    flags.DEFINE_list(
        "columns", None, "FIELD:COLUMN for the files, separated by commas", flag_values=values
    )
    flags.DEFINE_integer(
        "limit", None, "most examples of each task; 0: all", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", None, "longest answer, in tokens", lower_bound=1, flag_values=values
    )
    flags.DEFINE_list(
        "harness", None, "tasks of lm-evaluation-harness, instead of --tasks", flag_values=values
    )
    flags.DEFINE_string(
        "include_path", None, "folder of your own tasks for the harness", flag_values=values
    )
    flags.DEFINE_bool(
        "parts", False, "also score the anchor and the augments alone", flag_values=values
    )
    flags.DEFINE_integer(
        "batch_size", 128, "most prompts answered at once", lower_bound=1, flag_values=values
    )
    _define_options(values)
    _define_variant(values)
    flags.DEFINE_string("output", None, "folder of the results", flag_values=values)


def _define_options(values: flags.FlagValues) -> None:
    """Defines how tasks are asked; the defaults are those of `answering.Options`."""
    flags.DEFINE_list(
        "metric", None, "for files, main one first: exact_match, contains, number, regex, chrf1, …",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "stop", [], "for files: text before which an answer ends; repeatable", flag_values=values
    )
    flags.DEFINE_integer(
        "shots", None, "examples before each question; default: the task's", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "seed", 0, "seed for drawing shots and answers", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "samples", 1, "answers to each problem, for pass@k", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float("temperature", 0.0, "0: the most probable token", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "share of probability to draw from", flag_values=values)
    flags.DEFINE_integer(
        "context", 0, "most tokens of a prompt with its answer; 0: no limit", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "drop_shots", False, "leave out shots that do not fit into --context", flag_values=values
    )


def _define_variant(values: flags.FlagValues) -> None:
    """Defines what is scored in the model's place; the defaults are those of `Variant`."""
    flags.DEFINE_enum(
        "control", "", ["", *CONTROLS], "how the augments of a pair are destroyed",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "mix", "", "decoder whose probabilities are mixed into MODEL's", flag_values=values
    )
    flags.DEFINE_float(
        "mix_weight", 0.5, "its weight", lower_bound=0, upper_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "hand_over", "", "decoder whose answers come into MODEL's prompts", flag_values=values
    )
    flags.DEFINE_string("hand_over_question", "{inputs}", "what it is asked", flag_values=values)
    flags.DEFINE_string(
        "hand_over_prompt", "{answer}\n{inputs}", "what MODEL then reads", flag_values=values
    )
    flags.DEFINE_list(
        "hand_over_replace", None, "TEXT,REPLACEMENT in the prompts it is asked", flag_values=values
    )


def _load_config(values: flags.FlagValues) -> ConfigDict:
    """The keys of a run's config that an evaluation uses; defaults for a model without a run."""
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

    from calm_jax.evaluation import groups, metric_table, results, runner
    from calm_jax.evaluation.answering import Options
    from calm_jax.membership import refuse_several

    quiet_libtpu()
    cache_programs()
    refuse_several("calm evaluate")
    folder = absolute(values.workdir or values.model)
    variant = _variant(values)
    output = results.evaluation_folder(folder) / variant.name
    if values.output:
        output = absolute(values.output)
    if values.harness or values.include_path:
        print(_by_harness(folder, output, values))
        return 0
    summary = runner.evaluate(
        folder,
        step=values.step,
        **models.moved(values),
        tasks=settings.evaluate.tasks,
        limit=settings.evaluate.limit,
        max_new_tokens=settings.evaluate.max_new_tokens,
        columns=_columns(values.columns),
        mesh=settings.mesh.to_dict(),
        batch_size=values.batch_size,
        parts=values.parts,
        options=_options(values, Options),
        variant=variant,
        output=output,
        command=command_line("evaluate", *argv),
    )
    parts = summary.get(results.PARTS, {})
    scores = results.scores_of(summary)
    for task, score in scores.items():
        print(f"{task}: {metric_table.in_words(score)}")
        for part, of_part in parts.items():
            print(f"{task}, {part} alone: {metric_table.in_words(of_part[task])}")
        print(results.predictions_file(output, task))
    for group in groups.groups(scores, parts.get("anchor")):
        print(f"{group.name}: {group}")
    return 0


def _by_harness(folder: epath.Path, output: epath.Path, values: flags.FlagValues) -> str:
    """The tables of the harness; of the flags for tasks those that it knows."""
    unused = [
        name
        for name in (*_OF_TASKS, *_OF_VARIANTS, *_OF_ANSWERS)
        if values[name].value != values[name].default
    ]
    if unused or not values.harness:
        raise CalmError(f"--{unused[0]} is not for --harness" if unused else "give --harness=TASK")
    try:
        from calm_jax.evaluation.harness import evaluate_harness
    except ImportError as error:
        raise CalmError(
            f"--harness needs lm-evaluation-harness ({error}): pip install 'calm_jax[harness]'"
        ) from error
    return evaluate_harness(
        folder,
        values.harness,
        include_path=values.include_path,
        parts=values.parts,
        output=output,
        moved=models.moved(values),
        step=values.step,
        shots=values.shots,
        limit=values.limit or 0,
        context=values.context,
        batch_size=values.batch_size,
    )


def _variant(values: flags.FlagValues) -> Any:
    from calm_jax.evaluation.baselines import HandOver
    from calm_jax.evaluation.variants import Variant

    replace = values.hand_over_replace
    if replace is not None and len(replace) != 2:
        raise CalmError(f"--hand_over_replace={','.join(replace)} is not TEXT,REPLACEMENT")
    rule = HandOver(
        values.hand_over_question, values.hand_over_prompt, tuple(replace) if replace else None
    )
    return Variant(values.control, values.mix, values.mix_weight, values.hand_over, rule)


def _options(values: flags.FlagValues, make: type) -> Any:
    """`answering.Options`, whose class is given since its module is loaded late."""
    several = {"stop": tuple(values.stop)} | (
        {"metrics": tuple(values.metric)} if values.metric else {}
    )
    names = {field.name for field in dataclasses.fields(make)} - {"metrics", "stop"}
    return make(**several, **{name: values[name].value for name in names})
