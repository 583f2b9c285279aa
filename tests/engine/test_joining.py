"""Contexts that are put together from others: what they answer is what copies of their pairs would say, moved to where they stand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ARCHITECTURES, STRESS, lose, tiny_engine, tiny_model, tiny_tokenizer
from families import FAMILIES, tiny_family
from kvzip_memory import BudgetError, CompressedContext, CorruptFileError, InputError, KVzipEngine, UnsupportedModelError, WindowError
from kvzip_memory.attention.base import turned
from kvzip_memory.context import RaggedLayer
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.prompting.documents import Document

A = "The lamp is wound at dusk. " * 6
B = "Ferdinand the donkey carries oil on Tuesdays. " * 5
C = "The door code is 8306; nobody tells. " * 5
QUESTION = "What is wound at dusk?"
JOINABLE = [(False, False, False), (True, True, True), (False, True, True), (True, False, True)]


def asked(engine: KVzipEngine, context: CompressedContext) -> torch.Tensor:
    return engine.logits(context, engine.prompt_ids(context, QUESTION))


def loaded(engine: KVzipEngine, joinable: Sequence[bool] = (False, False, False)) -> list[CompressedContext]:
    return [engine.load(text, joinable=how) for text, how in zip((A, B, C), joinable, strict=True)]


def copied(engine: KVzipEngine, context: CompressedContext) -> Row:
    """A row over copies of all that a context sees, each with its keys rotated on to where it stands. Shares nothing with turned queries
    but the rotation itself."""
    rotations, owners, parts = engine._model.rotations, engine._model.layout.owners, []
    with context.lease() as lease:
        none = [0] * len(lease.parts)
        for layers, shift, nearer in zip(lease.parts, lease.shifts or none, lease.nearer or none, strict=True):
            own = []
            for layer, owner in zip(layers, owners, strict=True):
                plain = layer.among(torch.ones_like(layer.positions, dtype=torch.bool))
                moved, by = (shift, shift + nearer) if plain.window is None else (0, context.saved)
                keys = turned(plain.keys, rotations.turn(owner, -by))
                values = keys if layer.shared else plain.values
                own.append(replace(plain, keys=keys, values=values, positions=plain.positions + moved))
            parts.append(tuple(own))
    *before, last = parts
    return Row(last, context.n_tokens, Tail(), {}, tuple(before))


def positions(engine: KVzipEngine, row: Row) -> list[list[int]]:
    """Of each full layer's first head, those of the copies."""
    full = [place for place, window in enumerate(engine._model.windows) if window is None]
    return [[p for part in row.parts for p in part[place].positions_of(0).tolist()] for place in full]


