import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.composed import export_bridge, identities, load_composed
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.errors import CalmError
from calm_jax.models import CompositionConfig, compose
from calm_jax.models.lora import LoRAConfig, add_lora
from calm_jax.models.parameters import module_tree

TOKENS = np.random.default_rng(0).integers(0, tiny_models.VOCAB, (2, 7)).astype(np.int32)
CONFIG = CompositionConfig(connections=((1, 0), (3, 2), (3, 3)), num_heads=4, bias=True)
# Nothing else in these tests makes a compiled forward pass of the same trees differ.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Frozen folders of an anchor, its augment, and another model of each one's config."""
    folder = tmp_path_factory.mktemp("frozen")
    for seed, name in enumerate(("anchor", "other anchor")):
        frozen.save_frozen(tiny_models.decoder(seed, "llama"), folder / name)
    for seed, name in enumerate(("augment", "other augment"), start=2):
        frozen.save_frozen(tiny_models.decoder(seed, embed_dim=16), folder / name)
    return folder


@pytest.fixture(scope="module")
def composed(models):
    anchor, augment = frozen.load(models / "anchor"), frozen.load(models / "augment")
    return tiny_models.randomised(compose(anchor, augment, CONFIG, rngs=nnx.Rngs(4)))


@pytest.fixture(scope="module")
def run(composed, tmp_path_factory):
    """A run's directory with checkpoints of steps 1 and 2, of which 1 is the best."""
    run = tmp_path_factory.mktemp("runs") / "run"
    tree = {"bridge": module_tree(composed.bridge)}
    state = {
        "batch_index": 0,
        "config": {},
        "frozen": identities(composed),
        "composition": [CONFIG.to_dict()],
    }
    opt_state = {"count": np.int32(0)}
    with TrainingCheckpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(1, tree, opt_state, state, {"loss": 1.0})
        worse = jax.tree.map(lambda x: x + 1, tree)
        checkpoints.save(2, worse, opt_state, state, {"loss": 2.0})
    return run


