"""Processes that are forked. Of a process' threads only the one that forks is in the child: a lock that another one holds is held there for
ever, what it was to do is never done, and its connections and files are the parent's. So what has such things refuses to work in the child.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from kvzip_memory.errors import ForkedError
from kvzip_memory.system.threads import release

_actions: WeakKeyDictionary[object, Callable[[Any], None]] = WeakKeyDictionary()
_kept: list[object] = []


def after_fork(owner: object, action: Callable[[Any], None]) -> None:
    """Have something done with an object in every child that is forked, before anything else; ``action`` does not refer to it."""
    _actions[owner] = action


def refuse_after_fork(owner: object, *names: str) -> None:
    """Have attributes of an object, such as its locks, raise :class:`ForkedError` in every child, whatever is done with them."""
    after_fork(owner, partial(_refuse, names))


def is_parents(owner: object) -> bool:
    """Whether an object of :func:`refuse_after_fork` was made by the process that was forked into this one."""
    return any(isinstance(value, _Refusing) for value in vars(owner).values())


def _refuse(names: tuple[str, ...], owner: object) -> None:
    for name in names:
        _kept.append(getattr(owner, name))  # what closes when it is no longer used would close the parent's
        object.__setattr__(owner, name, _Refusing(type(owner).__name__))


class _Refusing:
    """In place of what the parent has."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def _refused(self, *args: object, **kwargs: object) -> NoReturn:
        raise ForkedError(
            f"this {self._owner.lstrip('_')} was made before the process was forked, and is its parent's: make an engine in each process, "
            "with the same cache_dir, after the fork; or start processes by multiprocessing's 'spawn' or 'forkserver'"
        )

    __getattr__ = __enter__ = __exit__ = __call__ = __iter__ = __len__ = __getitem__ = __setitem__ = __contains__ = _refused


def _in_child() -> None:
    for owner, action in list(_actions.items()):
        action(owner)


# GNU OpenMP's threads are not in the child either, where the first one that computes in parallel would wait for them.
os.register_at_fork(before=release, after_in_child=_in_child)
