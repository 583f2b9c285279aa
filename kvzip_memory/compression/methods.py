"""The methods of a stage by their names: ours, and those of other packages.

Another package adds one by an entry point, the name of the method, in the group ``kvzip_memory.scorers``, ``kvzip_memory.allocators`` or
``kvzip_memory.refits``; a program by :meth:`Methods.register`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kvzip_memory.errors import InputError, ModelError
from kvzip_memory.system.printable import brief

T = TypeVar("T")


class Methods(Generic[T]):
    """Of one stage.

    Args:
        stage: what it is called in a call, such as ``"scorer"``.
        needs: what a method has beside its identity, by which it is told from what is none.
        identities: kinds of what it may say of itself.
        known: makers of ours, by name.
    """

    def __init__(self, stage: str, needs: tuple[str, ...], identities: tuple[type, ...], known: dict[str, Callable[[], T]]) -> None:
        self._stage, self._needs, self._identities, self._known = stage, ("identity", *needs), identities, dict(known)

    def register(self, name: str, make: Callable[[], T]) -> None:
        """Give a method a name, from now on and in this process.

        Args:
            make: the method with its defaults, such as its class.

        Raises:
            InputError: another one has that name, it is no text, or this is nothing that makes one.
        """
        if not isinstance(name, str) or not name:
            raise InputError(f"the name of a {self._stage} is {brief(name)}; give a text")
        if not callable(make):
            raise InputError(f"{brief(make)} makes no {self._stage}; give what does, such as its class")
        if self._known.setdefault(name, make) is not make:
            raise InputError(f"{self._stage} {brief(name)} is another one already; give yours another name")

    def of(self, given: Any) -> T:
        """A method that was given as itself or by its name.

        Raises:
            InputError: it is neither; names those that are known. As of :meth:`identity`.
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
        self.identity(given)
        method: T = given
        return method

    def identity(self, method: Any) -> Any:
        """What a method says of itself now, as keys hold it: a copy, as JSON gives it back.

        Raises:
            InputError: JSON cannot hold it, or it is of another kind than that of a method of this stage.
        """
        told = method.identity()
        try:
            identity = json.loads(json.dumps(told, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self._stage} {brief(method)} says that it is {brief(told)}, which JSON cannot hold: {error}") from error
        if not isinstance(identity, self._identities) or identity in ("", {}):
            kinds = " or ".join(kind.__name__ for kind in self._identities)
            raise InputError(f"{self._stage} {brief(method)} says that it is {brief(told)}; identity() gives a {kinds} that is not empty")
        return identity

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


def owed(method: Any, what: str, given: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a method has given, which may be somebody else's.

    Raises:
        ModelError: it is no tensor of this shape and dtype, or one without numbers.
    """
    if isinstance(given, Tensor) and given.shape == shape and given.dtype == dtype and given.layout == torch.strided and not given.is_meta:
        return given
    kind = "" if not isinstance(given, Tensor) else "meta " if given.is_meta else "sparse " if given.layout != torch.strided else ""
    got = f"a {kind}tensor {list(given.shape)} {given.dtype}" if isinstance(given, Tensor) else brief(given)
    raise ModelError(f"{brief(method.identity())} gave {what} as {got}, not as a tensor {list(shape)} {dtype}; use another method")
