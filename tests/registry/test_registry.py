"""The registry: found, built once, placed, and never mixed up."""

import gc
import json
import math
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

import synthetic
from conftest import CHATML, ROOT, TEXT, same_pairs, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import BudgetError, CompressedContext, Document, IdentityMismatchError, InputError, KVzipEngine, StorageError
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.context import Resident
from kvzip_memory.inference import loading
from kvzip_memory.registry import ContextRegistry, Report, parse_bytes
from kvzip_memory.registry.disk.index import Index, IndexDamagedError, IndexUnavailableError
from kvzip_memory.registry.disk.putting import Putting
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.identity import NEWEST_FORMAT
from kvzip_memory.registry.tier import packed, to_host
from kvzip_memory.registry.wanted import TTL_LIMIT
from kvzip_memory.system.locks import held


def blobs(folder: Path) -> list[Path]:
    return sorted((folder / "contexts" / "blobs").rglob("*.safetensors"))


def load_and_close(folder: Path, text: Any = TEXT, **options: Any) -> CompressedContext:
    """Loaded by an engine that has written everything down and gone."""
    engine = tiny_engine(cache_dir=folder, ratio=0.4)
    context = engine.load(text, **options)
    context.layers  # noqa: B018 - still there
    engine.close()
    return context


# -- identity: one case a field, on real saved folders -------------------------------------------------------------

TEMPLATE = CHATML + "{% if add_generation_prompt and not thinking %}<none>{% endif %}"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(changes))


def add_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    tokenizer.add_tokens(["kvzip"])
    tokenizer.save_pretrained(folder)


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<none>", "<nothing>"))


def activate_adapter(engine: KVzipEngine) -> None:
    layer = torch.nn.Linear(1, 1)
    layer.active_adapters, layer.scaling = ["a"], {"a": 1.0}  # type: ignore[assignment]
    with torch.no_grad():
        engine.model.model.tuner = layer


