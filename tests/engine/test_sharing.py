"""Contexts that share the pairs of another: what they answer, what they take, and what is lost with what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import ARCHITECTURES, TEXT, lose, masked_logits, merged, own_logits, same_pairs, tiny_engine
from kvzip_memory import BudgetError, CompressedContext, CorruptFileError, InputError, KVzipEngine
from kvzip_memory.cli import app
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.prompting.messages import Message

FIRST: list[Message] = [{"role": "user", "content": "Who carries oil?"}, {"role": "assistant", "content": "The donkey does, on Tuesdays."}]
SECOND: list[Message] = [{"role": "user", "content": "And the door code?"}, {"role": "assistant", "content": "It is 8306."}]
QUESTION = "What is wound at dusk?"


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[KVzipEngine]:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    yield engine
    engine.close()


def tree(
    engine: KVzipEngine, ratio: float | None = None
) -> tuple[CompressedContext, CompressedContext, CompressedContext, CompressedContext]:
    """A document, a conversation over it, what that has grown to, and one that shares the conversation."""
    document = engine.load(TEXT, name="document", ratio=ratio)
    first = engine.extend(document, FIRST, share=True)
    return document, first, engine.extend(first, SECOND), engine.extend(first, SECOND, share=True)


def logits(engine: KVzipEngine, context: CompressedContext) -> torch.Tensor:
    return engine.logits(context, engine.prompt_ids(context, QUESTION))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_ratio_1_it_is_what_the_model_computes(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=1.0)
    for context in tree(engine):
        ids = engine.prompt_ids(context, QUESTION)
        torch.testing.assert_close(engine.logits(context, ids), own_logits(engine, context, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_sees_what_is_kept_of_all_parts(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.3)
    document, first, grown, shared = tree(engine)
    for context, ancestors in ((first, [document]), (grown, [document, first]), (shared, [document, first])):
        ids = engine.prompt_ids(context, QUESTION)
        expected = masked_logits(engine, context, ids, *ancestors)
        torch.testing.assert_close(engine.logits(context, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_own_pairs_are_those_of_what_is_new(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.3, refit="none")
    document, first, grown, shared = tree(engine)
    dense = engine.extend(document, FIRST, ratio=1.0, share=True)
    assert [part.key for part in grown.parts] == [document.key]
    assert [part.key for part in shared.parts] == [document.key, first.key]
    assert [part.n_tokens for part in shared.parts] == [document.n_tokens, first.n_tokens - document.n_tokens]
    for context, parent in ((first, document), (grown, document), (shared, first)):
        own = context.n_tokens - parent.n_tokens
        assert context.shared_tokens == parent.n_tokens
        assert context.kept_pairs == round(0.3 * context.storage.full_heads * own)
        assert context.total_pairs == context.storage.full_heads * own
        assert all(layer.window or layer.positions.min() >= parent.n_tokens for layer in context.layers)
    with first.lease() as lease:
        assert all(x.keys is y.keys for x, y in zip(lease.before[0], document.layers, strict=True))
    for layer, all_of_it in zip(first.layers, dense.layers, strict=True):  # of what was computed behind the same pairs
        for head in range(layer.n_heads if layer.window is None else 0):
            at = torch.searchsorted(all_of_it.positions_of(head), layer.positions_of(head))
            assert torch.equal(layer.head(head)[0], all_of_it.head(head)[0][at])


def test_what_a_parent_has_ranked_otherwise_can_be_shared() -> None:
    engine, other = tiny_engine(ratio=0.5), tiny_engine(ratio=0.5, scorer=KVzipScorer(chunk_tokens=400))
    document = engine.load(TEXT)
    with pytest.raises(InputError, match="share=True"):
        other.extend(document, FIRST)
    assert logits(other, other.extend(document, FIRST, share=True)).isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_session_over_a_document_folds_into_pairs_of_its_own(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    document = engine.load(TEXT)
    session = engine.session(document)
    for question in ("Who carries oil?", "When?", "Why?"):
        session.ask(question, max_new_tokens=4)
        if len(session._talk.ends) > 1:
            session.fold(keep=1)
    assert session.context is not None
    assert [part.key for part in session.context.parts] == [document.key]
    assert session.context.nbytes < document.nbytes
    assert session.ask("And then?", max_new_tokens=4).text is not None


def test_one_document_is_stored_once_for_many(stored: KVzipEngine, tmp_path: Path) -> None:
    document = stored.load(TEXT, name="document")
    stored.registry.flush()
    alone = stored.registry.stats()["tiers"]["disk"]["nbytes"]
    many = [stored.extend(document, [{"role": "user", "content": f"I am number {i}."}], share=True) for i in range(10)]
    stored.registry.flush()
    tiers = stored.registry.stats()["tiers"]
    assert tiers["device"]["nbytes"] == document.nbytes + sum(context.nbytes for context in many)
    assert all(context.nbytes < document.nbytes / 3 for context in many)
    files = {path.stem: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    assert tiers["disk"]["nbytes"] == sum(files.values())
    assert max(files[context.key] for context in many) < alone


def test_a_restart_finds_it_by_name_key_and_text(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    *_, shared = tree(engine)
    expected, ids = logits(engine, shared), [*shared.token_ids.tolist(), *engine.prompt_ids(shared, QUESTION)]
    named = engine.extend(engine.get(shared.key), [{"role": "user", "content": "Bye."}], name="bye", share=True)
    told = logits(engine, named)
    engine.close()
    again = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    found = again.get(shared.key)
    assert torch.equal(logits(again, found), expected)
    assert torch.equal(logits(again, again.get("bye")), told)
    assert [part.key for part in again.get("bye").parts] == [*(part.key for part in shared.parts), shared.key]
    prefix = again.stored_prefix(ids, 0.5)
    assert prefix is not None
    assert prefix.key in (shared.key, tree(again)[2].key)
    assert all(context.receipt is not None and context.receipt.hit for context in tree(again))
    again.close()


@pytest.mark.parametrize("lost", [[0], [1], [0, 1], [0, 1, 2], [0, 1, 2, 3]])
def test_what_was_lost_is_made_again(lost: list[int], tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    contexts = tree(engine)
    expected = [logits(engine, context) for context in contexts]
    for number in lost:
        lose(engine, contexts[number].key)
    for context, wanted in zip(contexts[::-1], expected[::-1], strict=True):
        torch.testing.assert_close(logits(engine, context), wanted, atol=1e-5, rtol=1e-5)
    engine.close()


def test_without_its_text_a_lost_part_is_told_of(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    document, first, *_ = tree(engine)
    engine.close()
    (tmp_path / "contexts" / "blobs" / document.key[:2] / f"{document.key}.safetensors").unlink()
    again = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    with pytest.raises(InputError, match=f"shares the pairs of context {document.key[:12]}, which is not stored"):
        again.get(first.key)
    assert f"what it shares is not stored: {document.key[:12]}" in str(again.registry.verify(first.key))
    again.load(TEXT)
    assert again.get(first.key).n_tokens == first.n_tokens
    assert again.registry.verify(first.key) is None
    again.close()


def test_what_is_shared_is_deleted_last(stored: KVzipEngine) -> None:
    document, first, grown, shared = tree(stored)
    for held, by in ((document, (first, grown, shared)), (first, (shared,))):
        with pytest.raises(InputError, match="are shared by") as error:
            stored.registry.remove(held.key)
        assert all(other.key[:12] in str(error.value) for other in by)
    for context in (shared, first, grown, document):
        stored.registry.remove(context.key)
    assert stored.registry.contexts() == []
    tiers = stored.registry.stats()["tiers"]
    assert tiers["device"]["nbytes"] == tiers["disk"]["nbytes"] == 0


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "on disk"])
def test_what_is_forgotten_takes_along_what_shares_it(in_memory: bool, tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    document = engine.load(TEXT, tags="document: a")
    first = engine.extend(document, FIRST, share=True, tags="thread: ana", name="ana")
    other = engine.extend(document, SECOND, tags="thread: bob")
    engine.registry.flush()
    if not in_memory:
        engine.close()
        engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    forgotten = engine.forget("document: a")
    assert {entry.key for entry in forgotten.deleted} == {document.key, first.key}
    assert [entry.key for entry in engine.registry.contexts()] == [other.key]
    engine.close()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or first.key.encode() not in path.read_bytes(), path
        assert path.stem != document.key


def test_over_what_was_forgotten_nothing_is_stored(stored: KVzipEngine, tmp_path: Path) -> None:
    document = stored.load(TEXT, tags="document: a")
    session = stored.session(document)
    session.ask("Who carries oil?", max_new_tokens=4)
    expected = logits(stored, stored.extend(document, FIRST, share=True))
    stored.forget("document: a")
    folded = session.fold(keep=0)
    assert folded.receipt is not None
    assert folded.receipt.reason == "removed"
    assert session.ask("When?", max_new_tokens=4).text is not None
    session.fold(keep=0)
    torch.testing.assert_close(logits(stored, stored.extend(document, FIRST, share=True)), expected)
    stored.registry.flush()
    assert not [*tmp_path.rglob("*.safetensors")]
    assert stored.registry.contexts() == []
    again = stored.load(TEXT)
    stored.extend(again, FIRST, share=True)
    stored.registry.flush()
    assert len([*tmp_path.rglob("*.safetensors")]) == 2


def test_a_conversation_is_forgotten_and_its_document_stays(stored: KVzipEngine) -> None:
    document = stored.load(TEXT, name="document", tags="thread: ana")
    first = stored.extend(document, FIRST, share=True, tags="thread: ana")
    forgotten = stored.forget("thread: ana")
    assert [entry.key for entry in forgotten.deleted] == [first.key]
    assert [entry.key for entry in forgotten.kept] == [document.key]


def test_another_process_does_not_write_it_again(tmp_path: Path) -> None:
    one, other = (tiny_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))
    document = one.load(TEXT, tags="document: a")
    one.registry.flush()
    mine = other.load(TEXT)
    other.registry._writing.write_behind = lambda *given: False  # type: ignore[method-assign]
    first = other.extend(mine, FIRST, share=True)  # in its memory alone
    del other.registry._writing.write_behind  # type: ignore[attr-defined]
    one.forget("document: a")
    other.registry.flush()
    other.close()
    one.close()
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.stem in (document.key, first.key)]


def test_a_budget_of_disk_spares_what_is_shared(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path)
    document = engine.load(TEXT)
    engine.registry.flush()
    nbytes = engine.registry.stats()["tiers"]["disk"]["nbytes"]
    engine.close()
    engine = tiny_engine(ratio=0.5, cache_dir=tmp_path, disk_bytes=int(2.6 * nbytes))
    for number in range(12):
        engine.extend(document, [{"role": "user", "content": f"I am number {number}. " + "Hello! " * number}], share=True)
        engine.registry.flush()
        there = {path.stem for path in (tmp_path / "contexts" / "blobs").rglob("*.safetensors")}
        assert document.key in there
        assert len(there) > 1
    assert len(there) < 13
    engine.load("Something else is told here. " * 12)  # takes more than what is left beside the document
    engine.registry.flush()
    left = [path.stem for path in (tmp_path / "contexts" / "blobs").rglob("*.safetensors")]
    assert document.key not in left or len(left) > 1
    engine.close()


def test_a_budget_of_the_device_lets_what_shares_leave_first(tmp_path: Path) -> None:
    whole = tiny_engine(ratio=0.5)
    document = whole.load(TEXT)
    nbytes = document.nbytes
    engine = tiny_engine(ratio=0.5, device_bytes=int(1.3 * nbytes))
    document = engine.load(TEXT)
    many = [engine.extend(document, [{"role": "user", "content": f"I am number {i}."}], share=True) for i in range(8)]
    held = set(engine.registry._memory.device.held)
    assert document.key in held
    assert 1 < len(held) < 9
    for context in many:
        assert logits(engine, context).isfinite().all()
    with pytest.raises(BudgetError, match="device_bytes is"):
        tiny_engine(ratio=0.5, device_bytes=nbytes + 100).extend(document, FIRST, share=True)


def test_a_file_has_all_it_takes(stored: KVzipEngine, tmp_path: Path) -> None:
    for number, context in enumerate(tree(stored)):
        path = context.save(tmp_path / f"{number}.safetensors")
        elsewhere = tiny_engine(ratio=0.5)
        opened = elsewhere.open(path)
        assert opened.parts == context.parts
        assert (opened.nbytes, opened.shared_nbytes, opened.kept_pairs) == (context.nbytes, context.shared_nbytes, context.kept_pairs)
        assert torch.equal(logits(elsewhere, opened), logits(stored, context))
        for share in (False, True):
            grown, here = (engine.extend(c, FIRST, share=share) for engine, c in ((elsewhere, opened), (stored, context)))
            assert grown.key == here.key
            torch.testing.assert_close(logits(elsewhere, grown), logits(stored, here), atol=1e-5, rtol=1e-5)
            saved = grown.save(tmp_path / "grown.safetensors")
            assert same_pairs(tiny_engine(ratio=0.5).open(saved), grown)


def test_a_stored_file_is_not_opened_without_what_it_shares(stored: KVzipEngine, tmp_path: Path) -> None:
    first = tree(stored)[1]
    stored.registry.flush()
    (path,) = [path for path in tmp_path.rglob("*.safetensors") if path.stem == first.key]
    with pytest.raises(CorruptFileError, match="of a cache folder, and lacks what it shares"):
        stored.open(path)


def test_ls_shows_a_tree(stored: KVzipEngine, tmp_path: Path) -> None:
    document, first, grown, shared = tree(stored)
    stored.close()
    out = CliRunner().invoke(app, ["ls", "--tree", "--cache-dir", str(tmp_path)])
    assert out.exit_code == 0, out.output
    shown = out.output
    at = {context.key: shown.index(context.key[:8]) for context in (document, first, grown, shared)}
    assert at[document.key] < min(at[first.key], at[grown.key])
    assert at[first.key] < at[shared.key]
    out = CliRunner().invoke(app, ["ls", "--json", "--cache-dir", str(tmp_path)])
    parts = {facts["key"]: facts["parts"] for facts in json.loads(out.stdout)}
    assert parts == {document.key: [], first.key: [document.key], grown.key: [document.key], shared.key: [document.key, first.key]}


def test_the_merged_pairs_are_each_there_once(stored: KVzipEngine) -> None:
    for context in tree(stored):
        for layer in merged(context):
            at = torch.stack([layer.heads(), layer.positions])
            assert at.unique(dim=1).shape == at.shape
