"""The engine: a model, its tokenizer, and the contexts loaded with it."""

from __future__ import annotations

import errno
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kvzip_memory import turns
from kvzip_memory.bridge import result_of
from kvzip_memory.building import context_identity, model_identity
from kvzip_memory.chain import Managed, Step, leased
from kvzip_memory.compression import DensePairs, Prefilled, compress, prefill, prefill_behind
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.compression.scorers import KVzipScorer, Scorer
from kvzip_memory.context import CompressedContext, Receipt, Resident, as_told, checked_context
from kvzip_memory.errors import CorruptFileError, IdentityMismatchError, InputError, KVzipError, WindowError
from kvzip_memory.inference import loading
from kvzip_memory.inference.attribution import NEUTRAL, Span, attention_mass, compared
from kvzip_memory.inference.batching import Places
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.inference.modeling import LanguageModel, eos_ids
from kvzip_memory.inference.weights import Fingerprint, Stamp
from kvzip_memory.prompting.fronts import Fronts, front
from kvzip_memory.prompting.guidance import Guidance
from kvzip_memory.prompting.language import Language
from kvzip_memory.prompting.prompts import Prompt, PromptBuilder
from kvzip_memory.prompting.sources import (
    MOST_KEPT,
    MOST_OF_SCHEMA,
    Message,
    as_messages,
    as_texts,
    check_metadata,
    clean,
    cleaned,
    read_source,
)
from kvzip_memory.prompting.tools import Tool, ToolForm, calls_grammar, checked_tools, read_calls
from kvzip_memory.registry import ContextRegistry, Entry, Forgotten, Label, Report, Wanted, check_name, check_tag, check_ttl, parse_bytes
from kvzip_memory.registry.disk.files import read_context
from kvzip_memory.registry.holders import MARKED, Naming
from kvzip_memory.registry.identity import MODEL_FIELDS, check_same_model, group_of, key_of, label, tenant_digest
from kvzip_memory.registry.wanted import MOST_TAGS
from kvzip_memory.session import Reply, Session, Stream
from kvzip_memory.system.calls import check
from kvzip_memory.system.checksums import Checksums
from kvzip_memory.system.digests import digest
from kvzip_memory.system.forks import is_parents, refuse_after_fork
from kvzip_memory.system.limits import host_nbytes
from kvzip_memory.system.modes import plain
from kvzip_memory.system.paths import as_folder, as_path
from kvzip_memory.system.printable import logger_of, printable
from kvzip_memory.system.sharing import Shared
from kvzip_memory.system.threads import release

logger = logger_of(__name__)

_WHOLE_KEY, _SHORT_OF_A_KEY = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{1,7}")

#: Tokens of the window that a context leaves free, for a question and its answer.
FREE_TOKENS = 256


