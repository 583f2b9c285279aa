"""Every family of the table in docs/models.md: what a model computes over contexts is what transformers computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import STRESS, TEXT, masked_logits, own_logits, row_over, same_pairs, tiny_tokenizer
from families import FAMILIES, HYBRIDS, LATENT, tiny_family
from kvzip_memory import BudgetError, CompressedContext, CorruptFileError, InputError, KVzipEngine, Session
from kvzip_memory.context import Resident
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.registry.disk.files import write_context
from kvzip_memory.registry.identity import NEWEST_FORMAT, other_version

QUESTION = "Which day does the donkey carry oil?"
MORE = "The lamp is blue, and the donkey is grey. " * 3


#: A family for each kind of layers; all of them under ``make stress``.
SOME_HYBRIDS = ["falcon_h1", "kimi_linear", "lfm2", "nemotron_h", "qwen3_5_text"]
SOME = ["cohere2", "deepseek_v3", "gemma2", "gemma3n_text", "gemma4_text", "gpt_oss", "llama", "llama4_text", "mimo_v2_flash", "qwen3_moe"]


@pytest.fixture(params=sorted(FAMILIES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(FAMILIES if STRESS else {*SOME, *SOME_HYBRIDS}))
def some(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(HYBRIDS if STRESS else SOME_HYBRIDS))
def hybrid(request: pytest.FixtureRequest) -> str:
    return request.param


def engine_of(kind: str, **options: object) -> KVzipEngine:
    return KVzipEngine(tiny_family(kind), tiny_tokenizer(), 0.4, **{"codec": "none", **options})  # type: ignore[arg-type]


def test_at_ratio_1_logits_equal_transformers_own(kind: str) -> None:
    check_at_ratio_1(kind, 3)


def test_of_3000_tokens_logits_equal_transformers_own(some: str) -> None:
    check_at_ratio_1(some, 10)


def check_at_ratio_1(kind: str, times: int) -> None:
    engine = engine_of(kind)
    context = engine.load(TEXT * times, ratio=1.0)
    ids = engine.prompt_ids(context, QUESTION)
    torch.testing.assert_close(engine.logits(context, ids), own_logits(engine, context, ids), atol=2e-4, rtol=1e-4)


def test_an_extension_equals_one_build(some: str) -> None:
    engine = engine_of(some)
    grown = engine.extend(engine.load(TEXT, ratio=1.0), MORE)
    ids = engine.prompt_ids(grown, QUESTION)
    torch.testing.assert_close(engine.logits(grown, ids), own_logits(engine, grown, ids), atol=2e-4, rtol=1e-4)


def test_a_compressed_context_equals_dense_attention_with_evicted_pairs_masked(kind: str) -> None:
    engine = engine_of(kind)
    context = engine.load(TEXT, ratio=0.3)
    ids = engine.prompt_ids(context, QUESTION)
    torch.testing.assert_close(engine.logits(context, ids), masked_logits(engine, context, ids), atol=1e-3, rtol=1e-4)
    grown = engine.extend(context, MORE)
    torch.testing.assert_close(engine.logits(grown, ids), masked_logits(engine, grown, ids, context), atol=1e-3, rtol=1e-4)


def test_a_reopened_context_is_the_same_to_the_last_bit(some: str, tmp_path: Path) -> None:
    engine = engine_of(some, cache_dir=tmp_path)
    context = engine.load(TEXT)
    ids = engine.prompt_ids(context, QUESTION)
    expected = engine.logits(context, ids)
    engine.close()
    again = engine_of(some, cache_dir=tmp_path)
    found = again.load(TEXT)
    assert found.receipt.tier == "disk"  # type: ignore[union-attr]
    assert same_pairs(context, found)
    assert torch.equal(again.logits(found, ids), expected)
    assert found.nbytes == context.nbytes
    opened = again.open(found.save(tmp_path / "one.kvzip"))
    assert torch.equal(again.logits(opened, ids), expected)


def test_rows_of_a_batch_equal_each_alone(some: str) -> None:
    engine = engine_of(some)
    contexts = [engine.load(TEXT, ratio=0.3), engine.load(MORE, ratio=0.6), engine.load(TEXT + MORE, ratio=1.0), None]
    rows = [row_over(contexts[i]) for i in (0, 1, 0, 2, 3, 3)]
    ids = [[5, 6, 7], [8], [9, 10, 11], [12, 13], [14], [15, 16, 17, 18]]
    alone = [engine.logits(contexts[i], each) for i, each in zip((0, 1, 0, 2, 3, 3), ids, strict=True)]
    together = engine._model.forward(rows, ids, n_logits=4)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    then = engine._model.forward(rows, [[20]] * 6)
    for row, logits, i, each in zip(rows, then, (0, 1, 0, 2, 3, 3), ids, strict=True):
        assert row.tail.length == len(each) + 1
        torch.testing.assert_close(logits, engine.logits(contexts[i], [*each, 20])[-1:], atol=2e-4, rtol=1e-4)


def test_in_bfloat16_logits_are_no_farther_than_transformers_own(some: str) -> None:
    exact = engine_of(some)
    context = exact.load(TEXT, ratio=1.0)
    ids = exact.prompt_ids(context, QUESTION)
    wanted = own_logits(exact, context, ids)
    engine = KVzipEngine(tiny_family(some).to(torch.bfloat16), tiny_tokenizer())
    rounded = engine.load(TEXT, ratio=1.0)
    ours, theirs = engine.logits(rounded, ids), own_logits(engine, rounded, ids).float()
    assert (ours - wanted).abs().mean() <= 1.5 * (theirs - wanted).abs().mean()


def test_the_bytes_of_a_context_are_known_before_it_is_built(some: str) -> None:
    engine = engine_of(some)
    for ratio in (0.3, 1.0):
        context = engine.load(TEXT, ratio=ratio)
        prompt = engine._contexts.prompt(engine._language, TEXT)
        assert engine._contexts._builder.sizes.nbytes(len(prompt.token_ids), prompt.protected, ratio) == context.nbytes
    with pytest.raises(BudgetError):
        engine_of(some, device_bytes=context.nbytes - 1).load(TEXT, ratio=1.0)
    assert engine_of(some, device_bytes=context.nbytes).load(TEXT, ratio=1.0).nbytes == context.nbytes


def test_a_file_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    """A header may say anything, with right checksums: that keys are their own values, that there are states."""
    for kind, other in (("llama", "deepseek_v3"), ("deepseek_v3", "llama"), ("llama", "lfm2"), ("lfm2", "llama"), ("cohere2", "llama")):
        engine, theirs = engine_of(kind), engine_of(other)
        context = theirs.load(TEXT)
        forged = replace(
            context,
            identity=engine.load(TEXT).identity,
            key=engine.load(TEXT).key,
            storage=Resident(context.layers, write_context, context.states),
        )
        path = forged.save(tmp_path / "forged.kvzip")
        with pytest.raises(CorruptFileError):
            engine.open(path)


# -- latents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(LATENT), indirect=True)
def test_latents_are_stored_once_for_all_heads(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind)
    context = engine.load(TEXT)
    width = 16 + 8  # the latent, and the rotated key
    for layer in context.layers:
        assert layer.shared
        assert layer.keys.shape == (sum(layer.lengths), width)
    pairs = sum(sum(layer.lengths) for layer in context.layers)
    assert context.nbytes == pairs * (4 * width + 4 + 2) + 4 * context.n_tokens
    assert context.save(tmp_path / "one.kvzip").stat().st_size < 1.5 * context.nbytes + (1 << 16)
    assert context.identity.get("refit") is None
    with pytest.raises(InputError, match="refit='none'"):
        engine_of(kind, refit="ridge")


@pytest.mark.parametrize("kind", sorted(LATENT), indirect=True)
def test_latents_are_not_expanded_while_answers_are_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(kind)
    context = engine.load(TEXT)
    (attention,) = {type(module) for module in engine.model.modules() if hasattr(module, "expand_kv")}
    original, lengths = attention.expand_kv, []

    def expand_kv(self: Any, latents: torch.Tensor, keys: torch.Tensor) -> Any:
        lengths.append(latents.shape[2])
        return original(self, latents, keys)

    monkeypatch.setattr(attention, "expand_kv", expand_kv)
    engine.generate(context, QUESTION, max_new_tokens=4)
    assert set(lengths) == {1}


# -- states ------------------------------------------------------------------------------------------------------


def test_states_are_counted_and_whole_at_any_ratio(hybrid: str) -> None:
    engine = engine_of(hybrid, refit="none")
    whole, small = engine.load(TEXT, ratio=1.0), engine.load(TEXT, ratio=0.2)
    assert whole.states.keys() == small.states.keys() != set()
    for name, state in whole.states.items():
        assert torch.equal(state, small.states[name])
    of_states = sum(state.untyped_storage().nbytes() for state in small.states.values())
    of_pairs = sum(t.untyped_storage().nbytes() for layer in small.layers for t in layer.tensors())
    assert small.nbytes == of_states + of_pairs + small.token_ids.untyped_storage().nbytes()


def test_a_cut_has_the_states_of_a_build(hybrid: str) -> None:
    engine = engine_of(hybrid, refit="none")
    engine.load(TEXT, ratio=0.6)
    cut = engine.load(TEXT, ratio=0.3)
    assert cut.receipt.shrunk_from == 0.6  # type: ignore[union-attr]
    built = engine_of(hybrid, refit="none").load(TEXT, ratio=0.3)
    assert same_pairs(cut, built)
    for name, state in built.states.items():
        assert torch.equal(state, cut.states[name])


@pytest.mark.parametrize("kind", [*SOME_HYBRIDS, "gpt_oss"])
def test_models_that_differ_in_a_recurrence_or_in_sinks_have_contexts_of_their_own(kind: str, tmp_path: Path) -> None:
    first = engine_of(kind, cache_dir=tmp_path)
    first.load(TEXT)
    first.close()
    model = tiny_family(kind)
    changed = [p for name, p in model.named_parameters() if any(word in name for word in ("A_log", "dt_bias", "conv", "ssm", "sinks"))]
    with torch.no_grad():
        changed[0].add_(0.1)
    assert KVzipEngine(model, tiny_tokenizer(), 0.4, cache_dir=tmp_path).load(TEXT).receipt.tier == "built"  # type: ignore[union-attr]


def expected_after(engine: KVzipEngine, session: Session) -> torch.Tensor:
    """Logits after all that was said, and a few ids more, read anew."""
    return engine.logits(session.context, [*session._talk.ids, 30, 31])[-2:]


def found_after(engine: KVzipEngine, session: Session) -> torch.Tensor:
    """The same from the session's own tail, once nothing is answered any more."""
    session._check_idle()
    context, tail = session.context, session._tail.copy()
    ids = [[*session._talk.ids[tail.length :], 30, 31]]
    if context is None:
        return engine._model.forward([Row((), 0, tail)], ids, n_logits=2)[0]
    with context.lease() as lease:
        return engine._model.forward([engine._model.row(lease, context.n_tokens, tail)], ids, n_logits=2)[0]