@pytest.mark.parametrize("joinable", JOINABLE, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_join_is_what_copies_would_be(architecture: str, joinable: tuple[bool, ...]) -> None:
    for ratio in (1.0, 0.5) if STRESS or architecture in ("llama", "gemma3") else (0.5,):
        engine = tiny_engine(architecture, ratio=ratio)
        join = engine.join(loaded(engine, joinable))
        ids, row = engine.prompt_ids(join, QUESTION), copied(engine, join)
        expected = engine._model.forward([row], [ids], n_logits=len(ids))[0]
        torch.testing.assert_close(engine.logits(join, ids), expected, atol=1e-4, rtol=1e-4)
        if ratio == 1.0:  # each token once, in its order
            assert positions(engine, row) == [list(range(join.n_tokens))] * len(positions(engine, row))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_that_are_read_again_are_seen_instead(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    contexts = loaded(engine, (False, True, False))
    join = engine.join(contexts, repair=20)
    head, starts = contexts[0].protected, (contexts[0].n_tokens, contexts[0].n_tokens + contexts[1].n_tokens - contexts[0].protected)
    assert join.receipt is not None
    assert (join.receipt.read, join.identity["again"]) == (40, [[start, start + 20] for start in starts])
    ids, row = engine.prompt_ids(join, QUESTION), copied(engine, join)
    expected = engine._model.forward([row], [ids], n_logits=len(ids))[0]
    torch.testing.assert_close(engine.logits(join, ids), expected, atol=1e-4, rtol=1e-4)
    again = [p for start in starts for p in range(start, start + 20)]
    for place, seen in zip([i for i, window in enumerate(engine._model.windows) if window is None], positions(engine, row), strict=True):
        assert row.layers[place].positions_of(0).tolist() == again
        assert len({*seen}) == len(seen)
        assert sorted(seen)[:head] == list(range(head))


@pytest.mark.parametrize("joinable", JOINABLE, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_join_that_is_read_again_whole_is_one_build(architecture: str, joinable: tuple[bool, ...]) -> None:
    if joinable[0] and architecture not in ("llama", "gemma3") and not STRESS:
        return
    engine = tiny_engine(architecture, ratio=1.0)
    contexts = [engine.load(A), *loaded(engine, joinable)[1:]]  # the first stands where it was read
    join = engine.join(contexts, repair=1000)
    assert join.kept_pairs == join.total_pairs
    tokens, ids = join.token_ids.tolist(), engine.prompt_ids(join, QUESTION)
    row = Row((), 0, Tail())
    expected = engine._model.forward([row], [tokens + ids], n_logits=len(ids))[0]
    torch.testing.assert_close(engine.logits(join, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [300, 340, 380])
@pytest.mark.parametrize("joinable", JOINABLE[:3], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contexts_that_share_positions_are_what_copies_would_be(architecture: str, joinable: tuple[bool, ...], shared: int) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    contexts = loaded(engine, joinable)
    join = engine.join(contexts, positions=shared)
    assert join.n_tokens - join.saved == shared
    ids, row = engine.prompt_ids(join, QUESTION), copied(engine, join)
    expected = engine._model.forward([row], [ids], n_logits=len(ids))[0]
    torch.testing.assert_close(engine.logits(join, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_shares_positions_is_stored_saved_grown_cited_and_joined(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, ratio=0.5, cache_dir=tmp_path)
    a, b, c = loaded(engine, (False, True, True))
    join = engine.join([a, b, c], positions=300)
    assert len({join.key, engine.join([a, b, c], positions=301).key, engine.join([a, b, c]).key}) == 3
    room = join.n_tokens
    assert engine.join([a, b, c], positions=room).key == engine.join([a, b, c], positions="shared").key == engine.join([a, b, c]).key
    session = engine.session(join)
    session.ask(QUESTION, max_new_tokens=4)
    more = engine.extend(join, [Document(C)])
    contexts = [
        join,
        more,
        engine.extend(join, [Document(C)], share=False),
        engine.extend(more, [{"role": "user", "content": "Hello?"}], share=True),
        session.fold(keep=0),
        engine.join([join, c]),
        engine.join([c, join]),
        engine.join([c, more, a]),
        engine.join([c, more, join], positions=600),
        engine.join([engine.join([a, b], positions=260), c], positions=280),
    ]
    for number, context in enumerate(contexts):
        ids = engine.prompt_ids(context, QUESTION)
        expected = engine._model.forward([copied(engine, context)], [ids], n_logits=len(ids))[0]
        torch.testing.assert_close(engine.logits(context, ids), expected, atol=1e-4, rtol=1e-4)
        other = tiny_engine(architecture, ratio=0.5)
        opened = other.open(context.save(tmp_path / f"{number}.safetensors"))
        torch.testing.assert_close(other.logits(opened, ids), expected, atol=1e-4, rtol=1e-4)
        scores = engine.relevance([(context, [(source.start, source.end) for source in context.sources])], QUESTION, "At dusk")
        assert [len(of) for of in scores] == [len(context.sources)]
    taken = [context.n_tokens - context.saved for context in contexts]
    own = [context.n_tokens - context.protected for context in (a, b, c, more)]
    assert taken[:2] == [300, 300 + more.n_tokens - join.n_tokens]
    assert taken[5:] == [300 + own[2], 300 + own[2], taken[1] + own[0] + own[2], 600, 280]
    engine.close()
    again = tiny_engine(architecture, ratio=0.5, cache_dir=tmp_path)
    for context in contexts:
        ids = engine.prompt_ids(context, QUESTION)
        assert torch.equal(again.logits(again.get(context.key), ids), engine.logits(context, ids))
    assert again.stats()["built"] == 0
    again.close()


def test_more_documents_than_the_window_holds(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    window = engine.window
    contexts = [engine.load(f"Part {i}. " + A * 3, joinable=i > 0, name=f"{i}") for i in range(2 * window // 400)]
    with pytest.raises(WindowError, match=r'join fewer contexts, or with positions="shared",'):
        engine.join(contexts)
    join = engine.join(contexts, positions="shared")
    assert join.n_tokens > window > join.n_tokens - join.saved == window // 2
    session = engine.session(join)
    replies = [session.ask(question, max_new_tokens=5) for question in (QUESTION, "Why?")]
    assert replies[0].usage.input_tokens > window
    folded = session.fold(keep=0)
    assert folded.saved == join.saved
    assert engine.session(folded).ask("Who?", max_new_tokens=5).text
    with pytest.raises(WindowError, match=f"{window + 1:,} tokens with the context; the model's window is {window:,};") as error:
        engine.logits(join, [40] * (window // 2 + 1))
    assert (error.value.tokens, error.value.window) == (window + 1, window)
    assert engine.logits(join, [40] * (window // 2)).shape[0] == window // 2
    with pytest.raises(WindowError, match=f"of the model's window of {window:,} tokens"):
        session.ask("Why? " * (window // 6), max_new_tokens=1)
    with pytest.raises(WindowError, match="of the model's window"):
        engine.generate(join, "Why?", schema={"type": "string", "minLength": window}, max_new_tokens=2 * window)
    with pytest.raises(WindowError, match=r"the text has 6,0.. tokens in 2,0.. positions"):
        engine.extend(join, [Document("a" * (window // 2))])
    assert session.ask("Why?", max_new_tokens=10 * window).finish_reason in ("length", "stop")
    with pytest.raises(WindowError):
        engine.join(contexts, positions=window)


def test_a_join_says_how_many_positions_it_takes_and_where_they_are_too_few(caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine(ratio=0.5)
    context = engine.load(A, name="a")
    few = engine.join([context] * 4, positions=context.n_tokens)
    assert f"{few.n_tokens:,} tokens in {context.n_tokens:,} positions of" in repr(few)
    grown = engine.extend(few, [{"role": "user", "content": "Hello?"}])
    assert f"{grown.n_tokens:,} tokens in {grown.positions:,} positions, " in repr(grown)
    assert "positions" not in repr(context) + repr(engine.join([context] * 4))
    assert not caplog.records
    engine.join([context] * 9, positions=context.n_tokens)
    assert "tokens share a position in a join of 9 contexts; answers from it may be of no use" in caplog.text


@pytest.mark.parametrize("odd", [0, 100, -1, True, 1.5, "near", None, ["shared"]])
def test_positions_are_a_word_or_as_many_as_the_longest_context_takes(odd: object) -> None:
    engine = tiny_engine(ratio=0.5)
    with pytest.raises(InputError, match=r"positions is .*(\"sequential\", \"shared\"|the longest of the contexts takes)"):
        engine.join(loaded(engine), positions=odd)  # type: ignore[arg-type]
    contexts = loaded(engine)
    shared = engine.join(contexts, positions=300)
    grown = engine.extend(shared, [Document(C)])
    for attempt, options in (
        (contexts, {"positions": 300}),
        ([shared, contexts[0]], {}),
        ([contexts[0], shared], {}),
        ([grown, contexts[0]], {}),
    ):
        with pytest.raises(InputError, match="repair=4 reads tokens where they stand"):
            engine.join(attempt, repair=4, **options)  # type: ignore[arg-type]


def test_what_was_read_again_is_stored_saved_grown_and_joined(tmp_path: Path) -> None:
    engine = tiny_engine("gemma3", ratio=0.5, cache_dir=tmp_path)
    a, b, c = loaded(engine, (False, True, True))
    join = engine.join([a, b], name="both", repair=16)
    assert join.key != engine.join([a, b]).key != engine.join([a, b], repair=15).key
    assert join.storage.nbytes > engine.join([a, b]).storage.nbytes
    expected = asked(engine, join)
    for entry in engine.registry.contexts():
        lose(engine, entry.key)
    torch.testing.assert_close(asked(engine, join), expected, atol=1e-5, rtol=1e-5)
    grown = engine.extend(join, [{"role": "user", "content": "Hello?"}])
    assert grown.parts == join.all_parts
    session = engine.session(join)
    session.ask(QUESTION, max_new_tokens=4)
    contexts = [
        join,
        grown,
        session.fold(keep=0),
        engine.join([join, c]),
        engine.join([c, join], repair=10),
        engine.join([join, c], repair=9),
    ]
    for number, context in enumerate(contexts):
        ids = engine.prompt_ids(context, QUESTION)
        expected = engine._model.forward([copied(engine, context)], [ids], n_logits=len(ids))[0]
        torch.testing.assert_close(engine.logits(context, ids), expected, atol=1e-4, rtol=1e-4)
        opened = tiny_engine("gemma3", ratio=0.5).open(context.save(tmp_path / f"{number}.safetensors"))
        torch.testing.assert_close(tiny_engine("gemma3", ratio=0.5).logits(opened, ids), expected, atol=1e-4, rtol=1e-4)
    engine.close()
    again = tiny_engine("gemma3", ratio=0.5, cache_dir=tmp_path)
    for context in contexts:
        ids = engine.prompt_ids(context, QUESTION)
        assert torch.equal(again.logits(again.get(context.key), ids), engine.logits(context, ids))
    assert again.stats()["built"] == 0
    again.close()


@pytest.mark.parametrize("odd", [-1, True, 1.0, "16", None])
def test_repair_is_a_number_of_tokens(odd: object) -> None:
    engine = tiny_engine(ratio=0.5)
    with pytest.raises(InputError, match=r"repair is .*; it is a whole number of tokens"):
        engine.join(loaded(engine), repair=odd)  # type: ignore[arg-type]


SOME = ["cohere", "deepseek_v3", "gemma3n_text", "glm4", "llama4_text", "nanochat", "qwen3_next", "smollm3"]


@pytest.mark.parametrize("kind", sorted(FAMILIES) if STRESS else SOME)
def test_every_family_joins_or_says_why_not(kind: str) -> None:
    engine = KVzipEngine(tiny_family(kind), tiny_tokenizer(), ratio=0.5, codec="none")
    if engine._model.layout.stateful or kind == "llama4_text":
        for attempt in (lambda: engine.join(loaded(engine)), lambda: engine.load(A, joinable=True)):
            with pytest.raises(UnsupportedModelError, match=r"load their texts as one|put together from parts"):
                attempt()
        return
    join = engine.join(loaded(engine, (False, True, False)))
    ids = engine.prompt_ids(join, QUESTION)
    expected = engine._model.forward([copied(engine, join)], [ids], n_logits=len(ids))[0]
    torch.testing.assert_close(engine.logits(join, ids), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_joinable_context_has_the_pairs_that_the_model_computes_behind_the_preamble(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=1.0)
    context, head = engine.load(A, joinable=True), engine.load(A).protected
    front = next(entry for entry in engine.registry.contexts() if entry.n_tokens == head + 1024)
    ids = torch.cat([engine.get(front.key).token_ids, context.token_ids[head:]]).long()
    with torch.inference_mode():
        cache = engine.model(input_ids=ids[None], use_cache=True).past_key_values
    for layer, owner in zip(context.layers, engine._model.layout.owners, strict=True):
        if layer.window is None:
            wanted = cache.layers[owner].keys[0, :, head + 1024 :]
            torch.testing.assert_close(layer.keys, wanted.flatten(0, 1), atol=1e-4, rtol=1e-4)
    assert engine.tokenizer.decode(context.token_ids[head:]) == f"\n\n{A}"  # whatever stands before it and behind it
    assert asked(engine, context).isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_joinable_context_is_seen_where_it_stands_alone(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    context = engine.load(A, joinable=True)
    expected = engine._model.forward([copied(engine, context)], [[5, 6, 7]], n_logits=3)[0]
    torch.testing.assert_close(engine.logits(context, [5, 6, 7]), expected, atol=1e-4, rtol=1e-4)
    assert positions(engine, copied(engine, engine.load(A, ratio=1.0, joinable=True)))[0] == list(range(context.n_tokens))


def test_no_pair_is_copied_and_no_token_read() -> None:
    engine = tiny_engine(ratio=0.5)
    contexts = loaded(engine, (True, True, True))
    join = engine.join(contexts)
    assert join.receipt is not None
    assert join.receipt.read == 0
    assert join.kept_pairs == join.storage.nbytes == 0
    assert join.nbytes == 4 * join.n_tokens
    with join.lease() as lease:
        for part, context in zip(lease.before[1:], contexts, strict=True):
            assert all(x.keys is y.keys for x, y in zip(part, context.layers, strict=True))
    assert engine.join(contexts).receipt.hit  # type: ignore[union-attr]
    assert engine.join(contexts[::-1]).key != join.key


def test_a_join_that_is_not_stored_is_there_while_it_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    contexts = loaded(engine, (True, True, True))
    engine.registry.flush()
    stored, files = {entry.key for entry in engine.registry.contexts()}, sorted(tmp_path.rglob("*.safetensors"))
    join = engine.join(contexts, store=False)
    assert (join.receipt.tier, join.receipt.read, join.receipt.reason) == ("built", 0, "unstored")  # type: ignore[union-attr]
    grown = engine.extend(join, [{"role": "user", "content": "Hello?"}])
    assert grown.receipt.reason == "unstored"  # type: ignore[union-attr]
    assert engine.get(join.key).key == join.key  # while it is in use
    answers = [asked(engine, context) for context in (join, grown)]
    assert {entry.key for entry in engine.registry.contexts()} == stored
    engine.registry.flush()
    assert sorted(tmp_path.rglob("*.safetensors")) == files
    other = engine.join(contexts)
    assert torch.equal(asked(engine, other), answers[0])
    assert len(engine.registry.contexts()) == len(stored) + 1
    assert "removed" not in caplog.text
    engine.close()


def test_a_join_is_asked_grown_folded_cited_and_joined_again(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    a, b, c = loaded(engine, (False, True, True))
    join = engine.join([a, b], name="both")
    before = asked(engine, join)
    assert engine.session(join).ask(QUESTION, max_new_tokens=4).text is not None
    grown = engine.extend(join, [{"role": "user", "content": "Hello?"}])
    assert grown.parts == join.parts
    for context in (grown, engine.extend(grown, [{"role": "user", "content": "More?"}]), engine.join([join, c]), engine.join([c, join])):
        ids = engine.prompt_ids(context, QUESTION)
        expected = engine._model.forward([copied(engine, context)], [ids], n_logits=len(ids))[0]
        torch.testing.assert_close(engine.logits(context, ids), expected, atol=1e-4, rtol=1e-4)
    session = engine.session(join)
    session.ask(QUESTION, max_new_tokens=4)
    folded = session.fold(keep=0)
    assert folded.parts == join.parts
    assert session.ask("And?", max_new_tokens=4).text is not None
    spans = [(source.start, source.end) for source in join.sources]
    assert len(engine.relevance([(join, spans)], QUESTION, "The lamp.")[0]) == 2
    engine.close()
    again = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    assert torch.equal(asked(again, again.get("both")), before)
    again.close()


def test_a_conversation_over_a_joinable_document_shares_it() -> None:
    engine = tiny_engine(ratio=0.5)
    document = engine.load(A, joinable=True)
    grown = engine.extend(document, [{"role": "user", "content": "Hello?"}])
    assert [part.key for part in grown.parts][-1] == document.key  # whose pairs are seen from elsewhere than where they were made
    ids = engine.prompt_ids(grown, QUESTION)
    expected = engine._model.forward([copied(engine, grown)], [ids], n_logits=len(ids))[0]
    torch.testing.assert_close(engine.logits(grown, ids), expected, atol=1e-4, rtol=1e-4)


def test_sources_and_kept_strings_hold_across_parts() -> None:
    engine = tiny_engine(ratio=0.2)
    contexts = [
        engine.load([Document(text, name=name)], keep=["8306"] if "8306" in text else (), joinable=True)
        for text, name in ((A, "a"), (C, "c"))
    ]
    join = engine.join(contexts)
    assert [source.name for source in join.sources] == ["a", "c"]
    for source, text in zip(join.sources, (A, C), strict=True):
        assert text.strip() in engine.tokenizer.decode(join.token_ids[source.start : source.end])
    ids = engine.tokenizer("8306", add_special_tokens=False).input_ids
    seen = {p for layer in copied(engine, join).parts[-1] for p in layer.positions.tolist()} | {
        p for part in copied(engine, join).parts for p in part[0].positions_of(0).tolist()
    }
    at = [i for i in range(join.n_tokens) if join.token_ids[i : i + len(ids)].tolist() == ids]
    assert at
    assert all(i in seen for i in at)


def test_what_was_lost_is_made_again(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    contexts = loaded(engine, (False, True, True))
    join = engine.join(contexts)
    expected = asked(engine, join)
    for entry in engine.registry.contexts():
        lose(engine, entry.key)
    torch.testing.assert_close(asked(engine, join), expected, atol=1e-5, rtol=1e-5)
    saved = join.save(tmp_path / "join.safetensors")
    opened = tiny_engine(ratio=0.5).open(saved)
    torch.testing.assert_close(asked(tiny_engine(ratio=0.5), opened), expected, atol=1e-5, rtol=1e-5)
    engine.registry.flush()
    (path,) = [path for path in tmp_path.rglob("*.safetensors") if path.stem == join.key]
    with pytest.raises(CorruptFileError, match="lacks what it shares"):
        engine.open(path)
    engine.close()


def test_replacing_a_document_is_another_join_and_forgetting_one_takes_its_joins_along(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    a, b, c = (engine.load(text, joinable=True, tags=f"document: {n}") for n, text in enumerate((A, B, C)))
    join, other = engine.join([a, b]), engine.join([a, c])
    with pytest.raises(InputError, match="are shared by"):
        engine.registry.remove(b.key)
    forgotten = engine.forget("document: 1")
    assert {entry.key for entry in forgotten.deleted} == {b.key, join.key}
    assert asked(engine, other).isfinite().all()
    engine.close()


def test_what_was_not_read_where_it_stands_is_used_only_when_it_is_named() -> None:
    engine = tiny_engine(ratio=0.5)
    parts = [engine.load(text, joinable=True) for text in (A, B)]
    join = engine.join(parts)
    for context in (*parts, join):
        ids = [*context.token_ids.tolist(), *engine.prompt_ids(context, QUESTION)]
        found = engine.stored_prefix(ids, 0.5)
        assert found is None or found.n_tokens == found.protected
        assert engine.get(context.key).n_tokens == context.n_tokens
    plain = engine.load(A)
    found = engine.stored_prefix([*plain.token_ids.tolist(), 5], 0.5)
    assert found is not None
    assert found.key == plain.key


def test_it_is_as_old_as_what_it_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path, ttl=1000)
    first = engine.load(A, joinable=True)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 600)
    second = engine.load(B, joinable=True)
    join = engine.join([first, second])
    for context in (second, join):
        assert abs(context.created - first.created) < 5
        assert context.expires == first.expires
    monkeypatch.setattr(time, "time", lambda: now + 1100)
    for context in (first, second, join):
        with pytest.raises(InputError):
            tiny_engine(ratio=0.5, cache_dir=tmp_path, ttl=1000).get(context.key)
    assert asked(engine, join).isfinite().all()
    engine.close()


def test_what_cannot_be_joined_says_why(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5)
    a, b = engine.load(A), engine.load(B)
    with pytest.raises(InputError, match="1 contexts to join; give at least two"):
        engine.join([a])
    with pytest.raises(InputError, match="joinable=True is for documents"):
        engine.load([{"role": "user", "content": "Hi"}], joinable=True)
    with pytest.raises(InputError, match="another system prompt"):
        engine.join([a, engine.load(B, system="Be short.")])
    with pytest.raises(InputError, match="is of a conversation; documents are joined"):
        engine.join([a, engine.load([{"role": "user", "content": "Hi"}])])
    with pytest.raises(InputError, match="no context 'nobody'"):
        engine.join([a, "nobody"])
    with pytest.raises(WindowError):
        KVzipEngine(tiny_model(max_position_embeddings=600), tiny_tokenizer()).join(
            [
                c
                for engine in [KVzipEngine(tiny_model(max_position_embeddings=600), tiny_tokenizer())]
                for c in (engine.load(A), engine.load(B))
            ]
        )
    assert engine.join([a, b]).n_tokens == a.n_tokens + b.n_tokens - a.protected


def test_rows_over_joins_and_others_are_one_batch() -> None:
    engine = tiny_engine(ratio=0.5)
    a, b, c = loaded(engine, (True, True, True))
    joins = [engine.join([a, b]), engine.join([b, a]), engine.join([a, b, c]), a]
    rows, copies = [], []
    for context in joins:
        with context.lease() as lease:
            rows.append(engine._model.row(lease, context.n_tokens, Tail()))
        copies.append(copied(engine, context))
    ids = [[5, 6], [7], [8, 9], [4]]
    for got, expected in zip(engine._model.forward(rows, ids), engine._model.forward(copies, ids), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_gap_hides_pairs_at_the_beginning_of_each_head() -> None:
    layer = RaggedLayer(torch.randn(9, 4), torch.randn(9, 4), (4, 5), torch.tensor([0, 1, 2, 5, 0, 1, 3, 4, 8], dtype=torch.int32))
    for first, hidden in ((2, (2, 2)), (3, (3, 2)), (5, (3, 4)), (6, (4, 4)), (9, (4, 5))):
        view = layer.seen_from(first)
        assert view is layer.seen_from(first)
        assert view.gaps == hidden
        for head, gap in enumerate(hidden):
            assert torch.equal(view.head(head)[0], layer.head(head)[0][gap:])
            assert torch.equal(view.positions_of(head), layer.positions_of(head)[gap:])
        alone = view.among(torch.ones(9, dtype=torch.bool))
        assert (alone.gaps, alone.lengths) == ((), view.lengths)
        assert alone.positions.tolist() == [p for head in (0, 1) for p in layer.positions_of(head).tolist() if p >= first]
        other = view.seen_from(4)
        assert (other.lengths, other.gaps) == ((1, 2), (3, 3))
        assert (view.seen_from(0).lengths, view.seen_from(0).gaps) == (layer.lengths, ())
    assert layer.seen_from(0) is layer


def test_a_device_without_room_for_the_preamble_says_so() -> None:
    engine = tiny_engine(ratio=0.5, device_bytes=2 * tiny_engine(ratio=0.5).load(A).nbytes)
    with pytest.raises(BudgetError, match=r"1,024 tokens that stand before it and are dropped take room, too; preamble=False"):
        engine.load(A, joinable=True)
    assert engine.load(A, joinable=True, preamble=False).n_tokens


def test_another_preamble_is_another_context() -> None:
    engine = tiny_engine(ratio=1.0)
    text = "The fog horn sounds at four. " * 80
    ours, theirs = engine.load(A, joinable=True), engine.load(A, joinable=True, preamble=text)
    assert theirs.key != ours.key
    assert engine.load(A, joinable=True, preamble=text).receipt.hit  # type: ignore[union-attr]
    assert theirs.token_ids.tolist() == ours.token_ids.tolist()
    head = ours.protected
    tokens = [*ours.token_ids[:head].tolist(), *engine.text_ids(text)[:1024], *ours.token_ids[head:].tolist()]
    with torch.inference_mode():
        keys = (
            engine.model(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values.layers[0].keys[0, :, -(ours.n_tokens - head) :]
        )
    torch.testing.assert_close(theirs.layers[0].keys, keys.flatten(0, 1), atol=1e-4, rtol=1e-4)
    for odd in ({"preamble": text}, {"joinable": True, "preamble": " \n"}, {"joinable": True, "preamble": ""}):
        with pytest.raises(InputError, match="preamble"):
            engine.load(A, **odd)


INNER = {
    "joined": lambda e, a, b, c: e.join([a, b]),
    "joined, joinable first": lambda e, a, b, c: e.join([b, a]),
    "read again": lambda e, a, b, c: e.join([a, b, c], repair=11),
    "shared": lambda e, a, b, c: e.extend(e.join([b, c]), Document("The fog horn sounds at four."), share=True),
    "opened": None,
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_read_again_behind_what_is_seen_and_nothing_else(architecture: str, inner: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    a, b, c = loaded(engine, (False, True, False))
    if inner == "opened":
        first = engine.open(engine.join([b, a, c], repair=3).save(tmp_path / "join.safetensors"))
    else:
        first = INNER[inner](engine, a, b, c)  # type: ignore[misc]
    join = engine.join([first, c], repair=9)
    row = copied(engine, first)
    engine._model.forward([row], [join.token_ids[first.n_tokens : first.n_tokens + 9].tolist()])
    for layer, (keys, values) in zip(join.layers, row.tail.pairs(9), strict=True):
        if layer.window is None:
            torch.testing.assert_close(layer.keys, keys.flatten(0, 1), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, values.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_joins_of_joins_that_a_device_has_no_room_for_are_refused_at_once() -> None:
    def joins(engine: KVzipEngine) -> list[CompressedContext]:
        a, b, c = loaded(engine)
        return [engine.join([a, b]), engine.join([b, c])]

    roomy = tiny_engine(ratio=0.5)
    nbytes = sum(context.nbytes for context in (*loaded(roomy), *joins(roomy)))
    engine = tiny_engine(ratio=0.5, device_bytes=nbytes + 2000)
    with pytest.raises(BudgetError, match="the context takes about"):  # and not that it was waited for
        engine.join(joins(engine), repair=20)


def test_in_a_window_without_room_for_a_preamble_the_head_goes_with_the_last_text(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        engine = KVzipEngine(tiny_model(max_position_embeddings=420), tiny_tokenizer(), ratio=0.5, cache_dir=folder)
        document = engine.load("The lamp is wound at dusk.", joinable=True, tags="a", system="Be brief.")
        assert document.shift == 0
        engine.leave_behind(document.key, ["a"])  # no conversation has grown through it
        assert engine.get(document.key)
        engine.forget("a")
        assert not engine.registry.contexts()
        engine.close()
