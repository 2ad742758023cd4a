"""The tasks as seqio Tasks with seqio's metrics; importing this module imports TensorFlow."""

from calm_jax.data import tasks as data_tasks
from calm_jax.data.tasks import seqio, tf  # imported there after TensorFlow, as it must be
from calm_jax.data.vocabulary import Vocabulary
from calm_jax.errors import CalmError
from calm_jax.evaluation import metric_table
from calm_jax.evaluation.tasks.registry import open_tasks
from calm_jax.evaluation.tasks.task import Task

_OF_TEXTS = (*metric_table.OF_ANSWERS, "smoothed_bleu4")
SPLIT = "test"


def register(
    name: str, vocabulary: Vocabulary, *, shots: int | None = None, seed: int = 0
) -> list[seqio.Task]:
    """Registers the rows of a task under calm_jax/tasks/, as calm_jax/tasks/mgsm/sw.

    Each has the split "test", with whole prompts as `inputs`, and its metrics as `metric_fns`.

    Args:
        name: as `--tasks` takes it, such as "mgsm/sw:FOLDER".
        vocabulary: that prompts and answers are tokenised with.
        shots: before every question; default: as many as the task says.
        seed: that they are drawn by.

    Raises:
        CalmError: as `open_tasks` does; a name that it does not know; a task that is not scored by
            comparing texts.
    """
    found = open_tasks(name)
    if found is None:
        raise CalmError(f"{name} is no task of calm_jax")
    for task in found:
        if other := [metric for metric in task.metrics if metric not in _OF_TEXTS]:
            raise CalmError(f"{task.name} is scored by {other[0]}, which seqio's metrics cannot")
    return [_add(task, vocabulary, shots, seed) for task in found]


def _add(task: Task, vocabulary: Vocabulary, shots: int | None, seed: int) -> seqio.Task:
    start = "".join(map(task.template.shot, task.drawn(shots, seed)))
    columns = {
        "inputs": [start + task.template.ask(example) for example in task.examples],
        "targets": [example["targets"] for example in task.examples],
    }

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split, in its order
        return tf.data.Dataset.from_tensor_slices(columns)

    return seqio.TaskRegistry.add(
        f"calm_jax/tasks/{task.name}",
        source=seqio.FunctionDataSource(
            dataset, splits=[SPLIT], num_input_examples={SPLIT: len(task.examples)}
        ),
        preprocessors=[data_tasks.tokenize],
        output_features=data_tasks.output_features(vocabulary),
        metric_fns=[metric_table.seqio_metric(metric) for metric in task.metrics],
        task_cls=data_tasks.Task,
    )
