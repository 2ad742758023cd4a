"""A plan as text: tables in Markdown, aligned so that a terminal shows them too."""

from collections.abc import Callable, Sequence
from typing import Any

from calm_jax import units
from calm_jax.planning.compiled_plan import Plan

_NAMES = {
    "compute": "matrix products",
    "memory": "chip's memory",
    "links": "links between chips",
    "network": "network between slices",
}

_BY_FORMULA = (
    "Use formulas to rank ways of running: their times may be wrong by a factor of three. Rely "
    "only on compiled plans."
)


def document(plan: Plan) -> str:
    """A plan as a page of its own: a title, the command that made it, and `text`."""
    return f"# {_subject(plan)}\n\n    {plan['command']}\n\n{text(plan)}"


def text(plan: Plan) -> str:
    """All tables and sentences of one plan."""
    sections = [_head(plan), _memory(plan)]
    if "seconds" in plan:
        if plan.get("collectives"):
            sections.append(_collectives(plan))
        sections.append(_seconds(plan))
    if "training" in plan:
        sections.append(_training(plan["training"]))
    sections.append(_decoding(plan))
    if "candidates" in plan:
        sections.append(_candidates(plan))
    if not all(each["compiled"] for each in (plan, *plan.get("candidates", ()))):
        sections.append(_BY_FORMULA)
    if plan.get("advice"):
        sections.append(plan["advice"])
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; its first column is text, the others are numbers."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        for row in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _subject(plan: Plan) -> str:
    return f"{' + '.join(plan['models'])} on {plan['topology']}"


def _head(plan: Plan) -> str:
    mesh = " × ".join(f"{axis} {ways}" for axis, ways in plan["mesh"].items() if ways > 1)
    micro = f" in {plan['accumulate']} micro-batches" if plan["accumulate"] > 1 else ""
    rows = f"{plan['batch_size']:,} rows of {plan['length']:,} tokens"
    for number, length in enumerate(plan.get("own_lengths", ())):
        rows += f" and {length:,} of its own for augment {number}" if length else ""
    how = "compiled" if plan["compiled"] else "by formula, not compiled"
    if "compile_seconds" in plan:
        how += f" in {plan['compile_seconds']:.0f} s"
    return (
        f"**{_subject(plan)}** ({plan['chips']:,} chips; {how})\n"
        f"mesh {mesh or 'of one chip'}; {rows} a step{micro}; attention {plan['attention']}; "
        f"remat {plan['remat']}; weight sharding {plan['weight_sharding']}"
    )


def _memory(plan: Plan) -> str:
    memory = plan["memory"]
    rows = [
        (tree["name"], units.count(tree["parameters"]), units.size(tree["bytes"]))
        for tree in memory["trees"]
    ]

    def add(name: str, size: float | None) -> None:
        rows.append((name, "", units.size(size) if size is not None else "more"))

    needed, rest = memory["peak"], "activations, gradients, buffers"
    if "temporaries" in memory:
        add("arguments of the step", memory["arguments"])
        add(rest, memory["peak_of_step"] - memory["arguments"])
        add("peak of the step", memory["peak_of_step"])
        add("loaded, but unused by the step", memory["unused"])
    if not plan["compiled"]:
        add(rest, needed - sum(tree["bytes"] for tree in memory["trees"]))
    add("needed", needed or None)
    add("a chip has", memory["available"])
    if needed:
        add("left over", memory["available"] - needed)
    if memory.get("host"):
        add("offloaded to the host", memory["host"])
    verdict = "" if memory["fits"] else "\n\n**It does not fit.**"
    return table(("memory of a chip", "parameters", "size"), rows) + verdict


def _collectives(plan: Plan) -> str:
    smallest = sum(row["bytes"] for row in plan["collectives"]) / 1000
    rows = [
        (row["kind"], " × ".join(row["axes"]), f"{row['runs']:,}", units.size(row["bytes"]))
        for row in plan["collectives"]
        if row["bytes"] >= smallest
    ]
    return table(("sent by a chip in a step", "along", "runs", "size"), rows)


def _seconds(plan: Plan) -> str:
    seconds = plan["seconds"]
    rows = [(_NAMES[key], units.seconds(seconds[key])) for key in _NAMES if seconds[key]]
    rows.append(("a step, all at the same time", units.seconds(seconds["bound"])))
    rows.append(("a step, one after the other", units.seconds(seconds["serial"])))
    lines = [table(("spent on", "time"), rows)]
    summary = f"{units.flops(plan['flops'])} per chip and step"
    if plan["mfu_bound"] is not None:
        least = plan["mfu_bound"] * seconds["bound"] / seconds["serial"]
        summary += (
            f"; MFU between {100 * least:.0f} % (one after the other) and "
            f"{100 * plan['mfu_bound']:.0f} %"
        )
    lines.append(f"{summary}; bounded by {_NAMES[plan['bottleneck']]}.")
    return "\n\n".join(lines)


def _training(cost: dict[str, Any]) -> str:
    times = " to ".join(units.seconds(3600 * hours) for hours in cost["hours"])
    line = (
        f"Training on {units.count(cost['tokens'])} tokens: {cost['steps']:,} steps, {times}, "
        f"{_range(cost['chip_hours'])} chip hours"
    )
    return line + (f", {_range(cost['dollars'])} dollars." if "dollars" in cost else ".")


def _decoding(plan: Plan) -> str:
    found, rows = plan["decoding"], []

    def add(name: str, values: Sequence[Any], shown: Callable[[Any], str] = units.size) -> None:
        rows.append((name, *map(shown, values)))

    add(f"{plan['memory']['trees'][0]['name']}'s keys and values", [x["anchor"] for x in found])
    for number in range(len(found[0]["augments"])):
        name, cross = f"augment {number}'s", [x["cross"][number] for x in found]
        add(f"{name} keys and values", [x["augments"][number] for x in found])
        add(f"{name} f_cross", [x["kept"] for x in cross])
        add("its form", ["latent" if x["latent"] else "projected" for x in cross], str)
        other = ["none" if x["other"] is None else units.size(x["other"]) for x in cross]
        add("in the other form", other, str)
    add("together", [x["total"] for x in found])
    fit = f"rows of {plan['length']:,} tokens that fit all chips"
    add(fit, [x["rows"] for x in found], "{:,}".format)
    add("their tokens", [x["tokens"] for x in found], "{:,}".format)
    return table(("decoding: a token on a chip", *(x["dtype"] for x in found)), rows)


def _candidates(plan: Plan) -> str:
    rows = [
        (
            " × ".join(f"{axis} {ways}" for axis, ways in each["mesh"].items() if ways > 1),
            each["accumulate"],
            each["remat"],
            each["weight_sharding"],
            units.size(each["peak"]) if each["peak"] else "more",
            units.seconds(each["seconds"]) if each["seconds"] else "",
            "compiled" if each["compiled"] else "formula",
        )
        for each in plan["candidates"]
    ]
    return table(("mesh", "accumulate", "remat", "weights", "size", "time", "by"), rows)


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values)
