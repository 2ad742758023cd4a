"""The page of synthetic runs: what it says, what it needs, what it survives."""

import html as html_module
import html.parser
import json
import re
import shutil

import pytest

from calm_jax.cli import report as command
from calm_jax.errors import CalmError
from calm_jax.evaluation import results
from calm_jax.evaluation.page import environment
from calm_jax.evaluation.report import write_report
from calm_jax.evaluation.score_sections import Bar, Figure, Group
from calm_jax.evaluation.table1 import table1

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects the text, the tags and the attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(experiment) -> Page:
    return Page(write_report(experiment).page.read_text())


def predictions(experiment, model: str, task: str) -> list[dict]:
    path = experiment / model / "evaluation" / f"calm_jax_key_value_demo_{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_set_of_the_validation_has_its_line(experiment):
    write_report(experiment)
    text = (experiment / "report.html").read_text()
    assert all(text.count(f">{name}</text>") == 1 for name in ("math", "num", "subs"))


def test_table1_json_is_what_the_predictions_say(experiment):
    write_report(experiment)
    table = json.loads((experiment / "table1.json").read_text())
    assert {model: set(row) for model, row in table.items()} == {
        model: {"subs", "num", "math"} for model in ("augment", "anchor", "composed")
    }
    for model, row in table.items():
        for name, percent in row.items():
            records = predictions(experiment, model, name)  # MATH: not those of math_seen
            right = [r["prediction"] == r["targets"] for r in records]
            assert percent == pytest.approx(100 * sum(right) / len(right))


def test_page_shows_the_figures_and_the_papers(experiment):
    page = read_page(experiment)
    table = json.loads((experiment / "table1.json").read_text())
    for row in table.values():
        for percent in row.values():
            assert f"{percent:.1f}" in page.text
    for paper in ("98.1", "92.9", "73.7", "72.0", "84.3", "4.2"):
        assert paper in page.text
    for said in ("1,000 strings of 2–4 letters", "20% (200 keys)", "connections 3→0, 3→1, 3→2",
                 "Best constant answer", "230,400", "--config=configs/kv_compose.py"):  # fmt: skip
        assert said in page.text


def test_page_tells_several_augments_apart(experiment):
    """Connections are named as the run wrote them with its costs."""
    path = experiment / "composed" / "config.json"
    config = json.loads(path.read_text())
    first, second = {"connections": [[3, 1], [3, 0]]}, {"connections": [[2, 1]], "gate": True}
    config |= {"name": "kv_two_augments:compose", "composition": [first, second]}
    config["augments"] = ["runs/two/first/frozen", "runs/two/second/frozen"]
    path.write_text(json.dumps(config))
    path = experiment / "augment" / "config.json"
    path.write_text(path.read_text().replace("demo/augment", "demo/augment_second"))
    path = experiment / "composed" / "costs.json"
    names = ["0: 3→0", "0: 3→1", "1: 2→1"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"connections": names}))
    text = write_report(experiment).page.read_text()
    assert [text.count(f">{name}</text>") for name in names] == [1, 1, 1]
    page = Page(text)
    for said in ("augment 0: connections 3→1, 3→0", "augment 1: connections 2→1; norms before it, "
                 "a gate", "Augment, second",
                 "of the second half of the keys"):  # fmt: skip
        assert said in page.text


def test_best_constant_answer_is_of_the_evaluated_set(experiment):
    table = table1(results.read_runs(experiment))
    for name, (answer, percent) in table.constants.items():
        targets = [record["targets"] for record in predictions(experiment, "anchor", name)]
        assert percent == pytest.approx(100 * targets.count(answer) / len(targets))
        assert all(targets.count(other) <= targets.count(answer) for other in targets)


def test_page_needs_no_network_and_no_script(experiment):
    page = read_page(experiment)
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "onload"}
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object"}
    text = (experiment / "report.html").read_text()
    assert "url(" not in text and "@import" not in text and "//" not in text


