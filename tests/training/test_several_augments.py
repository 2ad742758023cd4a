"""One run over two augments of different family, width, depth, heads and dtype."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_models
from tiny_models import stored_bytes

from calm_jax import generate
from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.composed import export_bridge, load_composed
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.evaluation.attention import attention
from calm_jax.models import CompositionConfig
from calm_jax.training import configuration, loop

VOCAB = 264  # of bytes, padded
STEPS, STOPPED_AT = 5, 3
MODELS = {
    "anchor": {"family": "llama", "num_layers": 3},
    "first": {"family": "palm", "embed_dim": 16, "num_layers": 3, "num_heads": 4,
              "dtype": "bfloat16"},
    "second": {"family": "gemma", "embed_dim": 24, "num_layers": 2, "num_heads": 2,
               "num_kv_heads": 2, "head_dim": 8},
}  # fmt: skip
# Both end in the anchor's layer 1.
COMPOSITIONS = (
    CompositionConfig(connections=((2, 0), (1, 1)), rotary=True),
    CompositionConfig(connections=((1, 1),), num_heads=8, bias=True, gate=True),
)
PROMPTS = ["abc>", "d>", "dcba"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with data and the three frozen models."""
    folder = tmp_path_factory.mktemp("several")
    random = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(40):
            text = "".join(random.choice(list("abcd"), size=random.integers(1, 6)))
            file.write(json.dumps({"inputs": text + ">", "targets": text[::-1]}) + "\n")
    for seed, (name, fields) in enumerate(MODELS.items()):
        decoder = tiny_models.decoder(seed, vocab_size=VOCAB, **fields)
        frozen.save_frozen(decoder, folder / name, vocabulary=load_vocabulary("bytes"))
    return folder


def run_config(shared, **mesh):
    config = configuration.composed_run(*COMPOSITIONS)
    config.anchor = str(shared / "anchor")
    config.augments = (str(shared / "first"), str(shared / "second"))
    config.data.train = ({"jsonl": str(shared / "data.jsonl")},)
    config.data.update(length=16, cache_dir=str(shared / "cache"))
    config.optimizer.update(learning_rate=1e-2, schedule="constant")
    config.train.update(
        num_steps=STEPS, batch_size=8, log_every=1, save_every=STOPPED_AT, tensorboard=False
    )  # fmt: skip
    config.mesh.update(mesh)
    config.cache_compiled = str(shared / "xla")
    return config


class Session(loop._Session):
    """Remembers the latest one, and its trees as they were before the first step."""

    last: "Session"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Session.last = self
        self.before = stored_bytes(self.model.trainable), stored_bytes(self.model.frozen)


def trained(config, workdir) -> Session:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_Session", Session)
        loop.train(config, workdir)
    return Session.last


@pytest.fixture(scope="module")
def whole(shared):
    """A run that never stopped."""
    return trained(run_config(shared), shared / "whole")


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run as it would be had it been killed before its last checkpoint was whole."""
    run = shutil.copytree(whole.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    return run


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def test_every_leaf_of_the_bridge_moves_and_no_frozen_one(whole, shared):
    trainable, frozen_before = whole.before
    after = stored_bytes(whole.model.trainable)
    assert after.keys() == trainable.keys()
    assert not [path for path in after if after[path] == trainable[path]]
    assert stored_bytes(whole.model.frozen) == frozen_before
    dtypes = [
        {x.dtype.name for x in jax.tree.leaves(tree)}
        for tree in whole.model.frozen["augments"].values()
    ]
    assert dtypes == [{"bfloat16"}, {"float32"}]
    assert {x.dtype.name for x in jax.tree.leaves(whole.model.trainable)} == {"float32"}
    for seed, (name, fields) in enumerate(MODELS.items()):
        as_made = tiny_models.decoder(seed, vocab_size=VOCAB, **fields)
        stored = frozen.load(shared / name)
        assert stored.fingerprint == frozen.model_fingerprint(as_made)


def test_metrics_and_costs_name_every_connection_and_model(whole):
    lines = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert {key for key in lines[0] if "connection" in key} == {f"connection/{k}" for k in range(3)}
    assert all(lines[-1][f"connection/{k}"] > 0 for k in range(3))
    trees = json.loads((whole.run / "costs.json").read_text())["trees"]
    assert [tree["name"] for tree in trees] == [
        "anchor", "augment 0", "augment 1", "bridge", "optimizer"
    ]  # fmt: skip


def test_goes_on_exactly_where_it_stopped(whole, stopped, shared):
    resumed = trained(run_config(shared), stopped)
    assert resumed.first_step == STOPPED_AT
    assert losses(stopped) == losses(whole.run)
    assert stored_bytes(resumed.model.trainable) == stored_bytes(whole.model.trainable)


@pytest.mark.slow
def test_goes_on_on_another_mesh(whole, stopped, shared):
    resumed = trained(run_config(shared, data=2, fsdp=4), stopped)
    assert resumed.first_step == STOPPED_AT
    assert losses(stopped) == pytest.approx(losses(whole.run), rel=1e-4)


def test_the_restored_model_is_the_one_in_memory(whole):
    parts, model = whole.parts, whole.model
    in_memory = parts.merge(model.trainable, model.frozen)
    in_memory.anchor.vocabulary = load_vocabulary("bytes")
    restored = load_composed(whole.run, step=STEPS)
    assert restored.configs == COMPOSITIONS
    assert stored_bytes(restored.bridge) == stored_bytes(model.trainable["bridge"])
    answers = generate(restored, PROMPTS, max_new_tokens=6)
    np.testing.assert_array_equal(answers, generate(in_memory, PROMPTS, max_new_tokens=6))


def test_an_exported_bridge_takes_its_augments_in_their_order(whole, shared, tmp_path):
    export_bridge(whole.run, tmp_path / "bridge", step=STEPS)
    given = [frozen.load(shared / name) for name in ("first", "second")]
    loaded = load_composed(tmp_path / "bridge", anchor=shared / "anchor", augments=given)
    assert stored_bytes(loaded.bridge) == stored_bytes(whole.model.trainable["bridge"])
    with pytest.raises(CalmError) as caught:
        load_composed(tmp_path / "bridge", augments=given[::-1])
    for fingerprint in (model.fingerprint[:16] for model in given):
        assert re.search(rf"\b{fingerprint}\b", str(caught.value))
    assert "augment 0" in str(caught.value) and "\n" not in str(caught.value)


def test_attention_names_the_augment_of_each_map(whole):
    model = load_composed(whole.run, step=STEPS)
    found = attention(model, {"task": [{"inputs": "ab>", "correct": True}]})["connections"]
    places = [(c["augment"], c["from"], c["to"]) for c in found]
    assert places == [(0, 2, 0), (0, 1, 1), (1, 1, 1)]
    for connection in found:
        weights_TS = np.array(connection["weights"])
        assert not np.triu(weights_TS, 1).any()
        np.testing.assert_allclose(weights_TS.sum(-1), 1, atol=1e-3)