ENGINES: dict[str, KVzipEngine] = {}
STEPS = ["ask", "stream", "cancel", "stop", "fold", "extend", "reset", "fork", "speculate"]


TALKING = ["deepseek_v3", "falcon_h1", "gpt_oss", "kimi_linear", "lfm2", "llama4_text", "qwen3_next"]


@settings(max_examples=200 if STRESS else 14, deadline=None, derandomize=True)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=2, max_size=7), which=st.sampled_from(TALKING))
def test_whatever_a_session_does_its_states_are_those_of_what_was_said(steps: list[str], which: str) -> None:
    engine = ENGINES[which] = ENGINES.get(which) or engine_of(which)
    context: CompressedContext = engine.load(TEXT, ratio=0.5)
    session = engine.session(context)
    for step in steps:
        if step == "ask":
            session.ask("Who?", max_new_tokens=4)
        elif step == "speculate":
            session.ask("Say it again: oil on Tuesdays; oil on Tuesdays; oil on", max_new_tokens=8, speculate=True)
        elif step == "stream":
            list(session.stream("What?", max_new_tokens=4))
        elif step == "cancel":
            stream = session.stream("Where?", max_new_tokens=6)
            next(iter(stream), None)
            stream.close()
        elif step == "stop":
            session.ask("Which?", max_new_tokens=6, stop=["e", "a"])
        elif step == "fold" and session._talk.ends:
            session.fold(0)
        elif step == "extend":
            session = engine.session(engine.extend(context, MORE))
        elif step == "reset":
            session.reset()
        elif step == "fork":
            session = session.fork()
        found = found_after(engine, session)
        torch.testing.assert_close(found, expected_after(engine, session), atol=1e-3, rtol=1e-4)


