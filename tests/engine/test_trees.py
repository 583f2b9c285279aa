"""Contexts that grow, share, fold, are joined, deleted and lost in two processes over one folder: never a wrong logit, nor a byte left."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import STRESS, lose, tiny_engine
from kvzip_memory import CompressedContext, InputError, KVzipEngine

TEXTS = ("The lamp is wound at dusk. " * 4, "Ferdinand the donkey carries oil on Tuesdays. " * 3)
SAID = ("Who?", "The door code is 8306.")
TAGS = ("red", "blue")
IDS = [40, 41, 42]
WHO, RATIO = st.integers(0, 1), st.sampled_from([0.4, 1.0])


@dataclass
class Known:
    """What is stored under a key."""

    parts: tuple[str, ...]
    tags: set[str] = field(default_factory=set)


@dataclass
class Hand:
    """A handle, and whether whoever has it gave all the texts it is made of."""

    who: int
    context: CompressedContext
    has_text: bool
    wanted: torch.Tensor = field(repr=False)


class Trees(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.room = tempfile.TemporaryDirectory()
        self.alone = tiny_engine()  # where nothing is ever lost
        self.engines = [self.engine(), self.engine()]
        self.known: dict[str, Known] = {}
        self.hands: list[Hand] = []
        self.originals: dict[str, CompressedContext] = {}
        self.fronts: dict[str, set[str]] = {}  # what a joinable text was read behind
        self.lost: set[str] = set()  # which come back when somebody who has their texts needs them

    def engine(self) -> KVzipEngine:
        return tiny_engine(cache_dir=self.room.name)

    def teardown(self) -> None:
        while self.known:
            key = max(self.known, key=lambda key: len(self.known[key].parts))
            self.engines[0].registry.remove(key)
            del self.known[key]
            self.fronts_go({key})
        for engine in self.engines:
            assert not engine.registry.contexts()
            engine.close()
        assert not [path for path in Path(self.room.name).rglob("*") if path.suffix == ".safetensors"]
        self.room.cleanup()

    def take(self, who: int, context: CompressedContext, original: CompressedContext, tags: set[str], has_text: bool) -> None:
        """A context that was made here, and by an engine that loses nothing."""
        assert context.key == original.key
        self.originals[context.key] = original
        self.hands.append(Hand(who, context, has_text, self.alone.logits(original, IDS)))
        self.find_again()
        if context.receipt is not None and context.receipt.reason == "removed":  # nor is what it shares stored again
            self.lost.add(context.key)  # until that is loaded again
            return
        if context.shift:
            self.fronts[context.key] = {context.identity["parent"], context.parts[0].key}
            if self.engines[who].registry.find(front := context.identity["parent"]):
                self.known.setdefault(front, Known(()))
        for part in context.parts:  # the template's head
            if part.n_tokens == context.protected and not self.engines[who].registry.is_removed(part.key):
                self.known.setdefault(part.key, Known(()))
        if not any(part.key not in self.known for part in context.parts):
            self.known.setdefault(context.key, Known(tuple(part.key for part in context.parts))).tags |= tags

    def find_again(self) -> None:
        for engine in self.engines:
            engine.registry.flush()
        for engine in self.engines:
            stored = engine.registry.contexts()
            fronts = {front for entry in stored for front in self.fronts.get(entry.key, ())}  # which come back with a text
            for entry in stored:
                if entry.key in self.lost or (entry.key in fronts and entry.key not in self.known):
                    self.known[entry.key] = Known(entry.parts, {*entry.tags})
                    self.lost.discard(entry.key)

    @rule(who=WHO, text=st.sampled_from(TEXTS), ratio=RATIO, joinable=st.booleans(), tags=st.sets(st.sampled_from(TAGS)))
    def load(self, who: int, text: str, ratio: float, joinable: bool, tags: set[str]) -> None:
        context = self.engines[who].load(text, ratio=ratio, joinable=joinable, tags=sorted(tags))
        self.take(who, context, self.alone.load(text, ratio=ratio, joinable=joinable), tags, has_text=True)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), tags=st.sets(st.sampled_from(TAGS)), how=st.sampled_from(["", "", "crowded", 7, 500]))
    def join(self, data: st.DataObject, tags: set[str], how: str | int) -> None:
        first = data.draw(st.sampled_from(self.hands))
        second = data.draw(st.sampled_from([hand for hand in self.hands if hand.who == first.who]))
        if max(first.context.n_tokens, second.context.n_tokens) > 400:
            return
        originals = [self.originals[hand.context.key] for hand in (first, second)]
        options: dict[str, Any] = {"repair": how} if isinstance(how, int) else {}
        if how == "crowded":
            taken = [context.n_tokens - context.saved for context in originals]
            options = {"positions": max(2 * sum(taken) // 3, *taken)}
        try:
            original = self.alone.join(originals, **options)
        except InputError:  # a conversation goes on otherwise
            return
        try:
            context = self.engines[first.who].join([first.context, second.context], tags=sorted(tags), **options)
        except InputError as error:
            without = [hand for hand in (first, second) if not hand.has_text and self.lost_of(hand)]
            self.must_be_lost(without[0] if without else first, error)
            return
        self.take(first.who, context, original, tags, first.has_text and second.has_text)

    @precondition(lambda self: self.hands)
    @rule(data=st.data(), said=st.sampled_from(SAID), ratio=RATIO, share=st.booleans(), tags=st.sets(st.sampled_from(TAGS)))
    def extend(self, data: st.DataObject, said: str, ratio: float, share: bool, tags: set[str]) -> None:
        hand = data.draw(st.sampled_from(self.hands))
        if hand.context.n_tokens > 400:
            return
        more = [{"role": "user", "content": said}]
        try:
            context = self.engines[hand.who].extend(hand.context, more, ratio=ratio, share=share, tags=sorted(tags))
        except InputError as error:
            self.must_be_lost(hand, error)
            return
        original = self.alone.extend(self.originals[hand.context.key], more, ratio=ratio, share=share)
        self.take(hand.who, context, original, tags, hand.has_text)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def fold(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from(self.hands))
        if hand.context.n_tokens > 400:
            return
        try:
            contexts = [
                self.folded(e, c) for e, c in ((self.engines[hand.who], hand.context), (self.alone, self.originals[hand.context.key]))
            ]
        except InputError as error:
            self.must_be_lost(hand, error)
            return
        self.take(hand.who, *contexts, set(), hand.has_text)

    @staticmethod
    def folded(engine: KVzipEngine, context: CompressedContext) -> CompressedContext:
        session = engine.session(context)
        session.ask("Why?", max_new_tokens=2)
        return session.fold(keep=0)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from(self.hands))
        try:
            got = self.engines[hand.who].logits(hand.context, IDS)
        except InputError as error:
            self.must_be_lost(hand, error)
            return
        torch.testing.assert_close(got, hand.wanted, atol=1e-4, rtol=1e-4)
        self.find_again()

    def lost_of(self, hand: Hand) -> list[str]:
        """What is not stored of a context and of what it shares."""
        return [key for key in (hand.context.key, *(part.key for part in hand.context.parts)) if key not in self.known]

    def must_be_lost(self, hand: Hand, error: InputError) -> None:
        """Only what nobody has the text of, and is not stored, may be refused; what was needed beside it may have been made again."""
        assert not hand.has_text, error
        assert self.lost_of(hand), error
        self.find_again()

    @precondition(lambda self: {*self.known} & {*self.originals})
    @rule(who=WHO, data=st.data())
    def get(self, who: int, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted({*self.known} & {*self.originals})))
        context = self.engines[who].get(key)
        self.hands.append(Hand(who, context, False, self.alone.logits(self.originals[key], IDS)))

    @precondition(lambda self: self.known)
    @rule(who=WHO, data=st.data())
    def remove(self, who: int, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        if any(key in known.parts for known in self.known.values()):
            with pytest.raises(InputError, match="are shared by"):
                self.engines[who].registry.remove(key)
        else:
            self.engines[who].registry.remove(key)
            del self.known[key]
            self.fronts_go({key})

    @rule(who=WHO, tag=st.sampled_from(TAGS))
    def forget(self, who: int, tag: str) -> None:
        self.engines[who].forget(tag)
        gone = {key for key, known in self.known.items() if known.tags == {tag}}
        gone |= {key for key, known in self.known.items() if gone & {*known.parts}}
        self.known = {key: known for key, known in self.known.items() if key not in gone}
        self.fronts_go(gone)
        for known in self.known.values():
            known.tags.discard(tag)

    def fronts_go(self, gone: set[str]) -> None:
        """What deleted texts were read behind goes with the last of them."""
        fronts = {front for key in gone for front in self.fronts.get(key, ())}
        used = {part for key, known in self.known.items() for part in (*known.parts, *self.fronts.get(key, ()))}
        for front in fronts - used:
            self.known.pop(front, None)

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def leave_memory(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from(self.hands))
        memory = self.engines[hand.who].registry._memory
        self.engines[hand.who].registry.flush()
        with memory.changed:
            for held in memory.here(hand.context.key):
                memory.drop(held)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave_all(self, data: st.DataObject) -> None:
        """As when budgets evict what nothing stored shares."""
        key = data.draw(st.sampled_from(sorted(self.known)))
        if not any(key in known.parts for known in self.known.values()):
            for engine in self.engines:
                lose(engine, key)
            del self.known[key]
            self.lost.add(key)

    @rule(who=WHO)
    def restart(self, who: int) -> None:
        self.engines[who].close()
        self.engines[who] = self.engine()
        self.hands = [hand for hand in self.hands if hand.who != who]

    @invariant()
    def both_list_it(self) -> None:
        for engine in self.engines:
            listed = {entry.key: (entry.parts, {*entry.tags}) for entry in engine.registry.contexts()}
            assert listed == {key: (known.parts, known.tags) for key, known in self.known.items()}

    @invariant()
    def bytes_are_counted(self) -> None:
        for engine in self.engines:
            tiers, memory = engine.registry.stats()["tiers"], engine.registry._memory
            assert tiers["device"]["nbytes"] == sum(held.nbytes for held in memory.device.held.values())
            files = [path.stat().st_size for path in Path(self.room.name).rglob("blobs/*/*.safetensors")]
            assert tiers["disk"]["nbytes"] == sum(files)


TestTrees = Trees.TestCase
TestTrees.settings = settings(max_examples=1000 if STRESS else 10, stateful_step_count=15, deadline=None, derandomize=True)
