"""What a task is: its examples, how its prompts are written, how it is answered and scored."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from calm_jax.errors import CalmError
from calm_jax.evaluation.tasks.prompts import Template

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of a table."""

    name: str  # of its predictions and its scores, such as "mgsm/sw"
    # each has the fields that the template names, "targets", the right answer, and what else is
    # kept beside the prediction
    examples: Sequence[Example]
    template: Template
    metrics: tuple[str, ...]  # names of `metric_table`, the main one first
    group: str = ""  # the rows that belong together, "mgsm"; "" of a row alone
    # examples of a split that is never scored, of which the shots are drawn
    pool: Sequence[Example] = ()
    shots: int = 0  # how many of them a prompt has where nothing else is asked
    # by a text ("generation"); by the more probable of "choices"; or ("reading") only by how
    # probable "text" is
    answered: Literal["generation", "choices", "reading"] = "generation"
    max_new_tokens: int = 0  # of a generated answer
    # of generated programs: runs those of all records, and adds "passed" and "outcomes"
    judge: Callable[[list[Example]], None] | None = None
    needs: Callable[[], None] | None = None  # fails where the task cannot be judged on this machine

    def drawn(self, shots: int | None, seed: int) -> list[Example]:
        """The examples that stand before every question; `None` shots are the task's own number.

        Raises `CalmError` where its pool does not have as many.
        """
        count = self.shots if shots is None else shots
        if count and not self.pool:
            raise CalmError(f"{self.name} has no split to draw --shots={count} from")
        if count > len(self.pool):
            raise CalmError(
                f"{self.name}: {count} shots were asked for, but the split that they are drawn "
                f"from has {len(self.pool)} examples"
            )
        return random.Random(seed).sample(list(self.pool), count)

    def fingerprint(self, shots: int | None, seed: int) -> str:
        """SHA-256 of all that is asked."""
        drawn = self.drawn(shots, seed)
        asked = [self.name, dataclasses.asdict(self.template), self.metrics, drawn, self.examples]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Place:
    """What `FAMILY/LANGUAGE+LANGUAGE:PATH` names; what it does not say is empty."""

    family: str
    languages: tuple[str, ...] = ()
    path: str = ""

    def chosen(self, found: Sequence[str]) -> list[str]:
        """The languages to score, of those that a folder has, in their order.

        Raises `CalmError` for one that it lacks.
        """
        for language in self.languages:
            if language not in found:
                raise CalmError(
                    f"{self.path} has no {language} for {self.family}; it has {', '.join(found)}"
                )
        return [name for name in found if not self.languages or name in self.languages]
