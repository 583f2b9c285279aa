"""Objects that stand for weights, pairs and threads: a copy is the object itself, and no pickle holds them."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self, SupportsIndex

from kvzip_memory.errors import NotPicklableError


def is_only_tried() -> bool:
    """Whether the pickle for which the caller is asked is one that LlamaIndex throws away.

    Its components pickle each of their fields first, and delete **from the living object** those that cannot be. So these are let
    pass there, and it is the pickle of the component itself that fails, with our error and all fields in their places.
    """
    asking = sys._getframe(2)
    return asking.f_code.co_name == "__getstate__" and asking.f_globals.get("__name__") == "llama_index.core.schema"


class NotPickled:
    """An object that cannot go to another process as it is."""

    _way_out: ClassVar[str]  # what to do instead

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[object], tuple[()]]:
        if is_only_tried():
            return object, ()
        raise NotPicklableError(f"a {type(self).__name__} cannot be pickled or sent to another process; {self._way_out}")


class Shared(NotPickled):
    """An object that copies of whatever holds it share. Frameworks copy models and their fields, deeply, as they like."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
