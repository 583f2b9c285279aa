"""Scores, budgets and eviction."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEXT, kept_at, kept_positions, masked_logits, tiny_engine
from kvzip_memory import InputError, KVzipEngine, ModelError
from kvzip_memory.attention import Softmax
from kvzip_memory.compression import Compressed, Prefilled, Stages, compress, prefill
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.compression.scorers import kvzip as kvzip_module
from kvzip_memory.context import Resident


def with_sinks(logits: torch.Tensor, softmax: Softmax) -> torch.Tensor:
    """``[..., heads, T, columns]``, the sink of each head behind them."""
    if softmax.sinks is None:
        return logits
    return torch.cat([logits, softmax.sinks.double().view(-1, 1, 1).expand(*logits.shape[:-1], 1)], -1)


def silent(stage: str, tokens: int) -> None:
    pass


def prefilled_of(engine: KVzipEngine, text: str = TEXT) -> Prefilled:
    prompt = engine._contexts.prompt(engine._language, text)
    pairs, states = prefill(engine._model, prompt.token_ids, silent)
    recipe, encode = prompt.recipe, engine._prompts.text_ids
    return Prefilled(engine._model, pairs, prompt.token_ids, prompt.protected, recipe.opening, recipe.closing, encode, states=states)


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
@pytest.mark.parametrize("ratio", [0.07, 0.3, 0.5, 0.999])
def test_the_head_and_exactly_the_rounded_ratio_of_the_rest_are_kept(allocator: str, ratio: float) -> None:
    engine = tiny_engine(allocator=allocator)
    context = engine.load(TEXT * 2, ratio=ratio)
    layers, heads = len(context.layers), context.layers[0].n_heads
    assert context.total_pairs == layers * heads * context.n_tokens
    assert context.kept_pairs == kept_at(ratio, context)


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
@pytest.mark.parametrize("budget", [1, 17, 59, 60])
def test_tied_scores_change_nothing_about_the_budget(allocator: str, budget: int) -> None:
    keep = ALLOCATORS.of(allocator).allocate(torch.full((2, 3, 10), 0.5).half(), budget)
    assert keep.sum() == budget
    assert torch.equal(keep, ALLOCATORS.of(allocator).allocate(torch.full((2, 3, 10), 0.5).half(), budget))


def test_the_global_allocator_keeps_the_highest_scores_anywhere() -> None:
    scores = torch.arange(24.0).flip(0).view(2, 3, 4)
    assert torch.equal(ALLOCATORS.of("global").allocate(scores, 7), scores > 16)


def test_uniform_keeps_the_same_number_for_every_head_and_per_layer_for_every_layer() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 2, 40)
    assert ALLOCATORS.of("uniform").allocate(scores, 60).sum(-1).unique().tolist() == [10]
    assert ALLOCATORS.of("per_layer").allocate(scores, 60).sum((1, 2)).unique().tolist() == [20]


def test_protected_pairs_are_kept_even_beyond_the_budget() -> None:
    scores = torch.rand(2, 2, 10)
    scores[:, :, :3] = float("inf")
    for allocate in (ALLOCATORS.of(name).allocate for name in ALLOCATORS):
        assert allocate(scores, 5)[:, :, :3].all()


def test_the_template_head_and_system_prompt_are_never_evicted(architecture: str) -> None:
    context = tiny_engine(architecture).load(TEXT, ratio=0.15, system="Be brief.")
    assert context.protected > len("Be brief.")
    for layer in context.layers:
        if layer.window is None:
            for head in range(layer.n_heads):
                start = layer.offsets[head]
                assert layer.positions[start : start + context.protected].tolist() == list(range(context.protected))


def test_the_same_text_twice_gives_the_same_bits(smollm2: KVzipEngine, excerpt: str) -> None:
    text = excerpt[:900]
    first = smollm2.load(text, ratio=0.31)
    tensors = [t.clone() for layer in first.layers for t in layer.tensors()]
    smollm2.registry.remove(first.key)
    second = smollm2.load(text, ratio=0.31)
    assert second.receipt is not None
    assert second.receipt.tier == "built"
    for before, after in zip(tensors, (t for layer in second.layers for t in layer.tensors()), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("repeat", ["whole", "local"])
@pytest.mark.parametrize("aggregation", ["max", "sum_of_squares"])
def test_scores_equal_the_formula_written_out(architecture: str, aggregation: str, repeat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of the repeat's rows, from the model's own eager attention, normalised over head, chunk and repeat."""
    monkeypatch.setattr(kvzip_module, "BLOCK_ELEMENTS", 5000)  # several blocks of rows
    engine = tiny_engine(architecture)
    prefilled = prefilled_of(engine)
    n, head = len(prefilled.token_ids), prefilled.protected
    start, end = head + 20, n - 30
    ids = [7, 8, 9, *prefilled.token_ids[start:end]]
    scorer = KVzipScorer(aggregation=aggregation, repeat=repeat)  # type: ignore[arg-type]
    scores = scorer.score_chunk(prefilled, ids, head, start, end)

    seen: dict[int, list[torch.Tensor]] = {}  # by the layer whose pairs are asked

    def formula(query: torch.Tensor, key: torch.Tensor, dense: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        columns = torch.cat([dense[:, :, :head], dense[:, :, start:end], key], 2).repeat_interleave(groups, 1)
        logits = softmax.capped(query.double() @ columns.double().mT * softmax.scaling)
        rows = query.shape[2]
        logits[..., -rows:].masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu(1), float("-inf"))
        p = with_sinks(logits, softmax).softmax(-1)[0, :, :, head : head + end - start].unflatten(0, (-1, groups))
        return p.amax((1, 2)) if aggregation == "max" else p.square().sum((1, 2))

    original = kvzip_module._RepeatCall.attend

    def attend(self, layer, query, key, value, softmax):  # type: ignore[no-untyped-def]
        source = prefilled.model.layout.places[layer]
        if prefilled.model.windows[source] is None:
            seen.setdefault(source, []).append(formula(query, key, prefilled.dense[source][0][None], softmax))
        return original(self, layer, query, key, value, softmax)

    monkeypatch.setattr(kvzip_module._RepeatCall, "attend", attend)
    scorer.score_chunk(prefilled, ids, head, start, end)
    asked = [torch.stack(parts) for parts in seen.values()]
    expected = [parts.amax(0) if aggregation == "max" else parts.sum(0).sqrt() for parts in asked]
    torch.testing.assert_close(scores, torch.stack(expected).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_what_a_parent_has_kept_stands_beside_a_chunk(architecture: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk behind a parent whose last tokens are repeated, too: their kept pairs share the probabilities, in every head its own."""
    engine, scorer = tiny_engine(architecture), KVzipScorer()
    whole = prefilled_of(engine)
    n, head, lead = len(whole.token_ids), whole.protected, 40
    start = n - 25
    first = replace(whole, dense=[(k[:, :start], v[:, :start]) for k, v in whole.dense], token_ids=whole.token_ids[:start])
    layers = compress(first, ratio, Stages.of(), silent).layers
    prefilled = replace(whole, dense=[(k[:, start:], v[:, start:]) for k, v in whole.dense], parent=list(layers), start=start)
    ids = [7, 8, 9, *whole.token_ids[start - lead :]]
    seen: dict[int, torch.Tensor] = {}  # squares, by the layer whose pairs are asked
    original = kvzip_module._RepeatCall.attend

    def attend(self, layer, query, key, value, softmax):  # type: ignore[no-untyped-def]
        source = whole.model.layout.places[layer]
        if whole.model.windows[source] is None:
            parent, rows, scores = layers[source], query.shape[2], []
            for h, queries in enumerate(query[0].double().unflatten(0, (parent.n_heads, -1))):
                keys, positions = parent.head(h)[0], parent.positions[parent.offsets[h] : parent.offsets[h + 1]]
                near = keys[(positions < head) | (positions >= start - lead)]
                logits = queries @ torch.cat([near, whole.dense[source][0][h, start:], key[0, h]]).double().T * softmax.scaling
                logits = softmax.capped(logits)
                logits[..., -rows:].masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu(1), float("-inf"))
                sinks = None if softmax.sinks is None else softmax.sinks.unflatten(0, (parent.n_heads, -1))[h]
                logits = with_sinks(logits, softmax._replace(sinks=sinks))
                scores.append(logits.softmax(-1)[..., len(near) : len(near) + n - start].square().sum((0, 1)))
            seen[source] = seen.get(source, 0) + torch.stack(scores)
        return original(self, layer, query, key, value, softmax)

    monkeypatch.setattr(kvzip_module._RepeatCall, "attend", attend)
    ours = scorer.score_chunk(prefilled, ids, head, start, n, lead=lead)
    monkeypatch.undo()
    torch.testing.assert_close(ours, torch.stack([*seen.values()]).sqrt().float(), atol=1e-5, rtol=1e-4)
    if ratio == 1.0 and not any(whole.model.windows):
        torch.testing.assert_close(ours, scorer.score_chunk(whole, ids, head, start - lead, n)[:, :, lead:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("new", "room", "lead"), [(30, 5000, 170), (200, 5000, 0), (700, 5000, 0), (30, 150, 56), (30, 40, 0)])
def test_few_new_tokens_are_repeated_with_those_before_them(new: int, room: int, lead: int) -> None:
    prefilled = prefilled_of(tiny_engine(), TEXT * 3)
    n, head = len(prefilled.token_ids), prefilled.protected
    prefilled.model.window = n + room
    assert KVzipScorer()._lead(replace(prefilled, start=n - new), n) == lead
    short = replace(prefilled, start=head + 5, token_ids=prefilled.token_ids[: head + 9])
    assert KVzipScorer()._lead(short, head + 9) == 5  # not of the head


def test_the_whole_repeat_pass_attends_as_the_model_itself_would(architecture: str) -> None:
    """Feeding the repeat behind the full context through the whole pass gives the hidden states of a plain forward."""
    engine = tiny_engine(architecture)
    prefilled = prefilled_of(engine)
    n, head = len(prefilled.token_ids), prefilled.protected
    ids = list(prefilled.token_ids[head : head + 40])
    outputs = []
    last = engine.model.base_model.layers[-1]  # it is not computed to its end in a repeat
    hook = last.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    KVzipScorer(repeat="whole").score_chunk(prefilled, ids, head, head, n)
    with torch.inference_mode():
        engine.model(input_ids=torch.tensor([[*prefilled.token_ids, *ids]]))
    hook.remove()
    torch.testing.assert_close(outputs[0], outputs[1][:, n:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("repeat", ["whole", "local"])
def test_a_repeat_fed_in_pieces_scores_as_in_one(architecture: str, repeat: str) -> None:
    engine = tiny_engine(architecture)
    prefilled = prefilled_of(engine)
    n, head = len(prefilled.token_ids), prefilled.protected
    ids = list(prefilled.token_ids[head : head + 40])
    at_once = KVzipScorer(repeat=repeat).score_chunk(prefilled, ids, head, head, n)
    engine._model.chunk_tokens = 7
    in_pieces = KVzipScorer(repeat=repeat).score_chunk(prefilled, ids, head, head, n)
    torch.testing.assert_close(in_pieces, at_once, atol=1e-5, rtol=1e-4)
    for (keys, _), (other, _) in zip(prefilled_of(engine).dense, prefilled.dense, strict=True):
        torch.testing.assert_close(keys, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("n", "room"), [(5013, 4000), (2000, 4000), (2001, 4000), (700, 300), (30, 4000)])
def test_chunks_are_equal_and_fit_behind_the_context(n: int, room: int) -> None:
    chunks = KVzipScorer()._chunks(24, n, room)
    sizes = [end - start for start, end in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= min(2000, room)
    assert chunks[0][0] == 24
    assert chunks[-1][1] == n
    assert all(a[1] == b[0] for a, b in pairwise(chunks))


def test_scoring_leaves_the_pairs_as_they_were(architecture: str) -> None:
    prefilled = prefilled_of(tiny_engine(architecture))
    before = [(keys.clone(), values.clone()) for keys, values in prefilled.dense]
    KVzipScorer(chunk_tokens=80).score(prefilled, silent)
    for (keys, values), (keys_now, values_now) in zip(before, prefilled.dense, strict=True):
        assert torch.equal(keys, keys_now)
        assert torch.equal(values, values_now)


def test_scores_that_are_not_finite_are_an_error_and_store_nothing(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    with torch.no_grad():
        engine.model.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="bfloat16 or float32"):
        engine.load(TEXT)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_build_in_pieces_equals_dense_attention_with_each_pieces_evictions_masked(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(architecture, compress_every=100)
    pieces: list[tuple[int, Compressed]] = []

    def noted(prefilled: Prefilled, *args: Any) -> Compressed:
        pieces.append((len(prefilled.token_ids), compress(prefilled, *args)))
        return pieces[-1][1]

    monkeypatch.setattr("kvzip_memory.building.compress", noted)
    context = engine.load(TEXT, ratio=0.4, keep="8306")
    assert [b - a for (a, _), (b, _) in pairwise(pieces)] == [96, 96]  # 312 tokens, 24 of them head
    assert context.kept_pairs == kept_at(0.4, context)
    ancestors = [replace(context, token_ids=context.token_ids[:end], storage=Resident(part.layers)) for end, part in pieces[:-1]]
    ids = engine.prompt_ids(context, "Who carries the oil?")
    torch.testing.assert_close(engine.logits(context, ids), masked_logits(engine, context, ids, *ancestors), atol=1e-4, rtol=0)
    for start, end in engine._contexts.prompt(engine._language, TEXT, keep=["8306"]).keep:
        assert all(kept[:, start:end].all() for kept in kept_positions(context))


def test_pieces_are_part_of_the_key_and_are_not_cut_down(tmp_path: Path) -> None:
    whole, pieces = tiny_engine(cache_dir=tmp_path), tiny_engine(cache_dir=tmp_path, compress_every=100)
    assert pieces.load(TEXT[:60], ratio=0.4).key == whole.load(TEXT[:60], ratio=0.4).key  # one piece
    assert pieces.load(TEXT, ratio=1.0).key == whole.load(TEXT, ratio=1.0).key
    half = pieces.load(TEXT, ratio=0.5)
    assert half.key != whole.load(TEXT, ratio=0.5).key
    assert pieces.load(TEXT, ratio=0.5).receipt.hit  # type: ignore[union-attr]
    assert pieces.load(TEXT, ratio=0.3).receipt.tier == "built"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="compress_every is 8 tokens"):
        tiny_engine(compress_every=8)