def test_where_some_rows_of_a_batch_fail_none_counts(hybrid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(hybrid)
    context = engine.load(TEXT)
    rows, ids = [row_over(context), row_over(context)], [[5, 6, 7], [8]]
    original, calls = engine._model._eager, list[int]()

    def eager(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "_eager", eager)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine._model.forward(rows, ids)
    assert [row.tail.length for row in rows] == [0, 0]
    assert all(row.remembered is context.states or row.remembered.keys() == context.states.keys() for row in rows)
    for row, each, logits in zip(rows, ids, engine._model.forward(rows, ids), strict=True):
        assert row.tail.length == len(each)
        torch.testing.assert_close(logits, engine.logits(context, each)[-1:], atol=2e-4, rtol=1e-4)


def test_states_of_a_model_whose_dtype_changed_are_its_own(hybrid: str, tmp_path: Path) -> None:
    engine = engine_of(hybrid, cache_dir=tmp_path)
    engine.load(TEXT)
    engine.model.to(torch.bfloat16)
    context = engine.load(TEXT)
    assert engine.open(context.save(tmp_path / "one.kvzip")).key == context.key
    engine.close()
    again = engine_of(hybrid, cache_dir=tmp_path)
    again.model.to(torch.bfloat16)
    assert again.load(TEXT).receipt.tier == "disk"  # type: ignore[union-attr]


def test_files_with_states_or_latents_are_of_a_format_of_their_own() -> None:
    for kind, written in (("llama", 4), ("gemma4_text", 4), ("lfm2", 5), ("deepseek_v3", 5)):
        identity = engine_of(kind).load(TEXT).identity
        assert identity["format"] == written
        assert other_version(identity) is None
    for kind, written in (("llama", 6), ("lfm2", 7)):
        engine = engine_of(kind)
        identity = engine.extend(engine.load(TEXT), MORE, share=True).identity
        assert identity["format"] == written
        assert other_version(identity) is None
    for kind, written in (("llama", 8), ("deepseek_v3", 9)):
        engine = engine_of(kind)
        context = engine.load(TEXT)
        identity = engine.join([context, context], positions=context.n_tokens + 1).identity
        assert identity["format"] == written
        assert other_version(identity) is None
    for kind, written in (("llama", 10), ("lfm2", 11)):
        engine = engine_of(kind, codec="int4")
        context = engine.load(TEXT)
        assert context.identity["format"] == written
        shared = engine.extend(context, MORE, share=True)
        assert shared.identity["format"] == written + 2
        assert other_version(shared.identity) is None
    for kind, written in (("llama", 14), ("deepseek_v3", 15)):
        engine = engine_of(kind, codec="k8v4")
        context = engine.load(TEXT)
        assert engine.join([context, context], positions=context.n_tokens + 1).identity["format"] == written
    assert written == NEWEST_FORMAT
    coded, plain = engine_of("llama", codec="int8").load(TEXT), engine_of("llama")
    shares = plain.extend(coded, MORE, share=True)  # in numbers, behind codes
    join = plain.join([coded, plain.load(TEXT, joinable=True)])
    found = [context.identity["format"] for context in (shares, plain.extend(shares, MORE, share=False), join, plain.extend(join, MORE))]
    assert found == [12, 12, 12, 12]
    assert plain.extend(coded, MORE, share=False).identity["format"] == 4  # written anew
    assert other_version({**identity, "format": NEWEST_FORMAT + 1}) == "newer"
    assert other_version({**identity, "format": 3}) == "older"


def test_a_forward_that_fails_leaves_states_as_they_were(hybrid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(hybrid)
    context = engine.load(TEXT)
    row = Row(context.layers, context.n_tokens, Tail(), context.states)
    engine._model.forward([row], [[5, 6]])
    before = {name: state.clone() for name, state in row.remembered.items()}
    head = engine.model.get_output_embeddings()

    def broken(*args: object) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", broken)
        with pytest.raises(RuntimeError, match="out of order"):
            engine._model.forward([row], [[7]])
    assert row.tail.length == 2
    for name, state in row.remembered.items():
        assert torch.equal(state, before[name])
