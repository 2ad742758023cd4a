import contextlib
import json
import resource
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import stored_bytes

from calm_jax import sharding
from calm_jax.checkpoints import training
from calm_jax.checkpoints.training import TrainingCheckpoints
from calm_jax.errors import CalmError, RunFailed, outcome

OPTIMIZER = optax.adamw(1e-3)


def tree(step: int):
    values = np.random.default_rng(step).normal(size=(3, 16, 8)).astype(np.float32)
    return {"rounds": {"0": {"query": jnp.asarray(values), "gate": jnp.float32(step)}}}


def abstract(of):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), of)


def save(checkpoints, step, loss=None):
    state = {"batch_index": step - 1, "config": {"kind": "composed"}}
    metrics = None if loss is None else {"loss": loss}
    checkpoints.save(step, tree(step), OPTIMIZER.init(tree(step)), state, metrics)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with TrainingCheckpoints(folder) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, step, shape=None):
    wanted = abstract(tree(step) if shape is None else shape)
    with TrainingCheckpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore(step, wanted, jax.eval_shape(OPTIMIZER.init, wanted))


def test_what_is_restored_is_what_was_saved(saved):
    restored = restore(saved, 2)
    assert restored.step == 2
    assert stored_bytes(restored.trainable) == stored_bytes(tree(2))
    assert stored_bytes(restored.opt_state) == stored_bytes(OPTIMIZER.init(tree(2)))
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(OPTIMIZER.init(tree(2)))
    assert restored.state == {"batch_index": 1, "config": {"kind": "composed"}}


def test_without_the_optimizer(saved, caplog):
    before = sorted(saved.rglob("*"))
    with TrainingCheckpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(1, abstract(tree(1)))
    assert not caplog.records  # Orbax has nothing to warn of
    assert sorted(saved.rglob("*")) == before
    assert restored.opt_state is None
    assert stored_bytes(restored.trainable) == stored_bytes(tree(1))


def test_onto_another_mesh(tmp_path):
    before, after = (
        jax.sharding.NamedSharding(
            sharding.make_mesh(shape, jax.devices()[: np.prod(list(shape.values()))]),
            jax.sharding.PartitionSpec(None, "fsdp", "tensor"),
        )
        for shape in ({"fsdp": 2, "tensor": 4}, {"fsdp": 2})
    )
    values = {"query": jax.device_put(tree(1)["rounds"]["0"]["query"], before)}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, values, OPTIMIZER.init(values), {"batch_index": 0})
    wanted = {"query": jax.ShapeDtypeStruct((3, 16, 8), jnp.float32, sharding=after)}
    with TrainingCheckpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(1, wanted).trainable["query"]
    assert restored.sharding == after
    assert restored.addressable_shards[0].data.shape == (3, 8, 8)
    assert stored_bytes({"query": restored}) == stored_bytes(values)


def test_the_latest_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: None}
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in losses.items():
            save(checkpoints, step, loss)
        checkpoints.wait()
        assert sorted(checkpoints.manager.all_steps()) == [2, 5, 6]
        assert (checkpoints.latest, checkpoints.best) == (6, 2)
    folders = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert folders == {"2", "5", "6"}
    with TrainingCheckpoints(tmp_path, keep=2) as checkpoints:  # another process knows as much
        assert (checkpoints.latest, checkpoints.best) == (6, 2)
        save(checkpoints, 7, 0.5)
        checkpoints.wait()
        assert sorted(checkpoints.manager.all_steps()) == [6, 7]


def test_without_validation_the_latest_is_the_best(saved):
    with TrainingCheckpoints(saved, read_only=True) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (2, 2)


def test_no_checkpoint(tmp_path):
    with TrainingCheckpoints(tmp_path / "none") as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (None, None)


def test_a_step_that_is_not_there(saved):
    with pytest.raises(CalmError, match=r"has no checkpoint of step 9; it has \[1, 2\]"):
        restore(saved, 9, tree(1))


