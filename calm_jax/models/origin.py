"""Where a model came from: what it carries beside its arrays and what they compute."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Vocabulary, folder and identity of a decoder.

    Any two are equal, since none changes a program: models that differ in nothing else share one
    compilation.
    """

    vocabulary: Any = None
    source: str | None = None
    loaded_dtype: str | None = None
    fingerprint: str | None = None

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)


def of_origin(name: str) -> property:
    """An attribute of a module that its `origin` holds."""

    def get(module):
        return getattr(module.origin, name)

    def put(module, value):
        module.origin = dataclasses.replace(module.origin, **{name: value})

    return property(get, put)
