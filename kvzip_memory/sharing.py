"""Objects that stand for weights, pairs and threads: a copy is the object itself, and no pickle holds them."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self, SupportsIndex

from kvzip_memory.errors import NotPicklableError


class NotPickled:
    """An object that cannot go to another process as it is."""

    _way_out: ClassVar[str]  # what to do instead

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise NotPicklableError(f"a {type(self).__name__} cannot be pickled or sent to another process; {self._way_out}")


class Shared(NotPickled):
    """An object that copies of whatever holds it share. Frameworks copy models and their fields, deeply, as they like."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
