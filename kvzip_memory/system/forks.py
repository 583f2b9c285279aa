"""Processes that are forked. Of a process' threads only the one that forks is in the child: a lock that another one holds is held there for
ever, what it was to do is never done, and its connections and files are the parent's. So what has such things refuses to work in the child.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from kvzip_memory.errors import ForkedError
from kvzip_memory.system.threads import release

_WAIT_S = 10.0  # for what must not be under way while the process is forked

_before: WeakKeyDictionary[object, Callable[[Any], None]] = WeakKeyDictionary()
_actions: WeakKeyDictionary[object, Callable[[Any], None]] = WeakKeyDictionary()
_kept: list[object] = []


# Threads in blocks that no fork cuts in two, whether one forks, and how deep each thread is in such blocks.
_changed = threading.Condition()
_inside, _forking = 0, False
_mine = threading.local()


class _Unforked:
    """A block that no fork cuts in two: who forks waits for the threads that are in one, and they wait for who forks."""

    def __enter__(self) -> None:
        global _inside
        depth = getattr(_mine, "depth", 0)
        if not depth:
            with _changed:
                while _forking:
                    _changed.wait()
                _inside += 1
        _mine.depth = depth + 1

    def __exit__(self, *error: object) -> None:
        global _inside
        depth = getattr(_mine, "depth", 0)
        _mine.depth = max(0, depth - 1)
        if depth == 1:  # 0 in a child that was forked in it
            with _changed:
                _inside -= 1
                if _forking:
                    _changed.notify_all()


unforked = _Unforked()


def before_fork(owner: object, action: Callable[[Any], None]) -> None:
    """Have something done with an object whenever the process is forked, while no thread is in an ``unforked`` block."""
    _before[owner] = action


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


def _before_fork() -> None:
    release()  # GNU OpenMP's threads are not in the child either, where the first one that computes in parallel would wait for them
    global _forking
    with _changed:
        _changed.wait_for(lambda: not _forking)
        _forking = True
        is_quiet = not getattr(_mine, "depth", 0) and _changed.wait_for(lambda: not _inside, _WAIT_S)
    if is_quiet:
        for owner, action in list(_before.items()):
            action(owner)


def _in_parent() -> None:
    global _forking
    with _changed:
        _forking = False
        _changed.notify_all()


def _in_child() -> None:
    global _changed, _inside, _forking, _mine
    _changed = threading.Condition()
    _inside, _forking, _mine = 0, False, threading.local()
    for owner, action in list(_actions.items()):
        action(owner)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
