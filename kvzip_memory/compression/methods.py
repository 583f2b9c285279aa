"""The methods of a stage by their names: ours, and those of other packages.

Another package adds one by an entry point, the name of the method, in the group ``kvzip_memory.scorers``, ``kvzip_memory.allocators`` or
``kvzip_memory.refits``; a program by :meth:`Methods.register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief

T = TypeVar("T")


class Methods(Generic[T]):
    """Of one stage.

    Args:
        stage: what it is called in a call, such as ``"scorer"``.
        needs: what a method has, by which it is told from what is none.
        known: makers of ours, by name.
    """

    def __init__(self, stage: str, needs: tuple[str, ...], known: dict[str, Callable[[], T]]) -> None:
        self._stage, self._needs, self._known = stage, needs, dict(known)

    def register(self, name: str, make: Callable[[], T]) -> None:
        """Give a method a name, from now on and in this process.

        Args:
            make: the method with its defaults, such as its class.

        Raises:
            InputError: another one has that name.
        """
        if self._known.setdefault(name, make) is not make:
            raise InputError(f"{self._stage} {brief(name)} is another one already; give yours another name")

    def of(self, given: Any) -> T:
        """A method that was given as itself or by its name.

        Raises:
            InputError: it is neither; names those that are known.
        """
        if isinstance(given, str):
            if (make := self._maker(given)) is None:
                raise InputError(f"{self._stage} {brief(given)} is unknown; use one of {', '.join(self)}")
            given = make()
        if missing := [name for name in self._needs if not hasattr(given, name)]:
            raise InputError(
                f"{self._stage} is {brief(given)}, which has no {', '.join(missing)}; give an object that has, or one of the names "
                f"{', '.join(self)}"
            )
        method: T = given
        return method

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(sorted(self._makers()))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._maker(name) is not None

    def _maker(self, name: str) -> Callable[[], T] | None:
        return self._known.get(name) or self._makers().get(name)  # to look through all packages takes 14 ms

    def _makers(self) -> dict[str, Callable[[], T]]:
        found = {point.name: (lambda point=point: point.load()()) for point in entry_points(group=f"kvzip_memory.{self._stage}s")}
        return {**found, **self._known}
