"""The page of an experiment: one HTML file that needs no network, and Table 1 as JSON beside it."""

import dataclasses
from collections.abc import Sequence

from etils import epath

from calm_jax.checkpoints.files import absolute, write_json, write_text
from calm_jax.evaluation import score_sections, setting, training_sections
from calm_jax.evaluation.page import Element, document, element, visible
from calm_jax.evaluation.results import Run, read_runs
from calm_jax.evaluation.table1 import Table1, as_text, percent, table1


@dataclasses.dataclass(frozen=True)
class Report:
    """Where the page is, and Table 1 where the experiment has one."""

    page: epath.Path
    table: Table1 | None

    def __str__(self) -> str:
        return f"{as_text(self.table)}\n\n{self.page}" if self.table else str(self.page)


def write_report(experiment: epath.PathLike, output: epath.PathLike | None = None) -> Report:
    """Writes the page of the runs under a folder, and `table1.json` into that folder.

    Args:
        experiment: a folder of run directories. For the key-value experiment they are called
            augment, anchor and composed; table1.json, `{model: {"subs", "num", "math"}}` in
            percent, is written when all three have been scored on all three sets.
        output: the page; default `experiment`/report.html.

    Raises:
        CalmError: no run in the folder, a damaged file of a run, or a place that cannot be written.
    """
    folder = absolute(experiment)
    page = absolute(output) if output else folder / "report.html"
    runs = read_runs(folder)
    scores = table1(runs)
    write_text(page, build_page(runs, scores, str(experiment)))
    if scores:
        write_json(folder / "table1.json", scores.percentages())
    else:
        (folder / "table1.json").unlink(missing_ok=True)  # that of other scores
    return Report(page, scores)


def build_page(runs: Sequence[Run], scores: Table1 | None, experiment: str) -> str:
    """The page as text. `experiment` is the folder as it stands in the commands it shows."""
    key_value = any(run.records(set=name) for run in runs for name in ("subs", "num", "math"))
    title = "Two frozen models, one trained bridge" if scores else "Experiment report"
    parts: list[Element] = [
        element(
            "header",
            element("p", "calm_jax · " + visible(epath.Path(experiment).name), class_="kicker"),
            element("h1", title),
            element("p", _summary(runs, scores), class_="lede"),
        )
    ]
    if scores:
        parts += [score_sections.headline(scores), score_sections.table_1(scores)]
    else:
        parts.append(score_sections.all_scores(runs))
    if key_value:
        parts += [setting.differences(runs), score_sections.breakdown(runs)]
    parts.append(training_sections.curves(runs))
    if any(run.composed for run in runs):
        parts += [training_sections.usage(runs), training_sections.attention(runs)]
    parts += [score_sections.examples(runs), setting.costs(runs), setting.making(experiment, runs)]
    return document(f"{title} · calm_jax", *parts)


def _summary(runs: Sequence[Run], scores: Table1 | None) -> str:
    """Two sentences: what was composed, and what came of it."""
    if scores is None:
        names = ", ".join(visible(run.name) for run in runs)
        return f"What the runs of this experiment score, and how they came to it: {names}."
    by_name = {run.name: run for run in runs}
    augment = _sized(setting.parameters(by_name["augment"], "decoder"))
    anchor = _sized(setting.parameters(by_name["anchor"], "decoder"))
    bridge = setting.parameters(by_name["composed"], "bridge")
    bridge = f" ({bridge} parameters)" if bridge else ""
    math = {name: percent(row["math"]["exact_match"]) for name, row in scores.scores.items()}
    return (
        f"A model that knows which number each key stands for (the augment{augment}) and a model "
        f"that can calculate (the anchor{anchor}) were joined without changing either: only a "
        f"bridge between their hidden states{bridge} was trained. Composed, they answer "
        f"{math['composed']}% of expressions over keys the bridge never saw; the augment alone "
        f"answers {math['augment']}%, the anchor alone {math['anchor']}%, and the best constant "
        f"answer is right in {percent(scores.constants['math'][1])}%."
    )


def _sized(amount: str | None) -> str:
    return f", {amount} parameters" if amount else ""
