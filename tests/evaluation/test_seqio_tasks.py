"""Tasks in the form of seqio: the same prompts and scores."""

import pytest
import task_folders

seqio_tasks = pytest.importorskip("calm_jax.evaluation.tasks.seqio_tasks")

from calm_jax.data import tasks as data_tasks  # noqa: E402
from calm_jax.data.vocabulary import ByteVocabulary  # noqa: E402
from calm_jax.errors import CalmError  # noqa: E402
from calm_jax.evaluation import metric_table  # noqa: E402
from calm_jax.evaluation.tasks.registry import open_tasks  # noqa: E402

seqio = data_tasks.seqio


def test_prompts_and_scores(tmp_path):
    name, vocabulary = f"flores/pol_Latn:{task_folders.flores(tmp_path)}", ByteVocabulary()
    (ours,) = open_tasks(name)
    (task,) = seqio_tasks.register(name, vocabulary, shots=2, seed=3)
    assert seqio.TaskRegistry.get("calm_jax/tasks/flores/pol_Latn") is task
    start = "".join(map(ours.template.shot, ours.drawn(2, 3)))
    rows = list(task.get_dataset(None, "test", shuffle=False).as_numpy_iterator())
    assert len(rows) == task.num_input_examples("test") == 3
    for row, example in zip(rows, ours.examples, strict=True):
        assert vocabulary.decode(row["inputs"]) == start + ours.template.ask(example)
        assert vocabulary.decode(row["targets"]) == example["targets"]
        assert row["targets"][-1] == vocabulary.eos_id
    texts = list(data_tasks.text_examples(task, "test", 0))
    assert [one["targets"] for one in texts] == [e["targets"] for e in ours.examples]
    targets, said = ["a b c", "d e f"], ["a b d", "d e f"]
    records = [{"targets": a, "prediction": b} for a, b in zip(targets, said, strict=True)]
    cell = metric_table.score(records, ours.metrics)
    found = {}
    for function in task.metric_fns:
        found |= function(targets, said)
    assert found == {metric: pytest.approx(cell[metric]) for metric in ours.metrics}
    seqio.TaskRegistry.remove("calm_jax/tasks/flores/pol_Latn")


def test_refusals(tmp_path):
    name = f"humaneval:{task_folders.human_eval(tmp_path)}"
    with pytest.raises(CalmError, match="humaneval is scored by pass@1, which seqio's metrics ca"):
        seqio_tasks.register(name, ByteVocabulary())
    with pytest.raises(CalmError, match=r"my/task is no task of calm_jax"):
        seqio_tasks.register("my/task", ByteVocabulary())