def test_every_chart_is_described(experiment):
    text = write_report(experiment).page.read_text()
    charts = text.count("<svg") + text.count('class="bars"') + text.count('class="heatmap"')
    assert charts == text.count('role="img" aria-label="') + text.count('aria-hidden="true"')
    assert text.count('role="img"') >= 12


def test_hostile_text_stays_text(experiment):
    hostile = '</code><script>alert("x")</script>\u0000\u202e&amp;'
    for model in ("augment", "anchor", "composed"):
        path = experiment / model / "evaluation" / "calm_jax_key_value_demo_math.jsonl"
        records = predictions(experiment, model, "math")
        for record in records:
            record |= {
                "inputs": hostile + record["inputs"],
                "prediction": hostile,
                "correct": False,
            }
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    attention = experiment / "composed" / "evaluation" / "attention.json"
    kept = json.loads(attention.read_text())
    kept["tokens"][0], kept["inputs"] = hostile, hostile
    attention.write_text(json.dumps(kept))
    page = read_page(experiment)
    assert "script" not in page.tags
    assert r'</code><script>alert("x")</script>\x00\u202e&amp;' in page.text


@pytest.mark.parametrize(
    "gone, line",
    [
        ("composed/evaluation/attention.json", "No attention map has been written yet."),
        ("*/costs.json", "No run has written its costs yet."),
        ("*/metrics.jsonl", "No run has logged a training step yet."),
        ("*/evaluation", "No run has been evaluated yet."),
    ],
)
def test_missing_data_makes_one_line(experiment, gone, line):
    assert line not in read_page(experiment).text
    for path in experiment.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert line in read_page(experiment).text


def test_without_a_model_there_is_no_table1(experiment):
    shutil.rmtree(experiment / "anchor")
    report = write_report(experiment)
    assert report.table is None and not (experiment / "table1.json").exists()
    assert "Scores" in Page(report.page.read_text()).text


def test_other_runs_get_their_scores(experiment):
    other = experiment / "translation"
    shutil.copytree(experiment / "composed", other)
    shutil.rmtree(other / "evaluation")
    (other / "evaluation").mkdir()
    record = {"inputs": "Hallo", "targets": "Hello", "prediction": "Hello", "correct": True}
    (other / "evaluation" / "my_task.jsonl").write_text(json.dumps(record) + "\n")
    summary = {"my/task": {"exact_match": 100.0, "count": 1, "interval": [20.7, 100.0]}}
    (other / "evaluation" / "summary.json").write_text(json.dumps(summary))
    for name in ("augment", "anchor", "composed"):
        shutil.rmtree(experiment / name)
    page = read_page(experiment)
    assert "my/task" in page.text and "20.7–100.0" in page.text and "Table 1" not in page.text


def test_different_expressions_are_told(experiment):
    assert "not scored on the same expressions" not in read_page(experiment).text
    path = experiment / "anchor" / "evaluation" / "calm_jax_key_value_demo_num.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "not scored on the same expressions" in read_page(experiment).text


def test_stale_table1_goes_with_its_scores(experiment):
    write_report(experiment)
    shutil.rmtree(experiment / "anchor" / "evaluation")
    write_report(experiment)
    assert not (experiment / "table1.json").exists()


def test_resumed_run_counts_a_step_once(experiment):
    path = experiment / "anchor" / "metrics.jsonl"
    lines = [json.dumps({"step": 20, "split": "train", "loss": 123.0}),
             json.dumps({"step": 35, "split": "train", "loss": float("nan")})]  # fmt: skip
    path.write_text(path.read_text() + "\n".join(lines) + "\n" + '{"step": 40, "spl')
    steps, losses = results.read_run(experiment / "anchor").curve("train", "loss")
    assert steps == sorted(set(steps)) and 40 in steps
    assert losses[steps.index(20)] == 123.0
    assert 35 not in steps
    write_report(experiment)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation/calm_jax_key_value_demo_subs.jsonl"])
