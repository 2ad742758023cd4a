"""What the page of an experiment shows, from folders that were written without a training."""

import dataclasses
import json
import re

import numpy as np
import pytest
from made_runs import page_of, random_rights

from calm_jax.errors import CalmError
from calm_jax.experiment.arms import Arm, Experiment, PaperTable

PAIR = {"anchor": "anchor", "augments": ("anchor",)}


def page(*arguments, **options):
    return page_of(*arguments, **options).read_text()


def test_a_curve_has_a_line_a_task_in_its_interval(tmp_path):
    shares = {"few": 2, "some": 20, "most": 50}
    arms = [Arm(name, x=x, **PAIR) for name, x in shares.items()]
    experiment = Experiment(
        "t", (Arm("anchor", kind="part"), *arms), ("math", "subs"), "some", axis="percent of keys"
    )
    rights = {"anchor": {task: random_rights(0, 0.5) for task in ("math", "subs")}}
    for name, share in shares.items():
        right = np.arange(200) < 2 * share  # exactly that many percent
        rights[name] = {"math": right, "subs": ~right}
    text = page(tmp_path, experiment, rights)
    (svg,) = re.findall(
        r'<svg role="img" aria-label="exact_match over percent of keys".*?</svg>', text, re.S
    )
    assert "percent of keys</text>" in svg
    lines = re.findall(r'<polyline class="dots" points="(.*?)"', svg)
    assert len(lines) == len(re.findall("<polygon", svg)) == 2
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    for line, shown in zip(heights, ([2, 20, 50], [98, 80, 50]), strict=True):
        # 0 % is at 180, 100 % at 12.
        np.testing.assert_allclose(line, [180 - 1.68 * value for value in shown], atol=0.1)


def pair(**fields):
    arms = (Arm("anchor", kind="part"), Arm("calm", "the pair", kind="calm", **PAIR))
    return Experiment("t", arms, ("all",), "calm", **fields)


@pytest.mark.parametrize(
    ("unscored", "words"),
    [
        ((), "2 seeds"),
        (("anchor",), "2 seeds"),
        (("calm",), "1 of 2 seeds"),
        (("anchor", "calm"), "1 of 2 seeds"),
    ],
)
def test_seeds_are_those_of_the_reference(tmp_path, unscored, words):
    def first_alone(job):
        if job.seed and job.arm.name in unscored:
            (job.results / "summary.json").unlink()

    rights = {name: {"all": np.arange(10) < 5} for name in ("anchor", "calm")}
    text = page(tmp_path, pair(seeds=(0, 1)), rights, also=first_alone)
    assert re.search('class="kicker">(.*?)</p>', text)[1] == f"calm_jax · {words}"
    missing = "; ".join(f"{name}, seed 1" for name in unscored)
    assert (f"Not finished: {missing}." in text) == bool(missing)


def test_jobs_of_other_commands_are_told(tmp_path):
    def ran_elsewhere(job):
        if job.arm.name == "calm":
            (job.folder / "job.json").write_text(json.dumps({"commands": [], "seconds": 1.0}))

    rights = {name: {"all": np.arange(10) < 5} for name in ("anchor", "calm")}
    text = page(tmp_path, pair(), rights, also=ran_elsewhere)
    assert "configs, or in another folder: calm, seed 0." in text
    assert "Not finished" not in text


def test_the_gain_of_each_language(tmp_path):
    """Two languages, one gains 40 points and the other loses 20."""
    ten = np.arange(10)
    rights = {
        "anchor": {"mgsm/sw": ten < 3, "mgsm/de": ten < 8},
        "calm": {"mgsm/sw": ten < 7, "mgsm/de": ten < 6},
    }
    text = page(tmp_path, pair(), rights, "mgsm")
    assert "mgsm, exact_match: better in 1 of 2" in text
    bars = re.findall(
        r'<g class="(\w+)"><title>(\w+): ([-+.\d]+)</title>\s*<rect x="[\d.]+" y="([\d.]+)" '
        r'width="[\d.]+" height="([\d.]+)"/>\s*<path class="interval" d="M[\d.]+ ([\d.]+)V([\d.]+)',
        text,
    )
    assert [bar[:3] for bar in bars] == [("gain", "sw", "+40.0"), ("loss", "de", "-20.0")]
    (gain_top, gain, low, high), (loss_top, loss, *_) = (map(float, bar[3:]) for bar in bars)
    assert gain == 2 * loss and gain_top + gain == loss_top  # both begin at 0
    assert high < gain_top < low  # further up is more
    together = text[text.index("<caption>mgsm, exact_match") :]
    together = together[: together.index("</table>")]
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", together)]
    assert cells == ["55.0", "", "65.0", "1 of 2"]


