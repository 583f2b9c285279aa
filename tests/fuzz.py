"""Inputs for all that reads a cache folder: sound ones that are changed and signed anew, kept where they reach new lines.

A :class:`Target` is one kind of file. Its inputs are the texts in it; :attr:`Target.signed` puts right checksums around one, so that what
is looked at behind them is what is tested. Whatever the input is, :attr:`Target.read` raises nothing but an ``AssertionError``, and says
``"served"`` or why not.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from kvzip_memory import turns
from kvzip_memory.registry.disk import facts, files, index, layout, names

LOOKED_AT = {module.__file__ for module in (facts, files, index, layout, names, turns)}
SECONDS = 30
MEMORY = 3 << 29  # bytes above those of the process

Line = tuple[CodeType, int]
#: What is put in place of any fact.
ODD: list[Any] = [
    *(None, True, False, "", "x", "\ud800", "\0", "../../outside", "\x1b[2J", "9" * 5000, "a" * 5000, "0" * 64),
    *(-1, 0, 1, 2, 31, 2**31, 2**53 + 1, 2**60, 2**64, -(10**15), 10**400, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], [-1], {"x": 1}, {"\ud800": {}}, [0] * 3000),
]


@dataclass(frozen=True)
class Target:
    name: str
    seeds: Sequence[bytes]
    signed: Callable[[bytes], bytes]
    read: Callable[[bytes], str]


@dataclass
class Found:
    """What inputs led to.

    Attributes:
        lines: that were reached.
        corpus: inputs that reached new ones.
        ends: how often each outcome came.
        faults: one input for each place where something was raised, and what.
    """

    lines: set[Line] = field(default_factory=set)
    corpus: list[bytes] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    def add(self, target: Target, text: bytes, data: bytes) -> None:
        with _lines() as lines:
            try:
                with bounded():
                    self.ends[target.read(data)] += 1
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                self.ends["raised"] += 1
                self.faults.setdefault(
                    f"{type(error).__name__} in {place.name}:{place.lineno}", f"{error}"[:300] + f"; for {text[:3000]!r}"
                )
        if not lines <= self.lines:
            self.lines |= lines
            self.corpus.append(text)


def explore(target: Target, count: int, seed: int = 0) -> Found:
    """Change what reached new lines, again and again."""
    rng, found = random.Random(f"{target.name} {seed}"), Found(corpus=[*target.seeds])
    for text in target.seeds:
        found.add(target, text, target.signed(text))
    assert found.ends.keys() == {"served"}, found.faults or found.ends
    for _ in range(count - len(target.seeds)):
        text = rng.choice(target.seeds if rng.random() < 0.5 else found.corpus)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            text = changed(text, rng)
        data = target.signed(text)
        found.add(target, text, changed_bytes(data, rng) if rng.random() < 0.1 else data)
    return found


@contextmanager
def bounded() -> Iterator[None]:
    """A block that may take neither long nor much memory."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"takes more than {SECONDS} s")

    handler, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def _lines() -> Iterator[set[Line]]:
    """The lines of what is looked at that a block reaches."""
    lines: set[Line] = set()

    def each(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            lines.add((frame.f_code, frame.f_lineno))
        return each

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: each if frame.f_code.co_filename in LOOKED_AT else None)
    try:
        yield lines
    finally:
        sys.settrace(before)


# -- changes -----------------------------------------------------------------------------------------------------------


def changed(text: bytes, rng: random.Random) -> bytes:
    """A text with another fact, or other bytes. One of several lines has one of them changed."""
    if rng.random() < 0.15:
        return changed_bytes(text, rng)
    lines = text.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = json.dumps(with_another_fact(json.loads(lines[at]), rng)).encode()
    except (ValueError, RecursionError):
        return changed_bytes(text, rng)
    if rng.random() < 0.05:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"\n".join(lines)


def _place(value: Any, rng: random.Random) -> tuple[Any, ...]:
    """Where a fact is, whatever it is in; those of a long list are no likelier than one that stands alone."""
    if not (value and isinstance(value, dict | list)):
        return ()
    at = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
    return (at, *_place(value[at], rng)) if rng.random() < 0.7 else (at,)


def with_another_fact(value: Any, rng: random.Random) -> Any:
    at = _place(value, rng)
    if not at:
        return rng.choice(ODD)
    inside = value
    for name in at[:-1]:
        inside = inside[name]
    last, kind = at[-1], rng.random()
    if kind < 0.15:
        del inside[last]
    elif kind < 0.3:
        other: Any = value
        for name in _place(value, rng):
            other = other[name]
        inside[last] = json.loads(json.dumps(other))
    elif kind < 0.5 and type(inside[last]) in (int, float):
        inside[last] = rng.choice((inside[last] + 1, inside[last] - 1, -inside[last], 2 * inside[last]))
    elif kind < 0.5 and isinstance(inside[last], str):
        inside[last] = rng.choice(
            (inside[last][:-1], inside[last] + "a", inside[last].upper(), inside[last] + "\ud800", inside[last] + "/..")
        )
    elif kind < 0.6 and isinstance(inside, dict):
        inside[rng.choice((*inside, "x", "\ud800", "kvzip", "__class__"))] = rng.choice(ODD)
    elif kind < 0.6:
        inside.insert(rng.randrange(len(inside) + 1), rng.choice((*ODD, inside[last])))
    else:
        inside[last] = rng.choice(ODD)
    return value


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    broken, kind = bytearray(data), rng.randrange(6)
    at = rng.randrange(len(broken) + 1)
    if kind == 0 and at < len(broken):
        broken[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del broken[at : at + rng.choice((1, 2, 8, 4096))]
    elif kind == 2:
        broken[at:at] = rng.choice((b"\0", b"\n", b"\xff", b'"', b"{", b"[" * 20_000, b"\0" * 4096, b"1" * 5000, b"\r\n"))
    elif kind == 3:
        del broken[at:]
    elif kind == 4:
        broken[at : at + 8] = rng.choice((bytes(8), b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (1 << 26).to_bytes(8, "little")))
    else:
        broken[at:at] = broken[rng.randrange(len(broken) + 1) :][: rng.choice((1, 16, 4096))]
    return bytes(broken)
