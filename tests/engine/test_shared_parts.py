"""Contexts made of parts, where something else happens to a part: opened from a file, forgotten, damaged, evicted, another's, in use."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import lose, tiny_engine, tiny_model
from kinds import tiny
from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.prompting.documents import Document
from templates import FAMILIES as TEMPLATES

A = "The lamp is wound at dusk. " * 6
B = "Ferdinand the donkey carries oil on Tuesdays. " * 5
HELLO = [{"role": "user", "content": "Hello?"}]
SAID = [*HELLO, {"role": "assistant", "content": "Yes?"}]
SECRET = "Ana's number is 8306-9911."


def asked(engine: KVzipEngine, context: CompressedContext) -> torch.Tensor:
    return engine.logits(context, engine.prompt_ids(context, "Who?"))


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.rglob("*.safetensors")}


# -- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["opened", "opened before", "extended", "shared", "opened twice"])
@pytest.mark.parametrize("texts", [(A, B), (A, A)], ids=["two", "one twice"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_opened_join_is_a_part_like_any_other(tmp_path: Path, architecture: str, texts: tuple[str, ...], again: str) -> None:
    """A saved file has of every part what others see that share it."""

    def grown(engine: KVzipEngine, join: CompressedContext) -> CompressedContext:
        if again.startswith("opened"):
            other = join if again == "opened twice" else engine.load(B)
            return engine.join([other, join] if again == "opened" else [join, other])
        return engine.extend(join, HELLO, share=again == "shared")

    engine, other = (tiny_engine(architecture, ratio=0.5) for _ in range(2))
    join = engine.join([engine.load(text) for text in texts])
    opened = other.open(join.save(tmp_path / "join.safetensors"))
    expected, found = grown(engine, join), grown(other, opened)
    assert found.key == expected.key
    assert torch.equal(asked(other, found), asked(engine, expected))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gemma4", "gpt_oss"])
def test_a_window_shows_the_head_before_a_short_joinable_text(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, ratio=1.0)
    context = engine.load("Ferdinand!", joinable=True)
    windows = [layer for layer in context.layers if layer.window is not None]
    assert windows
    assert all(layer.positions_of(0).tolist() == list(range(context.n_tokens)) for layer in windows)
    head = next(entry for entry in engine.registry.contexts() if entry.n_tokens == context.protected)
    for own, before in zip(context.layers, engine.get(head.key).layers, strict=True):
        if own.window is not None:
            assert torch.equal(own.keys.unflatten(0, (own.n_heads, -1))[:, : context.protected].flatten(0, 1), before.keys)
    for grown in (engine.extend(context, HELLO), engine.extend(engine.join([context, engine.load("Oil.", joinable=True)]), HELLO)):
        assert asked(engine, grown).isfinite().all()
        assert torch.equal(asked(engine, engine.open(grown.save(tmp_path / "grown.safetensors"))), asked(engine, grown))


@pytest.mark.parametrize(
    ("family", "kind"), [("llama2", "prepend"), ("qwen3", "unigram"), ("gemma3", "metaspace always"), ("qwen3", "bytes")]
)
def test_joinable_texts_are_whole_and_apart_however_they_end(family: str, kind: str) -> None:
    template = TEMPLATES[family]
    tokenizer = tiny(kind, template.special, template.tags)
    tokenizer.chat_template = template.template
    engine = KVzipEngine(tiny_model("llama", vocab_size=len(tokenizer) + 8), tokenizer, ratio=1.0)
    texts = [f"Ferdinand carries oil{end}" for end in (".", "", " ", "\n", "\n\n", "?")]
    contexts = [engine.load(text, joinable=True) for text in texts]
    join = engine.join(contexts)
    said = tokenizer.decode(join.token_ids[contexts[0].protected :])
    assert said.lstrip(" ") == "".join(f"\n\n{text}" for text in texts)
    for source, text in zip(join.sources, texts, strict=True):
        assert tokenizer.decode(join.token_ids[source.start : source.end]).strip() == text.strip()
    assert engine.join([engine.load(text) for text in texts]).n_tokens < join.n_tokens  # less what depends on what follows


def test_what_ends_in_a_conversation_is_not_joined() -> None:
    engine = tiny_engine(ratio=0.5)
    document = engine.load(B)
    for talk in (engine.extend(engine.load(A), SAID), engine.extend(engine.load(A), SAID, share=True), engine.load(SAID)):
        for contexts in ([talk, document], [document, talk], [talk, talk]):
            with pytest.raises(InputError, match="is of a conversation; documents are joined"):
                engine.join(contexts)


def test_a_prompts_beginning_is_never_a_join_nor_anothers_pairs(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    head = engine.load(A).protected
    first = engine.load((A * 20)[:1024])
    assert first.n_tokens == head + 1024  # so that the second part stands where it was read, behind something else
    join = engine.join([first, engine.load(B, joinable=True)])
    found = engine.stored_prefix([*join.token_ids.tolist(), 5], 0.5)
    assert found is None or found.key != join.key
    other = tiny_engine(ratio=0.5, cache_dir=tmp_path, scorer=KVzipScorer(chunk_tokens=400))
    document = other.load(A)
    other.registry.flush()
    child = engine.extend(engine.get(document.key), SAID, share=True)
    assert engine.stored_prefix([*child.token_ids.tolist(), 5]) is None
    other.close()
    engine.close()


def test_without_a_head_nothing_is_joinable() -> None:
    tokenizer = tiny("bytes", (), ())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    engine = KVzipEngine(tiny_model("llama", vocab_size=len(tokenizer) + 8), tokenizer, ratio=0.5)
    with pytest.raises(InputError, match="puts nothing before a text"):
        engine.load(A, joinable=True)
    apart = engine.join([engine.load(text, joinable=True, preamble=False) for text in (A, B)])
    assert tokenizer.decode(apart.token_ids) == f"\n\n{A}\n\n{B}"
    assert asked(engine, engine.join([engine.load(A), engine.load(B)])).isfinite().all()


def test_texts_without_a_name_are_numbered_through(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    contexts = [engine.load(text, joinable=True) for text in (A, Document(B, "oil"), A[::-1])]
    join = engine.join(contexts, name="join")
    for found in (join, engine.get("join")):
        assert [source.name for source in found.sources] == ["document 1", "oil", "document 3"]
    engine.close()


# -- what is kept ------------------------------------------------------------------------------------------------


def test_a_tenant_shares_nobodys_pairs(tmp_path: Path) -> None:
    nobody, alice = tiny_engine(ratio=0.5, cache_dir=tmp_path), tiny_engine(ratio=0.5, cache_dir=tmp_path, tenant="alice")
    document, joinable = nobody.load(A, tags="document: a"), nobody.load(A, joinable=True)
    child = nobody.extend(document, SAID, share=True)
    for way in (
        lambda: alice.extend(document, SAID, share=True),
        lambda: alice.join([document, alice.load(B)]),
        lambda: alice.extend(joinable, SAID),
        lambda: alice.extend(child, SAID),
    ):
        with pytest.raises(InputError, match="load its text with this engine"):
            way()
    session = alice.session(document)
    session.ask("Who?", max_new_tokens=2)
    folded = session.fold(keep=0, name="talk")
    assert folded.parts == ()
    nobody.forget("document: a")
    assert alice.get("talk").key == folded.key
    nobody.close()
    alice.close()


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_forgetting_a_document_without_a_file_takes_along_what_shares_it(tmp_path: Path, how: str) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    document = engine.load(A, tags="document: a")
    sharing = {engine.extend(document, SAID, share=True, tags="thread: x").key, engine.join([document, engine.load(B)]).key}
    engine.close()
    path = next(path for path in tmp_path.rglob("*.safetensors") if path.stem == document.key)
    if how == "damaged":
        data = bytearray(path.read_bytes())
        data[-5000] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    engine.registry.verify(document.key) if how == "damaged" else engine.registry.gc()
    assert {entry.key for entry in engine.forget("document: a").deleted} >= sharing
    assert not files(tmp_path) & sharing
    engine.close()


def test_what_another_process_forgot_is_shared_by_nothing_that_is_stored(tmp_path: Path) -> None:
    one, two = (tiny_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))
    document = one.load(A, tags="document: a")
    one.registry.flush()
    held = two.load(A)
    asked(two, held)
    assert len(one.forget("document: a").deleted) == 1
    session = two.session(held)
    session.ask("Who?", max_new_tokens=2)
    grown = [two.extend(held, SAID, share=True, tags="thread: x"), two.join([held, two.load(B)]), session.fold(keep=0)]
    two.registry.flush()
    assert not files(tmp_path) & {document.key, *(context.key for context in grown)}
    assert all(asked(two, context).isfinite().all() for context in grown)
    one.close()
    two.close()


def test_a_joinable_texts_system_prompt_is_forgotten_with_the_last_that_has_it(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        engine = tiny_engine(ratio=0.5, cache_dir=folder)
        contexts = [engine.load(text, system=SECRET, joinable=True, tags=tag) for text, tag in ((A, "ana"), (B, "bo"))]
        other = engine.load(A, joinable=True)
        for tag, left in (("ana", 6), ("bo", 3)):
            engine.forget(tag)
            assert len(engine.registry.contexts()) == left  # each text, a head, a preamble
        engine.registry.flush()
        assert asked(engine, other).isfinite().all()
        assert not files(tmp_path) & {context.key for context in contexts}
        engine.close()
    ids = torch.tensor(tiny_engine().text_ids(SECRET), dtype=torch.int32).numpy().tobytes()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and ids in path.read_bytes()]


def test_what_shares_with_an_opened_context_is_not_stored_and_folds_share_nothing(tmp_path: Path) -> None:
    path = tiny_engine(ratio=0.5).load(A).save(tmp_path / "book.safetensors")
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path / "cache")
    opened = engine.open(path)
    shares = [engine.extend(opened, SAID, share=True), engine.join([opened, engine.load(B)])]
    session = engine.session(opened)
    session.ask("Who?", max_new_tokens=2)
    folded = session.fold(keep=0, name="talk")
    engine.close()
    assert not files(tmp_path / "cache") & {context.key for context in shares}
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path / "cache")
    assert engine.get("talk").key == folded.key
    engine.close()


def test_what_a_pinned_context_shares_stays_with_it() -> None:
    engine = tiny_engine(ratio=0.5, device_bytes=int(3.2 * tiny_engine(ratio=0.5).load(A).nbytes))
    key = engine.join([engine.load(A), engine.load(A[::-1])]).key
    engine.registry.pin(key)
    gc.collect()
    for number in range(6):
        engine.load(A[number + 1 :] + "x" * (number + 1))
    assert asked(engine, engine.get(key)).isfinite().all()


def test_after_a_head_was_removed_joinable_texts_are_stored_as_before(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    engine.load(A, joinable=True)
    engine.registry.remove(engine.load(A, joinable=True).key)
    assert engine.registry.contexts() == []  # nor what it was read behind
    context = engine.load(B, joinable=True, name="b")
    assert engine.get("b").key == context.key
    assert engine.load(B, joinable=True).receipt.hit  # type: ignore[union-attr]
    engine.close()


@pytest.mark.parametrize("share", [False, True])
def test_what_grew_from_a_join_stays_when_that_is_removed(tmp_path: Path, share: bool) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    join = engine.join([engine.load(A), engine.load(B)])
    child = engine.extend(join, HELLO, share=share)
    engine.registry.flush()
    engine.registry.remove(join.key)
    with child.lease() as lease:
        assert lease.receipt.hit
    session = engine.session(child)
    session.ask("Who?", max_new_tokens=2)
    assert engine.registry.find(session.fold(keep=0).key)
    engine.close()


def test_what_grows_from_a_join_is_as_old_as_its_oldest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path, ttl=1000)
    first, now = engine.load(A), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 600)
    join = engine.join([first, engine.load(B)])
    session = engine.session(join)
    session.ask("Who?", max_new_tokens=2)
    for context in (join, engine.extend(join, HELLO), engine.extend(join, HELLO, share=True), session.fold(keep=0)):
        assert (context.created, context.expires) == (first.created, first.expires)
    engine.close()


# -- room --------------------------------------------------------------------------------------------------------


def test_answers_over_joins_that_fit_one_by_one_take_turns(tmp_path: Path) -> None:
    nbytes = tiny_engine(ratio=0.5).load(A).nbytes
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path, device_bytes=int(2.9 * nbytes))
    engine.registry._memory.wait_s = 20
    a, b, c, d = (engine.load(A[number:] + "abcdefg"[:number]) for number in (0, 3, 5, 7))
    joins = [engine.join([a, b]), engine.join([c, d])]
    expected = [asked(engine, join) for join in joins]
    answers: list[list[torch.Tensor]] = [[], []]

    def ask(number: int) -> None:
        for _ in range(30):
            answers[number].append(asked(engine, joins[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, wanted in zip(answers, expected, strict=True):
        assert len(found) == 30
        assert all(torch.equal(answer, wanted) for answer in found)
    with engine.registry._memory.changed:
        assert not any(held.users for held in engine.registry._memory.device.held.values())
    engine.close()


def test_what_a_join_shares_twice_takes_room_once() -> None:
    engine = tiny_engine(ratio=0.5, device_bytes=int(3.5 * tiny_engine(ratio=0.5).load(A).nbytes))
    a, b = engine.load(A), engine.load(A[5:] + "abcde")
    both = engine.join([engine.join([a, b]), engine.join([b, a])])
    assert torch.equal(asked(engine, both), asked(engine, engine.join([a, b, b, a])))


def test_sharing_what_shares_ends_somewhere() -> None:
    engine = tiny_engine(ratio=1.0)
    context = engine.load("Hi.")
    for _ in range(63):
        context = engine.extend(context, HELLO, share=True, behind=True)
    assert len(context.parts) == 63
    with pytest.raises(InputError, match="65 contexts would share one behind another; at most 64 may: extend without share=True"):
        engine.extend(context, HELLO, share=True, behind=True)
    assert engine.extend(context, HELLO, behind=True).parts == context.parts


def test_joins_of_what_is_no_list_of_contexts_say_so() -> None:
    engine = tiny_engine(ratio=0.5)
    a, b = engine.load(A, name="a"), engine.load(B, name="b")
    for wrong in ("ab", a, None, 5):
        with pytest.raises(InputError, match="give a list of two contexts or more"):
            engine.join(wrong)  # type: ignore[arg-type]
    for wrong in ([a, None], [a, 5], [a, [b]], [a, b"b"]):
        with pytest.raises(InputError, match="is no context"):
            engine.join(wrong)  # type: ignore[list-item]
    with pytest.raises(InputError, match="store=False"):
        engine.join([a, b], name="both", store=False)
    assert engine.join(iter([a, b])).key == engine.join(["a", b]).key  # type: ignore[arg-type]


def test_what_a_removed_context_shares_is_not_stored_for_its_sake(tmp_path: Path) -> None:
    engine, other = (tiny_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))
    document = engine.load(A, joinable=True, tags="red")
    join = engine.join([document, engine.load(B, joinable=True, tags="red")], tags="red")
    expected = asked(engine, join)
    engine.registry.flush()
    other.forget("red")
    assert not other.registry.contexts()
    for context in (join, document, join):  # the template's head and the preamble, too, stay away
        asked(engine, context)
        assert not engine.registry.contexts()
    assert torch.equal(asked(engine, join), expected)
    engine.registry.flush()
    assert not files(tmp_path)


@pytest.mark.parametrize("deleted", ["removed", "forgotten", "head removed"])
@pytest.mark.parametrize("grows", ["extended", "folded", "joined"])
def test_what_grows_from_something_deleted_elsewhere_after_it_was_lost_is_not_stored(tmp_path: Path, deleted: str, grows: str) -> None:
    """The file had left the disk before: only the tag's note, or the head's, tells that nobody wants the document any more."""
    engine, other = (tiny_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))
    document = engine.load(A, joinable=deleted == "head removed", tags="red")
    engine.registry.flush()
    if deleted == "removed":
        other.registry.remove(document.key)
    for each in (engine, other) if deleted != "removed" else ():
        lose(each, document.key)
    if deleted == "forgotten":
        other.forget("red")
    elif deleted == "head removed":
        other.registry.remove(document.parts[0].key)
    session = engine.session(document)
    session.ask("Why?", max_new_tokens=2)
    grown = {
        "extended": lambda: engine.extend(document, HELLO, share=True),
        "folded": lambda: session.fold(keep=0),
        "joined": lambda: engine.join([document, document]),
    }[grows]()
    assert asked(engine, grown).isfinite().all()
    for each in (engine, other):
        each.registry.flush()
    stored = {entry.key: entry.parts for entry in engine.registry.contexts()}
    assert stored == {entry.key: entry.parts for entry in other.registry.contexts()}
    assert all(part in stored for parts in stored.values() for part in parts)
    assert grown.key not in stored


@pytest.mark.parametrize("kind", ["text", "joinable", "extended", "joined"])
@pytest.mark.parametrize("by", ["this process", "another"])
@pytest.mark.parametrize("how", ["removed", "forgotten"])
def test_a_handle_of_what_was_deleted_and_loaded_again_is_one_of_that(tmp_path: Path, kind: str, by: str, how: str) -> None:
    """Whoever found it by its key has no text of it, and needs none once others have loaded that again."""
    engine, other = (tiny_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))

    def load(engine: KVzipEngine) -> CompressedContext:
        document = engine.load(A, joinable=kind != "text", tags="red")
        if kind == "extended":
            return engine.extend(document, HELLO, share=True, tags="red")
        return engine.join([document, engine.load(B, joinable=True, tags="red")], tags="red") if kind == "joined" else document

    context = load(other)
    other.registry.flush()
    handle = engine.get(context.key)
    expected = asked(engine, handle)
    deleting = engine if by == "this process" else other
    if how == "forgotten":
        deleting.forget("red")
    else:
        for entry in sorted(deleting.registry.contexts(), key=lambda entry: -len(entry.parts)):
            if deleting.registry.find(entry.key):  # what a joinable text was read behind goes with it
                deleting.registry.remove(entry.key)
    assert not engine.registry.contexts()
    again = load(engine)
    engine.registry.flush()
    assert again.key == handle.key
    assert torch.equal(asked(engine, handle), expected)
    memory = engine.registry._memory
    with memory.changed:
        for held in memory.here(handle.key):
            memory.drop(held)
    assert torch.equal(asked(engine, handle), expected)


def test_joins_of_the_same_parts_in_any_order_and_number_end(tmp_path: Path) -> None:
    """Who holds a part waits for nobody who brings another."""
    nbytes = tiny_engine(ratio=0.5).load(A).nbytes
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path, device_bytes=int(2.4 * nbytes), host_bytes=0)
    engine.registry._memory.wait_s = 20
    a, b, k = (engine.load(A[number:] + "abcdefg"[:number]) for number in (0, 3, 5))
    engine.registry.flush()
    found: list[torch.Tensor] = []

    def ask(*contexts: CompressedContext) -> None:
        found.extend(asked(engine, engine.join(contexts, store=False)) for _ in range(15))

    threads = [threading.Thread(target=ask, args=pair) for pair in ((a, k), (b, k), (k, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 45
    engine.close()


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
@pytest.mark.parametrize("who", ["itself", "another process"])
def test_a_joinable_text_is_stored_whoever_forgets_the_last_other_one(
    tmp_path: Path, who: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, other = (tiny_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))
    engine.load(A, joinable=True, tags="a")
    engine.registry.flush()
    forgetting = engine if who == "itself" else other
    plain, done = engine._contexts._builder.build, list[str]()

    def build(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(when)
            forgetting.forget("a")
        return plain(*args, **kwargs)

    readmit = engine.registry.readmit

    def readmitted(key: str) -> None:
        readmit(key)
        if not done and len(engine.registry.find(key)) and key != b_key:
            done.append(when)
            forgetting.forget("a")

    b_key = tiny_engine(ratio=0.5).load(B, joinable=True).key
    monkeypatch.setattr(
        *((engine.registry, "readmit", readmitted) if when == "before it is read" else (engine._contexts._builder, "build", build))
    )
    context = engine.load(B, joinable=True, name="b")
    assert done
    engine.close()
    other.close()
    again = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    assert again.get("b").key == context.key
    assert asked(again, again.get("b")).isfinite().all()
    again.close()


def test_what_is_to_be_kept_is_kept_though_its_end_depends_on_what_follows() -> None:
    template = TEMPLATES["qwen3"]
    tokenizer = tiny("bytes NFC", template.special, template.tags)
    tokenizer.chat_template = template.template
    engine = KVzipEngine(tiny_model("llama", vocab_size=len(tokenizer) + 8), tokenizer, ratio=0.1)
    text, wanted = "The lamp is wound at dusk. " * 20 + "The door code is 8306.", "The door code is 8306."
    for joinable in (False, True):
        context = engine.load(text, keep=[wanted], joinable=joinable)
        tail = len(engine.text_ids(wanted)) - 2
        for layer in context.layers:
            for head in range(layer.n_heads):
                kept = layer.positions_of(head).tolist()
                assert {*range(context.n_tokens - tail, context.n_tokens)} <= {position + context.shift for position in kept}