ROPE = {"rope_type": "default", "rope_theta": 5e5}
# field: (edit of the folder, options of the engine, arguments of load, edit of the engine)
MUTATIONS: dict[str, tuple[str, Callable[[Path], None] | None, dict[str, Any], dict[str, Any], Callable[[KVzipEngine], None] | None]] = {
    "a weight": ("weights", edit_weight, {}, {}, None),
    "rope": ("config", edit_config(rope_parameters=ROPE), {}, {}, None),
    "norm epsilon": ("config", edit_config(rms_norm_eps=1e-4), {}, {}, None),
    "architecture": ("architecture", edit_config(model_type="mistral", sliding_window=None), {}, {}, None),
    "dtype": ("dtype", None, {"dtype": "bfloat16"}, {}, None),
    "tokenizer": ("tokenizer", add_token, {}, {}, None),
    "template": ("template", edit_template, {}, {}, None),
    "template variables": ("recipe", None, {"template_kwargs": {"thinking": True}}, {}, None),
    "adapter": ("adapter", None, {}, {}, activate_adapter),
    "text": ("text", None, {}, {"source": TEXT + "One more."}, None),
    "title": ("text", None, {}, {"source": [Document(TEXT, "a"), Document(TEXT, "c")]}, None),
    "system": ("system", None, {}, {"system": "Be brief."}, None),
    "ratio": ("ratio", None, {}, {"ratio": 0.41}, None),
    "pinned spans": ("keep", None, {}, {"keep": "8306"}, None),
    "aggregation": ("scorer", None, {"scorer": KVzipScorer(aggregation="max")}, {}, None),
    "repeat pass": ("scorer", None, {"scorer": KVzipScorer(repeat="whole")}, {}, None),
    "chunk": ("scorer", None, {"scorer": KVzipScorer(chunk_tokens=999)}, {}, None),
    "allocator": ("allocator", None, {"allocator": "uniform"}, {}, None),
    "tenant": ("tenant", None, {"tenant": "bob"}, {}, None),
    "format": ("format", None, {}, {}, None),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_change_of_any_field_is_a_miss_that_names_it(
    saved_model: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, edit_folder, options, arguments, edit_engine = MUTATIONS[case]
    source: Any = [Document(TEXT, "a"), Document(TEXT, "b")] if case == "title" else TEXT

    def ask(folder: Path, options: dict[str, Any], arguments: dict[str, Any]) -> CompressedContext:
        engine = KVzipEngine.from_pretrained(folder, cache_dir=tmp_path / "cache", **{"tenant": "alice", "ratio": 0.4, **options})
        if edit_engine is not None and folder != saved_model:
            edit_engine(engine)
        context = engine.load(**{"source": source, "name": "page", **arguments})
        engine.close()
        return context

    first = ask(saved_model, {}, {})
    assert first.receipt is not None
    assert not first.receipt.hit
    mutated = tmp_path / "mutated"
    subprocess.run(["cp", "-r", saved_model, mutated], check=True)
    if edit_folder is not None:
        edit_folder(mutated)
    if field == "format":
        monkeypatch.setattr("kvzip_memory.registry.identity.FORMAT", NEWEST_FORMAT + 1)
    second = ask(mutated, options, arguments)
    monkeypatch.undo()
    assert second.receipt is not None
    assert second.receipt.tier == "built"
    assert field in str(second.receipt.reason), second.receipt.reason
    assert field == "tenant" or field in second.receipt.differs
    assert second.key != first.key
    again = ask(saved_model, {}, {})
    assert again.receipt is not None
    assert (again.receipt.tier, again.receipt.hit, again.key) == ("disk", True, first.key)


def test_a_text_loaded_before_is_found_in_a_new_process_and_nothing_is_prefilled(tmp_path: Path) -> None:
    context = load_and_close(tmp_path, name="page")
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import TEXT, tiny_engine\n"
        f"engine = tiny_engine(cache_dir={str(tmp_path)!r}, ratio=0.4)\n"
        "engine.model.base_model.register_forward_pre_hook(lambda *a: 1 / 0)\n"  # any forward would fail
        "context = engine.load(TEXT)\n"
        "print(context.key, context.receipt.tier, context.receipt.hit, context.kept_pairs, engine.get('page').key == context.key)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.split() == [context.key, "disk", "True", str(context.kept_pairs), "True"]


def test_what_a_process_loaded_is_on_disk_when_it_ends(tmp_path: Path) -> None:
    """Writing goes on behind the answer; leaving does not lose it."""
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import TEXT, tiny_engine\n"
        f"print(tiny_engine(cache_dir={str(tmp_path)!r}, ratio=0.4).load(TEXT).key)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert [path.stem for path in blobs(tmp_path)] == [out.stdout.strip()]


def test_everything_stored_is_private(tmp_path: Path) -> None:
    load_and_close(tmp_path / "new")
    for path in (tmp_path / "new" / "contexts").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


# -- tiers ---------------------------------------------------------------------------------------------------------


def test_receipts_say_where_a_context_came_from(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    first, second = engine.load(TEXT), engine.load(TEXT, name="again")
    assert first.receipt is not None
    assert second.receipt is not None
    assert (first.receipt.tier, first.receipt.hit, first.receipt.reason) == ("built", False, "not stored")
    assert {"tokenize", "prefill", "score", "evict"} <= set(first.receipt.ms)
    assert (second.receipt.tier, second.receipt.hit, second.name) == ("device", True, "again")
    assert second.layers[0].keys.data_ptr() == first.layers[0].keys.data_ptr()
    reply = engine.generate(second, "Who?", max_new_tokens=2)
    assert (reply.receipt.tier, reply.receipt.key) == ("device", first.key)
    stats = engine.stats()
    assert stats["lookups"] == sum(stats["hits"].values()) + stats["built"]
    assert stats["built"] == 1
    engine.close()


@pytest.mark.parametrize("with_disk", [True, False])
def test_contexts_move_down_when_a_tier_is_full_and_come_back_when_asked(tmp_path: Path, with_disk: bool) -> None:
    texts = [f"Page {i}. " + TEXT for i in range(3)]
    fresh = tiny_engine(ratio=0.4)
    expected = [fresh.load(text) for text in texts]
    size = max(context.nbytes for context in expected)
    engine = tiny_engine(ratio=0.4, device_bytes=size, host_bytes=size, cache_dir=tmp_path if with_disk else None)
    contexts = [engine.load(text) for text in texts]
    engine.registry.flush()
    ids = engine.prompt_ids(contexts[0], "Who?")
    tiers = []
    for i in [2, 1, 0, 0, 2, 1]:
        with contexts[i].lease() as lease:
            tiers.append(lease.receipt.tier)
        assert torch.equal(engine.logits(contexts[i], ids), fresh.logits(expected[i], ids))
        assert same_pairs(contexts[i], expected[i])
    third = "disk" if with_disk else "built"  # what is lost from memory is built again, not refused
    assert tiers[0] == "device"
    assert set(tiers) == {"device", "host", third}
    stats = engine.stats()["tiers"]
    assert stats["device"]["nbytes"] <= size
    assert stats["host"]["nbytes"] <= size
    engine.close()


def test_a_context_that_is_answered_from_is_not_moved(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.4, cache_dir=tmp_path)
    size = engine.load(TEXT).nbytes
    engine = tiny_engine(ratio=0.4, device_bytes=size)
    engine.registry._memory.wait_s = 0.3
    context = engine.load(TEXT)
    with engine.stream(context, "Who?", max_new_tokens=1500) as stream:
        next(stream)
        with pytest.raises(BudgetError, match=r"1 contexts in use"):
            engine.load(TEXT[:-5])
        assert engine.stats()["tiers"]["device"]["contexts"] == 1
    other = engine.load(TEXT[:-5])
    assert engine.registry.tiers(context.key) == []
    assert engine.generate(other, "Who?", max_new_tokens=2).receipt.tier == "device"


def test_a_context_larger_than_the_device_tier_is_refused_before_any_work() -> None:
    engine = tiny_engine(device_bytes=1000)
    engine.model.base_model.register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(BudgetError, match="device_bytes is 1,000"):
        engine.load(TEXT)


def test_a_session_goes_on_after_its_context_was_moved_away(tmp_path: Path) -> None:
    alone = tiny_engine(ratio=0.4)
    expected = alone.session(alone.load(TEXT))
    engine = tiny_engine(ratio=0.4, device_bytes=alone.load(TEXT).nbytes, cache_dir=tmp_path)
    session = engine.session(engine.load(TEXT))
    for question in ("Who?", "And then?", "Why?"):
        assert session.ask(question, max_new_tokens=5).text == expected.ask(question, max_new_tokens=5).text
        engine.load(TEXT[:-5])  # pushes the other out
        assert engine.registry.tiers(session.context.key) == ["disk"]  # type: ignore[union-attr]
    engine.close()


@pytest.mark.parametrize("ttl", [math.inf, math.nan, 1e16, TTL_LIMIT + 1, 10**400, 0, -5, -math.inf, True, "60", b"60", [60]])
def test_a_ttl_is_a_number_of_seconds(ttl: Any, tmp_path: Path) -> None:
    for make in (
        lambda: tiny_engine(cache_dir=tmp_path / "cache", ttl=ttl),
        lambda: ContextRegistry(synthetic.CPU, tmp_path / "cache", ttl=ttl),
        lambda: KVzipEngine.from_pretrained(tmp_path / "no model", cache_dir=tmp_path / "cache", ttl=ttl),
    ):
        with pytest.raises(InputError, match=r"^ttl is .*; give seconds above 0, at most 3,153,600,000 \(100 years\), or None for never$"):
            make()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("created", [0.0, float(2**50 - 1), float(1 - 2**50)])
@pytest.mark.parametrize("ttl", [5e-324, 1, 60.5, TTL_LIMIT])
def test_what_a_ttl_stores_damages_no_index(ttl: float, created: float, tmp_path: Path) -> None:
    first = ContextRegistry(synthetic.CPU, tmp_path, ttl=ttl)
    with first.lease(synthetic.wanted(1), lambda report: replace(synthetic.context(1), created=created)):
        pass
    first.close()
    for _ in range(2):
        registry = ContextRegistry(synthetic.CPU, tmp_path)
        (entry,) = registry.contexts()
        assert entry.expires is not None
        assert entry.names.keys() == {"page 1"}
        assert registry._backing.tier is not None
        assert not registry._backing.tier.made_anew
        assert not registry.quarantine()
        registry.close()
        shutil.rmtree(tmp_path / "index")  # then its file's header tells as much


def test_expired_contexts_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(ratio=0.4, ttl=60, cache_dir=tmp_path)
    engine.load(TEXT)
    engine.registry.flush()
    assert engine.load(TEXT).receipt.tier == "device"  # type: ignore[union-attr]
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    receipt = engine.load(TEXT).receipt
    assert receipt is not None
    assert (receipt.tier, receipt.reason) == ("built", "expired")
    engine.close()


@pytest.mark.parametrize("size", ["4 GiB", "4GiB", 4 * 2**30, "4294967296", "4194304kib"])
def test_sizes_are_read(size: int | str) -> None:
    assert parse_bytes("device_bytes", size) == 2**32


@pytest.mark.parametrize("size", ["4 apples", "", "-1", "GiB"])
def test_what_is_no_size_is_refused_before_anything_is_loaded(size: str) -> None:
    with pytest.raises(InputError, match="disk_bytes"):
        KVzipEngine.from_pretrained("/nowhere", disk_bytes=size)


# -- smaller ratios from larger ones -------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", ["global", "per_layer", "uniform"])
def test_a_smaller_ratio_comes_out_of_a_larger_one_as_if_it_had_been_built(architecture: str, allocator: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"allocator": allocator, "refit": "none"}
    built = tiny_engine(architecture, **options).load(TEXT, ratio=0.3, keep="8306")
    engine = tiny_engine(architecture, cache_dir=tmp_path, **options)
    engine.load(TEXT, ratio=0.5, keep="8306")
    engine.close()
    engine = tiny_engine(architecture, cache_dir=tmp_path, **options)
    engine.model.base_model.register_forward_pre_hook(lambda *a: 1 / 0)  # no model needed
    shrunk = engine.load(TEXT, ratio=0.3, keep="8306")
    assert shrunk.receipt is not None
    assert (shrunk.receipt.hit, shrunk.receipt.tier, shrunk.receipt.shrunk_from) == (True, "disk", 0.5)
    assert shrunk.key == built.key
    assert shrunk.nbytes == built.nbytes
    for one, other in zip(shrunk.layers, built.layers, strict=True):
        assert one.lengths == other.lengths
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))
    engine.close()


def test_what_was_refitted_is_not_cut_but_built(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    engine.load(TEXT, ratio=0.5)
    receipt = engine.load(TEXT, ratio=0.45).receipt
    assert receipt is not None
    assert (receipt.tier, receipt.shrunk_from, receipt.differs) == ("built", None, ("ratio",))
    assert receipt.reason == "ratio: stored with 0.5, from which 0.45 cannot be had, since pairs are fitted to those that were evicted"


def test_a_larger_ratio_never_comes_out_of_a_smaller_one(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, refit="none")
    engine.load(TEXT, ratio=0.3)
    for ratio in (0.5, 1.0):
        receipt = engine.load(TEXT, ratio=ratio).receipt
        assert receipt is not None
        assert receipt.tier == "built"
    assert engine.load(TEXT, ratio=0.4).receipt.shrunk_from == 0.5  # type: ignore[union-attr]
    engine.close()


def test_strings_to_keep_are_kept_at_any_ratio() -> None:
    engine = tiny_engine()
    prompt = engine._contexts.prompt(engine._language, TEXT, keep=["8306", "Ferdinand"])
    text = engine.tokenizer.decode(prompt.token_ids)
    assert {engine.tokenizer.decode(prompt.token_ids[a:b]) for a, b in prompt.keep} == {"8306", "Ferdinand"}
    assert len(prompt.keep) == text.count("8306") + text.count("Ferdinand")
    context = engine.load(TEXT, ratio=0.2, keep=["8306", "Ferdinand"])
    wanted = {position for span in prompt.keep for position in range(*span)}
    for layer in context.layers:
        for head in range(layer.n_heads):
            assert wanted <= set(layer.positions[layer.offsets[head] : layer.offsets[head + 1]].tolist())
    with pytest.raises(InputError, match="'9999' does not occur"):
        engine.load(TEXT, keep="9999")


# -- names, tags, tenants ------------------------------------------------------------------------------------------


def test_names_tags_and_pins(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    first = engine.load(TEXT, name="page", tags=["a", "b"])
    newer = engine.load(TEXT + "More.", name="page")
    engine.registry.flush()
    assert engine.get("page").key == newer.key
    assert engine.get(first.key[:10]).key == first.key
    assert [entry.tags for entry in engine.registry.find(first.key)] == [("a", "b")]
    engine.registry.pin(first.key)
    engine.close()
    again = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    assert {entry.key: entry.pinned for entry in again.registry.contexts()} == {first.key: True, newer.key: False}
    assert same_pairs(again.get("page"), newer)
    again.registry.remove(newer.key)
    with pytest.raises(InputError, match=f"no context 'page'.*{first.key[:12]}"):
        again.get("page")
    with pytest.raises(InputError, match="no context 'pag' of this model"):
        again.get("pag")
    again.close()


def test_tags_and_names_are_listed_before_they_are_on_disk(tmp_path: Path) -> None:
    engine, go_on = tiny_engine(cache_dir=tmp_path, ratio=0.4), threading.Event()
    engine.load(TEXT, tags="a")
    engine.registry.flush()
    engine.registry._writing.thread.submit(go_on.wait)
    engine.load(TEXT, tags="b", name="page")
    told = [(entry.tags, entry.name) for entry in engine.registry.contexts()]
    go_on.set()
    engine.registry.flush()
    assert told == [(entry.tags, entry.name) for entry in engine.registry.contexts()] == [(("a", "b"), "page")]
    engine.close()


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_removed_is_answered_from_but_stored_no_more(tmp_path: Path, stored: bool) -> None:
    engine = tiny_engine(cache_dir=tmp_path if stored else None, ratio=0.4)
    context = engine.load(TEXT, name="page")
    expected = engine.generate(context, "Who?", max_new_tokens=8).text
    stream = engine.stream(context, "Who?", max_new_tokens=8)
    pieces = [next(iter(stream))]
    engine.registry.remove(context.key)  # during an answer
    with pytest.raises(InputError, match="no context"):
        engine.get("page")
    assert "".join([*pieces, *stream]) == expected
    assert engine.registry.contexts() == []
    reply = engine.generate(context, "Who?", max_new_tokens=8)
    assert (reply.text, reply.receipt.tier, reply.receipt.reason) == (expected, "built", "removed")
    engine.registry.flush()
    assert engine.registry.contexts() == []
    assert engine.stats()["tiers"]["device"]["nbytes"] == 0
    for reference in (context.key, "page"):
        with pytest.raises(InputError, match="no context"):
            engine.get(reference)
    assert engine.load(TEXT).receipt.tier == "built"  # type: ignore[union-attr]
    assert engine.generate(context, "Who?", max_new_tokens=8).receipt.tier == "device"
    engine.close()


def test_what_is_removed_here_and_loaded_by_another_is_used(tmp_path: Path) -> None:
    one, other = tiny_engine(cache_dir=tmp_path, ratio=0.4), tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = one.load(TEXT, name="page")
    expected = one.generate(context, "Who?", max_new_tokens=8).text
    one.registry.remove("page")
    other.load(TEXT, name="page")
    other.registry.flush()
    reply = one.generate(one.get("page"), "Who?", max_new_tokens=8)
    assert (reply.text, reply.receipt.tier) == (expected, "device")
    assert one.generate(context, "Who?", max_new_tokens=8).text == expected
    for engine in (one, other):
        engine.close()


def test_a_handle_that_outlives_the_weights_is_not_built_with_others(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load(TEXT)
    session = engine.session(context)
    engine.registry.remove(context.key)
    engine.registry.readmit(context.key)  # as if another process had deleted it
    with torch.no_grad():
        engine.model.lm_head.weight.mul_(2)  # type: ignore[union-attr,operator]
    with pytest.raises(IdentityMismatchError, match="weights"):
        session.ask("Who?")
    engine.registry.flush()
    assert engine.registry.contexts() == []
    engine.close()


def test_a_name_is_that_of_the_text_last_loaded_under_it(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    first, second = engine.load(TEXT, name="page"), engine.load("New. " + TEXT, name="page")
    for use in (lambda: engine.generate(first, "Who?", max_new_tokens=1), lambda: engine.load(TEXT), engine.registry.flush):
        use()
        assert engine.get("page").key == second.key
    engine.close()
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    engine.load(TEXT)
    engine.registry.flush()
    assert tiny_engine(cache_dir=tmp_path).get("page").key == engine.get("page").key == second.key
    engine.load(TEXT, name="page")
    assert engine.get("page").key == first.key
    engine.registry.flush()
    assert tiny_engine(cache_dir=tmp_path).get("page").key == first.key
    engine.close()


def test_equal_texts_under_two_names_are_one_context_that_has_both(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load(TEXT, name="a.md")
    assert engine.load(TEXT, name="b.md").receipt.hit
    elsewhere = tiny_engine(cache_dir=tmp_path)
    for step in (lambda: None, engine.registry.flush):
        step()
        assert [(engine.get(name).key, engine.get(name).name) for name in ("a.md", "b.md")] == [
            (context.key, "a.md"),
            (context.key, "b.md"),
        ]
    assert [elsewhere.get(name).key for name in ("a.md", "b.md")] == [context.key] * 2

    assert list(engine.registry.remove("a.md").names) == ["b.md"]
    elsewhere.generate(context := elsewhere.get("b.md"), "Who?", max_new_tokens=1)  # knew both names
    elsewhere.registry.flush()
    with pytest.raises(InputError, match=r"no context 'a.md'"):
        tiny_engine(cache_dir=tmp_path).get("a.md")
    assert tiny_engine(cache_dir=tmp_path).get("b.md").key == context.key
    assert not engine.registry.remove("b.md").names
    assert not engine.registry.contexts()
    for one in (engine, elsewhere):
        one.close()


def test_a_name_that_is_no_text_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    engine.load(TEXT, name="page")
    engine.registry.pin("page")
    for use in (
        lambda: engine.get("caf\udce9"),
        lambda: engine.load(TEXT, name="caf\udce9"),
        lambda: engine.load(TEXT, tags=["a", "caf\udce9"]),
    ):
        with pytest.raises(InputError, match="not text that can be stored"):
            use()
    assert [entry.pinned for entry in engine.registry.contexts()] == [True]
    engine.close()


def test_what_the_disk_cannot_take_costs_nothing_that_is_stored(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path / "one", ratio=0.4)
    engine.load(TEXT)
    engine.registry.flush()
    nbytes = engine.registry.contexts()[0].file_nbytes
    engine.close()
    engine = tiny_engine(cache_dir=tmp_path / "two", ratio=0.4, disk_bytes=int(3.2 * nbytes))
    for name in "abc":
        engine.load(f"{name} {TEXT}", name=name)
    for name in "ab":
        engine.registry.pin(name)
    before, stats = sorted((tmp_path / "two").rglob("*.safetensors")), engine.stats()["tiers"]["disk"]
    engine.load(TEXT * 3)
    engine.registry.flush()
    assert sorted((tmp_path / "two").rglob("*.safetensors")) == before
    assert engine.stats()["tiers"]["disk"] == stats
    assert len(engine.registry.contexts()) == 4  # one in memory only
    engine.close()


def test_what_is_stored_stays_when_it_cannot_be_stored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load(TEXT, name="page", tags="red")
    engine.registry.pin("page")
    [held], tier = engine.registry._memory.in_memory([context.key]), engine.registry._backing.tier
    assert tier is not None

    def full(*args: Any) -> None:
        raise IndexUnavailableError("SQLite: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Putting, "_insert_now", full)
        with pytest.raises(IndexUnavailableError):
            tier.put(to_host(held.context), held.group)
    assert tier.usage() == tier.measured() > 0
    engine.close()
    again = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    assert again.get("page").key == context.key
    [entry] = again.registry.contexts()
    assert (entry.pinned, entry.tags, list(entry.names)) == (True, ("red",), ["page"])


def test_what_is_built_while_the_engine_is_closed_stays_in_memory(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    engine.load(TEXT)
    engine.registry.flush()
    engine.registry._writing.thread.shutdown()  # as close does behind a build under way
    context = engine.load("New. " + TEXT, name="new")
    assert engine.registry.tiers(context.key) == ["device"]
    assert engine.registry._memory.device.reserved == 0
    assert engine.generate(context, "Who?", max_new_tokens=2).receipt.tier == "device"


def test_a_context_in_use_is_found_by_its_key_when_its_pairs_are_gone() -> None:
    size = tiny_engine(ratio=0.4).load(TEXT).nbytes
    engine = tiny_engine(ratio=0.4, device_bytes=int(1.5 * size))
    context = engine.load(TEXT)
    key, expected = context.key, engine.generate(context, "Who?", max_new_tokens=8).text
    engine.load("Other. " + TEXT)
    assert engine.registry.tiers(key) == []
    assert engine.generate(engine.get(key), "Who?", max_new_tokens=8).text == expected
    engine.load("Other. " + TEXT)
    del context
    gc.collect()
    with pytest.raises(InputError, match="no context"):
        engine.get(key)


def test_a_pinned_context_is_never_lost(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.4)
    size = engine.load(TEXT).nbytes
    for folder, disk_bytes in ((tmp_path / "one", "1.3MB"), (tmp_path / "two", 1000), (None, None)):
        engine = tiny_engine(ratio=0.4, device_bytes=int(2.5 * size), disk_bytes=disk_bytes, cache_dir=folder)
        pinned = engine.load(TEXT)
        engine.registry.pin(pinned.key)
        for i in range(8):
            engine.load(f"{i}" + TEXT)
            engine.registry.flush()
        assert engine.load(TEXT).receipt.hit  # type: ignore[union-attr]
        engine.close()


def test_tenants_never_hit_each_others_contexts(tmp_path: Path) -> None:
    engines = {t: tiny_engine(cache_dir=tmp_path, ratio=0.5, refit="none", tenant=t) for t in ("alice", "bob", None)}
    keys = {}
    for tenant, engine in engines.items():
        context = engine.load(TEXT, name="page")
        assert context.receipt is not None
        assert context.receipt.tier == "built"
        assert context.receipt.differs == ()  # nor does the reason tell that somebody else has the text
        assert engine.load(TEXT, ratio=0.3).receipt.shrunk_from == 0.5  # type: ignore[union-attr]
        keys[tenant] = context.key
        engine.registry.flush()
    assert len(set(keys.values())) == 3
    for tenant, engine in engines.items():
        assert engine.get("page").key == keys[tenant]
        assert {e.tenant for e in engine.registry.contexts()} == {engine.registry.tenant}
        for other, key in keys.items():
            if other != tenant:
                with pytest.raises(InputError):
                    engine.get(key)
    for engine in engines.values():
        engine.close()


def test_two_models_share_a_folder_and_nothing_else(tmp_path: Path) -> None:
    engines = [KVzipEngine(tiny_model(seed=seed), tiny_tokenizer(), ratio=0.4, cache_dir=tmp_path) for seed in (0, 1)]
    for _ in range(2):
        contexts = [engine.load(TEXT, name="page") for engine in engines]
        for engine in engines:
            engine.registry.flush()
    assert contexts[0].key != contexts[1].key
    assert [engine.stats()["built"] for engine in engines] == [1, 1]
    for engine, context in zip(engines, contexts, strict=True):
        assert engine.get("page").key == context.key
        with pytest.raises(InputError):
            engine.get(next(c.key for c in contexts if c is not context))
        engine.close()


def test_a_context_moved_to_the_host_takes_exactly_its_bytes(architecture: str) -> None:
    context = tiny_engine(architecture, ratio=0.4).load(TEXT)
    resident = replace(context, storage=Resident(context.layers))
    moved = packed(resident)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in moved.layers for t in layer.tensors()}
    assert list(storages.values()) == [resident.storage.nbytes]
    assert moved.nbytes == context.nbytes
    for one, other in zip(moved.layers, context.layers, strict=True):
        assert (one.lengths, one.window) == (other.lengths, other.window)
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


# -- one build -----------------------------------------------------------------------------------------------------


def test_64_threads_that_ask_for_one_text_cause_one_build(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    barrier, found = threading.Barrier(64), []

    def ask() -> None:
        barrier.wait()
        found.append(engine.load(TEXT))

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 64
    assert engine.stats()["built"] == 1
    assert len({context.layers[0].keys.data_ptr() for context in found}) == 1
    engine.close()


def test_a_build_that_fails_fails_for_all_who_wait_and_is_tried_again_later() -> None:
    engine = tiny_engine(ratio=0.4)
    broken = engine.model.model.norm.weight.clone()
    handle = engine.model.base_model.register_forward_pre_hook(lambda *a: 1 / 0)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            engine.load(TEXT)
        except ZeroDivisionError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8
    handle.remove()
    assert engine.load(TEXT).receipt.tier == "built"  # type: ignore[union-attr]
    assert torch.equal(broken, engine.model.model.norm.weight)


@pytest.mark.parametrize("shared", [True, False])
def test_who_waits_for_a_build_sees_its_progress(tmp_path: Path, shared: bool) -> None:
    """In one registry, and in another one on the same folder, which is what another process has."""
    registries = [ContextRegistry(synthetic.CPU, tmp_path) for _ in range(1 if shared else 2)]
    seen: list[tuple[str, int, int]] = []
    started = threading.Event()

    def build(report: Report) -> CompressedContext:
        for done in range(10):
            report("score", done, 10)
            started.set()
            time.sleep(0.15)
        return synthetic.context(1)

    def first() -> None:
        with registries[0].lease(synthetic.wanted(1), build):
            pass

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with registries[-1].lease(synthetic.wanted(1), build, lambda *progress: seen.append(progress)) as (context, lease):
        assert synthetic.same(context, synthetic.context(1))
        assert lease.receipt.tier == ("device" if shared else "disk")
    thread.join()
    told = [progress for progress in seen if progress[0] == "score"]
    assert len(set(told)) >= 2
    assert told == sorted(told)
    for registry in registries:
        registry.close()


async def test_the_async_twins_do_not_block_the_event_loop() -> None:
    import asyncio

    engine = tiny_engine(ratio=0.4)
    beats = 0

    async def heart() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    heartbeat = asyncio.create_task(heart())
    context = await engine.aload(TEXT * 4, name="page")
    reply = await engine.agenerate(context, "Who?", max_new_tokens=5)
    heartbeat.cancel()
    assert beats > 5
    assert reply.text == engine.generate(context, "Who?", max_new_tokens=5).text


# -- damage --------------------------------------------------------------------------------------------------------


def test_a_damaged_file_goes_to_quarantine_with_its_reason_and_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = load_and_close(tmp_path)
    (path,) = blobs(tmp_path)
    registry = ContextRegistry(torch.device("cpu"), tmp_path / "contexts")
    registry.pin(context.key)
    registry.close()
    broken = bytearray(path.read_bytes())
    broken[-5000] ^= 4
    path.write_bytes(broken)
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    again = engine.load(TEXT)
    assert again.receipt is not None
    assert again.receipt.tier == "built"
    assert "checksum" in str(again.receipt.reason)
    assert "moved to quarantine" in caplog.text
    (bad,) = engine.registry.quarantine()
    assert "checksum" in bad["reason"]
    assert (tmp_path / "contexts" / "quarantine" / bad["file"]).read_bytes() == broken
    assert same_pairs(context, again)
    assert engine.stats()["quarantined"] == 1
    engine.close()
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    assert engine.registry.one(context.key).pinned
    assert engine.load(TEXT).receipt.tier == "disk"  # type: ignore[union-attr]
    assert engine.registry.gc()["quarantined"] == 1
    assert engine.registry.quarantine() == []
    engine.close()


def test_a_file_under_anothers_key_is_not_served(tmp_path: Path) -> None:
    first, second = load_and_close(tmp_path), load_and_close(tmp_path, "Another page. " * 9)
    tier = DiskTier(tmp_path / "contexts")
    os.replace(tier.folder.path(second.key), tier.folder.path(first.key))
    tier.close()
    again = load_and_close(tmp_path)
    assert again.receipt is not None
    assert again.receipt.tier == "built"
    assert "holds the context" in str(again.receipt.reason)
    assert same_pairs(first, again)


def test_a_symbolic_link_is_refused_without_reading_what_it_points_to(tmp_path: Path) -> None:
    context = load_and_close(tmp_path)
    (path,) = blobs(tmp_path)
    elsewhere = tmp_path / "elsewhere.safetensors"
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere)
    again = load_and_close(tmp_path)
    assert again.receipt is not None
    assert "symbolic link" in str(again.receipt.reason)
    assert same_pairs(context, again)
    assert elsewhere.exists()


def test_a_linked_folder_is_refused_without_reading_what_it_points_to(tmp_path: Path) -> None:
    load_and_close(tmp_path)
    (path,) = blobs(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    os.replace(path.parent, elsewhere)
    path.parent.symlink_to(elsewhere)
    before = (elsewhere / path.name).read_bytes()
    again = load_and_close(tmp_path)
    assert again.receipt is not None
    assert again.receipt.tier == "built"
    assert (elsewhere / path.name).read_bytes() == before


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Callable[..., None]]:
    """A folder with one context, and a way to write rows past our own code."""
    load_and_close(tmp_path, name="page")

    def plant(key: Any, raw: int, mode: int, filename: str | None, value: Any) -> None:
        with sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db") as database:
            database.execute("DELETE FROM Cache WHERE key = ?", (key,))
            database.execute(
                "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename, value) VALUES (?, ?, 0, 0, 0, ?, ?, ?)",
                (key, raw, mode, filename, value),
            )

    return tmp_path, plant


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_damaged_table_is_told_by_iterating_over_it(tmp_path: Path, newest_first: bool) -> None:
    index = Index(tmp_path)
    for number in range(300):
        index.set(f"context:{number}", {"text": "x" * 100})
    index.close()
    with sqlite3.connect(tmp_path / "cache.db") as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'Cache'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    with (tmp_path / "cache.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    index = Index(tmp_path)
    with pytest.raises(IndexDamagedError):
        list(index.keys("", newest_first))
    index.close()


def test_of_a_damaged_index_what_can_be_read_is_kept(planted: tuple[Path, Callable[..., None]]) -> None:
    folder, plant = planted
    engine = tiny_engine(cache_dir=folder, ratio=0.4)
    engine.load(TEXT, name="later", tags="red")
    engine.registry.pin("later")
    other = engine.load(TEXT + "More.", name="more")
    engine.registry.pin("more")
    engine.close()
    plant(f"context:{other.key}", 1, 1, None, "0123456789abcdef{}")
    engine = tiny_engine(cache_dir=folder, ratio=0.4)
    told = {entry.name: (sorted(entry.names), entry.tags, entry.pinned) for entry in engine.registry.contexts()}
    assert told == {"later": (["later", "page"], ("red",), True), "more": (["more"], (), False)}
    assert engine.load(TEXT).receipt.tier == "disk"
    engine.close()


@pytest.mark.parametrize("kind", ["pickled value", "pickled key", "file outside", "row with a path for a key", "foreign row"])
def test_planted_rows_are_refused_without_executing_or_reading_anything(
    planted: tuple[Path, Callable[..., None]], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, plant = planted
    proof = folder / "executed"
    secret = folder / "secret.safetensors"
    secret.write_text("not ours")
    (path,) = blobs(folder)
    bomb = b"cposix\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR."
    if kind == "pickled value":
        plant(f"context:{path.stem}", 1, 4, None, bomb)
    elif kind == "pickled key":
        plant(bomb, 0, 1, None, "x")
    elif kind == "file outside":
        plant(f"context:{path.stem}", 1, 3, "../../../secret.safetensors", None)
    elif kind == "row with a path for a key":
        row = {"key": "../../secret", "identity": {}, "group": "", "file_nbytes": 1, "nbytes": 1, "n_tokens": 1, "ratio": 1, "tags": []}
        plant("context:../../secret", 1, 1, None, Index.packed("context:../../secret", row))
    else:
        plant(f"context:{path.stem}", 1, 1, None, "0123456789abcdef{}")
    engine = tiny_engine(cache_dir=folder, ratio=0.4, disk_bytes="10MB")
    assert engine.registry.contexts()
    assert engine.load(TEXT).receipt.tier == "disk"  # type: ignore[union-attr]
    engine.load(TEXT + "More.")
    engine.registry.gc()
    engine.close()
    assert "index" in caplog.text
    assert not proof.exists()
    assert secret.read_text() == "not ours"


def test_a_lost_index_is_made_anew_from_the_files(tmp_path: Path) -> None:
    context = load_and_close(tmp_path, name="page", tags="a")
    for path in (tmp_path / "contexts" / "index").iterdir():
        path.unlink()
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    found = engine.get("page")
    assert found.key == context.key
    assert found.receipt.tier == "disk"  # type: ignore[union-attr]
    (entry,) = engine.registry.contexts()
    assert entry.tags == ("a",)
    assert engine.stats()["tiers"]["disk"]["nbytes"] == blobs(tmp_path)[0].stat().st_size
    engine.close()


def test_a_folder_of_a_newer_layout_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_and_close(tmp_path)
    (tmp_path / "contexts" / "FORMAT").write_text("3\n")
    gc.collect()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "contexts").rglob("*")}
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load(TEXT)
    assert engine.generate(context, "Who?", max_new_tokens=2).text
    assert "newer than the 2 this version knows" in caplog.text
    assert "layout 3" in str(engine.registry.no_disk)
    engine.close()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "contexts").rglob("*")} == before


def test_a_disk_that_cannot_be_written_costs_one_warning_and_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    contexts = [engine.load(f"{i}" + TEXT) for i in range(3)]
    engine.registry.flush()
    monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 1
    assert engine.stats()["disk_errors"] == 3
    assert all(engine.generate(context, "Who?", max_new_tokens=2).receipt.tier == "device" for context in contexts)
    assert blobs(tmp_path) == []
    assert engine.stats()["tiers"]["disk"]["nbytes"] == 0
    engine.load("4" + TEXT)
    engine.registry.flush()
    assert len(blobs(tmp_path)) == 1
    engine.close()


MOUNTED = """
mount -t tmpfs -o size={size} tmpfs {folder} || exit 77
{prepare}
exec {python} -c "{script}"
"""


def in_a_mount(folder: Path, size: str, prepare: str, script: str) -> str:
    """What a script prints in a mount of its own over ``folder``."""
    folder.mkdir()
    command = MOUNTED.format(size=size, folder=folder, prepare=prepare, python=sys.executable, script=script)
    out = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    if out.returncode == 77 or "unshare" in out.stderr[:20]:
        pytest.skip("this machine lets nobody mount a file system")
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.parametrize("size", ["640k", "650k", "660k"])  # it is full at a file, or at its row
def test_a_full_file_system(size: str, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import TEXT, tiny_engine\n"
        f"engine = tiny_engine(cache_dir='{tmp_path / 'small'}', ratio=0.4)\n"
        "contexts = [engine.load(str(i) + TEXT) for i in range(8)]\n"
        "engine.registry.flush()\n"
        "assert all(engine.generate(c, 'Who?', max_new_tokens=2).text for c in contexts)\n"
        "stats, measured = engine.stats(), engine.registry._backing.tier.measured\n"
        "print(stats['stored'], stats['disk_errors'], stats['tiers']['disk']['nbytes'] >= measured())\n"
        f"open('{tmp_path / 'small' / 'filler'}', 'w').close()\n"  # somebody makes room
        "print(engine.stats()['tiers']['disk']['nbytes'] == measured())\n"
    )
    fill = f"head -c 60000 /dev/zero > {tmp_path / 'small' / 'filler'}"
    stored, errors, enough, exact = in_a_mount(tmp_path / "small", size, fill, script).split()
    assert int(stored) + int(errors) == 8
    assert int(errors) >= 3
    assert enough == "True"  # what is there is counted
    assert exact == "True"


def test_a_read_only_file_system_serves_what_it_has(tmp_path: Path) -> None:
    load_and_close(tmp_path / "cache", name="page")
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import TEXT, tiny_engine\n"
        f"engine = tiny_engine(cache_dir='{tmp_path / 'mounted'}', ratio=0.4)\n"
        "stored, new = engine.load(TEXT), engine.load(TEXT + 'More.')\n"
        "assert engine.generate(new, 'Who?', max_new_tokens=2).text\n"
        "engine.registry.flush()\n"
        "print(stored.receipt.tier, new.receipt.tier, engine.stats()['disk_errors'] > 0)\n"
        "print(engine.get('page').key == stored.key, *(entry.name for entry in engine.registry.contexts() if entry.name))\n"
        "try: engine.registry.remove(stored.key)\n"
        "except OSError as error: print(error)\n"
    )
    prepare = f"cp -r {tmp_path / 'cache'}/* {tmp_path / 'mounted'}/ && mount -o remount,ro {tmp_path / 'mounted'}"
    told, found, refused = in_a_mount(tmp_path / "mounted", "20m", prepare, script).splitlines()
    assert told == "disk built True"
    assert found == "True page"
    assert "cannot be written" in refused


@pytest.mark.parametrize("everything", [True, False], ids=["reads too", "writes"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_index_that_somebody_holds_costs_a_second_and_a_warning(
    everything: bool, when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_and_close(tmp_path)
    if when == "after":
        engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        if everything and when == "before":  # nobody else may have it open
            holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
        holder.execute("CREATE TABLE held (x)")
        began = time.monotonic()
        if when == "before":
            engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
        stored, new, third = engine.load(TEXT), engine.load(TEXT + "More."), engine.load(TEXT + "Still more.")
        engine.registry.flush()
        assert time.monotonic() - began < 8  # it was some minutes
        assert (stored.receipt.tier, new.receipt.tier) == ("disk", "built")  # type: ignore[union-attr]
        assert engine.generate(new, "Who?", max_new_tokens=2).text
        assert len(blobs(tmp_path)) == 1
        holder.execute("ROLLBACK")
    assert "cache.db" in os.listdir(tmp_path / "contexts" / "index")
    assert sum("for a second" in record.message for record in caplog.records) == 1
    engine.generate(new, "Who?", max_new_tokens=2)  # its next use
    engine.registry._writing.thread.submit(lambda: None).result()
    assert engine.registry.tiers(new.key) == ["device", "disk"]
    assert len(blobs(tmp_path)) == 2
    engine.close()  # the others
    assert {path.stem for path in blobs(tmp_path)} == {stored.key, new.key, third.key}
    assert "free again" in caplog.text
    again = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    assert {entry.key for entry in again.registry.contexts()} == {stored.key, new.key, third.key}
    again.close()


def test_who_waits_for_another_process_is_told_after_a_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    key = load_and_close(tmp_path / "elsewhere").key
    with engine.registry._backing.tier.folder.lock(key):  # type: ignore[union-attr]
        asking = threading.Thread(target=engine.load, args=(TEXT,))
        asking.start()
        while "waiting for another process" not in caplog.text:
            assert asking.is_alive()
            time.sleep(0.01)
    asking.join()
    monkeypatch.setattr(loading, "_convert", lambda *args: None)
    source = tmp_path / "tiny.gguf"
    source.write_bytes(b"weights")
    with FileLock(f"{loading._converted(source, 'float32', tmp_path)}.lock"):
        converting = threading.Thread(target=loading._converted, args=(source, "float32", tmp_path))
        converting.start()
        while "is converting tiny-" not in caplog.text:
            assert converting.is_alive()
            time.sleep(0.01)
    converting.join()
    with FileLock(tmp_path / "lock"):
        for timeout, told in ((0.1, False), (1.2, True)):
            caplog.clear()
            with pytest.raises(Timeout), held(FileLock(tmp_path / "lock"), "tidying up", timeout):
                pass
            assert ("is tidying up" in caplog.text) == told
    engine.close()


def test_a_folder_is_fixed_when_the_engine_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    engine, registry = tiny_engine(cache_dir="cache"), ContextRegistry(torch.device("cpu"), Path("cache/contexts"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert engine.cache_dir == tmp_path / "cache"
    context = engine.load(TEXT)
    engine.close()
    assert [path.stem for path in blobs(tmp_path / "cache")] == [context.key]
    assert [entry.key for entry in registry.contexts()] == [context.key]
    registry.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_metadata_that_json_cannot_take_is_stored_as_text(tmp_path: Path) -> None:
    context = load_and_close(tmp_path, Document(TEXT, "page", {("a", 1): Path("/x"), "n": 2}), name="page")
    again = tiny_engine(cache_dir=tmp_path).get("page")
    assert context.sources[0].metadata == again.sources[0].metadata == {"('a', 1)": "/x", "n": 2}


def test_what_is_deleted_pinned_or_untagged_under_a_lock_is_refused_and_stays(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    key = engine.load(TEXT, name="page", tags="red").key
    engine.registry.flush()
    (before,) = engine.registry.contexts()
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        for change in (lambda: engine.registry.remove(key), lambda: engine.registry.pin("page"), lambda: engine.registry.untag(key, "red")):
            with pytest.raises(StorageError, match="holds the index locked; try again when it is free"):
                change()
        holder.execute("ROLLBACK")
    (after,) = engine.registry.contexts()
    assert (after.names, after.tags, after.pinned) == (before.names, ("red",), False)
    assert not engine.registry.is_removed(key)
    assert not engine.registry._memory.device.held[key].pinned
    engine.registry.untag(key, "red")
    assert engine.registry.remove(key).key == key
    engine.close()


def test_every_number_of_stats_is_documented_and_every_documented_one_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    usable, not_usable = (ContextRegistry(torch.device("cpu"), tmp_path / name) for name in ("contexts", "file"))
    stats = usable.stats()
    tiers = {name for registry in (usable, not_usable) for tier in registry.stats()["tiers"].values() for name in tier}
    assert set(re.findall(r"``(\w+)``", ContextRegistry.stats.__doc__ or "")) == stats.keys() | tiers
    table = (ROOT / "docs" / "registry.md").read_text()
    assert {name for name in stats if f"`{name}`" not in table} == set()
    usable.close()
