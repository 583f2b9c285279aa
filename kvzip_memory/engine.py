"""The engine: a model, its tokenizer, and the contexts loaded with it."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvzip_memory import loading
from kvzip_memory.attribution import NEUTRAL, Span, attention_mass, compared
from kvzip_memory.batching import Places
from kvzip_memory.cache import Row, Tail
from kvzip_memory.compression import DensePairs, Prefilled, compress, prefill, prefill_behind
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.scorers import KVzipScorer, Scorer
from kvzip_memory.context import CompressedContext, Lease, Receipt, Resident, Storage
from kvzip_memory.errors import IdentityMismatchError, InputError, KVzipError, WindowError
from kvzip_memory.generation import GenerationParams
from kvzip_memory.guidance import Guidance
from kvzip_memory.modeling import LanguageModel
from kvzip_memory.options import checked_ratio
from kvzip_memory.prompt import Prompt, PromptBuilder
from kvzip_memory.registry import Build, ContextRegistry, Entry, Report, Wanted, check_text, parse_bytes
from kvzip_memory.registry.files import read_context
from kvzip_memory.registry.identity import (
    MODEL_FIELDS,
    check_same_model,
    context_identity,
    digest,
    group_of,
    key_of,
    model_identity,
    tenant_digest,
    weights_identity,
)
from kvzip_memory.session import Reply, Session, Stream
from kvzip_memory.sharing import Shared
from kvzip_memory.sources import Message, as_folder, as_messages, as_path, as_texts, clean, cleaned, read_source
from kvzip_memory.threads import release
from kvzip_memory.tools import Tool, ToolForm, calls_grammar, checked_tools, read_calls
from kvzip_memory.weights import Watch

logger = logging.getLogger(__name__)

# The tag of contexts that were made by marks.
_MARKED = "cache_control"

#: Tokens of the window that a context leaves free, for a question and its answer.
FREE_TOKENS = 256


class KVzipEngine(Shared):
    """Loads texts into compressed contexts and answers from them.

    ``ratio`` is the fraction of key-value pairs **kept** (kvpress' ``compression_ratio`` is the fraction removed).
    May be used from any number of threads: their answers are decoded together, builds take turns with them. A copy, deep or not, is
    the engine itself.

    Args:
        model: a causal language model of transformers. It is not changed and goes on working for others.
        tokenizer: its tokenizer.
        ratio: kept fraction for :meth:`load`, in (0, 1].
        cache_dir: contexts are stored there and found again by later engines of the same model; None stores nothing.
        device_bytes: budget of the contexts on the model's device, such as ``"4GiB"``. None: a quarter of its memory.
        host_bytes: budget of the contexts moved from there to the host's memory. None: an eighth of it where the model
            is on a GPU, else 0.
        disk_bytes: budget of the contexts in ``cache_dir``. None: no limit.
        ttl: seconds after which a context is built anew; None never.
        tenant: a salt for every key: engines of different tenants never use each other's contexts.
        max_running: answers that threads get decoded together, a row each.
        max_waiting: answers that may wait behind them, first come first served; more is a :class:`QueueFullError`.
        attention: what computes attention over contexts: ``"auto"``, ``"cpu"``, ``"triton"``, ``"flash"`` or
            ``"reference"``, see :func:`kvzip_memory.attention.choose`; :meth:`stats` names what was chosen.
        progress: show progress bars; None shows them on a terminal only.
        compress_every: compress after so many tokens, before more are read. A build then never holds the whole dense
            cache, only so many tokens of it above what is kept, and is a little less faithful (``docs/benchmarks.md``).
            None reads everything first.
        scorer: how pairs are ranked, see :mod:`kvzip_memory.compression.scorers`.
        allocator: ``"global"``, ``"per_layer"`` or ``"uniform"``.
        template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``. The template is the tokenizer's own,
            which may be set at any time: contexts of another one are then not found, and are refused where they are given.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed.
        InputError: a ratio outside (0, 1], an unknown allocator, an attention that cannot compute on the model's device.
    """

    _way_out = "make one in each process, with the same cache_dir"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        ratio: float = 0.3,
        *,
        cache_dir: str | Path | None = None,
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = None,
        disk_bytes: int | str | None = None,
        ttl: float | None = None,
        tenant: str | None = None,
        max_running: int = 32,
        max_waiting: int = 1024,
        attention: str = "auto",
        progress: bool | None = None,
        compress_every: int | None = None,
        scorer: Scorer | None = None,
        allocator: str = "global",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.ratio = checked_ratio(ratio)
        _check_allocator(allocator)
        _check_every(compress_every)
        self._model = LanguageModel(model, tokenizer, attention, max_running=max_running, max_waiting=max_waiting)
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._prompts_of = (copy.deepcopy(tokenizer.chat_template), self._prompt_builder())
        self._scorer: Scorer = scorer or KVzipScorer()
        self._allocator = allocator
        self._compress_every = compress_every
        self._progress = progress
        self._tenant = tenant_digest(tenant)
        device = self._model.device
        if device_bytes is None:
            device_bytes = _memory_nbytes(device) // 4
        if host_bytes is None:
            host_bytes = 0 if device.type == "cpu" else _memory_nbytes(torch.device("cpu")) // 8
        #: Answers decoded together.
        self.max_running = max_running
        #: The folder given, wherever the process goes later; None if contexts are in memory only.
        self.cache_dir = None if cache_dir is None else as_folder(cache_dir, "cache_dir")
        #: What integrations keep for as long as the engine is there, by their names.
        self.shared: dict[str, Any] = {}
        self.registry = ContextRegistry(
            device,
            None if self.cache_dir is None else self.cache_dir / "contexts",
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            ttl=ttl,
            tenant=self._tenant,
        )
        self._watch = Watch(self.model)
        self._known_identity: tuple[Any, dict[str, Any]] = (None, {})
        self._loaded: WeakValueDictionary[str, CompressedContext] = WeakValueDictionary()
        release()
        self.guidance = Guidance(tokenizer, model.config.vocab_size, self._model.eos_ids)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        ratio: float = 0.3,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        cache_dir: str | Path | None = None,
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = None,
        disk_bytes: int | str | None = None,
        ttl: float | None = None,
        tenant: str | None = None,
        max_running: int = 32,
        max_waiting: int = 1024,
        attention: str = "auto",
        progress: bool | None = None,
        compress_every: int | None = None,
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
        checked_ratio(ratio)
        _check_allocator(allocator)
        _check_every(compress_every)
        for size, value in {"device_bytes": device_bytes, "host_bytes": host_bytes, "disk_bytes": disk_bytes}.items():
            parse_bytes(size, value)
        folder = None if cache_dir is None else as_folder(cache_dir, "cache_dir")
        loaded, tokenizer = loading.load_model(model, dtype=dtype, device=device, cache_dir=folder, **model_kwargs)
        return cls(
            loaded,
            tokenizer,
            ratio,
            cache_dir=folder,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            ttl=ttl,
            tenant=tenant,
            max_running=max_running,
            max_waiting=max_waiting,
            attention=attention,
            progress=progress,
            compress_every=compress_every,
            scorer=scorer,
            allocator=allocator,
            template_kwargs=template_kwargs,
        )

    @property
    def model(self) -> PreTrainedModel:
        return self._model.model

    @property
    def places(self) -> Places:
        """Threads for answers that an event loop waits for; for the integrations."""
        return self._model.places

    @property
    def window(self) -> int:
        """Tokens the model can hold: context, questions and answers together."""
        return self._model.window

    # -- contexts ------------------------------------------------------------------------------------------------

    def load(
        self,
        source: Any,
        *,
        name: str | None = None,
        ratio: float | None = None,
        system: str | None = None,
        keep: str | Sequence[str] | None = (),
        tags: str | Sequence[str] | None = (),
        tools: Sequence[Tool] | None = None,
    ) -> CompressedContext:
        """The compressed context of a source: found if it was loaded before, by whomever, else built.

        Building costs one prefill and one to two more for ranking the pairs; at ratio 1.0 only the prefill. It happens
        once: other threads and processes that ask for the same wait for it. What was loaded at a larger ratio is cut
        down to a smaller one without the model. The receipt says what happened, and why.

        Args:
            source: a string, a :class:`~pathlib.Path` to a text file, a document (LangChain's, LlamaIndex's or
                :class:`~kvzip_memory.sources.Document`), chat messages (mappings with ``role`` and ``content``, or the
                frameworks' own), or a list of documents or of messages.
            name: an alias, for :meth:`get` and the command line; not part of the key.
            ratio: kept fraction, the engine's if None.
            system: a system prompt, put first and never evicted.
            keep: strings of the text whose pairs are never evicted, wherever they occur, such as codes and names.
            tags: free words to list it by; not part of the key.
            tools: the tools of a conversation, in OpenAI's form; described where the template describes them.

        Raises:
            InputError: nothing to load, a ratio outside (0, 1], an unreadable file, roles the template refuses, a
                string to keep that does not occur.
            WindowError: more tokens than the window can hold beside a question.
            BudgetError: larger than ``device_bytes``, or running answers need all of it.
            ModelError: the model computed scores that are not finite.
        """
        checked_ratio(self.ratio if ratio is None else ratio)
        tags = _labels(name, tags)
        began = time.perf_counter()
        prompt = self._prompt(source, system, _strings(keep), tools)
        return self._load_text(prompt, ratio, name, tags, began)

    def load_marked(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, ratio: float | None = None
    ) -> CompressedContext | None:
        """The context of a prompt's beginning, up to the last block of text with ``cache_control``: found or built as by :meth:`load`.

        A mark that moves on with a conversation has only what is new read: the longest stored context that the prompt begins with, and
        that keeps as much, is gone on from, as by :meth:`extend`. That takes 256 new tokens; with fewer that context is what is given.
        Contexts made so are tagged ``cache_control``; of those of one conversation the first and the last two stay.

        None if no block has a mark, or if it ends within the first 256 tokens, where building would cost more than it saves.

        Raises:
            InputError, WindowError, BudgetError, ModelError: see :meth:`load`.
        """
        began = time.perf_counter()
        ratio = checked_ratio(self.ratio if ratio is None else ratio)
        prompt = self._prompts.until_mark(messages, tools)
        if prompt is None or len(prompt.token_ids) < FREE_TOKENS:
            if prompt is not None:
                logger.debug("cache_control after %d tokens is ignored; it takes %d", len(prompt.token_ids), FREE_TOKENS)
            return None
        self._check_window(prompt)
        before = self.stored_prefix([*prompt.token_ids, -1])  # of all of them, too
        if before is None or before.ratio < ratio or before.identity["scorer"] not in (None, self._scorer.identity()):
            return self._load_text(prompt, ratio, None, (_MARKED,), began)
        if len(prompt.token_ids) - before.n_tokens < FREE_TOKENS:
            return before
        left_behind = before.identity["parent"]
        try:
            context = self._load(replace(prompt, protected=before.protected), ratio, None, (_MARKED,), began, before)
        except IdentityMismatchError:  # as in _load_text
            return self._load_text(prompt, ratio, None, (_MARKED,), began)
        self._forget_marked(left_behind)
        return context

    def _forget_marked(self, key: str | None) -> None:
        """Delete a context that a mark made when it moved on, and that nobody else has named, tagged or pinned."""
        for entry in self.registry.find(key) if key else []:
            if entry.tags == (_MARKED,) and entry.identity["parent"] and not entry.names and not entry.pinned:
                try:
                    self.registry.remove(entry.key)
                except (InputError, OSError) as error:
                    logger.debug("context %s, which a mark has left behind, stays: %s", entry.key[:12], error)

    def extend(
        self,
        context: CompressedContext,
        more: Any,
        *,
        name: str | None = None,
        ratio: float | None = None,
        keep: str | Sequence[str] | None = (),
        tags: str | Sequence[str] | None = (),
        tools: Sequence[Tool] | None = None,
        behind: bool = False,
    ) -> CompressedContext:
        """A context that goes on where another one ends. That one stays as it is, for whoever uses it.

        Only what is new is read and ranked; its pairs then compete with those the parent has left, by the scores stored
        beside them, for ``ratio`` of all pairs of both. What the parent has evicted cannot come back. Found, built once
        and stored like any context; its key is made of the parent's and the new tokens.

        Args:
            context: the parent, of the same model; ``load`` or ``extend`` gave it.
            more: chat messages. They may repeat the conversation the parent was made of, from its first message on; then
                only what comes after it is new. Or documents, behind a context of documents; each gets a header.
            name: see :meth:`load`.
            ratio: kept fraction of all pairs, the parent's ratio if None.
            keep: strings of what is new whose pairs are never evicted. The parent's stay kept, but for a parent of ratio
                1.0, which has ranked nothing.
            tags: see :meth:`load`.
            tools: as for a conversation in :meth:`load`; described anew only if the parent was made with others.
            behind: all messages are new, also those that say what the parent begins with once more.

        Raises:
            InputError: as for :meth:`load`; documents behind a conversation; a parent whose pairs another scorer ranked.
            WindowError, BudgetError, ModelError: see :meth:`load`.
            IdentityMismatchError: the parent is another model's.
        """
        began = time.perf_counter()
        if ratio is not None:
            checked_ratio(ratio)
        tags, kept = _labels(name, tags), _strings(keep)
        self._check_parent(context)
        documents, messages = read_source(more)
        if documents and tools:
            raise InputError("tools belong to a conversation; give them with the question about these documents")
        prompt = (
            self._prompts.more_documents(context, documents, kept)
            if documents
            else self._prompts.more_turns(context, messages, kept, tools, behind)
        )
        self._check_window(prompt)
        return self._load(prompt, ratio, name, tags, began, context)

    async def aextend(self, context: CompressedContext, more: Any, **options: Any) -> CompressedContext:
        """:meth:`extend` in a thread, see :meth:`aload`."""
        return await asyncio.to_thread(self.extend, context, more, **options)

    def _folded(
        self,
        context: CompressedContext | None,
        prompt: Prompt,
        template: str,
        pairs: DensePairs,
        ratio: float | None,
        name: str | None,
    ) -> CompressedContext:
        """The context of another one, or of none, and of turns whose pairs are there already."""
        began = time.perf_counter()
        if context is not None:
            self._check_parent(context)
        if template != self._prompts.template:
            raise IdentityMismatchError(
                "the session began with another chat template than the tokenizer has now; set that one again to fold it",
                fields=("template",),
            )
        self._check_window(prompt)
        return self._load(prompt, ratio, name, (), began, context, pairs)

    def _load_text(self, prompt: Prompt, ratio: float | None, name: str | None, tags: Sequence[str], began: float) -> CompressedContext:
        """:meth:`_load` of what is built from its text alone: under the key of the weights as they are, had they changed unseen."""
        with suppress(IdentityMismatchError):
            return self._load(prompt, ratio, name, tags, began)
        return self._load(prompt, ratio, name, tags, began)

    def _load(
        self,
        prompt: Prompt,
        ratio: float | None,
        name: str | None,
        tags: Sequence[str],
        began: float,
        parent: CompressedContext | None = None,
        pairs: DensePairs | None = None,
    ) -> CompressedContext:
        """A prompt's context out of the registry, built if need be, from ``pairs`` if they are given."""
        ratio = checked_ratio((parent.ratio if parent else self.ratio) if ratio is None else ratio)
        tokenized = time.perf_counter()
        every = self._compress_every if pairs is None and ratio < 1.0 else None
        if every is not None and len(prompt.token_ids) - max(prompt.protected, parent.n_tokens if parent else 0) <= every:
            every = None  # all in one piece
        identity = context_identity(
            self._identity,
            prompt,
            ratio,
            self._scorer.identity(),
            self._allocator,
            self._tenant,
            parent.identity if parent else None,
            every,
        )
        ms = {"tokenize": 1e3 * (tokenized - began), "identify": 1e3 * (time.perf_counter() - tokenized)}
        wanted = Wanted(key_of(identity), identity, group_of(identity), name, tuple(sorted(set(tags))))
        self.registry.check_fits(self._estimated_nbytes(prompt, ratio))
        self.registry.readmit(wanted.key)
        build = partial(self._build, wanted, prompt, ratio, parent)
        now = build if pairs is None else partial(build, pairs=pairs)
        with self._bar(name) as bar, _leased(self.registry, wanted, now, parent, bar.show) as (context, lease):
            built = lease.receipt.tier == "built" and lease.receipt.shrunk_from is None
            read = len(prompt.token_ids) - (parent.n_tokens if parent else 0) if built else 0
            receipt = replace(lease.receipt, ms={**ms, **lease.receipt.ms}, read=read)
            storage = _Managed(self.registry, wanted, build, context.storage, parent)
        release()
        self._loaded[wanted.key] = context = replace(context, name=name, sources=prompt.sources, receipt=receipt, storage=storage)
        return context

    async def aload(self, source: Any, **options: Any) -> CompressedContext:
        """:meth:`load` in a thread, so that an event loop goes on. Cancelling stops waiting; a build goes on and is kept."""
        return await asyncio.to_thread(self.load, source, **options)

    def get(self, reference: str) -> CompressedContext:
        """The context last loaded under a name with this model, or that of a key (8 digits of it at least).

        One that was loaded here and is still in use is also found by its key when its pairs have left the registry.

        Raises:
            InputError: nothing is stored under it that this model can use.
        """
        entries, here = self.registry.find(reference), self._identity
        usable = [e for e in entries if all(e.identity.get(f) == here[f] for f in MODEL_FIELDS)]
        if not usable and (loaded := self._loaded.get(reference)) is not None and not self.registry.is_removed(reference):
            return loaded
        if not usable:
            other = f"; {len(entries)} of other models are" if entries else ""
            held = (
                "; another process holds the index of cache_dir now, so what lies there is not found by its name"
                if self.registry.is_held
                else ""
            )
            raise InputError(f"no context {reference!r} of this model is stored{other}{held}: load the text")
        return self._handle(usable[-1], reference if reference in usable[-1].names else None)

    def one_context(self, references: Sequence[CompressedContext | str | None]) -> CompressedContext | None:
        """The one context that a prompt refers to, by itself, its name or its key; None if it refers to none.

        Raises:
            InputError: the references are to several contexts, or :meth:`get` does not find one.
        """
        contexts = [self.get(reference) if isinstance(reference, str) else reference for reference in references if reference is not None]
        found = {context.key: context for context in contexts}
        if len(found) > 1:
            raise InputError(f"{len(found)} contexts in one prompt ({', '.join(map(repr, found.values()))}); load their texts as one")
        return next(iter(found.values()), None)

    def _handle(self, entry: Entry, name: str | None = None) -> CompressedContext:
        """A stored context that nobody gave the text of.

        Raises:
            InputError: it is no longer stored.
        """
        wanted = Wanted(entry.key, entry.identity, entry.group)
        self.registry.readmit(entry.key)  # if it was deleted, another process has loaded it again

        def build(report: Report) -> CompressedContext:
            raise InputError(f"context {entry.name or entry.key[:12]!r} is no longer stored; load its text again")

        with self.registry.lease(wanted, build) as (context, lease):
            storage = _Managed(self.registry, wanted, build, context.storage)
            return replace(context, name=name or entry.name, receipt=lease.receipt, storage=storage)

    def open(self, path: str | Path) -> CompressedContext:
        """A context from a file written by :meth:`CompressedContext.save`.

        Raises:
            IdentityMismatchError: written with another model; names the fields.
            CorruptFileError: damaged, incomplete, of a newer format, or not a context file.
            InputError: a path that no file can have.
            OSError: the file cannot be read.
        """
        began = time.perf_counter()
        context = read_context(as_path(path, "path"), self._model.device)
        check_same_model(context.identity, self._identity, str(path))
        ms = {"load": 1e3 * (time.perf_counter() - began)}
        return replace(context, receipt=Receipt(context.key, hit=True, tier="disk", nbytes=context.nbytes, ms=ms))

    def _prompt(self, source: Any, system: str | None = None, keep: Sequence[str] = (), tools: Sequence[Tool] | None = None) -> Prompt:
        documents, messages = read_source(source)
        if documents and tools:
            raise InputError("tools belong to a conversation; give them with the question about these documents")
        system = None if system is None else clean(system, "system prompt")
        prompt = (
            self._prompts.documents(documents, system, keep) if documents else self._prompts.conversation(messages, system, keep, tools)
        )
        self._check_window(prompt)
        return prompt

    def _check_window(self, prompt: Prompt) -> None:
        tokens, limit = len(prompt.token_ids), self.window - FREE_TOKENS
        if tokens > limit:
            raise WindowError(
                f"the text has {tokens:,} tokens; a context may have {limit:,} (the model's window of {self.window:,} less "
                f"{FREE_TOKENS} for a question and its answer). Compressing does not widen the window: split the text into several "
                "contexts or use a model with a longer one",
                tokens=tokens,
                window=self.window,
            )

    def _estimated_nbytes(self, prompt: Prompt, ratio: float) -> int:
        """Bytes the context will take, from the model's shape."""
        config, n = self.model.config, len(prompt.token_ids)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 2 * dim * self.model.dtype.itemsize + 4
        heads = config.num_key_value_heads
        full = sum(window is None for window in self._model.windows) * heads * n
        sliding = sum(heads * min(n, window - 1) for window in self._model.windows if window is not None)
        return round(ratio * full) * (pair + (2 if ratio < 1.0 else 0)) + sliding * pair + 4 * n

    def _build(
        self,
        wanted: Wanted,
        prompt: Prompt,
        ratio: float,
        parent: CompressedContext | None,
        report: Report,
        pairs: DensePairs | None = None,
    ) -> CompressedContext:
        """A context of the weights that its key names and of no others: all of them are read before it is built and once more after."""
        began = time.perf_counter()
        check_same_model(wanted.identity, self._proven_identity(), f"context {wanted.key[:12]!r}")  # a handle may outlive the weights
        before = time.perf_counter() - began
        context, ms = self._build_now(wanted, prompt, ratio, parent, report, pairs)
        began = time.perf_counter()
        check_same_model(
            wanted.identity,
            self._proven_identity(),
            f"context {wanted.key[:12]!r}",
            "the model was changed while it was built, and nothing is stored. Load it again, and change no weights meanwhile",
        )
        ms["verify"] = 1e3 * (before + time.perf_counter() - began)
        return replace(context, receipt=Receipt(wanted.key, hit=False, tier="built", ms=ms))

    def _build_now(
        self,
        wanted: Wanted,
        prompt: Prompt,
        ratio: float,
        parent: CompressedContext | None,
        report: Report,
        pairs: DensePairs | None,
    ) -> tuple[CompressedContext, dict[str, float]]:
        recipe, ids, start = prompt.recipe, prompt.token_ids, parent.n_tokens if parent else 0
        done = total = 0
        with self._bar(wanted.name) as bar, parent.lease() if parent else nullcontext() as lease:
            layers = list(lease.layers) if lease else []

            def progress(stage: str, tokens: int) -> None:
                nonlocal done
                done += tokens
                bar.show(stage, done, total)
                report(stage, done, total)

            first = start if parent and parent.identity["scorer"] else prompt.protected
            total = len(ids) - start + (self._scorer.cost(len(ids) - first) if wanted.identity["scorer"] else 0)
            ms: Counter[str] = Counter()
            dense_nbytes = parent.dense_nbytes if parent else 0
            for end in _ends(max(start, prompt.protected), len(ids), wanted.identity["compress_every"]):
                began = time.perf_counter()
                if pairs is not None:
                    progress("prefill", end - start)
                elif layers:
                    pairs = prefill_behind(self._model, layers, start, ids[start:end], progress)
                else:
                    pairs = prefill(self._model, ids[:end], progress)
                ms["prefill"] += 1e3 * (time.perf_counter() - began)  # type: ignore[assignment]
                keep = tuple((first, min(last, end)) for first, last in prompt.keep if first < end)
                opening, closing, encode = recipe.opening, recipe.closing, self._prompts.text_ids
                prefilled = Prefilled(self._model, pairs, ids[:end], prompt.protected, opening, closing, encode, keep, layers, start)
                compressed = compress(prefilled, ratio, self._scorer, self._allocator, progress)
                ms.update(compressed.ms)
                dense_nbytes += compressed.dense_nbytes
                layers, start, pairs = list(compressed.layers), end, None
                del compressed, prefilled  # they hold on to what the next piece frees
        context = CompressedContext(
            key=wanted.key,
            identity=wanted.identity,
            token_ids=torch.tensor(prompt.token_ids, dtype=torch.int32),
            storage=Resident(tuple(layers)),
            protected=prompt.protected,
            ratio=ratio,
            dense_nbytes=dense_nbytes,
            recipe=recipe,
            sources=prompt.sources,
        )
        return context, dict(ms)

    def _bar(self, name: str | None) -> _Bar:
        return _Bar(name or "context", None if self._progress is None else not self._progress)

    @property
    def _prompts(self) -> PromptBuilder:
        """Renders with the tokenizer's chat template as it is now. Sessions keep the one they began with."""
        template, prompts = self._prompts_of
        if self.tokenizer.chat_template != template:
            template = copy.deepcopy(self.tokenizer.chat_template)
            prompts = self._prompt_builder()
            self._prompts_of = (template, prompts)
        return prompts

    def _prompt_builder(self) -> PromptBuilder:
        """Raises:
        InputError: the tokenizer's chat template is none.
        """
        try:
            return PromptBuilder(self.tokenizer, self._template_kwargs)
        except KVzipError:
            raise
        except Exception as error:  # what a tokenizer and its template raise, in many kinds
            raise InputError(
                f"the tokenizer's chat_template {str(self.tokenizer.chat_template)[:80]!r} cannot be used ({error}); set it to another "
                "template's text, or to None for plain turns"
            ) from error

    @property
    def _identity(self) -> dict[str, Any]:
        """The model's fields of a key; computed again when a weight or an adapter has changed.

        Raises:
            IdentityMismatchError: the model was moved to another device.
            InputError: it has a dtype now that the engine's attention cannot compute with.
        """
        template = self._prompts.template
        now = (self._watch.stamp(), template)
        known, fields = self._known_identity
        if now != known:
            self._model.changed(moved=known is not None and now[0].places != known[0].places)
            fields = model_identity(self.model, self.tokenizer, template)
            self._known_identity = (now, fields)
        return fields

    def _proven_identity(self) -> dict[str, Any]:
        """:attr:`_identity` with all weights read, also if none seems to have changed."""
        fields = self._identity
        known, _ = self._known_identity
        fields = {**fields, **weights_identity(self.model)}
        self._known_identity = (known, fields)
        return fields

    @property
    def fingerprint(self) -> str:
        """Hash of model, tokenizer and template: what decides whether two engines can use each other's contexts."""
        return digest(self._identity)

    def stats(self) -> dict[str, Any]:
        """Bytes and budgets of the tiers, hits, builds and evictions, see :meth:`ContextRegistry.stats`; how many answers are
        ``running`` and how many are ``waiting`` for their turn, the oldest of them for ``oldest_wait_s`` seconds; the attention's name.
        """
        return {**self.registry.stats(), **self._model.load(), "attention": self._model.backend}

    def close(self) -> None:
        """Wait until everything loaded is on disk and let go of the folder. Happens by itself when Python ends.

        An index that another process keeps locked is waited for a second: what was loaded meanwhile is then not on disk, says a warning
        that counts it, and is built again by the next engine.
        """
        self.registry.close()

    def stored_prefix(self, ids: Sequence[int]) -> CompressedContext | None:
        """The stored context with the most tokens that a prompt's ids begin with, None if there is none."""
        if self.registry.is_empty() or (entry := self.registry.longest_prefix(self._identity, ids)) is None:
            return None
        try:
            context = self._handle(entry)
        except KVzipError as error:  # lost meanwhile, or no room for it: the prompt is computed
            logger.debug("a stored beginning of the prompt is not used: %s", error)
            return None
        return context if list(ids[: context.n_tokens]) == context.token_ids.tolist() else None

    # -- answers -------------------------------------------------------------------------------------------------

    def session(self, context: CompressedContext | None = None) -> Session:
        """A conversation over a context, or over none.

        Raises:
            IdentityMismatchError: the context is another model's; or, when it is asked or folded, its pairs are of weights, an adapter
                or a dtype that the model no longer has.
        """
        self._check_context(context)
        return self._session(context)

    def _session(self, context: CompressedContext | None) -> Session:
        return Session(self._model, self._prompts, context, self._folded, lambda: self._identity)

    def generate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """Answer one question from a context; the question is forgotten afterwards.

        Args:
            context: None answers without one, but for a stored context that the prompt's ids happen to begin with.
            question: text, or chat messages of which the last is the user's or a tool's.
            tools: what the model may call, in OpenAI's form; :meth:`read_calls` finds the calls in the answer's text.
            tool_choice: ``"auto"``, ``"none"``, ``"any"``, or the name of the tool to call. Kept to by guided decoding.
            parallel_tool_calls: whether one answer may call several times; None allows it where the model chooses.
            schema: a JSON schema; the answer is JSON that validates against it. With tools: or calls of them.
            form: how calls are written, if not as :attr:`tool_form` says.
            behind: messages come behind the context, also those that say what it begins with once more; otherwise such are taken for
                the whole conversation, of which the context holds a part.
            params: ``max_new_tokens=256, temperature=0.0, top_p=None, top_k=None, seed=None, stop=None, repetition_penalty=None,
                no_repeat_ngram_size=None``, see :class:`~kvzip_memory.generation.GenerationParams`.

        Raises:
            InputError: an empty question, a parameter outside its range, a schema with a keyword that cannot be kept to, or JSON or a call
                that ``max_new_tokens`` are too few for.
            WindowError: context and question fill the model's window.
            UnfinishedError: the JSON or the call was cut by ``stop``.
        """
        return self.stream(context, question, **params).whole()

    async def agenerate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """:meth:`generate` in a thread, so that an event loop goes on."""
        return await asyncio.to_thread(self.generate, context, question, **params)

    def stream(
        self,
        context: CompressedContext | None,
        question: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: Any = None,
        schema: Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        form: ToolForm | None = None,
        behind: bool = False,
        **params: Any,
    ) -> Stream:
        """The answer of :meth:`generate`, piece by piece."""
        tools = checked_tools(tools)
        schema = cleaned(schema, "schema") if isinstance(schema, Mapping) else schema
        if parallel_tool_calls is None and self._prompts.one_call:
            parallel_tool_calls = False
        if tools:
            params["grammar"] = calls_grammar(self.guidance, form or self.tool_form, tools, tool_choice, schema, parallel_tool_calls)
        elif schema is not None:
            params["grammar"] = self.guidance.json(schema)
        if context is not None:
            return self._session(context).stream(question, tools, behind, **params)
        checked = GenerationParams.of(params)
        ids = self._prompts.question(None, question, tools, thinks=checked.free)
        context = self.stored_prefix(ids)
        return self._session(context).stream_ids(ids[context.n_tokens :] if context else ids, checked)

    @property
    def tool_form(self) -> ToolForm:
        """How the model writes tool calls, by its chat template."""
        return self._prompts.form

    def read_calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """An answer's text without its tool calls, and the calls: ``id``, ``name`` and ``arguments``."""
        return read_calls(text, self.tool_form)

    def prompt_ids(
        self, context: CompressedContext | None, question: str | Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> list[int]:
        """The ids that follow the context for this question: separator or headers, question, assistant header."""
        return self._prompts.question(context.recipe if context else None, question, tools)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
        """Tokens of messages as a prompt."""
        return self._prompts.count(messages, tools)

    def _masses(
        self, context: CompressedContext, spans: Sequence[Span], question: str | Sequence[Message], answer: str
    ) -> tuple[Tensor, Tensor]:
        """Attention to spans of a context: of the last message with its answer, and of :data:`NEUTRAL`."""
        self._check_context(context)
        closing = len(context.recipe.closing)

        def mass(row: Row, ids: list[int], said: str, more: list[int]) -> Tensor:
            if row.start + len(ids) >= self.window:
                tokens = row.start + len(ids)
                raise WindowError(
                    f"{tokens:,} tokens with the context; the model's window is {self.window:,}", tokens=tokens, window=self.window
                )
            first = max(0, len(ids) - closing - len(self._prompts.text_ids(said)))
            return attention_mass(self._model, row, [*ids, *more][: self.window - row.start], spans, first)

        last, answer = as_messages(question)[-1]["content"], clean(answer, "answer")
        with context.lease() as lease:
            n = context.n_tokens
            asked = mass(Row(lease.layers, n, Tail()), self.prompt_ids(context, question), last, self._prompts.text_ids(answer))
            return asked, mass(Row(lease.layers, n, Tail()), self.prompt_ids(context, NEUTRAL), NEUTRAL, [])

    def token_offsets(self, text: str, *, alone: bool = True) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of each of a document's tokens, in the order in which they lie in its context.

        Args:
            text: of the document.
            alone: whether it is the only one in its context.

        Raises:
            InputError: the tokenizer does not know them; a fast one does.
        """
        return self._prompts.offsets(clean(text, "document"), alone)

    def relevance(
        self, parts: Sequence[tuple[CompressedContext, Sequence[Span]]], question: str | Sequence[Message], answer: str = ""
    ) -> list[Tensor]:
        """How much a question is about spans of contexts, by the attention it pays them.

        Reads the question, and :data:`~kvzip_memory.attribution.NEUTRAL` to compare with, over each context; nothing is generated. Of a
        list of messages only the last one counts.

        Args:
            parts: contexts, and ``[start, end)`` of tokens of each; they are compared with one another, over all contexts.
            question: as it is asked of them.
            answer: counted like the question. In our measurements that ranked worse.

        Returns:
            Scores ``[len(spans)]`` of each context's spans, higher is more.

        Raises:
            InputError: no span; or as for :meth:`generate`.
            WindowError: context and question fill the model's window.
        """
        if not any(spans for _, spans in parts):
            raise InputError("no span to compare; give some tokens of the contexts")
        masses = [self._masses(context, spans, question, answer) for context, spans in parts]
        scores = compared(*(torch.cat(mass, -1) for mass in zip(*masses, strict=True)))
        return list(scores.split([len(spans) for _, spans in parts]))

    def logits(self, context: CompressedContext | None, ids: Sequence[int] | Tensor) -> Tensor:
        """Logits ``[len(ids), vocab]`` fp32 after each of ``ids``, fed behind the context. Nothing is kept.

        Raises:
            InputError: no ids.
            WindowError: more than the window holds.
        """
        self._check_context(context)
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not ids:
            raise InputError("no ids to compute logits for; give at least one")
        start = context.n_tokens if context else 0
        if start + len(ids) > self.window:
            tokens = start + len(ids)
            raise WindowError(
                f"{tokens:,} tokens with the context; the model's window is {self.window:,}", tokens=tokens, window=self.window
            )
        step = self._model.chunk_tokens
        chunks = [ids[i : i + step] for i in range(0, len(ids), step)]
        with context.lease() if context else nullcontext(None) as lease:
            row = Row(lease.layers if lease else (), start, Tail())
            return torch.cat([self._model.forward([row], [chunk], n_logits=len(chunk))[0] for chunk in chunks])

    def _check_context(self, context: CompressedContext | None) -> None:
        if context is not None:
            check_same_model(context.identity, self._identity, repr(context))

    def _check_parent(self, context: CompressedContext) -> None:
        self._check_context(context)
        scorer = context.identity["scorer"]
        if scorer not in (None, self._scorer.identity()):
            raise InputError(
                f"the pairs of {context!r} were ranked by {scorer}, with which this engine's {self._scorer.identity()} cannot be "
                "compared; extend it with an engine of that scorer, or load the text again"
            )

    def __repr__(self) -> str:
        return f"<KVzipEngine {self.model.config.model_type} window {self.window:,} ratio {self.ratio} on {self._model.device}>"


def _strings(keep: str | Sequence[str] | None) -> list[str]:
    return [clean(wanted, "keep") for wanted in as_texts(keep, "keep")]


def _labels(name: str | None, tags: str | Sequence[str] | None) -> list[str]:
    """The tags, when they and the name can be stored.

    Raises:
        InputError: they cannot.
    """
    labels = as_texts(tags, "tags")
    for text in labels if name is None else [name, *labels]:
        check_text(text)
    return labels


class _Managed(Shared):
    """The storage of a loaded context: in the registry, which moves it as it sees fit and has it built if it was lost."""

    _way_out = CompressedContext._way_out

    def __init__(
        self, registry: ContextRegistry, wanted: Wanted, build: Build, like: Storage, parent: CompressedContext | None = None
    ) -> None:
        self._registry, self._wanted, self._build, self._parent = registry, replace(wanted, name=None, tags=()), build, parent
        self.nbytes, self.kept_pairs, self.full_heads = like.nbytes, like.kept_pairs, like.full_heads

    @contextmanager
    def lease(self, key: str) -> Iterator[Lease]:
        if self._registry.is_removed(key) and "disk" in self._registry.tiers(key):  # another process has loaded it again
            self._registry.readmit(key)
        if self._registry.is_removed(key):
            logger.warning("context %s was removed; it is built for one answer and not stored", key[:12])
            context = self._build(lambda *progress: None)
            with context.lease() as lease:
                yield replace(lease, receipt=replace(lease.receipt, hit=False, tier="built", reason="removed"))
            return
        with _leased(self._registry, self._wanted, self._build, self._parent) as (_, lease):
            yield lease


@contextmanager
def _leased(
    registry: ContextRegistry, wanted: Wanted, build: Build, parent: CompressedContext | None, waiting: Report | None = None
) -> Iterator[tuple[CompressedContext, Lease]]:
    """A lease of a context. If it must be built, its parent is brought first, before the lock for building is taken.

    Several keys share one lock, so whoever holds one must not wait for another: the parent may have to be built too.
    """
    with ExitStack() as parents:
        if parent and not registry.tiers(wanted.key):
            parents.enter_context(parent.lease())

        def built(report: Report) -> CompressedContext:
            with parents:  # the parent may leave before the child moves in
                return build(report)

        with registry.lease(wanted, built, waiting) as found:
            parents.close()
            yield found


class _Bar:
    """A progress bar that appears with the first progress."""

    def __init__(self, name: str, disable: bool | None) -> None:
        self._name, self._disable = name, disable
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` tokens, in the given stage; 0 of 0 while nothing is known."""
        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._name, unit="tok", disable=self._disable, leave=False)
        self._bar.total = total or None
        self._bar.set_postfix_str(stage, refresh=False)
        self._bar.update(done - self._bar.n)


def _ends(first: int, n: int, every: int | None) -> list[int]:
    """Ends of the equal pieces, of at most ``every`` tokens, in which ``[first, n)`` is read and compressed."""
    count = 1 if every is None else max(1, math.ceil((n - first) / every))
    return [first + round((i + 1) * (n - first) / count) for i in range(count)]


def _memory_nbytes(device: torch.device) -> int:
    """Memory of a device; of the host for one that shares it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _check_allocator(allocator: str) -> None:
    if allocator not in ALLOCATORS:
        raise InputError(f"allocator {allocator!r} is unknown; use one of {', '.join(ALLOCATORS)}")


def _check_every(compress_every: int | None) -> None:
    if compress_every is not None and compress_every < 64:
        raise InputError(f"compress_every is {compress_every} tokens; pairs cannot be ranked among fewer than 64")
