"""The page of an experiment, one HTML file that needs no network; and Table 1 as JSON."""

import dataclasses
from collections.abc import Sequence

from etils import epath

from calm_jax.checkpoints.files import absolute, write_json, write_text
from calm_jax.evaluation import score_sections, setting, training_sections
from calm_jax.evaluation.page import environment
from calm_jax.evaluation.results import Run, read_runs
from calm_jax.evaluation.table1 import MODELS, PAPER, SETS, Table1, as_text, table1


@dataclasses.dataclass(frozen=True)
class Report:
    """Where the page is, and Table 1 if the experiment has one."""

    page: epath.Path
    table: Table1 | None

    def __str__(self) -> str:
        return f"{as_text(self.table)}\n\n{self.page}" if self.table else str(self.page)


def write_report(
    experiment: epath.PathLike, output: epath.PathLike | None = None, *, command: str = ""
) -> Report:
    """Writes the page of the runs under a folder, and `table1.json` into that folder.

    Args:
        experiment: a folder of run directories. For the key-value experiment they are called
            augment, anchor and composed; table1.json, `{model: {"subs", "num", "math"}}` in
            percent, is written when all three have been scored on all three sets.
        output: the page; default `experiment`/report.html.
        command: the command line that asks for it, which the page repeats.

    Raises:
        CalmError: no run in the folder, a damaged file of a run, or a place that cannot be written.
    """
    folder = absolute(experiment)
    page = absolute(output) if output else folder / "report.html"
    runs = read_runs(folder)
    scores = table1(runs)
    write_text(page, _page(runs, scores, folder.name, command))
    if scores:
        write_json(folder / "table1.json", scores.percentages())
    else:
        (folder / "table1.json").unlink(missing_ok=True)  # that of other scores
    return Report(page, scores)


def _page(runs: Sequence[Run], scores: Table1 | None, experiment: str, command: str) -> str:
    is_key_value = any(run.records(set=name) for run in runs for name in SETS)
    template = environment().get_template("page.html")
    return template.render(
        title="Two frozen models, one trained bridge" if scores else "Experiment report",
        experiment=experiment,
        runs=runs,
        by_name={run.name: run for run in runs},
        scores=scores,
        sets=SETS,
        models=MODELS,
        paper=PAPER,
        ladders=score_sections.ladders(scores) if scores else [],
        kept=score_sections.kept,
        tasks=score_sections.scores_by_task(runs),
        grouped=score_sections.grouped(runs),
        is_key_value=is_key_value,
        world=setting.world(runs),
        world_models=setting.models(runs),
        breakdown=score_sections.breakdown(runs) if is_key_value else [],
        losses=training_sections.losses(runs),
        accuracies=training_sections.accuracies(runs),
        usage=training_sections.usage(runs),
        attention=training_sections.attention(runs),
        examples=score_sections.examples(runs),
        parameters=setting.parameters,
        median_speed=setting.median_speed,
        made=setting.made(runs, command),
    )
