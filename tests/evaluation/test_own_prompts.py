"""A user's own prompts, of a pair and of a part whose tokenizer and template are its own."""

import functools
import json

import pytest
import tiny_tokenizers

from calm_jax.data.vocabularies import vocabulary_of_folder
from calm_jax.evaluation import own_prompts
from calm_jax.evaluation.answering import Options

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So long"}]
SYSTEM = {"role": "system", "content": "Be kind"}


class Model:
    def __init__(self, vocabulary):
        self.vocabulary = vocabulary


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {
        name: Model(vocabulary_of_folder(make(root / name)))
        for name, make in tiny_tokenizers.FAMILIES.items()
    }


def asked(models, tmp_path, messages, part):
    """The task for a pair whose anchor is Qwen's form, and for its part."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(messages) + "\n")
    entry = own_prompts.entry_of(str(file), {}, None)
    settings = {"limit": 0, "max_new_tokens": 32}
    own = functools.partial(own_prompts.task_of, config={}, settings=settings, options=Options())
    task = own(models["qwen"], str(file), entry)
    entries = {str(file): entry}
    return task, own_prompts.of_part(task, models[part], models["qwen"], entries, own)


@pytest.mark.parametrize("part", ["llama3", "gemma"])
def test_a_part_is_asked_in_its_own_template(models, tmp_path, part):
    task, found = asked(models, tmp_path, {"messages": CHAT}, part)
    ((whole,), (own,)) = task.examples, found.examples
    assert whole["inputs"] == models["qwen"].vocabulary.chat(CHAT[:1])
    assert own["inputs"] == models[part].vocabulary.chat(CHAT[:1]) != whole["inputs"]
    assert own["targets"] == whole["targets"] == "So long"
    assert (found.name, found.metrics) == (task.name, task.metrics)


def test_what_its_template_refuses_stands_in_the_anchors(models, tmp_path, caplog):
    task, found = asked(models, tmp_path, {"messages": [SYSTEM, *CHAT]}, "gemma")
    assert found is task
    assert "a part alone gets the pair's prompts, since its own fail" in caplog.text
    assert "System role not supported" in caplog.text


def test_other_prompts_stand_as_they_are(models, tmp_path):
    task, found = asked(models, tmp_path, {"inputs": "Hi", "targets": "Bye"}, "llama3")
    assert found.examples == task.examples
    task, found = asked(models, tmp_path, {"messages": CHAT}, "qwen")
    assert found is task


@pytest.mark.parametrize("metric", ["exact_match", "contains", "regex", "chrf2", "bleu"])
def test_what_ends_a_turn_is_no_part_of_the_answer(models, tmp_path, metric):
    """Answers are decoded without special tokens, so references have none, whatever judges."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    settings, options = {"limit": 0, "max_new_tokens": 32}, Options(metrics=(metric,))
    task = own_prompts.task_of(models["qwen"], "a", {"jsonl": str(file)}, {}, settings, options)
    (example,) = task.examples
    assert example["targets"] == "So long" and "written" not in example


def test_a_task_of_the_runs_data_comes_from_the_same_module():
    data = {"validation": [{"jsonl": "a.jsonl", "weight": 2}], "train": [{"task": "b"}]}
    data["train"] += [{"task": "mine", "import": "tasks"}, {"jsonl": "c.jsonl", "weight": 2}]
    known = {name: own_prompts.entry_of(name, {"data": data}, None) for name in ("mine", "other")}
    assert known == {"mine": {"task": "mine", "import": "tasks"}, "other": {"task": "other"}}
    assert own_prompts.entry_of("a.jsonl", {"data": data}, None) == data["validation"][0]
    assert own_prompts.entry_of("c.jsonl", {"data": data}, None) == {"jsonl": "c.jsonl"}