@pytest.fixture(scope="module")
def exported(composed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "bridge"
    export_bridge(composed, folder)
    return folder


def check_same(loaded, composed):
    assert loaded.configs == composed.configs
    for part in ("anchor", "augments", "bridge"):
        assert stored_bytes(getattr(loaded, part)) == stored_bytes(getattr(composed, part))
    np.testing.assert_allclose(loaded(TOKENS), composed(TOKENS), **CLOSE)


def test_from_a_run(run, composed):
    check_same(load_composed(run), composed)


def test_a_step_of_a_run(run, composed):
    later = load_composed(run, step=2)
    expected = jax.tree.map(lambda x: x + 1, module_tree(composed.bridge))
    assert stored_bytes(later.bridge) == stored_bytes(expected)
    with pytest.raises(CalmError, match=r"has no checkpoint of step 3; it has \[1, 2\]"):
        load_composed(run, step=3)


def test_from_an_exported_bridge(exported, composed):
    check_same(load_composed(exported), composed)


def test_with_a_low_rank_update_of_the_anchor(composed, tmp_path):
    anchor, augments = nnx.clone(composed.anchor), composed.augments
    add_lora(anchor, LoRAConfig(rank=2, alpha=4.0, targets=("query", "up")), nnx.Rngs(0))
    factor = anchor.layers.mlp.up_lora_b
    factor.set_value(factor.get_value() + 0.1)
    pair = tiny_models.randomised(compose(anchor, augments, CONFIG, rngs=nnx.Rngs(4)))
    export_bridge(pair, tmp_path / "bridge")
    loaded = load_composed(tmp_path / "bridge")
    check_same(loaded, pair)
    assert np.any(np.asarray(loaded(TOKENS)) != np.asarray(composed(TOKENS)))
    # An anchor that is given stays as it is, and its folder is that of the weights alone.
    given = frozen.load(composed.anchor.source)
    check_same(load_composed(tmp_path / "bridge", anchor=given), pair)
    assert stored_bytes(given) == stored_bytes(composed.anchor)
    with pytest.raises(CalmError, match="has a separate low-rank update"):
        frozen.save_frozen(pair.anchor, tmp_path / "anchor")
    with pytest.raises(CalmError, match=r"anchor that is given has a low-rank .*/bridge was train"):
        load_composed(tmp_path / "bridge", anchor=pair.anchor)
    pair.anchor.fingerprint = None
    with pytest.raises(CalmError, match="update and was never saved without it, so this bridge"):
        export_bridge(pair, tmp_path / "unsaved")
    assert not (tmp_path / "unsaved").exists()


def test_export_from_a_run(run, composed, tmp_path):
    export_bridge(run, tmp_path / "best")
    check_same(load_composed(tmp_path / "best"), composed)
    export_bridge(run, tmp_path / "last", step=2)
    loaded = load_composed(tmp_path / "last")
    assert stored_bytes(loaded.bridge) == stored_bytes(load_composed(run, step=2).bridge)


def test_an_export_is_small(exported, composed):
    """The bridge, what Orbax writes around it, and only names of its own arrays."""
    size = sum(path.stat().st_size for path in exported.rglob("*") if path.is_file())
    bridge = sum(map(len, stored_bytes(composed.bridge).values()))
    models = sum(map(len, stored_bytes(composed.anchor).values()))
    assert size < bridge + models / 2
    names = b"".join(path.read_bytes() for path in exported.rglob("*_METADATA"))
    assert b"rounds" in names
    assert b"embedding" not in names


def test_what_an_export_says(exported, models):
    values = json.loads((exported / "config.json").read_text())
    assert [entry["role"] for entry in values["frozen"]] == ["anchor", "augment 0"]
    for entry, name in zip(values["frozen"], ("anchor", "augment"), strict=True):
        assert entry["place"] == str(models / name)
        config = json.loads((models / name / "config.json").read_text())
        assert entry["fingerprint"] == config["fingerprint"]
    (composition,) = values["composition"]
    assert CompositionConfig.from_dict(composition) == CONFIG


def test_onto_a_mesh(run, composed):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    loaded = load_composed(run, mesh=mesh)
    assert stored_bytes(loaded.bridge) == stored_bytes(composed.bridge)
    crossing = loaded.bridge.rounds[0][0]
    wanted = sharding.array_sharding("", (32, 4, 8), ("embed", "heads", "head_dim"), mesh)
    assert crossing.query.get_value().sharding.is_equivalent_to(wanted, 3)
    assert {x.sharding.mesh for x in jax.tree.leaves(nnx.state(loaded))} == {mesh}


def test_onto_a_mesh_made_by_jax_itself(exported, models, composed):
    """Its axes are of type Explicit, and fewer than ours."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    alone, lone = frozen.load(models / "anchor", mesh=mesh), composed.anchor
    pair = load_composed(exported, mesh=mesh)
    with jax.set_mesh(mesh):
        under = alone(TOKENS)
    for found, expected in ((alone(TOKENS), lone), (under, lone), (pair(TOKENS), composed)):
        assert found.sharding.device_set == set(jax.devices())
        np.testing.assert_allclose(found, expected(TOKENS), rtol=1e-4, atol=1e-4)


def test_onto_the_mesh_of_the_anchor_that_is_given(exported, models, composed):
    mesh = sharding.make_mesh({"fsdp": 4, "data": 2})
    loaded = load_composed(exported, anchor=frozen.load(models / "anchor", mesh=mesh))
    assert {x.sharding.mesh for x in jax.tree.leaves(nnx.state(loaded))} == {mesh}
    np.testing.assert_allclose(loaded(TOKENS), composed(TOKENS), rtol=1e-4, atol=1e-4)


def test_models_in_integers_come_back_in_them(models, tmp_path):
    anchor = frozen.load(models / "anchor", dtype="int4")
    augment = frozen.load(models / "augment", dtype="int8")
    pair = tiny_models.randomised(compose(anchor, augment, CONFIG, rngs=nnx.Rngs(4)))
    assert [entry["dtype"] for entry in identities(pair)] == ["int4", "int8"]
    export_bridge(pair, tmp_path / "bridge")
    loaded = load_composed(tmp_path / "bridge")
    check_same(loaded, pair)
    assert loaded.anchor.fingerprint == frozen.describe(models / "anchor").fingerprint + " as int4"
    with pytest.raises(CalmError, match=r"was trained with the anchor .* as int4 .* is .*"):
        load_composed(tmp_path / "bridge", anchor=frozen.load(models / "anchor"))


@pytest.mark.parametrize("kind", ["decoder", "folder"])
def test_frozen_models_given(run, composed, models, tmp_path, kind):
    """They were moved: the recorded models are not asked for."""
    for name in ("anchor", "augment"):
        shutil.copytree(models / name, tmp_path / name)
    given = [tmp_path / "anchor", tmp_path / "augment"]
    if kind == "decoder":
        given = [frozen.load(folder) for folder in given]
    check_same(load_composed(run, anchor=given[0], augments=[given[1]]), composed)


@pytest.mark.parametrize("role", ["anchor", "augment"])
def test_another_frozen_model_is_refused_with_both_fingerprints(run, exported, models, role):
    other = frozen.load(models / f"other {role}")
    right = frozen.load(models / role)
    given = {"anchor": other} if role == "anchor" else {"augments": [other]}
    for folder in (run, exported):
        with pytest.raises(CalmError) as caught:
            load_composed(folder, **given)
        for part in (role, right.fingerprint[:16], other.fingerprint[:16], str(folder)):
            assert part in str(caught.value)


def test_a_frozen_model_in_memory_is_told_apart_by_its_weights(run, models):
    """A decoder without a folder is hashed."""
    right, wrong = tiny_models.decoder(0, "llama"), tiny_models.decoder(1, "llama")
    assert right.fingerprint is wrong.fingerprint is None
    load_composed(run, anchor=right)
    with pytest.raises(CalmError, match=r"was trained with the anchor"):
        load_composed(run, anchor=wrong)


def test_another_number_of_augments(run, models):
    augment = models / "augment"
    message = r"was trained with 1 augments, not {}"
    for given in ([], [augment, augment]):
        with pytest.raises(CalmError, match=message.format(len(given))):
            load_composed(run, augments=given)


def test_models_never_on_disk_must_be_given(tmp_path):
    model = tiny_models.composed(CompositionConfig(every=2))
    export_bridge(model, tmp_path / "bridge")
    with pytest.raises(CalmError, match=r"the anchor was never on disk; give it with --anchor"):
        load_composed(tmp_path / "bridge")
    loaded = load_composed(tmp_path / "bridge", anchor=model.anchor, augments=[*model.augments])
    assert stored_bytes(loaded.bridge) == stored_bytes(model.bridge)


def test_a_moved_frozen_model(exported, models, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "bridge")
    path = copy / "config.json"
    path.write_text(path.read_text().replace(str(models / "augment"), str(tmp_path / "gone")))
    message = r"augment 0: .*gone.*; if it has moved, give --augments \(augments=\)$"
    with pytest.raises(CalmError, match=message):
        load_composed(copy)
    load_composed(copy, augments=[models / "augment"])


@pytest.mark.parametrize("key", ["frozen", "composition"])
def test_damaged_export(exported, tmp_path, key):
    copy = shutil.copytree(exported, tmp_path / "bridge")
    values = json.loads((copy / "config.json").read_text())
    del values[key]
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(CalmError, match=rf"config\.json is damaged: it has no '{key}'"):
        load_composed(copy)


def test_export_without_its_weights(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "bridge")
    shutil.rmtree(copy / "weights")
    with pytest.raises(CalmError, match=r"bridge/weights (cannot be|is missing)"):
        load_composed(copy)


def test_neither_run_nor_export(models, exported, run, tmp_path):
    with pytest.raises(CalmError, match=r"is not a run or an exported bridge"):
        load_composed(tmp_path)
    with pytest.raises(CalmError, match=r"anchor is a frozen folder, not a composed run or an exp"):
        load_composed(models / "anchor")
    with pytest.raises(CalmError, match=r"is an exported bridge, so there is no step 1"):
        load_composed(exported, step=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"format": "calm_jax bridge, version 9"},
            r"config\.json: format is .*version 9.*version 2",
        ),
        ({"model_type": "llama"}, r"is a Hugging Face folder, not a composed run or an exported"),
        ({"kind": "decoder"}, r"is a decoder's run, not a composed run or an exported bridge"),
        ({"kind": "composed"}, r"has no checkpoint yet"),
        ({}, r"is a folder of another program, not a composed run or an exported bridge"),
    ],
)
def test_another_kind_of_folder(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CalmError, match=message):
        load_composed(tmp_path)


def test_runs_without_a_bridge(tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CalmError, match=r"empty has no checkpoint yet"):
        load_composed(tmp_path / "empty")
    with TrainingCheckpoints(tmp_path / "decoder" / "checkpoints") as checkpoints:
        arrays = {"x": np.zeros(3, np.float32)}
        checkpoints.save(1, arrays, arrays, {"frozen": []})
    with pytest.raises(CalmError, match=r"trains one decoder; load its frozen folder instead"):
        load_composed(tmp_path / "decoder")


def test_export_to_a_place_that_exists(composed, exported):
    before = sorted(exported.rglob("*"))
    with pytest.raises(CalmError, match=re.escape(f"{exported} exists")):
        export_bridge(composed, exported)
    assert sorted(exported.rglob("*")) == before


def test_several_augments_in_their_order(tmp_path):
    anchor = tiny_models.decoder(0, "llama")
    augments = [tiny_models.decoder(1, embed_dim=16), tiny_models.decoder(2, embed_dim=32)]
    configs = [CompositionConfig(every=2), CompositionConfig(connections=((0, 1),), gate=True)]
    model = compose(anchor, augments, configs, rngs=nnx.Rngs(0))
    export_bridge(model, tmp_path / "bridge")
    loaded = load_composed(tmp_path / "bridge", anchor=anchor, augments=augments)
    assert loaded.configs == tuple(configs)
    assert stored_bytes(loaded.bridge) == stored_bytes(model.bridge)
    with pytest.raises(CalmError, match=r"was trained with the augment 0"):
        load_composed(tmp_path / "bridge", anchor=anchor, augments=augments[::-1])
