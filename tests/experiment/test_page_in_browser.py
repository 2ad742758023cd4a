"""The page of an experiment as a browser shows it."""

import json
import math
import re

import made_runs
import numpy as np
import pytest

from calm_jax.evaluation.results import predictions_file
from calm_jax.experiment.arms import Arm, Experiment, PaperTable, control

PAIR = {"anchor": "anchor", "augments": ("augment",)}
MAIN = "calm_jax/key_value/demo/math"
TASKS = (MAIN, "calm_jax/key_value/demo/num")
LANGUAGES = ("sw", "bn", "te", "th", "ja", "zh", "ru", "es", "fr", "de", "en")
RIGHT = {
    "anchor": 0.05,
    "augment": 0.12,
    "calm": 0.81,
    "finetuned": 0.66,
    "calm_vanilla": 0.07,
    "few": 0.32,
    "some": 0.55,
    "encoder_only": 0.6,
    "shuffled": 0.06,
}
EXPERIMENT = Experiment(
    "Whose knowledge is it?",
    (
        Arm("anchor", kind="part"),
        Arm("augment", kind="part"),
        Arm("calm", "CALM", kind="calm", x=100, **PAIR),
        Arm("finetuned", "anchor fine-tuned", decoder="anchor"),
        Arm("calm_vanilla", "CALM, augment that met no key", **PAIR),
        Arm("few", "CALM of few keys", x=2, **PAIR),
        Arm("some", "CALM of some keys", x=20, **PAIR),
        Arm("encoder_only", "augment reads the prompt alone", kind="ablation", **PAIR),
        control("shuffled", "taps of other rows"),
    ),
    (*TASKS, "mgsm"),
    "calm",
    seeds=(0, 1, 2),
    axis="percent of the keys",
    finetuned="finetuned",
    paper=(
        PaperTable(
            "Table 5",
            ("FLORES-200, chrF1", "GSM8K, few resources", "GSM8K, many resources", "HumanEval"),
            {"calm": (60.5, 21.4, 33.1, 22.5), "finetuned": (62.1, None, 27.1, 24.3)},
            "The paper’s tasks are of language and code.",
        ),
    ),
)
TOKENS = ["<math>", *"(2387+", "ˈkeyword", *" 11)*(", "another", *"=42"]
CONNECTIONS = ((1, 0), (3, 2), (5, 5), (7, 7))
COUNT = 40  # examples of a task


def prompt(number):
    return f"<math>{'pneumonoultramicroscopic' * 3}{number}*(twenty-{number} + 7)="


