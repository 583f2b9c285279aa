"""Bytes, measured where they lie."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TESTS, TEXT, kept_at, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, KVzipEngine


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1.0])
def test_nbytes_is_the_storages_own_size_and_follows_the_ratio(ratio: float) -> None:
    engine = KVzipEngine(tiny_model(num_attention_heads=8, num_key_value_heads=4, head_dim=64), tiny_tokenizer(), codec="none")
    context = engine.load(TEXT * 4, ratio=ratio)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in context.layers for t in layer.tensors()}
    assert context.nbytes == sum(storages.values()) + context.token_ids.untyped_storage().nbytes()
    pair = 2 * context.layers[0].keys.shape[1] * context.layers[0].keys.element_size()
    assert context.dense_nbytes == context.total_pairs * pair
    assert context.nbytes <= (kept_at(ratio, context) / context.total_pairs + 0.03) * context.dense_nbytes


def test_a_reopened_context_is_as_small(smollm2: KVzipEngine, excerpt_context: CompressedContext, tmp_path: Path) -> None:
    path = excerpt_context.save(tmp_path / "c")
    again = smollm2.open(path)
    assert again.nbytes == excerpt_context.nbytes
    assert path.stat().st_size <= 0.33 * excerpt_context.dense_nbytes + 4096 * (4 * len(again.layers) + 16)


def test_the_dense_cache_is_really_freed() -> None:
    """Resident memory of a process that builds contexts: they stay, their dense caches do not."""
    script = """
import json, psutil
from conftest import HANDBOOK, tiny_model, tiny_tokenizer
from kvzip_memory import KVzipEngine
shape = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, head_dim=64)  # 16 KiB a token
model = tiny_model(**shape, max_position_embeddings=4096)
engine = KVzipEngine(model, tiny_tokenizer())
text = HANDBOOK.read_text()
resident = lambda: psutil.Process().memory_info().rss
kept = [engine.load(text[:1800])]  # warms up allocator and code paths
before = resident()
kept += [engine.load(text[i : i + 1800]) for i in (1000, 2000, 3000)]
print(json.dumps([resident() - before, sum(c.nbytes for c in kept[1:]), sum(c.dense_nbytes for c in kept[1:])]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=TESTS)
    grown, kept, dense = json.loads(out.stdout.splitlines()[-1])
    assert kept < 0.33 * dense
    assert grown < kept + 0.2 * dense, (grown, kept, dense)


def test_a_sliding_layer_holds_its_window_and_no_more() -> None:
    """With one KV head the cache's last tokens are a contiguous slice, which must not keep the rest alive."""
    engine = KVzipEngine(tiny_model("gemma3", num_key_value_heads=1), tiny_tokenizer(), ratio=0.5)
    context = engine.load(TEXT * 2)
    for layer in context.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert layer.window is None or len(tensor) == layer.window.size - 1


class Allocations(TorchDispatchMode):
    """The largest storage any operation has made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def test_decoding_copies_no_pair_of_the_context(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.9)
    context = engine.load(TEXT * 5)
    full = [layer for layer in context.layers if layer.window is None]
    addresses = [t.data_ptr() for layer in context.layers for t in layer.tensors()]
    content = [t.clone() for layer in context.layers for t in layer.tensors()]
    layer_nbytes = min(layer.keys.untyped_storage().nbytes() for layer in full)
    session = engine.session(context)
    with session.stream("Go on.", max_new_tokens=65) as stream:
        next(stream)  # the question itself is prefilled
        allocations, worker = Allocations(), engine._model._worker
        worker.run(allocations.__enter__)  # modes belong to a thread
        list(stream)
        worker.run(lambda: allocations.__exit__(None, None, None))
    assert stream.reply.usage.output_tokens == 65
    assert 0 < allocations.largest < layer_nbytes
    assert [t.data_ptr() for layer in context.layers for t in layer.tensors()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(content, (t for layer in context.layers for t in layer.tensors()), strict=True))


def test_a_repr_a_person_enjoys(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, name="handbook", ratio=0.3)
    kept = kept_at(0.3, context) / context.total_pairs
    assert repr(context).startswith(f"<CompressedContext 'handbook' {context.n_tokens:,} tokens, {100 * kept:.1f} % kept, ")
    assert repr(context).endswith(f"{context.nbytes / 1e6:.1f} MB of {context.dense_nbytes / 1e6:.1f} MB>")


def test_importing_the_package_imports_no_framework() -> None:
    script = "import sys, kvzip_memory; print(sorted(m for m in sys.modules if m.startswith(('langchain', 'llama_index'))))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
