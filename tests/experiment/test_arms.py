"""What an experiment may be, and the commands that make it."""

import pathlib
import re
import types

import pytest
from etils import epath

from calm_jax.data import key_value
from calm_jax.data.key_value_world import World
from calm_jax.errors import CalmError
from calm_jax.experiment.arms import KINDS, Arm, Experiment, groups, jobs
from calm_jax.shell import command_line

ARMS = (
    Arm("anchor", kind="part", seeded=False),
    Arm("augment", kind="part"),
    Arm("calm", kind="calm", anchor="anchor", augments=("augment", "anchor")),
    Arm("lora", decoder="anchor"),
    Arm("zeroed", scored_from="calm", kind="control", flags=("--control=zeroed",)),
    Arm("mixed", scored_from="anchor", flags=("--mix={augment}", "--hand_over_prompt={answer}")),
)


def experiment(**changes):
    fields = {"arms": ARMS, "tasks": ("a", "b.jsonl"), "reference": "calm", "seeds": (3, 5)}
    return Experiment("title", **fields | changes)


def by_name(**changes):
    found = jobs(experiment(**changes), "file.py", epath.Path("/w"), {})
    return {(job.arm.name, job.seed): job for job in found}


def test_every_seed_has_its_own_runs_but_for_those_without_seeds():
    found = by_name()
    assert len(found) == 1 + 2 * 5
    assert str(found["anchor", 3].folder) == "/w/all_seeds/anchor"
    assert str(found["calm", 5].folder) == "/w/seed_5/calm"
    assert str(found["calm", 5]) == "calm, seed 5"
    assert str(found["anchor", 3]) == "anchor"


def test_the_commands_name_the_models_of_their_seed():
    found = by_name(flags=("--limit=7",))
    job = found["calm", 5]
    assert command_line(*job.train) == (
        "calm train --config=file.py:calm --workdir=/w/seed_5/calm --config.train.seed=5 "
        "--config.data.seed=5 --config.anchor=/w/all_seeds/anchor/frozen "
        "--config.augments=\"('/w/seed_5/augment/frozen', '/w/all_seeds/anchor/frozen',)\""
    )
    assert command_line(*job.score) == (
        "calm evaluate --workdir=/w/seed_5/calm --tasks=a,b.jsonl --limit=7 "
        "--output=/w/seed_5/calm/evaluation"
    )
    assert "--config.decoder.from=/w/all_seeds/anchor/frozen" in found["lora", 3].train
    assert found["lora", 3].score[1] == "--model=/w/seed_3/lora/frozen"
    assert found["zeroed", 3].commands == [
        (
            *("evaluate", "--workdir=/w/seed_3/calm", "--tasks=a,b.jsonl", "--limit=7"),
            *("--control=zeroed", "--output=/w/seed_3/zeroed/evaluation"),
        )
    ]
    assert found["mixed", 5].score[1:3] == (
        "--model=/w/all_seeds/anchor/frozen",
        "--tasks=a,b.jsonl",
    )
    # A field that is no arm belongs to the flag itself.
    assert "--mix=/w/seed_5/augment/frozen" in found["mixed", 5].score
    assert "--hand_over_prompt={answer}" in found["mixed", 5].score


