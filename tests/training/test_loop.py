"""Whole runs, of models so small that a run takes a second after its compilation."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_models
from child_processes import environment
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.checkpoints import frozen, training
from calm_jax.checkpoints.composed import load_composed
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.data.entries import open_dataset
from calm_jax.data.stream import Stream, batches_once
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, DecoderConfig, Inputs
from calm_jax.models.parameters import module_tree, path_name
from calm_jax.training import config_keys, configuration, fitting, loop, step

STEPS, SAVE_EVERY, KILLED_AT = 12, 4, 10
VOCAB = 264  # of bytes, padded


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with data, two frozen models, and the caches of every run."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(40):
            text = "".join(random.choice(list("abcd"), size=random.integers(1, 6)))
            file.write(json.dumps({"inputs": text + ">", "targets": text[::-1]}) + "\n")
    for seed, name in enumerate(("anchor", "augment", "other")):
        save_model(folder / name, seed)
    return folder


def frozen_model(seed):
    """Its MLP is wide, so that a frozen weight among a run's files would show by its size."""
    return tiny_models.decoder(
        seed, vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=1024
    )


def save_model(target, seed):
    frozen.save_frozen(frozen_model(seed), target, vocabulary=load_vocabulary("bytes"))


def of_tests(config, shared):
    entry = {"jsonl": str(shared / "data.jsonl")}
    config.data.train = config.data.validation = (entry,)
    config.data.update(length=16, cache_dir=str(shared / "cache"))
    config.vocabulary = "bytes"
    config.train.update(
        num_steps=STEPS,
        batch_size=8,
        log_every=1,
        save_every=SAVE_EVERY,
        validate_every=6,
        keep=2,
        tensorboard=False,
    )
    config.optimizer.learning_rate = 1e-2
    config.cache_compiled = str(shared / "xla")
    return config


def composed_config(shared):
    config = configuration.composed_run(CompositionConfig(every=1))
    config.anchor, config.augments = str(shared / "anchor"), (str(shared / "augment"),)
    return of_tests(config, shared)


def decoder_config(shared, **fields):
    decoder = DecoderConfig.palm(
        vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=2, head_dim=4, mlp_dim=32, **fields
    )
    return of_tests(configuration.decoder_run(decoder), shared)


def changed(config, **sections):
    config = config.copy_and_resolve_references()
    for name, values in sections.items():
        config[name].update(values) if isinstance(values, dict) else setattr(config, name, values)
    return config


class Recorded:
    """One call of `train`, and every training batch that it put on its mesh."""

    def __init__(self, config, workdir):
        self.config, self.workdir, self.batches = config, workdir, []
        put_batch = sharding.put_batch
        with pytest.MonkeyPatch.context() as patch:

            def recorded(batch, mesh):
                self.batches.append({key: np.array(value) for key, value in batch.items()})
                return put_batch(batch, mesh)

            patch.setattr(sharding, "put_batch", recorded)
            self.path = loop.train(config, workdir)


@pytest.fixture(scope="module")
def composed_run(shared):
    return Recorded(composed_config(shared), shared / "composed")


@pytest.fixture(scope="module")
def decoder_run(shared):
    return Recorded(decoder_config(shared), shared / "decoder")


@pytest.fixture(scope="module")
def killed_run(shared):
    """The composed run's config in another process that SIGKILL ends at step `KILLED_AT`."""
    (shared / "config.json").write_text(json.dumps(config_keys.to_dict(composed_config(shared))))
    program = f"""
import json, os, signal, sys, time
import tiny_models
from ml_collections import ConfigDict
from calm_jax.training import loop

class Progress(loop.Progress):
    def train(self, step, *rest):
        super().train(step, *rest)
        if step == {KILLED_AT}:
            while not os.path.exists("killed/checkpoints/8"):  # written in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

loop.Progress = Progress
loop.train(ConfigDict(json.load(open("config.json"))), "killed")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=shared,
        env=environment(devices=8),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return shared / "killed"


def records(run, split="train"):
    """Lines of metrics.jsonl by step, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    left_out = {"tokens_per_second", "step_seconds", "waiting", "split"}
    steps = [line["step"] for line in lines if line["split"] == split]
    assert len(steps) == len(set(steps))
    return {
        line["step"]: {key: value for key, value in line.items() if key not in left_out}
        for line in lines
        if line["split"] == split
    }