def test_damaged_line_is_named(experiment, name):
    path = experiment / "augment" / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{broken\n", *lines[2:]]))
    with pytest.raises(CalmError, match=rf"{path}:3: "):
        write_report(experiment)
    assert not (experiment / "report.html").exists()


def test_no_experiment(tmp_path):
    with pytest.raises(CalmError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(CalmError, match=r"no runs here; no folder in it has a config\.json"):
        write_report(tmp_path)
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma/config.json").write_text('{"format": "calm_jax frozen folder, version 3"}')
    with pytest.raises(CalmError, match="no runs here; gemma is a frozen folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_place_that_cannot_be_written(experiment):
    (experiment / "file").write_text("")
    with pytest.raises(CalmError, match=r"cannot write .*file/page.html"):
        write_report(experiment, experiment / "file" / "page.html")


def test_command_prints_table1_and_writes_where_told(experiment, tmp_path, capsys):
    output = tmp_path / "elsewhere" / "page.html"
    assert command.main([f"--experiment={experiment}", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "Best constant answer" in printed and "84.3" in printed and str(output) in printed
    assert output.exists() and (experiment / "table1.json").exists()


def parts_scored(experiment, folder, **shares) -> None:
    """A run called mine, scored on a file of 10 examples, and its parts in `folder` of each."""
    run = experiment / "mine"
    shutil.copytree(experiment / "composed", run)
    shutil.rmtree(run / "evaluation")
    for name in ("augment", "anchor", "composed"):
        shutil.rmtree(experiment / name)
    config = json.loads((run / "config.json").read_text())
    config |= {name: str(experiment / "models" / name) for name in ("anchor",)}
    config["augments"] = [str(experiment / "models" / "augment")]
    (run / "config.json").write_text(json.dumps(config))

    def scored(share: int, target) -> dict:
        records = [{"inputs": f"{n}", "targets": "yes", "prediction": "yes" if n < share else "",
                    "correct": n < share} for n in range(10)]  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        (target / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return {"test.jsonl": {"exact_match": 10.0 * share, "count": 10, "empty": 10 - share,
                               "interval": [0.0, 100.0]}}  # fmt: skip

    summary = scored(7, run / "evaluation") | {"_run": {"step": 5, "date": "", "device": ""}}
    parts = {}
    for name, share in shares.items():
        if folder == "run":
            part = {"augment": "augment 0"}.get(name, name)
            parts[part] = scored(share, run / "evaluation" / part.replace(" ", "_"))
        else:
            target = experiment / "models" / name / "evaluation"
            found = scored(share, target) | {"another": {"exact_match": 0.0}}
            (target / "another.jsonl").write_text("")
            (target / "summary.json").write_text(json.dumps(found))
    (run / "evaluation" / "summary.json").write_text(json.dumps(summary | {"_parts": parts}))


@pytest.mark.parametrize("folder", ["run", "models"])
def test_parts_stand_beside_the_pair(experiment, folder):
    """Scored with the pair, or alone in their own folders."""
    parts_scored(experiment, folder, anchor=3, augment=1)
    text = write_report(experiment).page.read_text()
    rows = {row[0]: row[1:] for row in table_rows(text) if len(row) == 7}
    assert rows["mine"] == ["exact_match", "70.0", "0.0–100.0", "", "3", "10"]
    assert rows["mine: anchor alone"] == ["exact_match", "30.0", "0.0–100.0", "", "7", "10"]
    assert rows["mine: augment alone"][1] == "10.0" and "another" not in text
    assert "<em>empty</em>" in text
    described = re.search(r'class="bars" role="img" aria-label="([^"]*)"', text)[1]
    assert " ".join(described.split()) == (
        "test.jsonl: mine: anchor alone 30.0%, mine: augment alone 10.0%, mine 70.0%, "
        "best constant answer 100.0%,"
    )


def test_nothing_is_better_than_an_anchor_that_has_no_scores(experiment):
    parts_scored(experiment, "models", anchor=3, augment=1)
    for folder in ("mine", "models/augment"):
        path = experiment / folder / "evaluation" / "summary.json"
        summary = json.loads(path.read_text())
        summary["test.jsonl"]["group"] = "files"
        path.write_text(json.dumps(summary))
    shutil.rmtree(experiment / "models" / "anchor" / "evaluation")
    rows = table_rows(write_report(experiment).page.read_text())
    assert next(row for row in rows if row[:2] == ["mine", "files, exact_match"])[-1] == ""


@pytest.mark.parametrize("scored", [{"limit": 3}, {"options": {"shots": 2}}, {"files": [["b"]]}])
def test_a_part_that_was_asked_otherwise_is_not_compared(experiment, scored):
    parts_scored(experiment, "models", anchor=3, augment=1)
    path = experiment / "mine" / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"_run": summary["_run"] | {"files": [["a"]]}}))
    for name, more in (("anchor", {"files": [["a"], ["b"]]}), ("augment", scored)):
        path = experiment / "models" / name / "evaluation" / "summary.json"
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"_run": {"files": [["a"]], **more}}))
    rows = table_rows(write_report(experiment).page.read_text())
    assert {row[0] for row in rows if row[0].startswith("mine:")} == {"mine: anchor alone"}


