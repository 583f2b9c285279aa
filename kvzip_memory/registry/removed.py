"""What "removed" means.

A context is removed from the moment when somebody begins to delete it, until its text is loaded again. Meanwhile nobody finds it in
memory, it leaves that with the last answer from it, and it is not written; who still has a handle of it has it built for one answer.

Of what was deleted in this process a registry knows the keys. Of what others have deleted there are notes in the folder, with their
times: a context that was on disk, was deleted there and was not loaded here since is removed as well. One that another process has
stored again is not. What shares the pairs of another is removed with that one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.holders import is_held
from kvzip_memory.registry.tier import Held


class Removed:
    """Contexts that were removed. Not locked: who changes it holds the memory's lock."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[str]) -> None:
        """Contexts are deleted here."""
        self._keys.update(keys)

    def readmit(self, key: str) -> None:
        """A context is loaded again, or not deleted after all."""
        self._keys.discard(key)

    def forbids(self, held: Held, notes: Notes, names: Callable[[], Collection[str]]) -> bool:
        """Whether a context in memory is not to be written: it was removed here, or by another process.

        Args:
            notes: what was forgotten in the folder.
            names: those that the context has still; asked for only if they matter.
        """
        if held.key in self._keys or any(held.loaded <= notes.noted(part) for part in held.parts):
            return True
        if held.stored is None:  # nobody else can have deleted it
            return False
        if held.loaded <= notes.deleted(held.key):
            return True
        taken = max((notes.taken(held.key, tag) for tag in held.tags), default=0.0)
        return held.loaded <= taken and not is_held(names(), held.pinned, tags_left(held, notes))


def tags_left(held: Held, notes: Notes) -> dict[str, float]:
    """Tags of a context in memory that nobody has forgotten since, and when they were given. Who has stored none of it forgets none."""
    return dict(held.tags) if held.stored is None else notes.left(held.key, held.tags)


def outlived(held: Held, notes: Notes, is_stored: bool) -> None:
    """Take from a context in memory that is loaded again what went with it when others have deleted it. With the memory's lock held.

    Args:
        is_stored: whether its file is there; then it was not deleted unless there is a note of that.
    """
    deleted = notes.noted(held.key) if is_stored else notes.deleted(held.key)
    if held.stored is not None and held.loaded <= deleted:
        held.names = {name: given for name, given in held.names.items() if given > deleted}
        held.tags, held.pinned = tags_left(held, notes), False
