"""The page's sections on right and wrong answers. Missing data makes one line, never an error."""

from collections.abc import Sequence
from typing import Any

from calm_jax.evaluation import charts, metrics
from calm_jax.evaluation.charts import Bar
from calm_jax.evaluation.page import (
    COLOURS,
    Element,
    cut,
    element,
    figure,
    missing,
    panels,
    run_colour,
    section,
    table,
    visible,
)
from calm_jax.evaluation.results import Run
from calm_jax.evaluation.table1 import (
    MODELS,
    PAPER,
    SETS,
    Table1,
    expressions,
    interval,
    percent,
)

_EXAMPLES = 5  # right ones, and as many wrong ones


def headline(scores: Table1) -> Element:
    """The one number, what it means, and the three sets as bars."""
    cell = scores.scores["composed"]["math"]
    kept = (
        f"It keeps {_kept(scores, 'augment', 'subs')} of the augment's substitution and "
        f"{_kept(scores, 'anchor', 'num')} of the anchor's arithmetic."
    )
    words = element(
        "div",
        element(
            "p",
            f"of {cell['count']:,} arithmetic expressions, whose keys were all kept from the "
            f"bridge's training, are answered exactly by the composed model (95% interval "
            f"{interval(cell['interval'])}). The paper reports {PAPER['composed']['math']}%.",
        ),
        element("p", kept),
    )
    number = element("p", percent(cell["exact_match"]), element("small", "%"), class_="figure")
    ladders = []
    for name, what in SETS.items():
        bars = [
            Bar(
                {"augment": "augment", "anchor": "anchor", "composed": "composed"}[model],
                scores.scores[model][name]["exact_match"],
                COLOURS[model],
                scores.scores[model][name]["interval"],
                PAPER[model][name],
            )
            for model in MODELS
        ]
        bars.insert(2, Bar("best constant", scores.constants[name][1], COLOURS["constant"]))
        about = ", ".join(f"{bar.label} {percent(bar.value)}%" for bar in bars)
        ladders.append(figure(f"{name.upper()}: {what}", charts.ladder(f"{what}: {about}", bars)))
    marks = charts.legend(
        ("bar", COLOURS["composed"], "exact match, with its 95% interval"),
        ("paper", None, "the paper's figure"),
    )
    return element(
        "section",
        element("div", element("div", number), words, class_="headline"),
        element("div", class_="rule"),
        marks,
        panels(ladders),
    )


def table_1(scores: Table1) -> Element:
    """Models as rows, each set as two columns: our figure with its interval, the paper's."""
    groups = element(
        "tr",
        element("td"),
        *(
            element("th", name.upper(), element("small", what), colspan=2, scope="colgroup")
            for name, what in SETS.items()
        ),
    )
    columns = element(
        "tr",
        element("th", "Exact match, %", scope="col"),
        *(
            element("th", text, scope="col", class_=text)
            for _ in SETS
            for text in ("ours", "paper")
        ),
    )
    body = []
    for model, label in MODELS.items():
        if model == "composed":
            body.append(_constant_row(scores))
        cells = []
        for name in SETS:
            cell = scores.scores[model][name]
            spread = element("small", interval(cell["interval"]))
            cells.append(element("td", percent(cell["exact_match"]), spread, class_="ours"))
            cells.append(element("td", percent(PAPER[model][name]), class_="paper"))
        attributes = {"class_": "strong"} if model == "composed" else {}
        body.append(element("tr", element("th", label, scope="row"), *cells, **attributes))
    counts = [element("td", f"{count:,}", colspan=2) for count in scores.counts.values()]
    body.append(
        element("tr", element("th", "Expressions scored", scope="row"), *counts, class_="soft")
    )
    made = element(
        "table", element("thead", groups, columns), element("tbody", *body), class_="results"
    )
    notes = (
        "Below each figure its 95% interval (Wilson). The best constant answer is the most "
        "frequent result of the evaluated set itself, so no fixed answer does better. No evaluated "
        "expression was trained on. The paper's figures are those of its Table 1, on its own, "
        "larger task."
    )
    return section(
        "Table 1, ours beside the paper's",
        element("div", made, class_="scroll", tabindex=0),
        element("p", notes, class_="note"),
        None
        if scores.same_expressions
        else missing(
            "The three models were not scored on the same expressions: compare with care."
        ),
    )


def all_scores(runs: Sequence[Run]) -> Element:
    """Every task of every run: for experiments other than the key-value one."""
    rows = []
    for run in runs:
        for task, cell in run.scores.items():
            records = run.predictions[task]
            constant = metrics.best_constant(r["targets"] for r in records)[1] if records else None
            rows.append(
                (
                    visible(run.name),
                    element("code", visible(task)),
                    percent(cell["exact_match"]),
                    interval(cell["interval"]),
                    "not known" if constant is None else percent(constant),
                    f"{cell['count']:,}",
                )
            )
    if not rows:
        return section("Scores", missing("No run has been evaluated yet."))
    header = (
        "Run",
        "Task",
        "Exact match, %",
        "95% interval",
        "Best constant answer, %",
        "Examples",
    )
    return section("Scores", table(header, rows, numbers=4))


