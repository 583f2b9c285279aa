"""Whatever two processes do over one folder, one after another, both see what a few sets say."""

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import STRESS
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.holders import Naming
from synthetic import CPU, context, token_ids, wanted

NUMBERS, NAMES, TAGS = (1, 2, 3), ("x", "y"), ("red", "blue", "red | page")
WHO = st.integers(0, 1)
NUMBER, NAME, TAG = st.sampled_from(NUMBERS), st.sampled_from(NAMES), st.sampled_from(TAGS)


@dataclass
class Known:
    tags: set[str] = field(default_factory=set)
    pinned: bool = False


class TwoRegistries(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.room = tempfile.TemporaryDirectory()
        self.folder = Path(self.room.name) / "contexts"
        self.registries = [ContextRegistry(CPU, self.folder) for _ in range(2)]
        self.known: dict[int, Known] = {}
        self.named: dict[str, int] = {}
        self.handles: list[tuple[int, int, float]] = []  # who has it, of which text, and since when

    def teardown(self) -> None:
        for registry in self.registries:
            registry.close()
        self.registries = [ContextRegistry(CPU, self.folder)]
        self.both_see_it()
        self.registries[0].close()
        self.room.cleanup()

    def gone(self, number: int) -> None:
        self.known.pop(number)
        self.named = {name: n for name, n in self.named.items() if n != number}

    @rule(who=WHO, number=NUMBER, name=st.one_of(st.none(), NAME), tags=st.sets(TAG))
    def load(self, who: int, number: int, name: str | None, tags: set[str]) -> None:
        registry, asked = self.registries[who], replace(wanted(number), name=name, tags=tuple(tags))
        registry.readmit(asked.key)
        with registry.lease(asked, lambda report: context(number, 8)):
            loaded = registry.loaded(asked.key)
        registry.flush()
        self.handles.append((who, number, loaded))
        self.known.setdefault(number, Known()).tags |= tags
        if name is not None:
            self.named[name] = number

    @precondition(lambda self: self.known)
    @rule(who=WHO, data=st.data())
    def get(self, who: int, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.ask(who, number, time.time())

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.ask(*data.draw(st.sampled_from(self.handles)))

    def ask(self, who: int, number: int, loaded: float) -> None:
        registry, asked = self.registries[who], replace(wanted(number), name=None, loaded=loaded)
        if not registry.is_removed(asked.key):  # as who has a handle does
            with registry.lease(asked, lambda report: context(number, 8)):
                pass
            registry.flush()

    @precondition(lambda self: self.known)
    @rule(who=WHO, data=st.data())
    def remove(self, who: int, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.registries[who].remove(wanted(number).key)
        self.gone(number)

    @precondition(lambda self: self.named)
    @rule(who=WHO, data=st.data())
    def remove_name(self, who: int, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.named)))
        self.registries[who].remove(name)
        number = self.named[name]
        if sum(n == number for n in self.named.values()) == 1:
            self.gone(number)
        else:
            del self.named[name]

    @rule(who=WHO, tag=TAG, by_name=st.booleans())
    def forget(self, who: int, tag: str, by_name: bool) -> None:
        let_go = Naming(tag) if by_name else lambda key, other: other == tag
        self.registries[who].forget(let_go)
        for number, known in list(self.known.items()):
            rest = {other for other in known.tags if not let_go("", other)}
            if rest != known.tags:
                known.tags = rest
                if not rest and not known.pinned and number not in self.named.values():
                    self.gone(number)

    @precondition(lambda self: self.known)
    @rule(who=WHO, pinned=st.booleans(), data=st.data())
    def pin(self, who: int, pinned: bool, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.registries[who].pin(wanted(number).key, pinned)
        self.known[number].pinned = pinned

    @precondition(lambda self: self.known)
    @rule(who=WHO, tag=TAG, data=st.data())
    def untag(self, who: int, tag: str, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.registries[who].untag(wanted(number).key, tag)
        self.known[number].tags.discard(tag)

    @precondition(lambda self: self.known)
    @rule(who=WHO, tag=TAG, data=st.data())
    def join(self, who: int, tag: str, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        self.registries[who].join(wanted(number).key, [tag])
        self.registries[who].flush()
        if self.known[number].tags:
            self.known[number].tags.add(tag)

    @rule(who=WHO)
    def collect(self, who: int) -> None:
        self.registries[who].gc()

    @rule(who=WHO)
    def restart(self, who: int) -> None:
        self.registries[who].close()
        self.registries[who] = ContextRegistry(CPU, self.folder)
        self.handles = [handle for handle in self.handles if handle[0] != who]

    @invariant()
    def both_see_it(self) -> None:
        keys = {number: wanted(number).key for number in NUMBERS}
        for registry in self.registries:
            listed = {e.key: (set(e.names), set(e.tags), e.pinned) for e in registry.contexts()}
            assert listed == {
                keys[number]: ({name for name, n in self.named.items() if n == number}, known.tags, known.pinned)
                for number, known in self.known.items()
            }
            for number, key in keys.items():
                prefix = registry.longest_prefix(wanted(number).identity, [*token_ids(number).tolist(), 5])
                ways = [*registry.find(key), *registry.find(key[:10]), *([prefix] if prefix else [])]
                assert [entry.key for entry in ways] == [key] * 3 * (number in self.known)
            for name in NAMES:
                assert [entry.key for entry in registry.find(name)] == ([keys[self.named[name]]] if name in self.named else [])


EXAMPLES = 300 if STRESS else 30
TestTwoRegistries = TwoRegistries.TestCase
TestTwoRegistries.settings = settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None, derandomize=True)
