import json

import pytest

from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig
from calm_jax.training import configuration
from calm_jax.training.run import check_run, start_run


def open_run(workdir, config, *, overwrite=False):
    folder = check_run(workdir, config, overwrite=overwrite)
    start_run(folder, config, overwrite=overwrite)
    return folder


def config(**train):
    decoder = DecoderConfig.palm(
        vocab_size=64, embed_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32
    )
    result = configuration.decoder_run(decoder)
    result.train.update(train)
    return result


def test_new_directory_holds_its_config(tmp_path):
    run = open_run(tmp_path / "a" / "run", config(num_steps=7))
    assert run == tmp_path / "a" / "run"
    written = json.loads((run / "config.json").read_text())
    assert written["train"]["num_steps"] == 7
    assert written["decoder"]["embed_dim"] == 16
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_relative_and_home_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_run("here", config()) == tmp_path / "here"
    assert open_run("~/there", config()) == tmp_path / "there"


def test_what_may_change_between_resumptions(tmp_path):
    open_run(tmp_path, config())
    changed = config(num_steps=5, log_every=3, save_every=2, validate_every=9, keep=7)
    changed.mesh.update(data=2, fsdp=2, tensor=2)
    changed.cache_compiled = "elsewhere"
    open_run(tmp_path, changed)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["mesh"] == {"slices": 0, "data": 2, "fsdp": 2, "tensor": 2}
    assert written["train"]["num_steps"] == 5


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "batch_size", 32, "train.batch_size was 64, now 32"),
        ("train", "seed", 1, "train.seed was 0, now 1"),
        ("optimizer", "learning_rate", 0.5, "optimizer.learning_rate was 0.001, now 0.5"),
        ("data", "length", 8, "data.length was 512, now 8"),
        ("decoder", "mlp_dim", 48, "decoder.mlp_dim was 32, now 48"),
        ("decoder", "block", "sequential", "decoder.block was 'parallel', now 'sequential'"),
    ],
)
def test_any_other_difference_is_refused_with_both_values(tmp_path, section, key, value, message):
    open_run(tmp_path, config())
    before = (tmp_path / "config.json").read_bytes()
    changed = config()
    changed[section][key] = value
    with pytest.raises(CalmError) as caught:
        open_run(tmp_path, changed)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_every_difference_is_named(tmp_path):
    open_run(tmp_path, config())
    with pytest.raises(CalmError, match=r"batch_size was 64, now 8; train\.seed was 0, now 3"):
        open_run(tmp_path, config(batch_size=8, seed=3))


def test_a_config_that_lost_or_gained_a_key(tmp_path):
    open_run(tmp_path, config())
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    written["data"].pop("pack")
    path.write_text(json.dumps(written))
    with pytest.raises(CalmError, match=r"data\.pack was None, now True"):
        open_run(tmp_path, config())


def test_overwrite_starts_anew(tmp_path):
    open_run(tmp_path, config())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    open_run(tmp_path, config(seed=5), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 5


def test_the_name_of_a_vocabulary_is_no_file_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        changed = config()
        changed.vocabulary = "bytes"
        open_run(".", changed, overwrite=True)


@pytest.mark.parametrize("key", ["decoder.from", "vocabulary", "data.train"])
def test_overwriting_leaves_what_the_config_needs(tmp_path, key):
    needed = str(tmp_path / "run" / "frozen")
    open_run(tmp_path / "run", config())
    (tmp_path / "run" / "frozen").mkdir()
    changed = config()
    value = ({"jsonl": needed},) if key == "data.train" else needed
    with changed.ignore_type():
        changed.update_from_flattened_dict({key: value})
    with pytest.raises(CalmError, match=f"--overwrite would remove {needed} with the run"):
        open_run(tmp_path / "run", changed, overwrite=True)
    assert (tmp_path / "run" / "config.json").exists()
    open_run(tmp_path / "other", changed, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_something_else_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CalmError, match=r"neither empty nor a run: it has no config\.json"):
        open_run(tmp_path, config(), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_of_what_is_not_a_run(tmp_path):
    """A config.json alone does not make a run: many tools write one."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "weights.bin").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CalmError, match=r"is not a run but a Hugging Face folder"):
            open_run(tmp_path, config(), overwrite=overwrite)
    assert (tmp_path / "weights.bin").exists()


def test_damaged_config(tmp_path):
    open_run(tmp_path, config())
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(CalmError, match=r"config\.json:\d+: not JSON"):
        open_run(tmp_path, config())


@pytest.mark.parametrize("inside", [(), ("deeper",)])
def test_a_file_in_the_way(tmp_path, inside):
    (tmp_path / "file").write_text("")
    workdir = tmp_path.joinpath("file", *inside)
    with pytest.raises(CalmError, match=r"cannot (read|write) .*file"):
        open_run(workdir, config())


def test_a_place_that_cannot_be_written_is_found_before_anything_is_loaded(tmp_path):
    """/proc refuses even the superuser."""
    with pytest.raises(CalmError, match=r"cannot write /proc/run"):
        check_run("/proc/run", config())
    check_run(tmp_path / "deep" / "run", config())
    assert not list(tmp_path.iterdir())