class KVzipEngine(Shared):
    """Loads texts into compressed contexts and answers from them.

    ``ratio`` is the fraction of key-value pairs **kept** (kvpress' ``compression_ratio`` is the fraction removed).
    May be used from any number of threads: their answers are decoded together, builds take turns with them. A copy, deep or not, is
    the engine itself. It is the process' that made it: in a child that is forked later it raises :class:`ForkedError`.

    Args:
        model: a causal language model of transformers. It is not changed and goes on working for others.
        tokenizer: its tokenizer. It is copied: what others do with it meanwhile changes no text.
        ratio: kept fraction for :meth:`load`, in (0, 1].
        cache_dir: contexts are stored there and found again by later engines of the same model; None stores nothing.
        device_bytes: budget of the contexts on the model's device, such as ``"4GiB"``. None: a quarter of its memory.
        host_bytes: budget of the contexts moved from there to the host's memory. None: an eighth of it where the model
            is on a GPU, else 0.
        disk_bytes: budget of the contexts in ``cache_dir``. None: no limit.
        ttl: seconds after which a context is built anew, whoever stored it, above 0 and at most 100 years; None never. A context is as old
            as the reading of its text, the first of it if it was grown.
        tenant: a salt for every key: an engine finds, uses and changes only what is its tenant's; the rest is as if it had never existed,
            but for contexts and files of no tenant that it is given. Only its digest is kept.
        secret: a text of 16 characters at least, given to all engines of ``cache_dir``: what is there is used only if it was written with
            it, and the folder may be one that others can write (``docs/security.md``). So are files that are saved and opened by hand.
        max_running: answers that threads get decoded together, a row each.
        max_waiting: answers that may wait behind them, of threads and of event loops together, first come first served; more is a
            :class:`QueueFullError`. As many other async calls may wait.
        attention: what computes attention over contexts: ``"auto"``, ``"cpu"``, ``"triton"``, ``"flash"`` or
            ``"reference"``, see :func:`kvzip_memory.attention.choose`; :meth:`stats` names what was chosen.
        progress: show progress bars; None shows them on a terminal only.
        compress_every: compress after so many tokens, before more are read. A build then never holds the whole dense
            cache, only so many tokens of it above what is kept, and is a little less faithful (``docs/benchmarks.md``).
            None reads everything first.
        scorer: how pairs are ranked, see :mod:`kvzip_memory.compression.scorers`.
        allocator: ``"global"``, ``"per_layer"`` or ``"uniform"``.
        template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``. The template is the tokenizer's own,
            which may be set at any time: contexts of another one are then not found, and are refused where they are given. So are those
            of a tokenizer that was changed otherwise, which is noticed by the next call.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed.
        InputError: a ratio outside (0, 1], an unknown allocator, a tenant that is no text, a ``ttl`` that is no such number of seconds, an
            attention that cannot compute on the model's device.
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
        secret: str | None = None,
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
        self._spoken = Language(tokenizer, self._template_kwargs, self.window)
        self._model.tokenizer = self._spoken.tokenizer
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
            secret=secret,
            check=self._model.check_layers,
        )
        self._watch, self._weights = self._model.watch, Fingerprint(model)
        self._known_identity: tuple[Stamp | None, dict[str, Any]] = (None, {})
        self._loaded: WeakValueDictionary[str, Managed] = WeakValueDictionary()
        self._fronts = Fronts()
        release()
        refuse_after_fork(self, "_model", "registry", "shared", "_spoken")

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
        secret: str | None = None,
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
        check_ttl(ttl)
        tenant_digest(tenant)  # tells what is wrong with it
        Checksums(secret)
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
            secret=secret,
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
    def loads(self) -> Places:
        """Threads for everything else that one waits for; for the integrations."""
        return self._model.loads

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
                :class:`~kvzip_memory.prompting.sources.Document`), chat messages (mappings with ``role`` and ``content``, or the
                frameworks' own), or a list of documents or of messages.
            name: an alias, for :meth:`get` and the command line; not part of the key, nor one itself.
            ratio: kept fraction, the engine's if None.
            system: a system prompt, put first and never evicted.
            keep: strings of the text whose pairs are never evicted, wherever they occur, such as codes and names; at most 1,000.
            tags: free words to list it by; not part of the key. At most 256 at a time; a name or a tag has at most 4,096 characters.
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
        language = self._language
        prompt = self._prompt(language, source, system, _strings(keep), tools)
        return self._load_text(language, prompt, ratio, name, tags, began)

    def load_marked(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        ratio: float | None = None,
        tags: str | Sequence[str] | None = (),
    ) -> CompressedContext | None:
        """The context of a prompt's beginning, up to the last block of text with ``cache_control``: found or built as by :meth:`load`.

        A mark that moves on with a conversation has only what is new read: the longest stored context that the prompt begins with, and
        that keeps as much, is gone on from, as by :meth:`extend`. That takes 256 new tokens; with fewer that context is what is given.
        Contexts made so are tagged ``cache_control``, and with ``tags``; of those of one conversation the first and the last two stay.

        None if no block has a mark, or if it ends within the first 256 tokens, where building would cost more than it saves; and in a
        conversation, which ``tags`` stand for, whose system prompt or tools are other ones at every call.

        Raises:
            InputError, WindowError, BudgetError, ModelError: see :meth:`load`.
        """
        began = time.perf_counter()
        ratio, tags = checked_ratio(self.ratio if ratio is None else ratio), [MARKED, *_labels(None, tags)]
        language = self._language
        prompt = language.prompts.until_mark(messages, tools)
        if prompt is None or len(prompt.token_ids) < FREE_TOKENS:
            if prompt is not None:
                logger.debug("cache_control after %d tokens is ignored; it takes %d", len(prompt.token_ids), FREE_TOKENS)
            return None
        self._check_window(prompt)
        before = self._stored_prefix(language, [*prompt.token_ids, -1], ratio)  # of all of them, too
        if len(tags) > 1 and self._fronts.changes(tuple(tags), front(as_messages(messages), tools)) > 1 and before is None:
            logger.warning(
                "cache_control is ignored in %s: its system prompt or its tools change at every call, so that nothing would be found "
                "again; put what changes behind the mark",
                tags[-1],
            )
            return None
        if before is None:
            return self._load_text(language, prompt, ratio, None, tags, began)
        self.registry.join(before.key, tags)
        if len(prompt.token_ids) - before.n_tokens < FREE_TOKENS:
            return before
        left_behind = before.identity.get("parent")
        try:
            context = self._load(language, replace(prompt, protected=before.protected), ratio, None, tags, began, before)
        except IdentityMismatchError:  # as in _load_text
            return self._load_text(language, prompt, ratio, None, tags, began)
        self.leave_behind(left_behind, tags)
        return context

    def leave_behind(self, key: str | None, tags: Sequence[str]) -> None:
        """Delete a context that a conversation of these tags has grown through, and that nobody else has named, tagged or pinned. The
        one it began with stays, and so does all that has no tag.
        """
        for entry in self.registry.find(key) if key and tags else []:
            if set(tags) <= set(entry.tags) and entry.identity.get("parent"):
                try:
                    self.registry.leave(entry.key, tags)
                except (InputError, OSError) as error:
                    logger.debug("context %s, which a conversation has left behind, stays: %s", entry.key[:12], error)

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
        language = self._language
        self._check_parent(language, context)
        documents, messages = read_source(more)
        if documents and tools:
            raise InputError("tools belong to a conversation; give them with the question about these documents")
        prompt = (
            language.prompts.more_documents(context, documents, kept)
            if documents
            else language.prompts.more_turns(context, messages, kept, tools, behind)
        )
        self._check_window(prompt)
        return self._load(language, prompt, ratio, name, tags, began, context)

    async def aextend(self, context: CompressedContext, more: Any, **options: Any) -> CompressedContext:
        """:meth:`extend` in a thread, see :meth:`aload`."""
        return await result_of(self.loads, self.extend, context, more, **options)

    def _folded(
        self,
        language: Language,
        context: CompressedContext | None,
        prompt: Prompt,
        pairs: DensePairs,
        since: Stamp,
        ratio: float | None,
        name: str | None,
        tags: str | Sequence[str] | None,
    ) -> CompressedContext:
        """The context of another one, or of none, and of turns whose pairs are there already, from a model of the stamp ``since``."""
        began, tags = time.perf_counter(), _labels(name, tags)
        now, then = self._identity, self._identity_of(language)
        if differing := tuple(field for field in ("tokenizer", "template") if now[field] != then[field]):
            raise IdentityMismatchError(
                f"the session began with another {' and another '.join(map(label, differing))} than the tokenizer has now; set that one "
                "again to fold it",
                fields=differing,
            )
        if context is not None:
            self._check_parent(language, context)
        self._check_window(prompt)
        return self._load(language, prompt, ratio, name, tags, began, context, pairs, since)

    def _load_text(
        self, language: Language, prompt: Prompt, ratio: float | None, name: str | None, tags: Sequence[str], began: float
    ) -> CompressedContext:
        """:meth:`_load` of what is built from its text alone: under the key of the weights as they are, had they changed unseen."""
        with suppress(IdentityMismatchError):
            return self._load(language, prompt, ratio, name, tags, began)
        return self._load(language, prompt, ratio, name, tags, began)

    def _load(
        self,
        language: Language,
        prompt: Prompt,
        ratio: float | None,
        name: str | None,
        tags: Sequence[str],
        began: float,
        parent: CompressedContext | None = None,
        pairs: DensePairs | None = None,
        since: Stamp | None = None,
    ) -> CompressedContext:
        """A prompt's context out of the registry, built if need be, from ``pairs`` if they are given, and their model's stamp."""
        ratio = checked_ratio((parent.ratio if parent else self.ratio) if ratio is None else ratio)
        tokenized = time.perf_counter()
        every = self._compress_every if pairs is None and ratio < 1.0 else None
        if every is not None and len(prompt.token_ids) - max(prompt.protected, parent.n_tokens if parent else 0) <= every:
            every = None  # all in one piece
        identity = context_identity(
            self._identity_of(language),
            prompt,
            ratio,
            self._scorer.identity(),
            self._allocator,
            self._tenant,
            parent.identity if parent else None,
            every,
        )
        ms = {"tokenize": 1e3 * (tokenized - began), "identify": 1e3 * (time.perf_counter() - tokenized)}
        check_metadata(prompt.sources)
        wanted = Wanted(key_of(identity), identity, group_of(identity), name, tuple(sorted(set(tags))), prompt.sources)
        wanted = self.registry.with_room(wanted)
        self.registry.check_fits(self._estimated_nbytes(prompt, ratio))
        self.registry.readmit(wanted.key)
        start, known = (parent.n_tokens, len(parent.sources)) if parent else (0, 0)
        build = partial(self._build, language)
        step = Step(
            self.registry,
            wanted,
            build,
            parent.storage.step if parent and isinstance(parent.storage, Managed) else parent,
            torch.tensor(prompt.token_ids[start:], dtype=torch.int32, device="cpu"),
            prompt.protected,
            prompt.keep,
            prompt.recipe,
            as_told(prompt.sources)[known:],
        )
        now = step if pairs is None else replace(step, make=partial(build, pairs=pairs, since=since))
        with self._bar(name) as bar, leased(now, bar.show) as (context, lease):
            built = lease.receipt.tier == "built" and lease.receipt.shrunk_from is None
            receipt = replace(lease.receipt, ms={**ms, **lease.receipt.ms}, read=len(prompt.token_ids) - start if built else 0)
            self._loaded[wanted.key] = storage = Managed(step, context)
        release()
        return storage.handle(name=name, sources=prompt.sources, receipt=receipt)

    def forget(self, tag: str) -> Forgotten:
        """Forget what was loaded with a tag: a conversation (``"thread: ana"``), a document (``"document: a.pdf"``), or any word of yours.

        Contexts that nobody else holds, by another tag, a name or a pin, are deleted, also those that a conversation has grown out of;
        from the others the tag is taken. The turns that a session of this name keeps as text are deleted, too. What is then left where
        is told in ``docs/memory.md``. Loading the text again builds it again.

        Raises:
            InputError: the tag is no text.
            StorageError: another process holds the index of the folder, or it cannot be written or used; nothing was deleted.
            OSError: a file cannot be deleted.
        """
        check_tag(tag)
        self.registry.flush()
        check()  # from the first write on it is finished
        forgotten = self.registry.forget(Naming(tag))
        if self.cache_dir is not None:  # last: contexts can be made of turns again
            turns.erase(self.cache_dir, self.registry.tenant, tag, self.registry.checksums)
        return forgotten

    async def aforget(self, tag: str) -> Forgotten:
        """:meth:`forget` in a thread. Cancelled before it deletes it changes nothing; what it has begun it finishes."""
        return await result_of(self.loads, self.forget, tag)

    async def aload(self, source: Any, **options: Any) -> CompressedContext:
        """:meth:`load` in a thread, so that an event loop goes on.

        When it is cancelled, a build is given up within a chunk, unless others wait for it. ``asyncio.shield`` has it go on and be kept.

        Raises:
            QueueFullError: ``max_waiting`` calls wait for a thread; and as for :meth:`load`.
        """
        return await result_of(self.loads, self.load, source, **options)

    def get(self, reference: str) -> CompressedContext:
        """The context last loaded under a name with this model, or that of a key (8 digits of it at least).

        By its name it has the sources that it was loaded with under that name; by its key those that the text itself tells. A name is
        that of one context: when it is no longer stored, what was loaded under the name before is still found by its key alone. One that
        was loaded here and is still in use is also found by its key when its pairs have left the registry.

        Raises:
            InputError: nothing is stored under it that this model can use.
        """
        (entries, labels), here = self.registry.looked_up(reference), self._identity
        usable = [e for e in entries if all(e.identity.get(f) == here[f] for f in MODEL_FIELDS)]
        if not usable and (loaded := self._loaded.get(reference)) is not None and not self.registry.is_removed(reference):
            return loaded.handle()
        if not usable:
            other = f"; {len(entries)} of other models are" if entries else ""
            older = [entry.key[:12] for entry in self.registry.contexts() if reference in entry.former]
            other += f"; older ones of that name are, under their keys {', '.join(older)}" if older else ""
            held = (
                "; another process holds the index of cache_dir now, so what lies there is not found by its name"
                if self.registry.is_held
                else ""
            )
            short = "; a key is known by its first 8 digits at least" if _SHORT_OF_A_KEY.fullmatch(reference) else ""
            raise _not_stored(reference, other + held + short)
        return self._handle(usable[-1], labels.get(usable[-1].key))

    def one_context(self, references: Sequence[CompressedContext | str | None], by_name: bool = True) -> CompressedContext | None:
        """The one context that a prompt refers to, by itself, its name or its key; None if it refers to none.

        Args:
            by_name: whether texts may be names and beginnings of keys; else they are whole keys, which nobody guesses.

        Raises:
            InputError: the references are to several contexts, one is not the whole key it has to be, or :meth:`get` does not find it.
        """
        for reference in references:
            if isinstance(reference, str) and not by_name and not _WHOLE_KEY.fullmatch(reference):
                raise InputError(
                    f"a message brings the context {reference[:80]!r} (a block's file_id is read as a context's key); messages bring "
                    "contexts by their whole keys (context.as_block(), context.key), and by other names only for a model made with "
                    "contexts_by_name=True"
                )
        contexts = [self.get(reference) if isinstance(reference, str) else reference for reference in references if reference is not None]
        found = {self._mine(context).key: context for context in contexts}
        if len(found) > 1:
            raise InputError(f"{len(found)} contexts in one prompt ({', '.join(map(repr, found.values()))}); load their texts as one")
        return next(iter(found.values()), None)

    def _handle(self, entry: Entry, label: Label | None = None) -> CompressedContext:
        """A stored context that nobody gave the text of, with what was told of it when it got a name.

        Raises:
            InputError: it is no longer stored.
        """
        wanted = Wanted(entry.key, entry.identity, entry.group)

        def make(*given: Any) -> CompressedContext:
            raise InputError(f"context {label.name if label else entry.key[:12]!r} is no longer stored; load its text again")

        step = Step(self.registry, wanted, make)
        with leased(step) as (context, lease):
            handle = Managed(step, context).handle(receipt=lease.receipt)
        if label is None:
            return handle
        sources = handle.sources
        if len(label.sources) == len(sources):
            told = zip(sources, label.sources, strict=True)
            sources = tuple(replace(source, name=name, metadata=metadata) for source, (name, metadata) in told)
        return replace(handle, name=label.name, sources=sources)

    def open(self, path: str | Path) -> CompressedContext:
        """A context from a file written by :meth:`CompressedContext.save`, with the name and the sources of who saved it. For a ``ttl`` it
        is as old as its opening.

        Raises:
            IdentityMismatchError: written with another model, or for another tenant; names the fields.
            CorruptFileError: damaged, incomplete, of a newer format, or not a context file.
            InputError: a path that no file can have.
            OSError: the file cannot be read; in ``cache_dir`` what does not soundly say it is the tenant's is as one that is not there.
        """
        began = time.perf_counter()
        file, mine = as_path(path, "path"), False

        def admit(facts: Mapping[str, Any]) -> None:
            nonlocal mine
            mine = self._is_mine(facts["identity"])
            if not mine:
                raise IdentityMismatchError(f"{file} was saved for another tenant; open it with an engine of that", fields=("tenant",))

        try:
            context = read_context(file, self._model.device, admit=admit, checksums=self.registry.checksums)
        except (IdentityMismatchError, CorruptFileError, OSError):
            if mine or not self._is_stored(file):
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from None  # as for a key that is not stored
        check_same_model(context.identity, self._identity, str(path))
        self._model.check_layers(context.layers, str(path))
        ms = {"load": 1e3 * (time.perf_counter() - began)}
        receipt = Receipt(context.key, hit=True, tier="disk", nbytes=context.nbytes, ms=ms)
        return replace(context, receipt=receipt, created=time.time(), expires=None)

    def _is_stored(self, file: Path) -> bool:
        """Whether a file lies in ``cache_dir``."""
        return self.cache_dir is not None and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(self.cache_dir))

    def _prompt(
        self, language: Language, source: Any, system: str | None = None, keep: Sequence[str] = (), tools: Sequence[Tool] | None = None
    ) -> Prompt:
        prompts = language.prompts
        documents, messages = read_source(source)
        if documents and tools:
            raise InputError("tools belong to a conversation; give them with the question about these documents")
        system = None if system is None else clean(system, "system prompt")
        prompt = prompts.documents(documents, system, keep) if documents else prompts.conversation(messages, system, keep, tools)
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
        language: Language,
        step: Step,
        parent: CompressedContext | None,
        report: Report,
        pairs: DensePairs | None = None,
        since: Stamp | None = None,
    ) -> CompressedContext:
        """A context of the weights that its key names and of no others: all of them are read once it is built, and nobody has written to
        them meanwhile, or since the stamp of the model that ``pairs`` are of.

        Raises:
            IdentityMismatchError: they are others, or were for a while.
        """
        wanted, since = step.wanted, since or self._watch.stamp()
        where = f"context {wanted.key[:12]!r}"
        check_same_model(wanted.identity, self._identity_of(language), where)  # a handle may outlive the weights
        context, ms = self._build_now(language, step, parent, report, pairs)
        began = time.perf_counter()
        until = self._watch.stamp()
        way_out = "nothing is stored. Load it again, and change no weights meanwhile"
        check_same_model(
            wanted.identity,
            self._proven_identity(language),
            where,
            f"the model was changed, perhaps while it was built, and {way_out}",
        )
        if not self._model.untouched(since, until):
            raise IdentityMismatchError(
                f"the model was changed and changed back while {where} was built from it, and {way_out}", fields=("weights",)
            )
        ms["verify"] = 1e3 * (time.perf_counter() - began)
        return replace(context, receipt=Receipt(wanted.key, hit=False, tier="built", ms=ms))

    @plain()
    def _build_now(
        self, language: Language, step: Step, parent: CompressedContext | None, report: Report, pairs: DensePairs | None
    ) -> tuple[CompressedContext, dict[str, float]]:
        wanted, recipe = step.wanted, step.recipe
        assert step.ids is not None
        assert recipe is not None
        token_ids = step.ids if parent is None else torch.cat([parent.token_ids, step.ids])
        ids, start, ratio = tuple(token_ids.tolist()), parent.n_tokens if parent else 0, wanted.identity["ratio"]
        done = total = 0
        with self._model.building(), self._bar(wanted.name) as bar, parent.lease() if parent else nullcontext() as lease:
            layers = list(lease.layers) if lease else []

            def progress(stage: str, tokens: int) -> None:
                nonlocal done
                done += tokens
                bar.show(stage, done, total)
                report(stage, done, total)

            first = start if parent and parent.identity.get("scorer") else step.protected
            total = len(ids) - start + (self._scorer.cost(len(ids) - first) if wanted.identity["scorer"] else 0)
            ms: Counter[str] = Counter()
            dense_nbytes = parent.dense_nbytes if parent else 0
            for end in _ends(max(start, step.protected), len(ids), wanted.identity["compress_every"]):
                began = time.perf_counter()
                if pairs is not None:
                    progress("prefill", end - start)
                elif layers:
                    pairs = prefill_behind(self._model, layers, start, ids[start:end], progress)
                else:
                    pairs = prefill(self._model, ids[:end], progress)
                ms["prefill"] += 1e3 * (time.perf_counter() - began)  # type: ignore[assignment]
                keep = tuple((first, min(last, end)) for first, last in step.keep if first < end)
                opening, closing, encode = recipe.opening, recipe.closing, language.prompts.text_ids
                prefilled = Prefilled(self._model, pairs, ids[:end], step.protected, opening, closing, encode, keep, layers, start)
                compressed = compress(prefilled, ratio, self._scorer, self._allocator, progress)
                ms.update(compressed.ms)
                dense_nbytes += compressed.dense_nbytes
                layers, start, pairs = list(compressed.layers), end, None
                del compressed, prefilled  # they hold on to what the next piece frees
        context = CompressedContext(
            key=wanted.key,
            identity=wanted.identity,
            token_ids=token_ids,
            storage=Resident(tuple(layers)),
            protected=step.protected,
            ratio=ratio,
            dense_nbytes=dense_nbytes,
            recipe=recipe,
            sources=(*(as_told(parent.sources) if parent else ()), *step.sources),
            created=parent.created if parent else 0.0,
            expires=parent.expires if parent else None,
            coarsest=min(ratio, parent.coarsest) if parent else ratio,
        )
        return context, dict(ms)

    def _bar(self, name: str | None) -> _Bar:
        return _Bar(name or "context", self._progress)

    @property
    def _language(self) -> Language:
        """What is made of the tokenizer as it is now. Sessions keep the one they began with."""
        language = self._spoken
        if not language.still(self.tokenizer):
            language = self._spoken = Language(self.tokenizer, self._template_kwargs, self.window, language)
            self._model.tokenizer = language.tokenizer
        return language

    @property
    def _prompts(self) -> PromptBuilder:
        return self._language.prompts

    @property
    def guidance(self) -> Guidance:
        """Makes grammars for the tokenizer as it is now."""
        return self._guidance_of(self._language)

    def _guidance_of(self, language: Language) -> Guidance:
        return language.guidance(self.model.config.vocab_size, eos_ids(self.model, language.tokenizer))

    @property
    def _identity(self) -> dict[str, Any]:
        return self._identity_of(self._language)

    def _identity_of(self, language: Language) -> dict[str, Any]:
        """The model's fields of a key; those of its weights are computed again when one, or an adapter, has changed.

        Raises:
            IdentityMismatchError: the model was moved to another device.
            InputError: it has a dtype now that the engine's attention cannot compute with.
        """
        now = self._watch.stamp()
        known, fields = self._known_identity
        if now != known:
            self._model.changed(moved=known is not None and now.places != known.places)
            others = known is None or -1 in now.written(known)  # not only buffers, which the model's own forward may write to
            fields = model_identity(self.model, self._weights.get(anew=others))
            self._known_identity = (now, fields)
        return {**fields, **language.identity}

    def _proven_identity(self, language: Language) -> dict[str, Any]:
        """:meth:`_identity_of` with all weights read, also if none seems to have changed."""
        self._identity_of(language)
        known, _ = self._known_identity
        fields = model_identity(self.model, self._weights.get())
        self._known_identity = (known, fields)
        return {**fields, **language.identity}

    @property
    def fingerprint(self) -> str:
        """Hash of model, tokenizer and template: what decides whether two engines can use each other's contexts."""
        return digest(self._identity)

    def stats(self) -> dict[str, Any]:
        """Bytes and budgets of the tiers, hits, builds and evictions, see :meth:`ContextRegistry.stats`; how many answers are
        ``running`` and how many are ``waiting`` for their turn, the oldest of them for ``oldest_wait_s`` seconds; the attention's name; and
        how many ``sessions`` and ``nbytes`` of ``turns`` lie in ``cache_dir``, which ``disk_bytes`` does not count.
        """
        return {**self.registry.stats(), **self._model.load(), "attention": self._model.backend, "turns": turns.usage(self.cache_dir)}

    def close(self) -> None:
        """Wait until everything loaded is on disk and let go of the folder. Happens by itself when Python ends.

        An index that another process keeps locked is waited for a second: what was loaded meanwhile is then not on disk, says a warning
        that counts it, and is built again by the next engine. A process that was forked has nothing to close.
        """
        if not is_parents(self):
            self.registry.close()

    def stored_prefix(self, ids: Sequence[int], ratio: float | None = None) -> CompressedContext | None:
        """The stored context with the most tokens that a prompt's ids begin with, the finest of them; None if there is none.

        Args:
            ids: of the prompt.
            ratio: what keeps less of its pairs, or was grown from what does, is left out, and what was ranked otherwise than by this engine
                unless nothing was evicted. None is the engine's ratio.
        """
        return self._stored_prefix(self._language, ids, ratio)

    def _stored_prefix(self, language: Language, ids: Sequence[int], ratio: float | None = None) -> CompressedContext | None:
        least, made = self.ratio if ratio is None else ratio, (self._scorer.identity(), self._allocator)

        def fits(entry: Entry) -> bool:
            scorer, allocator = entry.identity.get("scorer"), entry.identity.get("allocator")
            return entry.fineness >= least and (scorer is None or (scorer, allocator) == made)

        if self.registry.is_empty() or (entry := self.registry.longest_prefix(self._identity_of(language), ids, fits)) is None:
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
        self._check_context(self._language, context)
        return self._session(self._language, context)

    def _session(self, language: Language, context: CompressedContext | None) -> Session:
        context = None if context is None else self._mine(context)
        fold = partial(self._folded, language)
        return Session(self._model, language.prompts, context, fold, partial(self._identity_of, language))

    def generate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """Answer one question from a context; the question is forgotten afterwards.

        Args:
            context: None answers without one, but for a stored context that the prompt's ids happen to begin with, see ``reuse``.
            question: text, or chat messages of which the last is the user's or a tool's.
            tools: what the model may call, in OpenAI's form; :meth:`read_calls` finds the calls in the answer's text.
            tool_choice: ``"auto"``, ``"none"``, ``"any"``, or the name of the tool to call. Kept to by guided decoding.
            parallel_tool_calls: whether one answer may call several times; None allows it where the model chooses.
            schema: a JSON schema; the answer is JSON that validates against it. With tools: or calls of them.
            form: how calls are written, if not as :attr:`tool_form` says.
            behind: messages come behind the context, also those that say what it begins with once more; otherwise such are taken for
                the whole conversation, of which the context holds a part.
            reuse: without a context, whether the longest stored one that the prompt begins with is answered from, if it keeps as much as
                the engine's ``ratio``, or as another ratio that is given; the receipt names it. False reads the whole prompt.
            params: ``max_new_tokens=256, temperature=0.0, top_p=None, top_k=None, seed=None, stop=None, repetition_penalty=None,
                no_repeat_ngram_size=None``, see :class:`~kvzip_memory.inference.generation.GenerationParams`.

        Raises:
            InputError: an empty question, a parameter outside its range, a schema with a keyword that cannot be kept to, or JSON or a call
                that ``max_new_tokens`` are too few for.
            WindowError: context and question fill the model's window.
            UnfinishedError: the JSON or the call was cut by ``stop``.
        """
        return self.stream(context, question, **params).whole()

    async def agenerate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """:meth:`generate` in a thread, so that an event loop goes on. When it is cancelled, the answer ends within a token.

        As many run as the engine decodes together; ``max_waiting`` more wait, without threads.

        Raises:
            QueueFullError: so many wait; and as for :meth:`generate`.
        """
        return await result_of(self.places, self.generate, context, question, **params)

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
        reuse: bool | float = True,
        **params: Any,
    ) -> Stream:
        """The answer of :meth:`generate`, piece by piece."""
        tools, language = checked_tools(tools), self._language
        prompts = language.prompts
        schema = cleaned(schema, "the schema", MOST_OF_SCHEMA) if isinstance(schema, Mapping) else schema
        if parallel_tool_calls is None and prompts.one_call:
            parallel_tool_calls = False
        if tools:
            prompts.check_tools(tools)
            guidance = self._guidance_of(language)
            params["grammar"] = calls_grammar(guidance, form or prompts.form, tools, tool_choice, schema, parallel_tool_calls)
        elif schema is not None:
            params["grammar"] = self._guidance_of(language).json(schema)
        if context is not None:
            return self._session(language, context).stream(question, tools, behind, **params)
        checked = GenerationParams.of(params)
        ids = prompts.question(None, question, tools, thinks=checked.free)
        context = self._stored_prefix(language, ids, None if reuse is True else checked_ratio(reuse, "reuse")) if reuse else None
        return self._session(language, context).stream_ids(ids[context.n_tokens :] if context else ids, checked)

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
        return self._prompts.question(self._mine(context).recipe if context else None, question, tools)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, most: int | None = None) -> int:
        """Tokens of messages as a prompt. Of what has more than ``most`` no more is read than tells that, and a larger number given."""
        return self._prompts.count(messages, tools, most)

    def _masses(
        self, context: CompressedContext, spans: Sequence[Span], question: str | Sequence[Message], answer: str
    ) -> tuple[Tensor, Tensor]:
        """Attention to spans of a context: of the last message with its answer, and of :data:`NEUTRAL`."""
        language = self._language
        self._check_context(language, context)
        prompts, recipe = language.prompts, context.recipe
        closing = len(recipe.closing)

        def mass(row: Row, ids: list[int], said: str, more: list[int]) -> Tensor:
            if row.start + len(ids) >= self.window:
                tokens = row.start + len(ids)
                raise WindowError(
                    f"{tokens:,} tokens with the context; the model's window is {self.window:,}; ask shorter, or load less",
                    tokens=tokens,
                    window=self.window,
                )
            first = max(0, len(ids) - closing - len(prompts.text_ids(said)))
            return attention_mass(self._model, row, [*ids, *more][: self.window - row.start], spans, first)

        last, answer = as_messages(question)[-1]["content"], clean(answer, "answer")
        with context.lease() as lease:
            n = context.n_tokens
            asked = mass(Row(lease.layers, n, Tail()), prompts.question(recipe, question), last, prompts.text_ids(answer))
            return asked, mass(Row(lease.layers, n, Tail()), prompts.question(recipe, NEUTRAL), NEUTRAL, [])

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text alone, as the model's tokenizer makes them without special tokens of its own."""
        return list(self._language.tokenizer(clean(text, "a text"), add_special_tokens=False).input_ids)

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

        Reads the question, and :data:`~kvzip_memory.inference.attribution.NEUTRAL` to compare with, over each context; nothing is
        generated. Of a list of messages only the last one counts.

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
        self._check_context(self._language, context)
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not ids:
            raise InputError("no ids to compute logits for; give at least one")
        start = context.n_tokens if context else 0
        if start + len(ids) > self.window:
            tokens = start + len(ids)
            raise WindowError(
                f"{tokens:,} tokens with the context; the model's window is {self.window:,}; give fewer ids, or load less",
                tokens=tokens,
                window=self.window,
            )
        step = self._model.chunk_tokens
        chunks = [ids[i : i + step] for i in range(0, len(ids), step)]
        with context.lease() if context else nullcontext(None) as lease:
            row = Row(lease.layers if lease else (), start, Tail())
            return torch.cat([self._model.forward([row], [chunk], n_logits=len(chunk))[0] for chunk in chunks])

    def _mine(self, context: CompressedContext) -> CompressedContext:
        """The context, if it is of this engine's tenant or of none.

        Raises:
            InputError: it is another tenant's: as of a key that is not stored; or no context.
        """
        if not self._is_mine(checked_context(context).identity):
            raise _not_stored(context.key)
        return context

    def _is_mine(self, identity: Mapping[str, Any]) -> bool:
        return identity.get("tenant") in (None, self._tenant)

    def _check_context(self, language: Language, context: CompressedContext | None) -> None:
        if context is not None:
            check_same_model(self._mine(context).identity, self._identity_of(language), repr(context))

    def _check_parent(self, language: Language, context: CompressedContext) -> None:
        self._check_context(language, checked_context(context))
        scorer = context.identity.get("scorer")
        if scorer not in (None, self._scorer.identity()):
            raise InputError(
                f"the pairs of {context!r} were ranked by {scorer}, with which this engine's {self._scorer.identity()} cannot be "
                "compared; extend it with an engine of that scorer, or load the text again"
            )

    def __repr__(self) -> str:
        return f"<KVzipEngine {self.model.config.model_type} window {self.window:,} ratio {self.ratio} on {self._model.device}>"