def test_scores_by_another_metric_are_no_exact_matches(experiment):
    """They have no "correct", or one that means something else."""
    path = experiment / "composed" / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    for name, cell in summary.items():
        if not name.startswith("_"):
            cell.update(metric="chrf1", chrf1=cell.pop("exact_match"), intervals={})
            file = path.parent / f"{name.replace('/', '_')}.jsonl"
            records = [json.loads(line) for line in file.read_text().splitlines()]
            kept = [{k: v for k, v in one.items() if k != "correct"} for one in records]
            file.write_text("".join(json.dumps(one) + "\n" for one in kept))
    path.write_text(json.dumps(summary))
    assert write_report(experiment).table is None


def test_scores_of_every_kind_stand_in_the_table(experiment):
    """Corpus scores and bits per byte; rows of a group are summed up beside the anchor's."""
    parts_scored(experiment, "run", anchor=3, augment=1)
    path = experiment / "mine" / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    said = [{"inputs": "a", "targets": "b", "prediction": "c"}]
    read = [{"start": "a", "bytes": 4, "tokens": 2, "logprob": -9.0}]
    tasks = {
        "ntrex/mar": ("chrf1", [50.0, 40.0, 30.0], {"group": "ntrex", "bleu": 7.25}, said),
        "ntrex/pol": ("chrf1", [20.0, 26.0, 30.0], {"group": "ntrex", "bleu": 3.5}, said),
        "text/a": ("bits_per_byte", [1.25, 1.5, 2.0], {}, read),
    }
    places = ["", "anchor", "augment_0"]
    cells = [summary, *summary["_parts"].values()]
    names = list(summary["_parts"])
    order = [places.index(name.replace(" ", "_")) for name in names]
    for task, (metric, values, more, records) in tasks.items():
        for number, cell in zip([0, *order], cells, strict=True):
            value = values[number]
            interval = [value - 1, value + 1]
            others = [name for name in more if name != "group"]
            cell[task] = {"metric": metric, metric: value, "interval": interval, "count": 1,
                          "intervals": {name: interval for name in (metric, *others)},
                          **more}  # fmt: skip
            folder = path.parent / places[number]
            file = folder / f"{task.replace('/', '_')}.jsonl"
            file.write_text("".join(json.dumps(one) + "\n" for one in records))
    path.write_text(json.dumps(summary))
    text = write_report(experiment).page.read_text()
    rows = table_rows(text)
    assert ["mine", "chrf1", "50.0", "49.0–51.0", "bleu 7.2", "not known", "1"] in rows
    assert ["mine", "bits_per_byte", "1.250", "0.250–2.250", "", "not known", "1"] in rows
    # Half of the root of 2, since both rows' intervals are one wide on each side.
    assert ["mine", "ntrex, chrf1", "35.0", "34.3–35.7", "1 of 2"] in rows
    assert ["mine: anchor alone", "ntrex, chrf1", "33.0", "32.3–33.7", ""] in rows
    figures = re.findall(r'class="bars" role="img" aria-label="(\S+)', text)
    assert figures == ["test.jsonl:"]