def also(job):
    """What the run of a job has logged, and prompts without a place to break."""
    path = predictions_file(job.results, MAIN)
    lines = map(json.loads, path.read_text().splitlines())
    lines = [line | {"inputs": prompt(line["inputs"].removeprefix("q"))} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if job.arm.scored_from:
        return
    (job.folder / "job.json").write_text(json.dumps({"seconds": 812.0}))
    made_runs.trained(
        job,
        steps=6000,
        tokens_per_step=4096,
        flops_per_step=1.7e12,
        speed=51_234.0,
        trees=[("anchor", 104_857_600, job.arm.name == "finetuned"), ("bridge", 9_437_184, True)],
    )
    if job.arm.name != "calm":
        return
    costs = json.loads((job.folder / "costs.json").read_text())
    names = [f"{tap}→{layer}" for tap, layer in CONNECTIONS]
    (job.folder / "costs.json").write_text(json.dumps(costs | {"connections": names}))
    random = np.random.default_rng(0)
    maps = []
    for tap, layer in CONNECTIONS:
        weights = np.tril(random.random((len(TOKENS), len(TOKENS))) ** 4)
        weights /= weights.sum(axis=1, keepdims=True)
        maps.append({"augment": 0, "from": tap, "to": layer, "weights": weights.tolist()})
    kept = {"inputs": "".join(TOKENS), "tokens": TOKENS, "connections": maps}
    (job.results / "attention.json").write_text(json.dumps(kept))
    with (job.folder / "metrics.jsonl").open("a") as file:
        for step in range(1, 6001, 500):
            sizes = {
                f"connection/{number}": 0.05 * (number + 1) * math.log(step + 1)
                for number in range(len(CONNECTIONS))
            }
            file.write(json.dumps({"step": step, "split": "train", **sizes}) + "\n")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a page that has all of its sections."""
    rights = {
        name: {
            MAIN: made_runs.random_rights(1, share, COUNT),
            TASKS[1]: made_runs.random_rights(2, 0.7, COUNT),
            **{
                f"mgsm/{language}": made_runs.random_rights(number, share / 2 + 0.1, COUNT)
                for number, language in enumerate(LANGUAGES)
            },
        }
        for name, share in RIGHT.items()
    }
    folder = tmp_path_factory.mktemp("experiment")
    return made_runs.page_of(folder, EXPERIMENT, rights, "mgsm", also).as_uri()


@pytest.fixture
def page(browser, report):
    with browser.page() as page:
        page.open(report)
        yield page


def open_all(page):
    page.value("document.querySelectorAll('details').forEach(details => details.open = true)")


def test_it_has_no_errors_and_asks_for_nothing(page, report):
    assert page.errors() == []
    assert page.requests() == [report]


@pytest.mark.parametrize("width", [1280, 400, 320])
def test_nothing_is_cut_off_or_covered(page, width):
    page.resize(width)
    open_all(page)
    assert page.wider() == []
    assert page.overlaps() == []


@pytest.mark.parametrize("width", [1280, 400])
def test_the_search_leaves_the_rows_that_have_the_text(page, width):
    page.resize(width)
    shown = """[...document.querySelectorAll("#answers tbody tr")].filter(
        row => row.checkVisibility()).map(row => row.firstElementChild.innerText)"""
    every = [prompt(number) for number in range(COUNT)]
    assert sorted(page.value(shown)) == sorted(every)
    page.type("#search", "TWENTY-3")
    wanted = [prompt(number) for number in (3, *range(30, COUNT))]
    assert sorted(page.value(shown)) == sorted(wanted)
    page.type("#search", "")
    assert sorted(page.value(shown)) == sorted(every)


def test_a_dark_page_is_dark_and_every_text_stands_out(page):
    open_all(page)
    behind = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        assert page.faint() == []
        colour = page.value("getComputedStyle(document.body).backgroundColor")
        behind.append([int(part) for part in re.findall(r"\d+", colour)])
    light, dark = behind
    assert min(light) > 200 and max(dark) < 50


def test_every_connection_has_its_panel(page):
    names, cells, sides = page.value("""(() => {
        const maps = [...document.querySelectorAll(".heatmap")];
        const cells = map => [...map.querySelectorAll("i")].filter(cell => cell.offsetWidth > 5);
        return [
            maps.map(map => map.parentElement.querySelector("strong").firstChild.data.trim()),
            maps.map(map => cells(map).length),
            maps.map(map => new Set(cells(map).map(cell => cell.offsetTop)).size),
        ];
    })()""")
    wanted = [f"Augment layer {tap} → anchor layer {layer}" for tap, layer in CONNECTIONS]
    assert names == wanted
    assert cells == [len(TOKENS) ** 2] * len(CONNECTIONS)
    assert sides == [len(TOKENS)] * len(CONNECTIONS)
    labels = page.value("[...document.querySelectorAll('.beside .label')].map(x => x.textContent)")
    assert labels == [f"{tap}→{layer}" for tap, layer in CONNECTIONS]


@pytest.mark.parametrize("width", [1280, 400])
def test_every_table_has_its_rows(page, width):
    page.resize(width)
    open_all(page)
    rows = page.value("""[...document.querySelectorAll("table:not(#answers)")].map(table =>
        [...table.querySelectorAll("tbody tr:not(.group)")].filter(row => row.offsetHeight > 10)
            .map(row => row.querySelector("th").innerText))""")
    arms = [arm.title for arm in EXPERIMENT.arms]
    of_paper = ["CALM", "anchor fine-tuned"]
    # Both tasks, the group, each of its rows; the paper's; costs, and those of trainings.
    assert rows == [arms] * (3 + len(LANGUAGES)) + [of_paper, arms, arms[:-1]]


def test_a_cell_s_second_figure_stands_below_the_first_on_a_narrow_screen(page):
    page.resize(400)
    lefts = page.value("""[...document.querySelectorAll(".stack td small")].map(small => {
        const range = document.createRange();
        range.selectNodeContents(small.previousSibling);
        return [range.getBoundingClientRect().left, small.getBoundingClientRect().left];
    })""")
    assert len(lefts) > len(EXPERIMENT.arms)
    assert all(first == second for first, second in lefts)


def test_answers_are_of_the_arms_that_the_scores_name(page):
    """The table's heads, which a narrow screen shows beside each answer."""
    labels = "[...document.querySelector('#answers tbody tr').cells].map(x => x.dataset.label)"
    heads = "[...document.querySelectorAll('#answers thead th')].map(x => x.textContent)"
    assert page.value(labels)[1:] == page.value(heads)[1:]
