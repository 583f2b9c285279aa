"""What is yes or no is True or False: nothing else is taken for one of them, in every way in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import TEXT, tiny_engine
from kvzip_memory import InputError, KVzipEngine, Session
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.registry import ContextRegistry

#: Arguments of the ways in.
GIVEN: dict[str, Callable[[KVzipEngine], tuple[Any, ...]]] = {
    "KVzipEngine.__init__": lambda e: (e.model, e.tokenizer),
    "KVzipEngine.from_pretrained": lambda e: ("no such model",),
    "KVzipEngine.load": lambda e: (TEXT,),
    "KVzipEngine.join": lambda e: ([e.load(TEXT), e.load("Another text.")],),
    "KVzipEngine.extend": lambda e: (e.load(TEXT), "more"),
    "KVzipEngine.one_context": lambda e: ([e.load(TEXT)],),
    "KVzipEngine.stream": lambda e: (None, "Who?"),
    "KVzipEngine.token_offsets": lambda e: (TEXT,),
    "Session.ask": lambda e: ("Who?",),
    "Session.stream": lambda e: ("Who?",),
    "ContextRegistry.pin": lambda e: (e.load(TEXT).key,),
    "ContextRegistry.gc": lambda e: (),
    "GenerationParams.__init__": lambda e: (),
}


def flags() -> Iterator[tuple[str, str, bool]]:
    """Each way in with one of its flags, and whether that may be left open."""
    for of in (KVzipEngine, Session, ContextRegistry, GenerationParams):
        for name, function in inspect.getmembers(of, callable):
            if (name.startswith("_") and name != "__init__") or name == "at_once":  # that is for chains of contexts
                continue
            for parameter in inspect.signature(function).parameters.values():
                if "bool" in (kinds := str(parameter.annotation).split(" | ")):
                    # None is the default of a call's parameters
                    yield f"{of.__name__}.{name}", parameter.name, "None" in kinds or of is GenerationParams


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> KVzipEngine:
    return tiny_engine(ratio=0.5, cache_dir=Path(tmp_path_factory.mktemp("cache")))


CASES = [*flags()]


@pytest.mark.parametrize(("way", "flag", "may_be_none"), CASES, ids=[f"{way}({flag})" for way, flag, _ in CASES])
def test_a_flag_is_true_or_false(engine: KVzipEngine, way: str, flag: str, may_be_none: bool) -> None:
    of, name = way.split(".")
    given = GIVEN[way](engine)
    ways_in = {"KVzipEngine": engine, "Session": engine.session(engine.load(TEXT)), "ContextRegistry": engine.registry}
    constructors = {"KVzipEngine": KVzipEngine, "GenerationParams": GenerationParams}
    call = constructors[of] if name == "__init__" else getattr(ways_in[of], name)
    before = [(entry.key, entry.pinned) for entry in engine.registry.contexts()]
    for odd in ("no", 0, 2, [], *([] if may_be_none else [None])):
        with pytest.raises(InputError, match=flag):
            call(*given, **{flag: odd})
    assert [(entry.key, entry.pinned) for entry in engine.registry.contexts()] == before
