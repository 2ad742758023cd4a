import json
import sys

import pytest

from calm_jax.data import evaluation_examples, key_value, load_vocabulary, open_dataset
from calm_jax.data.key_value_world import World
from calm_jax.data.vocabulary import ByteVocabulary
from calm_jax.errors import CalmError

USERS_MODULE = """
import seqio
import tensorflow as tf

EXAMPLES = {"inputs": ["ab=", "b="], "targets": ["3", "4"], "level": [1, 2]}

seqio.TaskRegistry.add(
    "users_task",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(EXAMPLES),
        splits=["train", "test"],
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={
        "inputs": seqio.Feature(seqio.ByteVocabulary(), add_eos=False),
        "targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
    },
)
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_tasks.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_tasks"
    sys.modules.pop("users_tasks", None)
    if seqio := sys.modules.get("seqio"):
        seqio.TaskRegistry.remove("users_task")


def test_every_config_is_registered_whole():
    import seqio

    from calm_jax.data import key_value_tasks, tasks  # noqa: F401 - key_value_tasks registers them

    for name in key_value.CONFIGS:
        prefix = f"calm_jax/key_value/{name}"
        augments = ("augment", "augment_first", "augment_second")
        for part in (*augments, "anchor", "bridge_math", "bridge_subs", "bridge_num"):
            assert set(seqio.get_mixture_or_task(f"{prefix}/{part}").splits) == {
                "train",
                "validation",
            }
        halves = ("subs_first", "subs_second", "math_first", "math_second")
        for part in ("subs", "num", "math", "math_seen", *halves):
            assert set(seqio.get_mixture_or_task(f"{prefix}/{part}").splits) == {"test"}
        rates = {task.name.split("_")[-1]: rate for task, rate in tasks.find(f"{prefix}/bridge")}
        expected = key_value.CONFIGS[name].bridge_rates
        assert rates == pytest.approx(dict(zip(key_value.BRIDGE_PARTS, expected, strict=True)))


def test_tfds_holds_what_the_world_writes(cache_dir, vocabulary):
    world = World(key_value.CONFIGS["tiny"])
    for name in ("subs_second", "subs", "num", "math", "math_seen"):
        task = f"calm_jax/key_value/tiny/{name}"
        examples = evaluation_examples(task, "test", vocabulary, cache_dir=str(cache_dir))
        corpus = "evaluation_halves" if name == "subs_second" else "evaluation"
        expected = list(world.examples(corpus, name))

        def by_input(example):
            return example["inputs"]

        assert sorted(examples, key=by_input) == sorted(expected, key=by_input)
        assert len({type(e["unseen"]) for e in examples} | {bool}) == 1
    few = evaluation_examples(task, "test", vocabulary, 7, str(cache_dir))
    assert few == examples[:7]


def test_a_users_task_is_read_in_the_models_vocabulary(users_module, data, vocabulary, cache_dir):
    entry = {"task": "users_task", "import": users_module}
    batch = open_dataset(data(entry, pack=False), "train", vocabulary).batch(range_of(2))
    for row, text in zip(batch["decoder_target_tokens"], ("ab=3", "b=4"), strict=True):
        ids = [*vocabulary.encode(text), vocabulary.eos_id]
        assert row[: len(ids)].tolist() == ids
    assert evaluation_examples(entry, "test", vocabulary, cache_dir=str(cache_dir)) == [
        {"inputs": "ab=", "targets": "3", "level": 1},
        {"inputs": "b=", "targets": "4", "level": 2},
    ]


def range_of(count):
    import numpy as np

    return np.arange(count)


def test_examples_of_a_file(tmp_path, cache_dir):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"inputs": "1+1=", "targets": "two"}) + "\n")
    entry = {"jsonl": str(path)}
    assert evaluation_examples(entry, "test", ByteVocabulary(), 0, str(cache_dir)) == [
        {"inputs": "1+1=", "targets": "two"}
    ]


@pytest.mark.parametrize(
    ("entry", "split", "part"),
    [
        ({"task": "calm_jax/key_value/none/augment"}, "train", "no key-value config 'none'"),
        ({"task": "calm_jax/key_value/tiny/none"}, "train", "no task .*tiny/none"),
        ({"task": "nothing"}, "train", "no task 'nothing'; known are .*tiny/augment"),
        ({"task": "nothing", "import": "no_such_module"}, "train", "no module 'no_such_module'"),
        ({"task": "calm_jax/key_value/tiny/math"}, "train", "no split 'train'; it has test"),
        ({"task": "a", "wieght": 1}, "train", "unknown key 'wieght'; known are .*weight"),
        ({"weight": 1}, "train", "needs either 'task', 'jsonl' or 'parquet'"),
        ({"jsonl": "a", "import": "b"}, "train", "'import' does not apply to 'jsonl'"),
        ({"task": "a", "columns": {}}, "train", "'columns' does not apply to 'task'"),
        ({"task": "a", "weight": 0.0}, "train", "weight 0.0 of a is not a number above 0"),
    ],
)
def test_a_wrong_entry_is_named(data, vocabulary, entry, split, part):
    with pytest.raises(CalmError, match=part):
        open_dataset(data(entry), split, vocabulary)


def test_a_vocabulary_without_an_end_token_is_refused(data, tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    endless = load_vocabulary(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CalmError, match="no end token for its targets"):
        open_dataset(data("augment"), "train", endless)