def test_the_answers_side_by_side_are_those_of_parts_baselines_and_the_pair(tmp_path):
    experiment = pair()
    more = (Arm("other", **PAIR), Arm("zeroed", scored_from="calm", kind="control"))
    experiment = dataclasses.replace(experiment, arms=(*experiment.arms, *more))
    ten = np.arange(10)
    rights = {"anchor": ten < 4, "calm": ten > 2, "other": ten < 0, "zeroed": ten < 0}
    text = page(tmp_path, experiment, {name: {"all": right} for name, right in rights.items()})
    table = text[text.index('id="answers"') :]
    heads = re.findall('<th scope="col">(.*?)</th>', table)
    assert heads == ["Prompt", "Right answer", "anchor", "the pair", "other"]
    # First those that the pair alone gets right, then those that the anchor alone does.
    asked = re.findall('<th scope="row"><code>q(\\d)', table)
    assert asked == [*"456789", *"012", "3"]


def test_answers_to_other_prompts_do_not_stand_beside(tmp_path):
    experiment = pair()
    experiment = dataclasses.replace(experiment, arms=(*experiment.arms, Arm("other", **PAIR)))

    def asked_else(job):
        if job.arm.name == "other":
            path = job.results / "all.jsonl"
            path.write_text(path.read_text().replace('"q', '"other '))

    rights = {name: {"all": np.arange(10) < 5} for name in ("anchor", "calm", "other")}
    text = page(tmp_path, experiment, rights, also=asked_else)
    table = text[text.index('id="answers"') :]
    heads = re.findall('<th scope="col">(.*?)</th>', table)
    assert heads == ["Prompt", "Right answer", "anchor", "the pair"]


def test_one_task_alone_has_no_gains(tmp_path):
    rights = {name: {"all": random_rights(0, 0.5)} for name in ("anchor", "calm")}
    assert "Gain by language" not in page(tmp_path, pair(), rights)


def test_the_paper_s_figures_stand_beside_ours(tmp_path):
    paper = (PaperTable("Table 9", ("KEYS", "LORE"), {"calm": (84.3, None)}, "Another task."),)
    rights = {"anchor": {"all": np.arange(8) < 1}, "calm": {"all": np.arange(8) < 5}}
    text = " ".join(page(tmp_path, pair(paper=paper), rights).split())
    table = text[text.index("Beside the paper’s Table 9") : text.index("Another task.")]
    assert re.findall(r"<td.*?>(.*?)</td>", table) == ["<b>62.5</b>", "84.3", ""]


@pytest.mark.parametrize(
    ("rows", "message"),
    [({"best": (1.0,)}, "Table 9: 'best' is no arm"), ({"calm": (1.0, 2.0)}, "2 figures of calm")],
)
def test_a_table_of_other_arms(rows, message):
    with pytest.raises(CalmError, match=message):
        pair(paper=(PaperTable("Table 9", ("KEYS",), rows),))


def test_the_attention_of_the_reference_and_what_its_connections_add(tmp_path):
    maps = [
        {"augment": 0, "from": 3, "to": to, "weights": [[1.0, 0.0], [0.25, 0.75]]} for to in (0, 1)
    ]
    kept = {"inputs": "ab", "tokens": ["a", "b"], "connections": maps}
    lines = [
        {"step": step, "split": "train", "connection/0": 0.1 * step, "connection/1": 0.02 * step}
        for step in (1, 2)
    ]

    def write(job):
        if job.arm.name == "calm":
            (job.results / "attention.json").write_text(json.dumps(kept))
            metrics = "".join(json.dumps(line) + "\n" for line in lines)
            (job.folder / "metrics.jsonl").write_text(metrics)

    rights = {name: {"all": random_rights(0, 0.5)} for name in ("anchor", "calm")}
    text = page(tmp_path, pair(), rights, also=write)
    panels = re.findall(r"<figure><strong>(Augment layer .*?)</strong>", text)
    assert panels == [
        "Augment layer 3 → anchor layer 0 <small>adds 0.2 ‖H‖</small>",
        "Augment layer 3 → anchor layer 1 <small>adds 0.04 ‖H‖</small>",
    ]
    assert text.count('title="b looks at a: 0.25"') == 2