def test_a_group_needs_only_models_of_earlier_ones():
    found = by_name()
    told = [[command_line(*command) for command in group] for group in groups(list(found.values()))]
    assert [len(group) for group in told] == [3, 9, 6]
    made = set()
    for group in told:
        for line in group:
            folders = set(re.findall(r"/w/\w+/\w+(?=/frozen|$)", line.split(" --output")[0]))
            mine = re.search(r"--workdir=(/w/\w+/\w+)", line)
            needed = folders | {mine[1]} if mine and "evaluate" in line else folders
            assert needed - ({mine[1]} if "train" in line else set()) <= made
        made |= {m[1] for line in group if (m := re.match(r".* train .*--workdir=(\S+)", line))}
    assert sum(map(len, told)) == 1 + 2 * 3 + len(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": (*ARMS, Arm("calm"))}, "two arms are called 'calm'"),
        ({"arms": (Arm("Calm"),)}, "arm 'Calm': a name has small letters"),
        ({"arms": (Arm("x", kind="odd"),)}, "kind 'odd'; known are part, calm"),
        ({"arms": (Arm("lora", decoder="anchor"),)}, "arm lora needs 'anchor'; the arms before it"),
        (
            {"arms": (Arm("a"), Arm("b", decoder="a", seeded=False))},
            "arm b has no seeds, but a, which it needs, has",
        ),
        ({"arms": (Arm("a", flags=("--mix={b}",)), Arm("b"))}, "arm a needs 'b'; the arms before"),
        (
            {"arms": (*ARMS, Arm("twice", scored_from="zeroed"))},
            "arm twice: zeroed is not trained",
        ),
        ({"finetuned": "best"}, "finetuned 'best' is no arm"),
        ({"axis": "keys"}, "axis 'keys', but arms with an x are none"),
        ({"arms": (*ARMS, Arm("a", anchor="anchor"))}, "arm a: anchor 'anchor' and augments ()"),
        ({"arms": (*ARMS, Arm("a", augments=("anchor",)))}, "a pair needs both"),
        ({"tasks": ("a", "a")}, "one at least, none twice"),
        ({"arms": (*ARMS, Arm("a", x=1.0))}, "axis '', but arms with an x are a"),
        ({"reference": "best"}, "reference 'best' is no arm"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"tasks": ()}, "one at least"),
    ],
)
def test_an_experiment_that_is_none(changes, message):
    with pytest.raises(CalmError, match=message):
        experiment(**changes)


def test_the_fields_of_flags_that_are_arms_are_needed():
    assert ARMS[-1].needs({"anchor", "augment"}) == ("anchor", "augment")


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def configs_of(name):
    """An experiment of `configs`, and the config of each arm that it trains."""
    from calm_jax.cli.config import call_file

    path = CONFIGS / f"{name}.py"
    found = call_file(str(path), "get_experiment", Experiment)
    configs = {
        arm.name: call_file(f"{path}:{arm.name}", "get_config", object)
        for arm in found.arms
        if arm.is_trained
    }
    for arm in found.arms:
        if arm.name in configs:
            assert (configs[arm.name].kind == "composed") == bool(arm.anchor)
    return found, configs


DEMO_S = ["table5_kv", "kv_ablations", "kv_share"]  # of the demo's models


@pytest.mark.parametrize("name", DEMO_S)
def test_the_experiments_have_the_demo_s_models_with_steps_of_their_own(name):
    from calm_jax.cli.config import load_file

    _, configs = configs_of(name)
    for arm, file in {"anchor": "anchor", "augment": "augment", "calm": "compose"}.items():
        demo = load_file(str(CONFIGS / f"kv_{file}.py"))
        demo.train.num_steps = {"anchor": 2_800, "augment": 900, "calm": 1_500}[arm]
        assert configs[arm] == demo


SMOLLM2 = {"vocab_size": 49_152, "embed_dim": 576, "num_layers": 30, "num_heads": 9,
           "num_kv_heads": 3, "head_dim": 64, "mlp_dim": 1_536, "tied_head": True}  # fmt: skip
GEMMA3 = {"vocab_size": 262_144, "embed_dim": 640, "num_layers": 18, "num_heads": 4,
          "num_kv_heads": 1, "head_dim": 256, "mlp_dim": 2_048, "tied_head": True}  # fmt: skip


@pytest.fixture
def real_models(monkeypatch):
    """The forms of the models that `launch/real_pair.sh` fetches, where their folders are read."""
    from calm_jax.checkpoints import frozen
    from calm_jax.models import DecoderConfig

    forms = {"anchor": SMOLLM2, "gemma": GEMMA3}

    def describe(folder):
        form = DecoderConfig.llama(**forms[pathlib.Path(folder).name])
        return types.SimpleNamespace(config=form)

    monkeypatch.setattr(frozen, "describe", describe)


KEY_VALUE = [*DEMO_S, "kv_small", "kv_medium", "kv_paper"]
REAL = ["real_facts", "real_translation", "real_tokenizers"]


@pytest.mark.parametrize("name", [*KEY_VALUE, *REAL])
def test_every_arm_can_be_trained(name, real_models):
    from calm_jax.training import configuration

    found, configs = configs_of(name)
    for arm in found.arms:
        if arm.name in configs:
            if arm.decoder:
                configs[arm.name].decoder["from"] = "frozen"
            configuration.validate(configs[arm.name])