def breakdown(runs: Sequence[Run]) -> Element:
    """Accuracy by operands: of composed models by seen and unseen keys, of all on each set."""
    heading = "Accuracy by number of operands, and by seen and unseen keys"
    figures = []
    for run in runs:
        both = [
            (label, run.records(set="math", unseen=unseen), run_colour(run), not unseen)
            for label, unseen in (("seen keys", False), ("unseen keys", True))
        ]
        if run.composed and all(records for _, records, *_ in both):
            about = (
                f"Exact match of {run.name} on arithmetic over seen and unseen keys, by operands"
            )
            chart = charts.bar_chart(about, _by_operands(both))
            figures.append(figure(f"MATH, seen and unseen keys: {visible(run.name)}", chart))
    for name in reversed(SETS):
        groups = _by_operands(
            [(run.name, expressions(run, name), run_colour(run), False) for run in runs]
        )
        if groups:
            about = f"{SETS[name]}: exact match of every model by number of operands"
            title = f"{name.upper()}: {SETS[name]}"
            figures.append(figure(title, charts.bar_chart(about, groups)))
    if not figures:
        return section(heading, missing("No prediction carries a number of operands."))
    marks = [("bar", run_colour(run), visible(run.name)) for run in runs]
    marks += [
        ("faint bar", run_colour(run), f"{visible(run.name)}, keys of the bridge's training")
        for run in runs
        if run.composed
    ]
    return section(heading, charts.legend(*marks), panels(figures, wide=True))


def examples(runs: Sequence[Run]) -> Element:
    """The same expressions answered by every run, some right and some wrong for a composed one."""
    heading = "Examples"
    answers = [
        (run, {r["inputs"]: r for r in (expressions(run, "math") or run.records())}) for run in runs
    ]
    answers = [(run, records) for run, records in answers if records]
    if not answers:
        return section(heading, missing("No predictions have been written yet."))
    judge, records = next((pair for pair in answers if pair[0].composed), answers[-1])
    chosen = [
        record
        for right in (True, False)
        for record in _spaced([r for r in records.values() if r["correct"] == right], _EXAMPLES)
    ]
    rows = []
    for record in chosen:
        cells: list[Any] = [
            element("code", cut(visible(record["inputs"]), 160)),
            element("code", cut(visible(record["targets"]), 40)),
        ]
        for _, other in answers:
            said = other.get(record["inputs"])
            cells.append("not asked" if said is None else _answer(said))
        rows.append(cells)
    wrong = sum(not record["correct"] for record in records.values())
    text = (
        f"Right and wrong answers of {visible(judge.name)}, spread evenly over its predictions, "
        f"which hold {wrong:,} wrong ones in {len(records):,}; every prediction stands in the "
        "run's evaluation folder."
    )
    header = ("Prompt", "Answer", *(visible(run.name) for run, _ in answers))
    return section(heading, element("p", text, class_="note"), table(header, rows))


def _constant_row(scores: Table1) -> Element:
    cells = []
    for answer, share in scores.constants.values():
        always = element("small", "always ", element("code", visible(answer)))
        cells += [element("td", percent(share), always), element("td", "–", class_="paper")]
    return element("tr", element("th", "Best constant answer", scope="row"), *cells, class_="soft")


def _kept(scores: Table1, parent: str, name: str) -> str:
    before = scores.scores[parent][name]["exact_match"]
    after = scores.scores["composed"][name]["exact_match"]
    return f"{percent(100 * after / before)}%" if before else "none"


def _by_operands(series: Sequence[tuple[str, list, str, bool]]) -> list:
    """Groups of `charts.bar_chart` by operands, of (label, records, colour, faint)."""
    operands = sorted(
        {r["operands"] for _, records, *_ in series for r in records if "operands" in r}
    )
    groups = []
    for number in operands:
        bars, counts = [], []
        for label, records, shade, faint in series:
            asked = [record for record in records if record.get("operands") == number]
            if asked:
                cell = metrics.score(asked)
                value, low_high = cell["exact_match"], cell["interval"]
                bars.append(Bar(label, value, shade, low_high, faint=faint))
                counts.append(cell["count"])
        fewest, most = min(counts), max(counts)
        note = f"n = {most:,}" if fewest == most else f"n = {fewest:,}–{most:,}"
        groups.append((f"{number} operand{'s' if number > 1 else ''}", note, bars))
    return groups


def _answer(record: dict[str, Any]) -> Element:
    text = cut(visible(record["prediction"]).strip(), 40)
    mark = "right" if record["correct"] else "wrong"
    return element("span", element("code", text or "(nothing)"), class_=mark)


def _spaced(records: list, count: int) -> list:
    """`count` of the records, evenly spaced."""
    if len(records) <= count:
        return records
    return [records[index * len(records) // count] for index in range(count)]
