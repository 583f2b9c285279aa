"""The engine: a model, its tokenizer, and the contexts loaded with it."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvzip_memory import loading
from kvzip_memory.cache import Row, Tail
from kvzip_memory.compression import Prefilled, compress, prefill
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.scorers import KVzipScorer, Scorer
from kvzip_memory.context import CompressedContext, Receipt
from kvzip_memory.errors import InputError, WindowError
from kvzip_memory.modeling import FEED_TOKENS, LanguageModel
from kvzip_memory.prompt import Message, Prompt, PromptBuilder, read_source
from kvzip_memory.registry.directory import ContextDirectory
from kvzip_memory.registry.files import read_context
from kvzip_memory.registry.identity import check_same_model, context_identity, digest, key_of, model_identity, weights_stamp
from kvzip_memory.session import Reply, Session, Stream

logger = logging.getLogger(__name__)

#: Tokens of the window that a context leaves free, for a question and its answer.
FREE_TOKENS = 256


class KVzipEngine:
    """Loads texts into compressed contexts and answers from them.

    ``ratio`` is the fraction of key-value pairs **kept** (kvpress' ``compression_ratio`` is the fraction removed).
    May be used from any number of threads; forwards of the model take turns.

    Args:
        model: a causal language model of transformers. It is not changed and goes on working for others.
        tokenizer: its tokenizer.
        ratio: kept fraction for :meth:`load`, in (0, 1].
        cache_dir: contexts are stored there and found again by later engines of the same model; None stores nothing.
        progress: show progress bars; None shows them on a terminal only.
        scorer: how pairs are ranked, see :mod:`kvzip_memory.compression.scorers`.
        allocator: ``"global"``, ``"per_layer"`` or ``"uniform"``.
        template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed.
        InputError: a ratio outside (0, 1] or an unknown allocator.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        ratio: float = 0.3,
        *,
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
        scorer: Scorer | None = None,
        allocator: str = "global",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.ratio = _checked_ratio(ratio)
        _check_allocator(allocator)
        self._model = LanguageModel(model, tokenizer)
        self.tokenizer = tokenizer
        self._prompts = PromptBuilder(tokenizer, template_kwargs)
        self._scorer: Scorer = scorer or KVzipScorer()
        self._allocator = allocator
        self._progress = progress
        self._directory = None if cache_dir is None else ContextDirectory(Path(cache_dir).expanduser() / "contexts")
        self._loaded: dict[str, weakref.WeakSet[CompressedContext]] = {}
        self._loaded_lock = threading.Lock()
        self._build_lock = threading.Lock()
        self._known_identity: tuple[Any, dict[str, Any]] = (None, {})

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        ratio: float = 0.3,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
        scorer: Scorer | None = None,
        allocator: str = "global",
        template_kwargs: Mapping[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> KVzipEngine:
        """An engine for a hub id, a local folder or a ``.gguf`` file (dequantised once, then read from a folder).

        Args:
            dtype: of the weights; ``"auto"`` is the checkpoint's on a GPU and float32 on a CPU.
            device: ``"auto"`` takes a GPU if there is one.
            model_kwargs: handed to transformers' ``from_pretrained``.

        Raises:
            InputError, UnsupportedModelError: see the class. Ratio and allocator are checked before anything is loaded.
        """
        _checked_ratio(ratio)
        _check_allocator(allocator)
        folder = None if cache_dir is None else Path(cache_dir).expanduser()
        loaded, tokenizer = loading.load_model(model, dtype=dtype, device=device, cache_dir=folder, **model_kwargs)
        return cls(
            loaded,
            tokenizer,
            ratio,
            cache_dir=cache_dir,
            progress=progress,
            scorer=scorer,
            allocator=allocator,
            template_kwargs=template_kwargs,
        )

    @property
    def model(self) -> PreTrainedModel:
        return self._model.model

    @property
    def window(self) -> int:
        """Tokens the model can hold: context, questions and answers together."""
        return self._model.window

    # -- contexts ------------------------------------------------------------------------------------------------

    def load(self, source: Any, *, name: str | None = None, ratio: float | None = None, system: str | None = None) -> CompressedContext:
        """The compressed context of a source: found if it was loaded before, else built.

        Building costs one prefill and one to two more for ranking the pairs; at ratio 1.0 only the prefill.

        Args:
            source: a string, a :class:`~pathlib.Path` to a text file, a document (LangChain's, LlamaIndex's or
                :class:`~kvzip_memory.prompt.Document`), chat messages (mappings with ``role`` and ``content``, or the
                frameworks' own), or a list of documents or of messages.
            name: shown in place of the key; not part of it.
            ratio: kept fraction, the engine's if None.
            system: a system prompt, put first and never evicted.

        Raises:
            InputError: nothing to load, a ratio outside (0, 1], an unreadable file, roles the template refuses.
            WindowError: more tokens than the window can hold beside a question.
            ModelError: the model computed scores that are not finite.
        """
        ratio = self.ratio if ratio is None else _checked_ratio(ratio)
        began = time.perf_counter()
        prompt = self._prompt(source, system)
        tokenized = time.perf_counter()
        identity = context_identity(self._identity, prompt, ratio, self._scorer.identity(), self._allocator)
        key = key_of(identity)
        ms = {"tokenize": 1e3 * (tokenized - began), "identify": 1e3 * (time.perf_counter() - tokenized)}
        context, tier, reason = self._in_memory(key), "device", None
        if context is None:  # one at a time: whoever waits for the same text finds it afterwards
            with self._build_lock:
                context, tier, reason = self._find(key, ms)
                if context is None:
                    context = self._build(key, identity, prompt, ratio, name, ms)
                self._remember(context)
        receipt = Receipt(key, hit=tier != "built", tier=tier, reason=reason, nbytes=context.nbytes, ms=ms)
        return self._remember(replace(context, name=name, sources=prompt.sources, receipt=receipt))

    def open(self, path: str | Path) -> CompressedContext:
        """A context from a file written by :meth:`CompressedContext.save`.

        Raises:
            IdentityMismatchError: written with another model; names the fields.
            CorruptFileError: damaged, incomplete, of a newer format, or not a context file.
            OSError: the file cannot be read.
        """
        began = time.perf_counter()
        context = read_context(Path(path), self._model.device)
        check_same_model(context.identity, self._identity, str(path))
        ms = {"load": 1e3 * (time.perf_counter() - began)}
        return replace(context, receipt=Receipt(context.key, hit=True, tier="disk", nbytes=context.nbytes, ms=ms))

    def _prompt(self, source: Any, system: str | None) -> Prompt:
        documents, messages = read_source(source)
        prompt = self._prompts.documents(documents, system) if documents else self._prompts.conversation(messages, system)
        tokens, limit = len(prompt.token_ids), self.window - FREE_TOKENS
        if tokens > limit:
            raise WindowError(
                f"the text has {tokens:,} tokens; a context may have {limit:,} (the model's window of {self.window:,} less "
                f"{FREE_TOKENS} for a question and its answer). Compressing does not widen the window: split the text into several "
                "contexts or use a model with a longer one",
                tokens=tokens,
                window=self.window,
            )
        return prompt

    def _in_memory(self, key: str) -> CompressedContext | None:
        """A context of this key that somebody still holds."""
        with self._loaded_lock:
            return next(iter(self._loaded.get(key, ())), None)

    def _remember(self, context: CompressedContext) -> CompressedContext:
        with self._loaded_lock:
            for key in [key for key, alive in self._loaded.items() if not alive]:
                del self._loaded[key]
            self._loaded.setdefault(context.key, weakref.WeakSet()).add(context)
        return context

    def _find(self, key: str, ms: dict[str, float]) -> tuple[CompressedContext | None, str, str | None]:
        """A context in memory or on disk; else None, ``"built"`` and the reason."""
        alive = self._in_memory(key)
        if alive is not None:
            return alive, "device", None
        if self._directory is None:
            return None, "built", "not in memory, and no cache_dir to look in"
        began = time.perf_counter()
        context, reason = self._directory.get(key, self._model.device)
        ms["load"] = 1e3 * (time.perf_counter() - began)
        return (context, "disk", None) if context is not None else (None, "built", reason)

    def _build(
        self, key: str, identity: Mapping[str, Any], prompt: Prompt, ratio: float, name: str | None, ms: dict[str, float]
    ) -> CompressedContext:
        n = len(prompt.token_ids)
        total = n + (self._scorer.cost(n - prompt.protected) if ratio < 1.0 else 0)
        hidden = None if self._progress is None else not self._progress
        with tqdm(total=total, desc=name or "context", unit="tok", disable=hidden, leave=False) as bar:

            def progress(stage: str, tokens: int) -> None:
                bar.set_postfix_str(stage, refresh=False)
                bar.update(tokens)

            began = time.perf_counter()
            cache = prefill(self._model, prompt.token_ids, progress)
            ms["prefill"] = 1e3 * (time.perf_counter() - began)
            recipe = prompt.recipe
            prefilled = Prefilled(
                self._model, cache, prompt.token_ids, prompt.protected, recipe.opening, recipe.closing, self._prompts.text_ids
            )
            compressed = compress(prefilled, ratio, self._scorer, self._allocator, progress)
        ms.update(compressed.ms)
        context = CompressedContext(
            key=key,
            identity=identity,
            token_ids=torch.tensor(prompt.token_ids, dtype=torch.int32),
            layers=compressed.layers,
            protected=prompt.protected,
            ratio=ratio,
            dense_nbytes=compressed.dense_nbytes,
            recipe=recipe,
            sources=prompt.sources,
            name=name,
        )
        if self._directory is not None:
            began = time.perf_counter()
            self._directory.put(context)
            ms["save"] = 1e3 * (time.perf_counter() - began)
        return context

    @property
    def _identity(self) -> dict[str, Any]:
        """The model's fields of a key; computed again when a weight or an adapter has changed."""
        stamp = weights_stamp(self.model)
        known_stamp, fields = self._known_identity
        if stamp != known_stamp:
            fields = model_identity(self.model, self.tokenizer, self._prompts.template)
            self._known_identity = (stamp, fields)
        return fields

    @property
    def fingerprint(self) -> str:
        """Hash of model, tokenizer and template: what decides whether two engines can use each other's contexts."""
        return digest(self._identity)

    # -- answers -------------------------------------------------------------------------------------------------

    def session(self, context: CompressedContext | None = None) -> Session:
        """A conversation over a context, or over none."""
        self._check_context(context)
        return Session(self._model, self._prompts, context)

    def generate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """Answer one question from a context (None: without one); the question is forgotten afterwards.

        Args:
            question: text, or chat messages of which the last is the user's.
            params: ``max_new_tokens=256, temperature=0.0, top_p=None, top_k=None, seed=None, stop=None``, see
                :class:`~kvzip_memory.generation.GenerationParams`.

        Raises:
            InputError: an empty question or a parameter outside its range.
            WindowError: context and question fill the model's window.
        """
        return self.session(context).ask(question, **params)

    def stream(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Stream:
        """The answer of :meth:`generate`, piece by piece."""
        return self.session(context).stream(question, **params)

    def prompt_ids(self, context: CompressedContext | None, question: str | Sequence[Message]) -> list[int]:
        """The ids that follow the context for this question: separator or headers, question, assistant header."""
        return self._prompts.question(context.recipe if context else None, question)

    def logits(self, context: CompressedContext | None, ids: Sequence[int] | Tensor) -> Tensor:
        """Logits ``[len(ids), vocab]`` fp32 after each of ``ids``, fed behind the context. Nothing is kept.

        Raises:
            InputError: no ids.
            WindowError: more than the window holds.
        """
        self._check_context(context)
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        row = Row(context, Tail())
        if not ids:
            raise InputError("no ids to compute logits for; give at least one")
        if row.length + len(ids) > self.window:
            tokens = row.length + len(ids)
            raise WindowError(
                f"{tokens:,} tokens with the context; the model's window is {self.window:,}", tokens=tokens, window=self.window
            )
        chunks = [ids[i : i + FEED_TOKENS] for i in range(0, len(ids), FEED_TOKENS)]
        return torch.cat([self._model.forward([row], [chunk], last_only=False)[0] for chunk in chunks])

    def _check_context(self, context: CompressedContext | None) -> None:
        if context is not None:
            check_same_model(context.identity, self._identity, repr(context))

    def __repr__(self) -> str:
        return f"<KVzipEngine {self.model.config.model_type} window {self.window:,} ratio {self.ratio} on {self._model.device}>"


def _check_allocator(allocator: str) -> None:
    if allocator not in ALLOCATORS:
        raise InputError(f"allocator {allocator!r} is unknown; use one of {', '.join(ALLOCATORS)}")


def _checked_ratio(ratio: float) -> float:
    if not 0 < ratio <= 1:
        raise InputError(f"ratio is {ratio}; it is the fraction of pairs kept and must lie in (0, 1]")
    return float(ratio)
