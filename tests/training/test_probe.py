"""The probe that chooses connections, and runs that ask for it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx
from random_models import connection_parameters, gemma, llama, random_composed, random_decoder

import calm_jax
from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, compose
from calm_jax.models.taps import Taps
from calm_jax.training import configuration, loop, loss, probe, probed_connections

B, T, V = 8, 12, 24
KNOWING = 1  # the layer whose tap tells the next token


def random_batch(seed):
    """Two segments in each row, then padding; targets are the next tokens."""
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(1, V, (B, T)).astype(np.int32)
    segments_BT = np.tile(np.repeat([1, 2, 0], [5, 5, 2]), (B, 1)).astype(np.int32)
    return {
        "decoder_input_tokens": tokens_BT,
        "decoder_target_tokens": np.roll(tokens_BT, -1, axis=1),
        "decoder_loss_weights": (segments_BT != 0).astype(np.float32),
        "decoder_positions": np.tile(np.r_[:5, :5, 0, 0], (B, 1)).astype(np.int32),
        "decoder_segment_ids": segments_BT,
        "decoder_causal_attention": np.zeros((B, T), np.int32),
    }


class Knowing(nnx.Module):
    """An augment of known states: of the token itself, of the next one, and of neither."""

    depth, width = 3, 16

    def __init__(self):
        self.table = nnx.Param(jax.random.normal(jax.random.key(5), (V, self.width)))

    def taps(self, inputs, layers, cache=None):
        own = self.table[...][inputs.tokens_BT]
        following = self.table[...][jnp.roll(inputs.tokens_BT, -1, axis=1)]
        neither = jax.random.normal(jax.random.key(6), own.shape)
        states = jnp.stack([own, following, neither])
        assert layers == (0, 1, 2)
        return Taps({}, layers, states), None


@pytest.fixture(scope="module")
def anchor():
    return random_decoder(llama(), seed=1)


def test_it_finds_the_tap_that_knows(anchor):
    found = probe.gains(anchor, Knowing(), [random_batch(n) for n in range(30)])
    assert (found.gain_IJ.argmax(axis=0) == KNOWING).all()
    # The stream holds the token itself, and noise predicts nothing.
    assert (found.explained_IJ[KNOWING] > 0.1).all()
    assert (found.explained_IJ[[0, 2]] < 0.02).all()
    best = np.sort(np.argsort(-found.gain_IJ[KNOWING])[:2])
    assert found.choose(2) == tuple((KNOWING, int(j)) for j in best)
    assert found.table(found.choose(2)).count("[") == 2


def test_what_an_augment_shares_with_the_anchor_is_no_gain(anchor):
    found = probe.gains(anchor, anchor, [random_batch(n) for n in range(30)])
    assert (np.diag(found.explained_IJ) < 0.02).all()


def test_gradients_are_those_of_what_a_bridge_adds():
    """A bridge's output bias adds the same vector to every token of a layer's stream."""
    config = gemma()
    layers = tuple((0, j) for j in range(config.num_layers))
    composition = CompositionConfig(connections=layers, bias=True, scan=False)
    model = random_composed(config, [llama()], composition)
    model = compose(model.anchor, model.augments, composition, rngs=nnx.Rngs(0))
    batch = jax.tree.map(jnp.asarray, random_batch(0))
    projections = (np.eye(config.embed_dim, dtype=np.float32),) * 2
    anchor = nnx.split(model.anchor)
    moments = probe._own_moments(anchor[0], 5, anchor[1], projections, batch)

    graphdef, state = nnx.split(model)
    gradients = jax.grad(lambda state: loss.loss_sums(nnx.merge(graphdef, state), batch)[0])(state)
    expected_JD = [
        of["output_bias"] for of in connection_parameters(nnx.merge(graphdef, gradients)).values()
    ]
    # The last feature is a constant.
    np.testing.assert_allclose(moments.products[:, -1], np.stack(expected_JD), atol=2e-5)


def test_a_mesh_changes_nothing(anchor):
    batches = [random_batch(n) for n in range(6)]
    alone = probe.gains(anchor, anchor, batches)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        spread = probe.gains(anchor, anchor, [sharding.put_batch(x, mesh) for x in batches])
    np.testing.assert_allclose(spread.gain_IJ, alone.gain_IJ, rtol=1e-3, atol=1e-3)


@pytest.fixture(autouse=True)
def few_batches(monkeypatch):
    monkeypatch.setattr(probed_connections, "BATCHES", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    with open(folder / "data.jsonl", "w") as file:
        for number in range(200):
            file.write(json.dumps({"inputs": f"{number}>", "targets": f"{number}"[::-1]}) + "\n")
    for seed, name in enumerate(("anchor", "augment")):
        decoder = tiny_models.decoder(seed, vocab_size=264, num_layers=4)
        frozen.save_frozen(decoder, folder / name, vocabulary=load_vocabulary("bytes"))
    return folder


def run_config(folder, *compositions, augments=1):
    config = configuration.composed_run(*compositions)
    config.anchor, config.augments = str(folder / "anchor"), (str(folder / "augment"),) * augments
    config.data.train = ({"jsonl": str(folder / "data.jsonl")},)
    config.data.update(length=16, cache_dir=str(folder / "cache"))
    config.train.update(num_steps=1, batch_size=8, tensorboard=False)
    config.cache_compiled = str(folder / "xla")
    return config


def test_a_run_keeps_what_the_probe_chose(folder, tmp_path, capsys, monkeypatch):
    config = run_config(folder, CompositionConfig(connections="probe", every=2))
    run = loop.train(config, tmp_path / "run")
    record = json.loads((run / "probe.json").read_text())["augments"][0]
    gain_IJ = np.array(record["gain"])
    assert gain_IJ.shape == (4, 4)
    chosen = json.loads((run / "config.json").read_text())["composition"]["connections"]
    assert chosen == record["connections"] and len(chosen) == 2
    assert {j for _, j in chosen} == set(np.argsort(-gain_IJ.max(axis=0))[:2].tolist())
    assert "Gain of a connection" in capsys.readouterr().out

    monkeypatch.setattr(probed_connections, "gains", None)  # it is not run again
    config.train.num_steps = 2
    loop.train(config, run)
    model = calm_jax.load_composed(run)
    assert [[c.layer, c.anchor_layer] for c in model.connections] == chosen


def test_one_of_two_augments(folder, tmp_path):
    named = CompositionConfig(connections=((0, 0),))
    config = run_config(folder, named, CompositionConfig(connections="probe"), augments=2)
    run = loop.train(config, tmp_path / "run")
    first, second = json.loads((run / "config.json").read_text())["composition"]
    assert first["connections"] == [[0, 0]]
    assert len(second["connections"]) == 1


def test_no_row_is_predicted_from_itself(folder, tmp_path, monkeypatch):
    """Every row is probed once at most, and too few rows are refused."""
    seen = []
    monkeypatch.setattr(probed_connections, "BATCHES", 1000)
    monkeypatch.setattr(probed_connections, "gains", lambda *given, **_: seen.extend(given[2]))
    config = run_config(folder, CompositionConfig(connections="probe"))
    with pytest.raises(AttributeError):  # of the result, which is None
        loop.train(config, tmp_path / "run")
    rows = [tuple(row) for x in seen for row in np.asarray(x["decoder_target_tokens"]).tolist()]
    assert len(seen) > 6 and len(set(rows)) == len(rows)
    config.train.batch_size = 64
    with pytest.raises(CalmError, match=r"needs 3 batches of 64 rows, but data\.train has"):
        loop.train(config, tmp_path / "run")


def test_what_is_refused_is_refused_before_weights_are_loaded(folder, tmp_path, monkeypatch):
    config = run_config(folder, CompositionConfig(connections="probe"))
    run = loop.train(config, tmp_path / "run")
    monkeypatch.setattr(probed_connections, "load_run_model", None)
    two = run_config(folder, CompositionConfig(connections="probe"), augments=2)
    with pytest.raises(CalmError, match="was started with another config: augments was"):
        loop.train(two, run)
    with pytest.raises(CalmError, match="every"):
        loop.train(run_config(folder, CompositionConfig(connections="probe", every=5)), run / "a")


def test_elsewhere_it_is_refused(anchor):
    with pytest.raises(CalmError, match="only training resolves"):
        compose(anchor, anchor, CompositionConfig(connections="probe"), rngs=nnx.Rngs(0))


def test_a_folder_of_something_else_is_refused_before(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(probed_connections, "load_run_model", None)
    with pytest.raises(CalmError, match="neither empty nor a run"):
        loop.train(run_config(folder, CompositionConfig(connections=("probe",))), tmp_path)