def _strings(keep: str | Sequence[str] | None) -> list[str]:
    return [clean(wanted, "keep") for wanted in as_texts(keep, "keep", MOST_KEPT)]


def _labels(name: str | None, tags: str | Sequence[str] | None) -> list[str]:
    """The tags, when they and the name can be stored.

    Raises:
        InputError: they cannot.
    """
    labels = as_texts(tags, "tags", MOST_TAGS)
    if name is not None:
        check_name(name)
    for tag in labels:
        check_tag(tag)
    return labels


def _not_stored(reference: str, but: str = "") -> InputError:
    return InputError(f"no context {reference!r} of this model is stored{but}: load the text")


_BAR_NAME = 40  # characters of a name that a progress bar shows


class _Bar:
    """A progress bar that appears with the first progress, where it is shown.

    Where it is not there is none: tqdm's lock, of all threads and forked processes, would hang a child that is forked while another
    thread has it, and all the others once such a child is killed.
    """

    def __init__(self, name: str, progress: bool | None) -> None:
        self._name, self._shown = printable(name)[:_BAR_NAME], sys.stderr.isatty() if progress is None else progress
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` tokens, in the given stage; 0 of 0 while nothing is known."""
        if not self._shown:
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._name, unit="tok", leave=False)
        self._bar.total = total or None
        self._bar.set_postfix_str(printable(stage)[:_BAR_NAME], refresh=False)  # another process' may have told it
        self._bar.update(done - self._bar.n)


def _ends(first: int, n: int, every: int | None) -> list[int]:
    """Ends of the equal pieces, of at most ``every`` tokens, in which ``[first, n)`` is read and compressed."""
    count = 1 if every is None else max(1, math.ceil((n - first) / every))
    return [first + round((i + 1) * (n - first) / count) for i in range(count)]


def _memory_nbytes(device: torch.device) -> int:
    """Memory of a device; what this process may use of the host's for one that shares it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_nbytes()


def _check_allocator(allocator: str) -> None:
    if allocator not in ALLOCATORS:
        raise InputError(f"allocator {allocator!r} is unknown; use one of {', '.join(ALLOCATORS)}")


def _check_every(compress_every: int | None) -> None:
    if compress_every is not None and compress_every < 64:
        raise InputError(f"compress_every is {compress_every} tokens; pairs cannot be ranked among fewer than 64")
