"""Contexts grown from others, and sessions folded into them."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEXT, kept_at, kept_positions, masked_logits, own_logits, row_over, tiny_engine
from kvzip_memory import CompressedContext, InputError, KVzipEngine, Session, WindowError
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.compression.scorers.kvzip import REPEATED
from kvzip_memory.prompting.documents import Document
from kvzip_memory.registry.disk.doctor import examine

FIRST = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": TEXT},
    {"role": "assistant", "content": "Thank you, I shall remember that."},
]
SECOND = [
    {"role": "user", "content": "The keeper's name is Ottoline and her boat is called Petrel. " * 2},
    {"role": "assistant", "content": "Noted."},
]
THIRD = [{"role": "user", "content": "On Fridays the oil is sent back."}, {"role": "assistant", "content": "Noted, too."}]
QUESTION = "Which day does the donkey carry oil?"


def chain(engine: KVzipEngine, *ratios: float) -> list[CompressedContext]:
    contexts = [engine.load(FIRST, ratio=ratios[0])]
    for more, ratio in zip((SECOND, THIRD), ratios[1:], strict=False):
        contexts.append(engine.extend(contexts[-1], more, ratio=ratio))
    return contexts


def pairs_of(context: CompressedContext) -> list[torch.Tensor]:
    return [t.clone() for layer in context.layers for t in layer.tensors()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# -- what the model sees --------------------------------------------------------------------------------------------


def test_the_ids_are_those_of_the_whole_conversation(engine: KVzipEngine) -> None:
    contexts = chain(engine, 0.5, 0.5, 0.5)
    whole = engine.load([*FIRST, *SECOND, *THIRD])
    assert contexts[-1].token_ids.tolist() == whole.token_ids.tolist()
    assert contexts[-1].recipe == whole.recipe
    assert engine.extend(contexts[0], [*FIRST, *SECOND]).key == contexts[1].key  # a conversation may be repeated
    ids = engine.prompt_ids(None, [*FIRST, *SECOND, *THIRD, {"role": "user", "content": QUESTION}])
    assert ids == contexts[-1].token_ids.tolist() + engine.prompt_ids(contexts[-1], QUESTION)


def test_what_comes_behind_a_conversation_may_say_the_same_again(engine: KVzipEngine) -> None:
    said, question = FIRST[1:], {"role": "user", "content": QUESTION}
    talk = engine.load(said, ratio=1.0)
    twice = engine.extend(talk, said, behind=True)
    assert twice.token_ids.tolist() == engine.load([*said, *said]).token_ids.tolist()
    whole = engine.generate(None, [*said, *said, question], max_new_tokens=12)
    again = engine.generate(talk, [*said, question], behind=True, max_new_tokens=12)
    assert (again.text, again.usage.input_tokens) == (whole.text, whole.usage.input_tokens)
    assert engine.session(talk).ask([*said, question], behind=True, max_new_tokens=12).text == whole.text
    assert engine.generate(talk, [*said, question], max_new_tokens=12).usage.input_tokens < whole.usage.input_tokens


def test_at_ratio_1_logits_equal_one_dense_prefill_of_everything(architecture: str) -> None:
    engine = tiny_engine(architecture)
    child = chain(engine, 1.0, 1.0, 1.0)[-1]
    assert child.kept_pairs == child.total_pairs
    ids = engine.prompt_ids(child, QUESTION)
    torch.testing.assert_close(engine.logits(child, ids), own_logits(engine, child, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratios", [(0.5, 0.5, 0.5), (0.4, 1.0, 0.6), (1.0, 0.5, 0.3)])
def test_below_ratio_1_each_generation_sees_what_the_one_before_has_kept(architecture: str, ratios: tuple[float, ...]) -> None:
    engine = tiny_engine(architecture)
    *ancestors, child = chain(engine, *ratios)
    ids = engine.prompt_ids(child, QUESTION)
    ours = engine.logits(child, ids)
    torch.testing.assert_close(ours, masked_logits(engine, child, ids, *ancestors), atol=1e-4, rtol=0)
    assert (ours - own_logits(engine, child, ids)).abs().max() > 0.01  # eviction shows


def test_smollm2_at_ratio_1_equals_transformers(exact: KVzipEngine, excerpt: str) -> None:
    context = exact.load(excerpt[:1500], ratio=1.0)
    context = exact.extend(context, [{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "Nobody says."}])
    ids = exact.prompt_ids(context, "What is the telephone number of head office?")
    torch.testing.assert_close(exact.logits(context, ids), own_logits(exact, context, ids), atol=1e-4, rtol=0)


def test_documents_follow_documents_each_under_its_header(architecture: str) -> None:
    engine = tiny_engine(architecture)
    both = engine.extend(engine.load(Document(TEXT, "lamp"), ratio=1.0), Document("The boat is called Petrel.", "boat"))
    assert [source.name for source in both.sources] == ["lamp", "boat"]
    texts = [engine.tokenizer.decode(both.token_ids[source.start : source.end]) for source in both.sources]
    assert texts == [TEXT, "The boat is called Petrel."]
    assert "Document 2: boat" in engine.tokenizer.decode(both.token_ids)
    ids = engine.prompt_ids(both, QUESTION)
    torch.testing.assert_close(engine.logits(both, ids), own_logits(engine, both, ids), atol=1e-4, rtol=0)


# -- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
def test_one_budget_holds_for_stored_and_new_pairs(allocator: str) -> None:
    engine = tiny_engine(allocator=allocator)
    for ratio in (0.5, 0.3):
        parent = engine.load(FIRST, ratio=0.5)
        child = engine.extend(parent, SECOND, ratio=ratio)
        budget = kept_at(ratio, child)
        assert child.kept_pairs == budget if allocator == "global" else budget * 0.9 < child.kept_pairs <= budget
        for before, after in zip(kept_positions(parent), kept_positions(child), strict=True):
            assert not (after[:, : parent.n_tokens] & ~before).any()  # nothing evicted comes back
            assert after[:, parent.n_tokens :].any()
            assert after[:, : child.protected].all()


def test_the_parents_pairs_are_ranked_by_their_stored_scores_as_they_have_faded(architecture: str) -> None:
    engine = tiny_engine(architecture)
    parent = engine.load(FIRST, ratio=0.6)
    child = engine.extend(parent, SECOND, ratio=0.4)
    [curve] = engine._contexts._builder._fadings.values()
    fading = curve.between(parent.n_tokens, child.n_tokens)
    assert (fading != 1).any()
    stored = torch.stack([layer.dense_scores(parent.n_tokens) for layer in parent.layers if layer.window is None])
    stored = (stored * fading).half()
    kept = torch.stack([layer.dense_scores(child.n_tokens) for layer in child.layers if layer.window is None])
    assert child.kept_pairs == kept_at(0.4, child)
    threshold = kept[~kept.isneginf()].min()
    of_parent = kept[:, :, : parent.n_tokens]
    assert torch.equal(of_parent[~of_parent.isneginf()], stored[~of_parent.isneginf()])
    assert stored[of_parent.isneginf()].max() <= threshold


def test_a_budget_larger_than_what_is_left_keeps_what_is_left(engine: KVzipEngine) -> None:
    parent = engine.load(FIRST, ratio=0.2)
    child = engine.extend(parent, SECOND, ratio=0.9)
    assert child.kept_pairs == parent.kept_pairs + child.total_pairs - parent.total_pairs


def test_kept_strings_of_both_are_never_evicted(engine: KVzipEngine) -> None:
    parent = engine.load(FIRST, ratio=0.4, keep="8306")
    child = engine.extend(parent, SECOND, ratio=0.15, keep="Petrel")
    grandchild = engine.extend(child, THIRD, ratio=0.15)
    ids = grandchild.token_ids.tolist()
    for wanted in ("8306", "Petrel"):
        spelled = engine.tokenizer(wanted).input_ids
        found = [i for i in range(len(ids)) if ids[i : i + len(spelled)] == spelled]
        assert len(found) > 1
        for at in found:
            assert all(kept[:, at : at + len(spelled)].all() for kept in kept_positions(grandchild))


def test_the_parent_is_not_touched_and_its_key_is_part_of_the_childs(engine: KVzipEngine) -> None:
    parent, other = engine.load(FIRST, ratio=0.5), engine.load(FIRST, ratio=0.4)
    before = pairs_of(parent)
    child = engine.extend(parent, SECOND)
    assert equal(before, pairs_of(parent))
    assert child.identity["parent"] == parent.key
    assert child.ratio == 0.5
    sibling = engine.extend(other, SECOND, ratio=0.5)
    assert sibling.key != child.key
    assert sibling.receipt is not None
    assert sibling.receipt.differs == ("parent",)


def test_scores_of_a_parent_at_ratio_1_are_made_when_they_are_needed() -> None:
    """A parent that was never ranked is ranked together with what follows, as one text."""
    engine = tiny_engine(refit="none")
    whole = engine.load([*FIRST, *SECOND], ratio=0.4)
    grown = engine.extend(engine.load(FIRST, ratio=1.0), SECOND, ratio=0.4)
    for one, other in zip(whole.layers, grown.layers, strict=True):
        assert one.lengths == other.lengths
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("repeat", ["local", "whole"])
def test_either_repeat_pass_grows_contexts(architecture: str, repeat: Any) -> None:
    engine = tiny_engine(architecture, scorer=KVzipScorer(repeat=repeat))
    child = chain(engine, 0.5, 0.5)[-1]
    assert child.kept_pairs == kept_at(0.5, child)


# -- the registry ---------------------------------------------------------------------------------------------------


def test_children_are_found_again_on_disk_cut_down_saved_and_opened(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, refit="none")
    child = chain(engine, 0.6, 0.6, 0.6)[-1]
    before = pairs_of(child)
    file = child.save(tmp_path / "child.safetensors")
    engine.close()
    assert all(finding.level != "problem" for finding in examine(tmp_path / "contexts"))

    later = tiny_engine(cache_dir=tmp_path, refit="none")
    parent = later.extend(later.load(FIRST, ratio=0.6), SECOND)
    again = later.extend(parent, THIRD)
    assert [c.receipt.tier for c in (parent, again) if c.receipt] == ["disk", "disk"]
    assert equal(before, pairs_of(again))
    assert equal(before, pairs_of(later.get(child.key)))
    assert later.registry.verify(child.key) is None
    assert equal(before, pairs_of(later.open(file)))
    smaller = later.extend(parent, THIRD, ratio=0.45)
    assert smaller.receipt is not None
    assert smaller.receipt.shrunk_from == 0.6
    built = tiny_engine(refit="none")
    assert equal(pairs_of(smaller), pairs_of(built.extend(chain(built, 0.6, 0.6)[-1], THIRD, ratio=0.45)))
    # a context opened from a file can be a parent
    assert later.extend(later.open(file), [{"role": "user", "content": "More."}]).identity["parent"] == child.key


def test_a_child_that_was_lost_with_its_ancestors_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    contexts = chain(engine, 0.5, 0.5, 0.5)
    ids = engine.prompt_ids(contexts[-1], QUESTION)
    before, logits = pairs_of(contexts[-1]), engine.logits(contexts[-1], ids)
    for context in contexts:
        engine.registry.remove(context.key)
    assert torch.equal(engine.logits(contexts[-1], ids), logits)
    assert equal(before, pairs_of(contexts[-1]))


def test_a_lost_parent_is_built_before_the_lock_of_its_child_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some keys share a lock file; here all do."""
    from kvzip_memory.registry.disk.folder import Folder

    lock = Folder.lock
    monkeypatch.setattr(Folder, "lock", lambda self, key: lock(self, "000"))
    engine = tiny_engine(cache_dir=tmp_path)
    contexts = chain(engine, 0.5, 0.5, 0.5)
    for context in contexts:
        engine.registry.remove(context.key)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(engine.logits(contexts[-1], [5])), daemon=True)
    thread.start()
    thread.join(60)
    assert found


