"""The texts that a model is scored on."""

from collections.abc import Mapping
from typing import Any

from calm_jax.data import cache
from calm_jax.data.vocabulary import Vocabulary


def evaluation_examples(
    task: str | Mapping[str, Any],
    split: str,
    vocabulary: Vocabulary,
    limit: int = 0,
    cache_dir: str = "",
) -> list[dict[str, Any]]:
    """Texts `inputs` and `targets` of a task, with what else its examples carry; `limit` 0 is all.

    `task` is a registered name, a file of JSON lines ("….jsonl"), or an entry of `config.data` as
    `open_source` takes. Key-value examples carry `set` (subs, num, math), `operands` and `unseen`,
    those of a file what `jsonl.parse` says. Imports TensorFlow.
    Raises `CalmError` as `open_source` does.
    """
    if isinstance(task, str):
        task = {"jsonl" if task.endswith(".jsonl") else "task": task}
    entry = dict(task)
    cache.check_entry(entry, "evaluation")
    ready = cache.ready_tasks(entry, split, vocabulary, cache.cache_directory(cache_dir))
    from calm_jax.data import tasks

    examples = [e for part, _ in ready for e in tasks.text_examples(part, split, limit)]
    return examples[:limit] if limit else examples