def table_rows(text: str) -> list[list[str]]:
    """The text of the cells of every row of the page's tables."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in cells]


def test_the_anchors_validation_loss_is_told(experiment):
    text = write_report(experiment).page.read_text()
    assert "Validation loss of the anchor alone: 1.75; of the pair at its best: " in text
    assert text.count(">anchor</text>") == 1


def test_how_this_was_made_is_what_was_run(experiment):
    path = experiment / "composed" / "commands.json"
    start = "calm train --config=mine.py --workdir='a b'"
    commands = [f"{start} --config.data.length=32", f"{start} --config.train.num_steps=9"]
    path.write_text(json.dumps({"commands": commands}))
    command.main([f"--experiment={experiment}"])
    text = html_module.unescape((experiment / "report.html").read_text())
    shown = text[text.index("<pre>") : text.index("</pre>")].splitlines()[1:]
    assert shown == [
        "calm train --config=configs/kv_augment.py --workdir=runs/kv/augment",
        "calm evaluate --workdir=runs/kv/augment",
        "calm train --config=configs/kv_anchor.py --workdir=runs/kv/anchor",
        "calm evaluate --workdir=runs/kv/anchor",
        *commands,
        "calm evaluate --workdir=runs/kv/composed",
        f"calm report --experiment={experiment}",
    ]
    trained = [row for row in table_rows(text) if "held_out.jsonl" in row]
    assert trained[2] == ["composed", "calm_jax/key_value/demo/composed", "held_out.jsonl", "2500",
                          "128", "48"]  # fmt: skip
    assert "data.length = 48\n" in text and "train.num_steps = 2500\n" in text
    path.unlink()
    assert "The commands that trained composed were not recorded" in read_page(experiment).text


def test_every_key_of_a_table_is_told_on_a_phone(experiment):
    """There the header is hidden: each cell names its column."""
    text = write_report(experiment).page.read_text()
    for table in re.findall(r'<table class="stack">.*?</table>', text, re.DOTALL):
        head, body = table.split("</thead>")
        names = [html_module.unescape(x) for x in re.findall(r"<th[^>]*>(.*?)</th>", head)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL):
            labels = re.findall(r'data-label="([^"]*)"', row)
            if 'scope="rowgroup"' in row:
                continue
            assert [html_module.unescape(label) for label in labels] == names[1:]


def test_bars_and_whiskers_are_as_wide_as_their_shares():
    bars = [Bar("part", 37.5, "var(--anchor)", (30.0, 45.25), 84.3), Bar("whole", 100.0, "red")]
    text = macro("bars", Figure("A title", [Group(bars)]))
    assert re.findall(r'class="bar" style="width: ([\d.]+)%', text) == ["37.5", "100"]
    assert 'class="whisker" style="left: 30%; right: 54.75%"' in text
    assert re.findall(r'class="paper" style="left: ([\d.]+)%', text) == ["84.3"]
    assert re.findall(r"<b>(.*?)</b>", text) == ["37.5", "100.0"]


def test_heatmap_darkens_with_weight_and_hides_nothing_large():
    text = macro("heatmap", "", ["a", "b"], ["a", "b"], [[1.0, 0.0], [0.3, 0.7]])
    titles = re.findall(r'title="(.*?)"', text)
    assert titles == ["a looks at a: 1.00", "b looks at a: 0.30", "b looks at b: 0.70"]
    whole, less, more = map(int, re.findall(r"--w: (\d+)%", text))
    assert whole == 100 > more > less > 30 and text.count("<i") == 4


def macro(name: str, *arguments) -> str:
    return getattr(environment().get_template("macros.html").module, name)(*arguments)