def test_a_child_is_built_once_for_many_threads_and_spills_like_any_other(tmp_path: Path) -> None:
    engine = tiny_engine()
    parent = engine.load(FIRST, ratio=0.5)
    tiers: list[str] = []
    threads = [threading.Thread(target=lambda: tiers.append(str(engine.extend(parent, SECOND).receipt.tier))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tiers) == ["built", *["device"] * 7]
    size = engine.extend(parent, SECOND).nbytes

    small = tiny_engine(cache_dir=tmp_path, device_bytes=round(2.5 * size))
    contexts = chain(small, 0.5, 0.5, 0.5)
    ids = small.prompt_ids(contexts[-1], QUESTION)
    expected = engine.logits(chain(engine, 0.5, 0.5, 0.5)[-1], ids)
    for context in [*contexts, *contexts]:
        small.logits(context, [5])
    assert torch.equal(small.logits(contexts[-1], ids), expected)
    assert small.stats()["evictions"] > 0


def test_a_handle_of_a_child_holds_no_pairs(engine: KVzipEngine) -> None:
    child = chain(engine, 0.5, 0.5)[-1]
    watched = [weakref.ref(t) for layer in child.layers for t in layer.tensors()]
    for entry in engine.registry.contexts():
        engine.registry.remove(entry.key)
    gc.collect()
    assert not any(ref() is not None for ref in watched)


# -- what cannot be -------------------------------------------------------------------------------------------------


def test_what_cannot_follow_is_an_error(engine: KVzipEngine) -> None:
    page, talk = engine.load(TEXT, ratio=0.5), engine.load(FIRST, ratio=0.5)
    with pytest.raises(InputError, match="conversation"):
        engine.extend(talk, "A page.")
    with pytest.raises(InputError, match="conversation"):
        engine.extend(engine.extend(page, SECOND), "A page.")
    with pytest.raises(InputError, match="add nothing"):
        engine.extend(talk, FIRST)
    with pytest.raises(InputError, match="'assistant'"):
        engine.extend(talk, [{"role": "assistant", "content": "And another thing."}])
    with pytest.raises(InputError, match="does not occur"):
        engine.extend(talk, SECOND, keep="8306")
    with pytest.raises(InputError, match="fraction of pairs kept"):
        engine.extend(talk, SECOND, ratio=1.5)
    with pytest.raises(WindowError, match="tokens"):
        engine.extend(talk, [{"role": "user", "content": "long " * 500}])
    other = tiny_engine(scorer=KVzipScorer(aggregation="max"))
    with pytest.raises(InputError, match="cannot be compared"):
        other.extend(talk, SECOND)


# -- folding --------------------------------------------------------------------------------------------------------


def talked(engine: KVzipEngine, context: CompressedContext | None, turns: int = 3) -> Session:
    session = engine.session(context)
    for turn in range(turns):
        session.ask(f"What is on page {turn}?", max_new_tokens=7)
    return session


def probe(session: Session) -> torch.Tensor:
    """Logits of the next turn's tokens, without changing the session."""
    twin = session.fork()
    ids = twin._talk.ask(QUESTION, None, False, twin._tail.length).ids
    return twin._model.forward([row_over(twin.context, twin._tail)], [ids], n_logits=len(ids))[0][-10:]


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("with_context", [True, False])
def test_at_ratio_1_a_folded_session_goes_on_as_if_it_were_not(architecture: str, keep: int, with_context: bool) -> None:
    engine = tiny_engine(architecture)
    session = talked(engine, engine.load(FIRST, ratio=1.0) if with_context else None)
    plain, before, tokens = session.fork(), probe(session), session.n_tokens
    context = session.fold(keep, ratio=1.0)
    assert session.n_tokens == tokens
    assert session.context is context
    torch.testing.assert_close(probe(session), before, atol=1e-4, rtol=0)
    assert session.ask(QUESTION, max_new_tokens=12).text == plain.ask(QUESTION, max_new_tokens=12).text


def test_folding_feeds_nothing_but_what_ranks_the_pairs(engine: KVzipEngine) -> None:
    session = talked(engine, engine.load(FIRST, ratio=0.5))
    engine.extend(engine.load(FIRST, ratio=0.5), SECOND)  # it is known how scores fade
    fed: list[int] = []
    hook = engine.model.model.register_forward_pre_hook(lambda m, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    cut = session._talk.ends[1]
    session.fold(1, ratio=0.5)
    hook.remove()
    assert max(cut, REPEATED) < sum(fed) < max(cut, REPEATED) + 150  # one repeat: its prompt, the folded tokens and some before them


def test_a_folded_session_equals_dense_attention_with_evicted_pairs_masked(architecture: str) -> None:
    engine = tiny_engine(architecture)
    parent = engine.load(FIRST, ratio=0.5)
    session = talked(engine, parent)
    child = session.fold(1, ratio=0.4)
    kept_turn = session._talk.ids[: session._tail.length]
    ids = session._talk.ask(QUESTION, None, False, session._tail.length).ids
    ours = session._model.forward([row_over(child, session._tail)], [ids], n_logits=len(ids))[0]
    theirs = masked_logits(engine, child, [*kept_turn, *ids], parent, folded_at=child.n_tokens + len(kept_turn))[len(kept_turn) :]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_fold_is_found_by_the_next_session_with_the_same_turns(engine: KVzipEngine) -> None:
    parent = engine.load(FIRST, ratio=0.5)
    one, two = talked(engine, parent), talked(engine, parent)
    first, second = one.fold(1, name="talk"), two.fold(1)
    assert first.key == second.key == engine.get("talk").key
    assert second.receipt is not None
    assert second.receipt.tier == "device"
    before = pairs_of(first)
    engine.registry.remove(first.key)
    one.ask(QUESTION, max_new_tokens=3)  # read again from its tokens
    for x, y in zip(before, pairs_of(first), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_a_session_can_be_folded_again_and_again(architecture: str) -> None:
    engine = tiny_engine(architecture)
    session = engine.session()
    contexts = []
    for turn in range(5):
        session.ask(f"What is on page {turn}?", max_new_tokens=5)
        contexts.append(session.fold(0, ratio=0.6))
    for parent, child in pairwise(contexts):
        assert child.identity["parent"] == parent.key
        assert child.kept_pairs == kept_at(0.6, child)
    assert contexts[0].protected == len(engine._prompts.free_recipe().opening)
    session.reset()
    assert session.n_tokens == contexts[-1].n_tokens


def test_there_must_be_a_turn_to_fold(engine: KVzipEngine) -> None:
    session = talked(engine, None, turns=1)
    for keep in (-1, 1, 5):
        with pytest.raises(InputError, match="1 turns"):
            session.fold(keep)
    tokens = session.n_tokens
    with pytest.raises(InputError, match="ratio"):
        session.fold(0, ratio=2.0)
    assert session.n_tokens == tokens


def test_a_session_that_folds_twice_has_the_contexts_of_one_that_was_extended(engine: KVzipEngine) -> None:
    session = engine.session(engine.load(FIRST))
    for question in ("Which day?", "What is wound?", "Who?"):
        session.ask(question, max_new_tokens=6)
    session.fold(1, ratio=0.4)
    folded = session.fold(0, ratio=0.4)
    once = pairs_of(folded)
    engine.registry.remove(folded.key)
    with folded.lease() as lease:  # built again
        again = [t for layer in lease.layers for t in layer.tensors()]
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_a_child_that_fits_is_built_although_its_parent_does_not_fit_beside_it(engine: KVzipEngine) -> None:
    size = engine.extend(engine.load(FIRST, ratio=0.5), SECOND).nbytes
    small = tiny_engine(device_bytes=int(1.2 * size))
    small.registry._memory.wait_s = 1
    child = small.extend(small.load(FIRST, ratio=0.5), SECOND)
    assert small.generate(child, QUESTION, max_new_tokens=4).receipt.tier == "device"