def test_a_write_that_never_ended_is_not_a_checkpoint(folder):
    """What a killed process leaves: a folder with the name that Orbax gives unfinished ones."""
    unfinished = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", unfinished)
    with TrainingCheckpoints(folder) as checkpoints:
        assert checkpoints.latest == 2
        save(checkpoints, 3)
    assert stored_bytes(restore(folder, 3).trainable) == stored_bytes(tree(3))


@pytest.mark.parametrize("item", ["trainable", "opt_state", "state"])
def test_half_a_checkpoint(folder, item):
    shutil.rmtree(folder / "2" / item)
    with pytest.raises(CalmError, match=r"checkpoints/2") as caught:
        restore(folder, 2)
    assert "\n" not in str(caught.value)


def test_damaged_arrays(folder):
    data = [path for path in (folder / "2" / "trainable").rglob("d/*") if path.is_file()]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CalmError, match=r"checkpoints/2 cannot be read") as caught:
        restore(folder, 2)
    assert "\n" not in str(caught.value)


def test_damaged_state(folder):
    path = folder / "2" / "state" / "metadata"
    path.write_text(path.read_text()[:10])
    with pytest.raises(CalmError, match=r"checkpoints/2 cannot be read"):
        restore(folder, 2)


def test_the_checkpoint_of_another_model(saved):
    other = tree(2)
    other["rounds"]["0"]["query"] = jnp.zeros((3, 16, 4))
    message = r"rounds/0/query has shape \(3, 16, 8\), the model needs \(3, 16, 4\)"
    with pytest.raises(CalmError, match=message):
        restore(saved, 2, other)
    other = tree(2)
    other["rounds"]["1"] = {"query": jnp.zeros(3)}
    with pytest.raises(CalmError, match=r"rounds/1/query is missing"):
        restore(saved, 2, other)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalmError, match=r"cannot write .*file/checkpoints"):
        TrainingCheckpoints(tmp_path / "file" / "checkpoints")


@contextlib.contextmanager
def full_disk():
    """A limit on the size of files; the function that it gives lifts it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # noqa: E731
    try:
        yield lift
    finally:
        lift()


def paused(monkeypatch, during):
    """The pauses before each retry, in which `during` is called with their number so far."""
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        during(len(pauses))

    monkeypatch.setattr(training, "time", types.SimpleNamespace(sleep=sleep))
    return pauses


@pytest.mark.parametrize("noticed", ["by the next save", "at the end"])
def test_a_failed_write_is_tried_again(tmp_path, monkeypatch, noticed):
    told = []
    with TrainingCheckpoints(tmp_path / "run", tell=told.append) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        with full_disk() as lift:
            pauses = paused(monkeypatch, lambda number: number == 2 and lift())
            save(checkpoints, 2)
            if noticed == "by the next save":
                save(checkpoints, 3)
            checkpoints.wait()
        last = 3 if noticed == "by the next save" else 2
        assert sorted(checkpoints.manager.all_steps()) == [1, last]
        save(checkpoints, 4)
    assert pauses == [1, 5]
    assert [line.rpartition("; ")[2] for line in told] == [
        "trying again in 1 s",
        "trying again in 5 s",
    ]
    assert all(line.startswith(f"cannot save a checkpoint in {tmp_path}/run") for line in told)
    assert all("(the last complete checkpoint is step 1)" in line for line in told)
    for step in (last, 4):
        assert stored_bytes(restore(tmp_path / "run", step).trainable) == stored_bytes(tree(step))


def test_a_write_that_fails_to_the_last(tmp_path, monkeypatch):
    told = []
    pauses = paused(monkeypatch, lambda _: None)
    failed = pytest.raises(RunFailed, match=r"cannot save a checkpoint in .*none is complete\)$")
    checkpoints = TrainingCheckpoints(tmp_path, tell=told.append)
    with failed as error, full_disk(), checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
    assert outcome(error.value) == (1, f"error: {error.value}")  # no bad input: it may go on
    assert pauses == [1, 5, 25]
    assert len(told) == 3


def test_state_is_json(saved):
    with TrainingCheckpoints(saved, read_only=True) as checkpoints:
        state = checkpoints.read_state(1)
    assert json.loads(json.dumps(state)) == state
