"""Where a model came from: facts that do not affect what it computes."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Vocabulary, folder and identity of a decoder.

    All instances compare equal, so that models which differ only here share compiled programs.
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
    """A property of a module that reads and writes the field `name` of its `origin`."""

    def get(module):
        return getattr(module.origin, name)

    def put(module, value):
        module.origin = dataclasses.replace(module.origin, **{name: value})

    return property(get, put)
