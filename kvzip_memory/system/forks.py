"""Processes that are forked. Of a process' threads only the one that forks is in the child: a lock that another one holds is held there for
ever, what it was to do is never done, and its connections and files are the parent's. So what has such things refuses to work in the child.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from kvzip_memory.errors import ForkedError
from kvzip_memory.system.threads import release

_WAIT_S = 10.0  # for threads in blocks that no fork is to cut in two

_before: WeakKeyDictionary[object, Callable[[Any], None]] = WeakKeyDictionary()
_actions: WeakKeyDictionary[object, Callable[[Any], None]] = WeakKeyDictionary()
_kept: list[object] = []

_table = threading.RLock()  # of who enters such a block for the first time; who forks has it
_locks: dict[threading.Thread, Any] = {}  # of the threads that have been in such a block
_mine = threading.local()
_taken: list[Any] = []  # those that who forks has taken, or was about to
_handler: Any = None  # of interrupts, while one that notes them is in its place
_interrupted = False


def unforked() -> AbstractContextManager[Any]:
    """A block that no fork cuts in two: who forks waits for the threads that are in one, and they wait for who forks.

    It is a lock of the thread's own, so that entering one costs nothing, and an interrupt cannot leave it half entered.
    """
    lock: Any = getattr(_mine, "lock", None)
    if lock is None:
        lock = threading.RLock()
        with _table:
            for thread in [thread for thread in _locks if not thread.is_alive()]:
                del _locks[thread]
            _locks[threading.current_thread()] = lock
        _mine.lock = lock
    found: AbstractContextManager[Any] = lock
    return found


def before_fork(owner: object, action: Callable[[Any], None]) -> None:
    """Have something done with an object whenever the process is forked, while no thread is in an :func:`unforked` block."""
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


def _note_interrupts() -> None:
    """Of what is raised in any hook nobody hears, so interrupts are noted until the last of them has ended, and sent again."""
    global _handler
    now = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread() and callable(now) and now is not _noted:
        _handler = now
        signal.signal(signal.SIGINT, _noted)


def _noted(*given: object) -> None:
    global _interrupted
    _interrupted = True


def _raise_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is _noted and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _handler)


def _before_fork() -> None:
    global _interrupted
    for _ in range(3):
        try:
            _note_interrupts()
            release()  # GNU OpenMP's threads are not in the child either, where the first one that computes in parallel would wait for them
            _hold()
            return
        except KeyboardInterrupt:  # just before
            _interrupted = True


def _hold() -> None:
    """Let nobody into a block, and have done what is to be done then; nothing if that takes too long, or we are in one ourselves."""
    _table.acquire()
    own, deadline = getattr(_mine, "lock", None), time.monotonic() + _WAIT_S
    if own is not None and own._is_owned():
        return
    for lock in [lock for lock in _locks.values() if lock is not own]:
        _taken.append(lock)
        if not lock._is_owned() and not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return
    for owner, action in list(_before.items()):
        action(owner)


def _in_parent() -> None:
    global _interrupted
    for _ in range(3):
        try:
            _let_go()
            _raise_interrupts()
            break
        except KeyboardInterrupt:
            _interrupted = True
    if _interrupted:
        _interrupted = False
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()  # when it is heard again


def _let_go() -> None:
    for lock in _taken:
        if lock._is_owned():
            lock.release()
    _taken.clear()
    while _table._is_owned():  # type: ignore[attr-defined]
        _table.release()


def _in_child() -> None:
    global _table, _locks, _mine, _taken, _interrupted
    _table = threading.RLock()
    _locks, _mine, _taken, _interrupted = {}, threading.local(), [], False
    _raise_interrupts()
    for owner, action in list(_actions.items()):
        action(owner)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