@pytest.mark.parametrize("name", ["medium", "paper"])
def test_written_out_answers_fit(name):
    found, configs = configs_of(f"kv_{name}")
    (flag,) = found.flags
    world = World(key_value.config(name))
    examples = [one for task in ("math", "num") for one in world.examples("evaluation", task)]
    texts = [(one["inputs"].removeprefix(key_value.MATH), one["targets"]) for one in examples]
    assert max(len(answer) for _, answer in texts) < int(flag.removeprefix("--max_new_tokens="))
    # Beside the characters, a row has a first token, a marker and a last one.
    longest = max(len(asked) + len(answer) for asked, answer in texts) + 3
    assert all(longest <= config.data.length for config in configs.values())


def test_an_ablation_changes_the_bridge_alone():
    from calm_jax.models import CompositionConfig

    found, configs = configs_of("kv_ablations")
    sections = {"calm": configs["calm"].composition.to_dict()}
    for arm in found.arms[3:]:
        config = configs[arm.name].to_dict()
        sections[arm.name] = config.pop("composition")
        assert config.items() <= configs["calm"].to_dict().items()
        CompositionConfig.from_dict(sections[arm.name]).resolve(augment_layers=4, anchor_layers=6)
    told = [repr(sorted(section.items())) for section in sections.values()]
    assert len(set(told)) == len(told)
    every = {name: CompositionConfig.from_dict(sections[f"every_{name}"]) for name in (1, 2, 4)}
    assert every[2].resolve(4, 6) == ((1, 2), (3, 5))


def test_a_share_changes_the_data_alone():
    found, configs = configs_of("kv_share")
    points = [arm for arm in found.arms if arm.x is not None]
    assert [arm.x for arm in points] == [1, 2, 5, 10, 20, 50]
    for arm in points:
        world = "demo" if arm.x == 20 else f"demo_share_{arm.x}"
        config = configs[arm.name]
        assert config.data.train[0]["task"] == f"calm_jax/key_value/{world}/bridge"
        config.data.train = config.data.validation = configs["calm"].data.train
        assert config == configs["calm"]


def test_the_small_version_has_every_table_and_is_short():
    found, configs = configs_of("kv_small")
    assert {arm.kind for arm in found.arms} == {*KINDS}
    assert [arm.x for arm in found.arms if arm.x is not None] == [20, 5, 50]
    assert all(task.startswith("calm_jax/key_value/small") for task in found.tasks)
    for name, config in configs.items():
        (entry,) = config.data.train
        share = name if name.startswith("share") else ""
        assert entry["task"].startswith(f"calm_jax/key_value/small{share and '_'}{share}/")
    # About 0.07 s each on two cores: with what each of 37 processes takes besides, 20 minutes.
    assert sum(config.train.num_steps for config in configs.values()) < 6_500
    assert configs["anchor"].decoder.embed_dim == 48
    bridge, lora = configs["calm"], configs["lora"]
    # 10 ranks of 6 layers' matrices: q, k, v, o of 48 by 48, and three of 48 by 144.
    assert lora.lora.rank * 6 * (4 * 96 + 3 * 192) == 57_600
    assert len(bridge.composition.connections) * 5 * 48**2 == 57_600


def test_table_5_s_baselines_are_trained_on_the_bridge_s_data():
    _, configs = configs_of("table5_kv")
    baselines = [configs[name] for name in ("calm", "lora")]
    assert baselines[0].data == baselines[1].data
    assert baselines[0].train.num_steps == baselines[1].train.num_steps
    assert baselines[1].lora.rank == 20  # 230,400 parameters beside the bridge's 231,360


def test_a_model_that_exists_is_scored_and_joined_where_it_is():
    arms = (Arm("anchor", kind="part", frozen="/models/anchor"), *ARMS[1:3])
    found = by_name(arms=arms)
    assert len(found) == 1 + 2 * 2
    (score,) = found["anchor", 3].commands
    assert score[:2] == ("evaluate", "--model=/models/anchor")
    assert "--config.anchor=/models/anchor" in found["calm", 5].train
    with pytest.raises(CalmError, match="is /models/anchor already; it cannot be made of arms"):
        experiment(arms=(ARMS[0], Arm("b", frozen="/models/anchor", decoder="anchor")))
