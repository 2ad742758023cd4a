"""The page itself: elements, style, and the few shapes every section is made of.

Elements are `xml.etree` elements, so every text that goes in is escaped when the page is written.
"""

import zlib
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from calm_jax.evaluation.results import Run

Element = ElementTree.Element
Child = Element | str | None

# Dark enough for text on white (WCAG AA), and told apart by lightness as well as by hue.
INK, MUTED, FAINT, LINE = "#17212b", "#566270", "#8b96a3", "#dde3e9"
COLOURS = {"augment": "#b45309", "anchor": "#2b5f9e", "composed": "#0b7464", "constant": "#7a8592"}
_OTHERS = ("#6a4c9c", "#a03768", "#4d6b14", "#8a5a00", "#33658a", "#7b3f2e")

_COLOUR_RULE = f""":root {{ color-scheme: light; --ink: {INK}; --muted: {MUTED}; --line: {LINE};
  --composed: {COLOURS["composed"]}; }}
"""
_STYLE = (
    _COLOUR_RULE
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #f4f6f8; color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: -apple-system, "Segoe UI", "Inter", "Roboto", "Helvetica Neue", "Arial",
  "Liberation Sans", system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 56px; }
header { padding: 8px 0 20px; }
header p.kicker { margin: 0 0 6px; color: var(--composed); font-weight: 600; letter-spacing: .04em;
  font-size: 14px; }
h1 { font-size: 34px; line-height: 1.18; letter-spacing: -.015em; margin: 0 0 14px; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 0 0 10px; line-height: 1.3; }
p { margin: 0 0 12px; max-width: 84ch; }
p.lede { font-size: 18px; max-width: 82ch; }
p.note, figcaption { color: var(--muted); font-size: 14px; }
p.missing { color: var(--muted); font-style: italic; margin: 0; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 26px 28px; margin: 0 0 20px; }
section > :last-child { margin-bottom: 0; }
.headline { display: grid; grid-template-columns: minmax(250px, 300px) 1fr; gap: 32px;
  align-items: center; }
.headline .figure { font-size: 64px; line-height: 1; font-weight: 650; letter-spacing: -.03em;
  color: var(--composed); margin: 0 0 10px; white-space: nowrap; }
.headline .figure small { font-size: 32px; font-weight: 500; letter-spacing: 0; }
.headline p { margin: 0 0 6px; }
.rule { border-top: 1px solid var(--line); margin: 20px 0 16px; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: 16px 36px; align-items: center; }
.panels { display: grid; gap: 22px 26px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
.panels.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure > strong { display: block; font-size: 14.5px; margin: 0 0 4px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; max-width: 440px; overflow: visible;
  font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 2px 0 14px; padding: 0;
  list-style: none; color: var(--muted); font-size: 14px; }
.legend svg { display: inline-block; width: 30px; height: 12px; margin-right: 7px;
  vertical-align: -1px; }
.scroll { overflow-x: auto; margin: 12px 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: left; padding: 9px 14px 9px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: 13.5px; vertical-align: bottom;
  border-bottom: 1.5px solid #b9c3cd; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td small, th small { display: block; color: var(--muted); font-size: 12.5px; font-weight: 400; }
tr.strong td, tr.strong th { background: #eef6f4; }
tr.strong > :first-child { box-shadow: inset 3px 0 0 var(--composed); padding-left: 12px; }
tr.soft td, tr.soft th { color: var(--muted); font-weight: 400; }
table.results { table-layout: fixed; min-width: 660px; }
table.results tr > :first-child { width: 20%; }
table.results td.ours { font-weight: 650; font-size: 17px; }
table.results td.paper { color: var(--muted); }
code, .token { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .92em; }
p code, th, strong { overflow-wrap: anywhere; }
th code { font-weight: 400; }
tbody th { min-width: 110px; }
tbody th:has(code) { min-width: 190px; }
pre { background: #f4f6f8; border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  overflow-x: auto; font-size: 13.5px; line-height: 1.6; margin: 8px 0 14px; }
.right { color: #0b6b4f; } .wrong { color: #b3261e; }
.right, .wrong { font-weight: 600; white-space: nowrap; }
.right::before { content: "\\2713\\00a0"; } .wrong::before { content: "\\2717\\00a0"; }
@media (max-width: 720px) {
  main { padding: 22px 12px 32px; }
  section { padding: 18px 16px; border-radius: 8px; }
  h1 { font-size: 27px; } p.lede { font-size: 16.5px; }
  .headline { grid-template-columns: 1fr; gap: 18px; }
  .headline .figure { font-size: 52px; }
  table { font-size: 14px; } th, td { padding-right: 10px; }
  table.results td.ours { font-size: 15px; }
}
@media print {
  body { background: #fff; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: 14px 0; }
  figure, tr, .headline { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)


def element(tag: str, *children: Child, **attributes: str | float) -> Element:
    """An HTML or SVG element. In attribute names `_` stands for `-`; `class_` is the class."""
    made = Element(tag)
    for name, value in attributes.items():
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        made.set(name.rstrip("_").replace("_", "-"), text)
    for child in children:
        if child is None:
            continue
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def run_colour(run: Run) -> str:
    """The colour of a run's part in the key-value experiment; of other runs, one by its name."""
    return COLOURS.get(run.name, _OTHERS[zlib.crc32(run.name.encode()) % len(_OTHERS)])


def cut(text: str, length: int) -> str:
    """At most so many characters, an ellipsis included."""
    return text if len(text) <= length else text[: length - 1] + "…"


def visible(text: str) -> str:
    """The text with line breaks and control characters written out, as a page cannot hold them."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def section(heading: str, *children: Child) -> Element:
    return element("section", element("h2", heading), *children)


def missing(text: str) -> Element:
    """The one line that stands where a section's data is not there."""
    return element("p", text, class_="missing")


def figure(title: str, chart: Element, caption: str | None = None) -> Element:
    return element(
        "figure",
        element("strong", title),
        chart,
        element("figcaption", caption) if caption else None,
    )


def panels(figures: Iterable[Element], wide: bool = False) -> Element:
    """Figures side by side, as many as fit: three on a wide screen, two if `wide`."""
    return element("div", *figures, class_="panels wide" if wide else "panels")


def table(
    header: Sequence[Child], rows: Iterable[Sequence[Child] | Element], numbers: int = 0
) -> Element:
    """A table; the first cell of a row names the row, the last `numbers` columns hold numbers.

    A row may be an element of its own, made by `row` with other classes.
    """
    head = element(
        "tr",
        *(
            element("th", cell, scope="col", **_number(index >= len(header) - numbers))
            for index, cell in enumerate(header)
        ),
    )
    body = [cells if isinstance(cells, Element) else row(cells, numbers) for cells in rows]
    made = element("table", element("thead", head), element("tbody", *body))
    return element("div", made, class_="scroll", tabindex=0)


def row(cells: Sequence[Child], numbers: int = 0, **attributes: str) -> Element:
    name, *others = cells
    return element(
        "tr",
        element("th", name, scope="row"),
        *(
            element("td", cell, **_number(index >= len(others) - numbers))
            for index, cell in enumerate(others)
        ),
        **attributes,
    )


def document(title: str, *children: Child) -> str:
    """The whole page as text."""
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", _STYLE),
        ),
        element("body", element("main", *children)),
        lang="en",
    )
    return (
        "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"
    )


def _number(applies: bool) -> dict[str, str]:
    return {"class_": "number"} if applies else {}
