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
_NOT_OF_HARNESS = (
    "tasks", "metric", "stop", "columns", "max_new_tokens", "drop_shots", "control", "mix",
    "hand_over", "samples", "temperature", "top_p", "seed",
)  # fmt: skip
_OF_MIX = ("mix_weight",)
_OF_HAND_OVER = ("hand_over_question", "hand_over_prompt", "hand_over_replace")


def _define_flags(define: config.Define) -> None:
    define("string", "workdir", "directory of a run")
    define("string", "model", "frozen folder or exported bridge")
    models.define_flags(define)
    define("list", "tasks", "TASK:FOLDER, seqio Tasks or files, separated by commas")
    define("list", "columns", "FIELD:COLUMN for the files, separated by commas")
    define("integer", "limit", "most examples of each task; 0: all", lower_bound=0)
    define("integer", "max_new_tokens", "longest answer, in tokens", lower_bound=1)
    define("list", "harness", "tasks of lm-evaluation-harness, instead of --tasks")
    define("string", "include_path", "folder of your own tasks for the harness")
    define("bool", "parts", "also score the anchor and the augments alone", False)
    define("integer", "batch_size", "most prompts answered at once", 128, lower_bound=1)
    _define_options(define)
    _define_variant(define)
    define("string", "output", "folder of the results")


def _define_options(define: config.Define) -> None:
    """Defines how tasks are asked; the defaults are those of `answering.Options`."""
    metrics = "exact_match, contains, number, regex, chrf1, …"
    define("list", "metric", f"for files, main one first: {metrics}")
    define("multi_string", "stop", "for files: text before which an answer ends; repeatable", [])
    shots = "examples before each question; default: the task's"
    define("integer", "shots", shots, lower_bound=0)
    define("integer", "seed", "seed for drawing shots and answers", 0, lower_bound=0)
    define("integer", "samples", "answers to each problem, for pass@k", 1, lower_bound=1)
    define("float", "temperature", "0: the most probable token", 0.0)
    define("float", "top_p", "share of probability to draw from", 1.0)
    context = "most tokens of a prompt with its answer; 0: no limit"
    define("integer", "context", context, 0, lower_bound=0)
    define("bool", "drop_shots", "leave out shots that do not fit into --context", False)


def _define_variant(define: config.Define) -> None:
    """Defines what is scored in the model's place; the defaults are those of `Variant`."""
    controls = ["", *CONTROLS]
    define("enum", "control", "how the augments of a pair are destroyed", "", enum_values=controls)
    define("string", "mix", "decoder whose probabilities are mixed into MODEL's", "")
    define("float", "mix_weight", "its weight", 0.5, lower_bound=0, upper_bound=1)
    define("string", "hand_over", "decoder whose answers come into MODEL's prompts", "")
    define("string", "hand_over_question", "what it is asked", "{inputs}")
    define("string", "hand_over_prompt", "what MODEL then reads", "{answer}\n{inputs}")
    define("list", "hand_over_replace", "TEXT,REPLACEMENT in the prompts it is asked")


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
    for name in ("tasks", "limit", "max_new_tokens"):
        if values[name].value is not None:
            used["evaluate"][name] = values[name].value
    used["evaluate"]["tasks"] = tuple(used["evaluate"]["tasks"])
    return ConfigDict(used)


def _columns(given: list[str] | None) -> dict[str, str]:
    """The flag --columns as a map from fields to columns."""
    pairs = [text.partition(":")[::2] for text in given or ()]
    for field, column in pairs:
        if not field or not column:
            raise CalmError(f"--columns={','.join(given)} is not FIELD:COLUMN,FIELD:COLUMN")
    return dict(pairs)


def main(argv: list[str]) -> int:
    given = models.mesh_as_config(argv)
    values, settings = config.parse(given, USAGE, _define_flags, load_config=_load_config)

    from calm_jax.evaluation import groups, metric_table, results, runner
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
        print(_by_harness(folder, output, values, settings))
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
        options=_options(values),
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


def _by_harness(
    folder: epath.Path, output: epath.Path, values: flags.FlagValues, settings: ConfigDict
) -> str:
    """The tables of the harness; of the flags for tasks those that it knows."""
    unused = [name for name in _NOT_OF_HARNESS if values[name].value != values[name].default]
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
        mesh=settings.mesh.to_dict(),
        shots=values.shots,
        limit=settings.evaluate.limit,
        context=values.context,
        batch_size=values.batch_size,
    )


def _variant(values: flags.FlagValues) -> Any:
    from calm_jax.evaluation.baselines import HandOver
    from calm_jax.evaluation.variants import Variant

    for parent, names in (("mix", _OF_MIX), ("hand_over", _OF_HAND_OVER)):
        given = [name for name in names if values[name].present]
        if given and not values[parent].value:
            raise CalmError(f"--{given[0]} needs --{parent}")
    replace = values.hand_over_replace
    if replace is not None and len(replace) != 2:
        raise CalmError(f"--hand_over_replace={','.join(replace)} is not TEXT,REPLACEMENT")
    rule = HandOver(
        values.hand_over_question, values.hand_over_prompt, tuple(replace) if replace else None
    )
    return Variant(values.control, values.mix, values.mix_weight, values.hand_over, rule)


def _options(values: flags.FlagValues) -> Any:
    from calm_jax.evaluation.answering import Options

    several = {"stop": tuple(values.stop)} | (
        {"metrics": tuple(values.metric)} if values.metric else {}
    )
    names = {field.name for field in dataclasses.fields(Options)} - {"metrics", "stop"}
    return Options(**several, **{name: values[name].value for name in names})
