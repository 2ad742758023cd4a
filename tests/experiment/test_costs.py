"""What arms cost: ratios against the paper's own arithmetic, decoding against a slower model."""

import json

import pytest
from etils import epath
from made_runs import random_rights, scored, trained

import calm_jax
from calm_jax.experiment import decoding
from calm_jax.experiment.arms import Arm, Experiment, Job, jobs
from calm_jax.experiment.comparison import compare
from calm_jax.experiment.costs import costs
from calm_jax.experiment.page import write_page

ARMS = (
    Arm("anchor", kind="part"),
    Arm("augment", kind="part"),
    Arm("calm", kind="calm", anchor="anchor", augments=("augment",)),
    Arm("tuned", decoder="anchor"),
    Arm("mixed", "a mixture", scored_from="anchor", flags=("--mix={augment}",)),
)


def experiment(**fields):
    return Experiment("t", ARMS, ("task",), "calm", **fields)


def written(folder, of=None):
    """The jobs of the paper's illustration: an augment of a tenth, and 2 % of its data.

    A token of the bridge costs here as much as one of fine-tuning, 600 FLOP and 2 ms; one of the
    augment a tenth of the arithmetic, and a twentieth of the time.
    """
    of = of or experiment(finetuned="tuned")
    found = list(jobs(of, "f.py", epath.Path(folder), {}))
    runs = {
        "anchor": (5_000, 600, 500, (("decoder", 1_000, True), ("optimizer", 2_000, False))),
        "augment": (1_000, 60, 10_000, (("decoder", 100, True),)),
        "calm": (20, 600, 500, (("anchor", 1_000, False), ("augment", 100, False),
                                ("bridge", 30, True), ("optimizer", 60, False))),
        "tuned": (20, 600, 500, (("decoder", 1_000, True),)),
    }  # fmt: skip
    for number, job in enumerate(found):
        scored(job, {"task": random_rights(number, 0.5, 20)})
        if job.train and job.arm.name in runs:
            steps, flops, speed, trees = runs[job.arm.name]
            trained(job, steps=steps, tokens_per_step=8, flops_per_step=8 * flops, speed=speed,
                    trees=trees)  # fmt: skip
    return found


def test_the_paper_s_illustration(tmp_path):
    of = experiment(finetuned="tuned")
    found = costs(of, compare(of, written(tmp_path)), {})
    calm = found["calm"]
    assert (calm.parameters, calm.trained, calm.tokens) == (1_130, 30, 160)
    assert calm.share == pytest.approx(0.02)
    assert (calm.a_token.arithmetic, calm.a_token.time) == (1, 1)
    # "CALM about 2 % of the cost of training m_B, m_A and CALM about 12 %"
    assert calm.whole.arithmetic == calm.whole.time == pytest.approx(0.02)
    assert calm.with_augments.arithmetic == pytest.approx(0.12)
    assert calm.with_augments.time == pytest.approx(0.02 + 0.05)
    assert found["augment"].whole.arithmetic == pytest.approx(0.1)
    assert found["tuned"].whole.arithmetic == pytest.approx(0.02)
    assert found["tuned"].with_augments is None
    assert found["mixed"].parameters is None and found["mixed"].whole is None


def test_without_an_arm_to_compare_with_nothing_is_related(tmp_path):
    of = experiment()
    found = costs(of, compare(of, written(tmp_path, of)), {})
    assert found["calm"].tokens == 160
    assert found["calm"].whole is None and found["calm"].share is None


def test_decoding_s_figures_are_of_a_token(tmp_path):
    of = experiment(finetuned="tuned")
    speeds = {"calm": {"1": 0.64, "8": 1.28}}
    found = costs(of, compare(of, written(tmp_path)), speeds)
    assert found["calm"].latency == pytest.approx(10)  # 64 tokens in 640 ms
    assert found["calm"].throughput == pytest.approx(400)  # 512 in 1.28 s
    assert found["anchor"].latency is None


def test_a_model_that_existed_before_has_the_figures_of_decoding(tmp_path):
    arms = (Arm("anchor", kind="part", frozen=str(tmp_path / "model")), *ARMS[1:])
    of = Experiment("t", arms, ("task",), "calm")
    rows = compare(of, written(tmp_path, of))
    cost = costs(of, rows, {"anchor": {"1": 0.64, "8": 1.28}})["anchor"]
    assert (cost.latency, cost.throughput) == pytest.approx((10, 400))
    assert cost.parameters is None and cost.speed is None


def test_the_page_tells_costs_of_models_and_names_other_ways_to_score(tmp_path):
    of, folder = experiment(finetuned="tuned"), epath.Path(tmp_path)
    found = written(tmp_path)
    seconds = {"calm": {"1": 0.64, "8": 1.28}}
    (tmp_path / "costs.json").write_text(
        json.dumps({"decoding": {"of": {}, "device": "1 × abacus", "seconds": seconds}})
    )
    page, results = write_page(of, found, folder, "calm experiment")
    text = " ".join(page.read_text().split())
    assert "that of anchor, scored in another way" in text
    assert "1 × abacus" in text and ">10.00</td>" in text and ">400</td>" in text
    assert "12 %<small>time 7 %</small>" in text
    cost = json.loads(results.read_text())["calm"]["cost"]
    assert cost["with_augments"]["arithmetic"] == pytest.approx(0.12)


def frozen_jobs(folder, layers):
    """Two scored decoders, of which the second has more layers."""
    import tiny_models

    found = []
    for name, depth in zip(("small", "deep"), layers, strict=True):
        place = epath.Path(folder) / name
        calm_jax.save_frozen(tiny_models.decoder(num_layers=depth), place / "frozen")
        score = ("evaluate", f"--model={place / 'frozen'}")
        job = Job(Arm(name), 0, place, ("train",), score, ())
        scored(job, {"task": random_rights(0, 0.5, 5)})
        found.append(job)
    return found


@pytest.mark.slow
def test_decoding_is_measured_once_for_the_same_models(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_ROUNDS", 1)
    folder = epath.Path(tmp_path)
    found = frozen_jobs(tmp_path, (1, 24))
    other = Job(Arm("again", scored_from="deep"), 0, folder / "again", (), found[1].score, ())
    scored(other, {"task": random_rights(0, 0.5, 5)})
    decoding.measure([*found, other], folder)
    seconds = decoding.measured(folder)["seconds"]
    assert list(seconds) == ["small", "deep"]  # not the one that is scored in another way
    for rows in ("1", "8"):
        assert seconds["deep"][rows] > 2 * seconds["small"][rows]
        # Eight rows are not eight times the work of one.
        assert seconds["deep"]["8"] < 8 * seconds["deep"]["1"]

    def refuse(models):
        raise AssertionError(f"{models} measured anew")

    monkeypatch.setattr(decoding, "decode_times", refuse)
    decoding.measure([*found, other], folder)
    summary = json.loads((found[0].results / "summary.json").read_text())
    summary["_run"]["date"] = "tomorrow"
    (found[0].results / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(AssertionError, match=r"small.*measured anew"):
        decoding.measure([*found, other], folder)


def test_no_model_no_file(tmp_path):
    decoding.measure([], epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())
    assert decoding.measured(epath.Path(tmp_path)) == {"device": "", "seconds": {}}