def stored_arrays(folder):
    """Every array of one item of a checkpoint, read without knowing what should be there."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        saved = checkpointer.metadata(folder).item_metadata.tree
        tree = checkpointer.restore(folder, restore_args=jax.tree.map(lambda _: as_numpy, saved))
    return {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def bridge_bytes(run):
    return stored_bytes(load_composed(run, step=STEPS).bridge)


def test_composed_run_learns_and_leaves_what_it_should(composed_run, shared):
    lines, scores = records(composed_run.path), records(composed_run.path, "validation")
    assert list(lines) == list(range(1, STEPS + 1))
    assert list(scores) == [6, 12]
    assert scores[12]["loss"] < scores[6]["loss"]
    assert {"exact", "accuracy", "connection/0", "connection/1"} <= scores[6].keys()
    rates = [line["learning_rate"] for line in lines.values()]
    half_cosine = [1e-2 * 0.5 * (1 + np.cos(np.pi * k / STEPS)) for k in range(STEPS)]
    np.testing.assert_allclose(rates, half_cosine, rtol=1e-4)
    assert json.loads((composed_run.path / "config.json").read_text()) == config_keys.to_dict(
        composed_config(shared)
    )
    costs = json.loads((composed_run.path / "costs.json").read_text())
    assert costs["global_batch"] == 8
    assert costs["tokens_per_step"] == 8 * 16
    assert costs["mesh"] == {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert [tree["name"] for tree in costs["trees"]] == [
        "anchor",
        "augment 0",
        "bridge",
        "optimizer",
    ]
    assert [tree["trained"] for tree in costs["trees"]] == [False, False, True, False]
    assert costs["flops_per_step"] > 0
    assert not (composed_run.path / "frozen").exists()


def test_step_0_of_a_composed_run_is_the_anchor(composed_run, shared):
    """The first loss of the run is that of the anchor alone on the first batch."""
    data, vocabulary = composed_run.config.data, load_vocabulary("bytes")
    batch = Stream(open_dataset(data, "train", vocabulary), batch_size=8, seed=0)[0]
    anchor = frozen.load(shared / "anchor")
    logits = np.asarray(anchor(Inputs.of_batch(batch)), np.float64)
    log_total = np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    losses = -np.take_along_axis(logits - log_total, batch["decoder_target_tokens"][..., None], -1)
    weights = batch["decoder_loss_weights"]
    expected = np.sum(losses[..., 0] * weights) / np.sum(weights)
    assert records(composed_run.path)[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_leaves_frozen_folders_as_they_were(composed_run, shared):
    for seed, name in enumerate(("anchor", "augment")):
        assert stored_bytes(frozen.load(shared / name)) == stored_bytes(frozen_model(seed))


def validation_scores(decoder, config):
    """Loss, accuracy and number of tokens of a decoder over the validation rows, one by one."""
    source = open_dataset(config.data, "validation", load_vocabulary("bytes"))
    assert len(source) % 8  # so that the last batch of a run has rows of padding
    loss = weight = right = 0.0
    for batch in batches_once(source, 1):
        logits = np.asarray(decoder(Inputs.of_batch(batch)), np.float64)[0]
        log_total = np.log(np.sum(np.exp(logits), axis=-1))
        targets = batch["decoder_target_tokens"][0]
        for t in np.flatnonzero(batch["decoder_loss_weights"][0]):
            loss += log_total[t] - logits[t, targets[t]]
            right += logits[t].argmax() == targets[t]
            weight += 1
    return pytest.approx({"loss": loss / weight, "accuracy": right / weight, "tokens": weight},
                         rel=1e-5)  # fmt: skip


def test_validation_scores_every_row_once(decoder_run):
    best = min(records(decoder_run.path, "validation").values(), key=lambda line: line["loss"])
    if best["step"] != STEPS:
        pytest.fail("the last step was not the best one; choose another learning rate")
    decoder = frozen.load(decoder_run.path / "frozen")
    scores = {key: best[key] for key in ("loss", "accuracy", "tokens")}
    assert scores == validation_scores(decoder, decoder_run.config)


def test_the_anchor_is_scored_before_step_1(composed_run, shared, tmp_path, capsys):
    """Also where the bridge starts at random, so that the pair of step 0 is not the anchor."""
    (at_zero,) = records(composed_run.path, "anchor").values()
    config = changed(composed_run.config, train={"num_steps": 1}, composition={"init": "paper"})
    (at_random,) = records(loop.train(config, tmp_path / "run"), "anchor").values()
    assert at_random == at_zero and at_zero["step"] == 0
    anchor = frozen.load(shared / "anchor")
    scores = {key: at_zero[key] for key in ("loss", "accuracy", "tokens")}
    assert scores == validation_scores(anchor, config)
    line = next(x for x in capsys.readouterr().out.splitlines() if "before step 1" in x)
    assert line.startswith(f"the anchor alone, before step 1: loss {at_zero['loss']:.4g} · ")
    assert line.count("exact") == 1


def test_plain_text_has_no_exactness(decoder_run, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abcd"}\n' * 4)
    config = decoder_run.config.copy_and_resolve_references()
    config.data.validation = ({"jsonl": str(path)},)
    config.train.num_steps = 1
    config.data.train, train = config.data.validation, config.data.train
    run = loop.train(config, tmp_path / "text")
    for split in ("train", "validation"):
        (text,) = records(run, split).values()
        assert {"loss", "accuracy"} <= text.keys() and not any("exact" in key for key in text)
    config.data.train = train
    config.data.validation += train
    (both,) = records(loop.train(config, tmp_path / "both"), "validation").values()
    assert [key for key in both if "exact/" in key] == ["exact/data"] and both["exact"] == 0


def test_decoder_run_ends_with_its_best_checkpoint_frozen(decoder_run):
    decoder = frozen.load(decoder_run.path / "frozen")
    assert decoder.vocabulary.fingerprint == load_vocabulary("bytes").fingerprint
    assert decoder.config == DecoderConfig.from_dict(
        {
            key: value
            for key, value in config_keys.to_dict(decoder_run.config.decoder).items()
            if key != "from"
        }
    )
    with TrainingCheckpoints(decoder_run.path / "checkpoints", read_only=True) as checkpoints:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            module_tree(decoder),
        )
        restored = checkpoints.restore(checkpoints.best, abstract)
    assert stored_bytes(restored.trainable) == stored_bytes(decoder)


def test_checkpoints_hold_no_frozen_weight(composed_run):
    """Every array of a checkpoint is one of the bridge, or a moment of one."""
    steps = sorted(int(path.name) for path in (composed_run.path / "checkpoints").iterdir())
    assert steps == [8, 12]  # the latest two; the best is one of them
    folder = Path(composed_run.path) / "checkpoints" / "12"
    items = {path.name for path in folder.iterdir() if path.is_dir()}
    assert items == {"trainable", "opt_state", "state", "metrics"}
    bridge = {
        path_name(path): value
        for path, value in jax.tree.leaves_with_path(
            {"bridge": module_tree(load_composed(composed_run.path, step=12).bridge)}
        )
    }
    trainable, opt_state = (stored_arrays(folder / name) for name in ("trainable", "opt_state"))
    assert trainable.keys() == bridge.keys()
    for name, value in trainable.items():
        np.testing.assert_array_equal(value, bridge[name])
    shapes = [value.shape for value in bridge.values()]
    moments = sorted(value.shape for value in opt_state.values() if value.ndim)
    assert moments == sorted(2 * shapes)  # Adam's two
    frozen_values = {
        value
        for model in ("anchor", "augment")
        for value in stored_bytes(frozen.load(Path(composed_run.path).parent / model)).values()
    }
    for value in (*trainable.values(), *opt_state.values()):
        assert value.tobytes() not in frozen_values


def test_the_last_lines_say_what_is_best_and_what_to_do_next(composed_run, decoder_run, capsys):
    for run, kept, next_command in (
        (composed_run, "checkpoints/{best}", "calm evaluate --workdir={run} --parts"),
        (decoder_run, "frozen", "calm evaluate --workdir={run}"),
    ):
        scores = records(run.path, "validation").values()
        best = min(scores, key=lambda line: line["loss"])
        loop.train(run.config, run.workdir)
        kept, next_command = (
            x.format(best=best["step"], run=run.path) for x in (kept, next_command)
        )
        assert (Path(run.path) / kept).exists()
        assert capsys.readouterr().out.splitlines()[-2:] == [
            f"{run.path} has finished {STEPS} steps; the best is step {best['step']} (validation "
            f"loss {best['loss']:.4g}), in {run.path}/{kept}",
            f"next: {next_command}",
        ]


def test_finished_run_is_left_alone(composed_run, monkeypatch):
    monkeypatch.setattr(loop, "_Session", lambda *_: pytest.fail("nothing is left to do"))
    before = (composed_run.path / "metrics.jsonl").read_bytes()
    assert loop.train(composed_run.config, composed_run.workdir) == composed_run.path
    assert (composed_run.path / "metrics.jsonl").read_bytes() == before


def test_killed_and_resumed_is_as_if_it_had_not_stopped(composed_run, killed_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed_run, run)
    assert max(records(run)) == KILLED_AT
    resumed = Recorded(composed_run.config, run)
    assert records(run) == records(composed_run.path)
    assert records(run, "validation") == records(composed_run.path, "validation")
    assert bridge_bytes(run) == bridge_bytes(composed_run.path)
    # It went on after the checkpoint of step 8, and not from the start.
    assert len(resumed.batches) < len(composed_run.batches)


def test_saved_on_8_devices_and_restored_on_2(composed_run, killed_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(killed_run, run)
    make_mesh, meshes = sharding.make_mesh, []

    def on_two(shape):
        meshes.append(make_mesh(shape, jax.devices()[:2]))
        return meshes[-1]

    monkeypatch.setattr(sharding, "make_mesh", on_two)
    config = changed(composed_run.config, mesh={"data": 1, "fsdp": 2})
    resumed = Recorded(config, run)
    assert [dict(mesh.shape) for mesh in meshes] == [
        {"slices": 1, "data": 1, "fsdp": 2, "tensor": 1}
    ]
    expected, found = records(composed_run.path), records(run)
    assert expected.keys() == found.keys()
    for number in range(1, STEPS + 1):
        assert found[number] == pytest.approx(expected[number], rel=1e-4, abs=1e-6), number
    # The batches of steps 9 to 12, after the one that was compiled for.
    stream = Stream(
        open_dataset(config.data, "train", load_vocabulary("bytes")), batch_size=8, seed=0
    )
    for number, batch in enumerate(resumed.batches[1:5], start=8):
        jax.tree.map(np.testing.assert_array_equal, batch, stream[number])


@pytest.mark.parametrize("begun", [False, True])
def test_weights_split_over_all_devices(begun, composed_run, killed_run, tmp_path):
    run = tmp_path / "run"
    if begun:
        shutil.copytree(killed_run, run)
    config = changed(composed_run.config, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    config.weight_sharding = "all"
    loop.train(config, run)
    expected, found = records(composed_run.path), records(run)
    assert expected.keys() == found.keys()
    for number in found:
        assert found[number] == pytest.approx(expected[number], rel=1e-3, abs=1e-6), number


def test_more_steps_may_be_asked_for_later(composed_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(composed_run.path, run)
    traces, loss_sums = [], step.loss_sums

    def counted(*arguments, **options):
        traces.append(len(arguments))
        return loss_sums(*arguments, **options)

    monkeypatch.setattr(step, "loss_sums", counted)
    loop.train(changed(composed_run.config, train={"num_steps": STEPS + 6}), run)
    assert max(records(run)) == STEPS + 6
    # The training step was traced once, with its key and noise, and the validation's once.
    assert sorted(traces) == [2, 5]


def test_a_loss_that_is_not_a_number_ends_the_run_and_is_not_saved(
    composed_run, tmp_path, monkeypatch
):
    iterate = Stream.iterate

    def poisoned(self, start=0):
        for index, batch in iterate(self, start):
            if index == 6:
                batch = batch | {"decoder_loss_weights": np.full((8, 16), np.nan, np.float32)}
            yield index, batch

    monkeypatch.setattr(Stream, "iterate", poisoned)
    config = changed(composed_run.config, train={"save_every": 1, "keep": 20})
    with pytest.raises(CalmError, match=r"^step 7: loss is nan; this step is not saved"):
        loop.train(config, tmp_path / "run")
    with TrainingCheckpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert sorted(checkpoints.manager.all_steps()) == [1, 2, 3, 4, 5, 6]
    restored = load_composed(tmp_path / "run", step=6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(module_tree(restored.bridge)))
    assert max(records(tmp_path / "run")) == 6


def test_disk_full_while_saving_leaves_the_checkpoint_before(composed_run, tmp_path, monkeypatch):
    """A limit on the size of files, set after the first checkpoint, makes later writes fail."""
    save = TrainingCheckpoints.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_until_full(self, number, *rest):
        if number == 2 * SAVE_EVERY:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        save(self, number, *rest)

    monkeypatch.setattr(TrainingCheckpoints, "save", save_until_full)
    monkeypatch.setattr(training, "RETRY_SECONDS", ())
    # Validated before the disk is full, so that nothing is left to compile, and to cache, after.
    train = {"log_every": 100, "validate_every": SAVE_EVERY}
    config = changed(composed_run.config, train=train)
    try:
        with pytest.raises(CalmError, match=r"cannot save a checkpoint in .*step 4\)") as caught:
            loop.train(config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    loop.train(config, tmp_path / "run")
    assert bridge_bytes(tmp_path / "run") == bridge_bytes(composed_run.path)


def test_data_or_a_frozen_model_that_changed_since_the_run_began(composed_run, shared, tmp_path):
    run, augment, data = tmp_path / "run", tmp_path / "augment", tmp_path / "data.jsonl"
    shutil.copytree(composed_run.config.augments[0], augment)
    shutil.copy(shared / "data.jsonl", data)
    config = changed(composed_run.config, train={"num_steps": 4})
    config.augments, config.data.train = (str(augment),), ({"jsonl": str(data)},)
    loop.train(config, run)
    config.train.num_steps = 8

    text = data.read_text()
    data.write_text(text.replace('"inputs": "', '"inputs": "d'))
    with pytest.raises(CalmError, match=rf"{run} started with other data\.train"):
        loop.train(config, run)
    data.write_text(text)

    was = frozen.load(augment).fingerprint
    shutil.rmtree(augment)
    save_model(augment, seed=7)
    now = frozen.load(augment).fingerprint
    with pytest.raises(CalmError) as caught:
        loop.train(config, run)
    for part in ("augment 0", was[:16], now[:16]):
        assert part in str(caught.value)
    assert max(records(run)) == 4


def test_a_decoder_goes_on_from_a_frozen_folder(decoder_run, shared, tmp_path):
    source = frozen.load(decoder_run.path / "frozen")
    config = of_tests(configuration.decoder_run(), shared)
    config.decoder["from"] = str(decoder_run.path / "frozen")
    config.train.num_steps = 2
    run = loop.train(config, tmp_path / "run")
    before = records(decoder_run.path, "validation")[STEPS]["loss"]
    assert records(run)[1]["loss"] == pytest.approx(before, rel=0.2)
    first = frozen.load(run / "frozen")
    assert first.config == source.config
    # Of a longer run the frozen folder is the new best one.
    config.train.num_steps = 4
    loop.train(config, run)
    second = frozen.load(run / "frozen")
    scores = records(run, "validation")
    assert (second.fingerprint != first.fingerprint) == (scores[4]["loss"] < scores[2]["loss"])
    assert len({source.fingerprint, first.fingerprint, second.fingerprint}) >= 2


def test_a_low_rank_update_of_a_frozen_decoder(shared, tmp_path):
    """It alone is trained and saved; the frozen folder at the end has it in its weights."""
    config = of_tests(configuration.decoder_run(), shared)
    config.decoder["from"] = str(shared / "anchor")
    config.lora.update(rank=2, alpha=4.0, targets=("query", "down"))
    run = loop.train(changed(config, train={"num_steps": 6}), tmp_path / "run")
    trained = stored_arrays(run / "checkpoints" / "6" / "trainable")
    factors = [f"attention/query_lora_{x}" for x in "ab"] + [f"mlp/down_lora_{x}" for x in "ab"]
    assert trained.keys() == {f"layers/{name}" for name in factors}
    with TrainingCheckpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert [entry["role"] for entry in checkpoints.read_state(6)["frozen"]] == ["decoder"]
    before, after = (
        stored_bytes(frozen.load(path)) for path in (shared / "anchor", run / "frozen")
    )
    different = {path for path in before if before[path] != after[path]}
    assert different == {"layers/attention/query", "layers/mlp/down"}
    rows = json.loads((run / "costs.json").read_text())["trees"]
    assert [row["name"] for row in rows] == ["decoder", "decoder, trained", "optimizer"]


def test_a_low_rank_update_beside_the_bridge(shared, tmp_path):
    config = composed_config(shared)
    config.lora.update(rank=2, targets=("up",))
    run = loop.train(changed(config, train={"num_steps": 6}), tmp_path / "run")
    trained = stored_arrays(run / "checkpoints" / "6" / "trainable")
    assert {name for name in trained if not name.startswith("bridge/")} == {
        f"anchor/layers/mlp/up_lora_{x}" for x in "ab"
    }
    loaded = load_composed(run)
    factor = np.asarray(loaded.anchor.layers.mlp.up_lora_b.get_value())
    np.testing.assert_array_equal(factor, trained["anchor/layers/mlp/up_lora_b"])
    assert np.any(factor)


def test_bad_input_ends_before_a_run_is_begun(shared, tmp_path, monkeypatch):
    def refused(message, **sections):
        config = changed(decoder_config(shared), **sections)
        with pytest.raises(CalmError, match=message):
            loop.train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused(r"train.batch_size 12 is not divisible by 8", train={"batch_size": 12})
    refused(r"needs 16 devices, but there are 8", mesh={"data": 16})
    refused(r"train.batch_size 8 is not divisible by 16", train={"accumulate": 2})
    refused(r"splash.*cpu", attention="splash")
    refused(r"heads of size 2 is not divisible by .* tensor = 8", mesh={"data": 1, "tensor": 8})
    monkeypatch.setattr(fitting, "memory_of", lambda device: 1000)
    refused(r"a step needs .* on each device, but cpu has 0.977 KiB")


def test_overwriting_keeps_the_old_run_where_the_new_one_is_refused(composed_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(composed_run.path, run)
    config = changed(composed_run.config, mesh={"data": 1, "tensor": 8})
    with pytest.raises(CalmError, match="tensor"):
        loop.train(config, run, overwrite=True)
    assert bridge_bytes(run) == bridge_bytes(composed_run.path)


def test_vocabulary_larger_than_the_decoder(shared, tmp_path):
    config = decoder_config(shared)
    config.decoder.vocab_size = 100
    with pytest.raises(CalmError, match=r"vocab_size 100 is less than the 259 tokens"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_anchor_without_a_vocabulary(shared, tmp_path):
    config = composed_config(shared)
    config.vocabulary = ""
    config.anchor = str(tmp_path / "anchor")
    frozen.save_frozen(frozen_model(0), tmp_path / "anchor")
    with pytest.raises(
        CalmError, match=r"the anchor \S+anchor has no vocabulary, so the trained mod"
    ):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_frozen_folder(shared, tmp_path):
    config = composed_config(shared)
    config.anchor = str(tmp_path / "nowhere")
    with pytest.raises(CalmError, match=r"nowhere is not a frozen folder: it does not exist"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
