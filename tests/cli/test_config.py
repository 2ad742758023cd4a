import pathlib

import pytest
from absl import flags
from ml_collections import ConfigDict

from calm_jax.cli import config
from calm_jax.errors import CalmError

FILE = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config():
    return ConfigDict({
        "name": "", "train": {"num_steps": 3, "rate": 0.5}, "decoder": {"from": ""},
        "width": placeholder(int), "pairs": (), "mixed": ({"task": "a", "weight": 1.0},),
        "parts": (ConfigDict({"every": 4}), ConfigDict({"every": 4})),
    })
"""


def define_flags(define):
    define("string", "config", "a file")
    define("integer", "count", "a number", 4)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(FILE)
    return path


def parse(*argv):
    return config.parse(
        argv,
        "Usage here.",
        define_flags,
        required=("config",),
        load_config=lambda values: config.load_file(values.config),
    )


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--config.train.num_steps=7"], "train.num_steps", 7),
        (["--config.train.num_steps", "7"], "train.num_steps", 7),
        (["--config.train.rate=2"], "train.rate", 2.0),
        (["--config.width=8"], "width", 8),
        (["--config.pairs=((3, 0), (3, 1))"], "pairs", ((3, 0), (3, 1))),
        (["--config.pairs=('a b/c',)"], "pairs", ("a b/c",)),
        (["--config.pairs=(1, 2)", "--config.pairs=(3,)"], "pairs", (3,)),
        (["--config.pairs", "(1, 2)", "--config.pairs", "(3,)"], "pairs", (3,)),
        (["--config.decoder.from=a/b"], "decoder.from", "a/b"),
        (["--config.name=x=y"], "name", "x=y"),
        (["--config.mixed[0].weight=0.25"], "mixed", ({"task": "a", "weight": 0.25},)),
        (
            ["--config.parts[1].every=2"],
            "parts",
            (ConfigDict({"every": 4}), ConfigDict({"every": 2})),
        ),
    ],
)
def test_a_key_is_set_on_the_command_line(path, arguments, key, expected):
    values, found = parse(f"--config={path}", "--count=5", *arguments)
    assert values.count == 5
    assert found[key] == expected


def test_every_call_has_flags_and_config_of_its_own(path):
    parse(f"--config={path}", "--config.train.num_steps=7", "--count=9")
    values, found = parse(f"--config={path}")
    assert (values.count, found.train.num_steps) == (4, 3)
    assert "count" not in flags.FLAGS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.trian.num_steps=3"], "key 'trian.num_steps'; did you mean 'train.num_steps'?"),
        (["--config.train.steps=3"], "'train.steps'; did you mean 'train.num_steps'?"),
        (["--config.nmae", "x"], "unknown config key 'nmae'; did you mean 'name'?"),
        (["--config.train.num_steps=many"], "--config.train.num_steps=many"),
        (["--config.train.num_steps"], "Missing value for flag --config.train.num_steps"),
        (["--config.mixed[3].weight=1"], "--config.mixed[3].weight=1: tuple index out of range"),
        (["--config.parts[1].evry=3"], "'parts[1].evry'; did you mean 'parts[1].every'?"),
        (["--config.parts[2].every=3"], "'parts[2].every'; did you mean 'parts[1].every'?"),
        (["--config.parts.every=3"], "'parts.every'; did you mean 'parts[1].every'?"),
        (["--config.train[0].rate=1"], "'train[0].rate'; did you mean 'train.rate'?"),
        (["--coumt=3"], "unknown flag --coumt; did you mean --count?"),
        (["--zzz"], "unknown flag --zzz; --help lists the flags"),
        (["--count=x"], "--count=x"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)  # fmt: skip
def test_a_meaningless_argument_is_named(path, arguments, message):
    with pytest.raises(CalmError) as caught:
        parse(f"--config={path}", *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_is_an_error_where_there_is_no_config():
    with pytest.raises(CalmError, match=r"unknown flag --config\.train"):
        config.parse(["--config.train=3"], "", lambda define: None)


def test_a_required_flag_is_asked_for():
    with pytest.raises(CalmError, match="--config is missing"):
        parse("--count=3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", r":1: ModuleNotFoundError: No module named"),
        ("def get_config():\n    return missing", r":2: NameError: name 'missing'"),
        ("def get_config(:", r"SyntaxError: invalid syntax"),
        ("value = 3", r"AttributeError: .*get_config"),
        ("def get_config():\n    return 3", r"get_config\(\) returns int"),
        ("def get_config():\n    raise ValueError('one\\ntwo')", r":2: ValueError: one$"),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(path, text, message):
    path.write_text(text)
    with pytest.raises(CalmError, match=message) as caught:
        parse(f"--config={path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(CalmError, match=r"nowhere\.py: there is no such file"):
        parse(f"--config={tmp_path / 'nowhere.py'}")
    (tmp_path / "config.txt").write_text("")
    with pytest.raises(CalmError, match=r"config\.txt is not a Python file"):
        parse(f"--config={tmp_path / 'config.txt'}")


def test_help_lists_flags_with_defaults_and_every_key(path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage here.\n")
    assert "--count: a number (default: 4)" in shown
    assert "--config.KEY=VALUE" in shown
    with pytest.raises(SystemExit):
        parse(f"--config={path}", "--help")
    assert "--config.train.num_steps=3\n" in capsys.readouterr().out


def test_the_small_trial_of_own_models_sets_keys_that_exist():
    file = pathlib.Path(__file__).parents[2] / "configs/own_models.py"
    trial = file.read_text().partition("A small trial")[2].partition('"""')[0]
    arguments = [word for word in trial.split() if word.startswith("--config.")]
    assert arguments
    found = config.override(config.load_file(str(file)), arguments)
    assert found.train.num_steps <= 50 < config.load_file(str(file)).train.num_steps


def test_the_config_is_locked(path):
    _, found = parse(f"--config={path}")
    assert isinstance(found, ConfigDict)
    with pytest.raises(AttributeError):
        found.train.nmu_steps = 3
