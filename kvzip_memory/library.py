"""A model and the contexts that are loaded with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvzip_memory import turns
from kvzip_memory.access import Access
from kvzip_memory.bridge import result_of
from kvzip_memory.building import Builder
from kvzip_memory.compression import Stages
from kvzip_memory.compression.allocators import Allocator
from kvzip_memory.compression.codecs import FittedCodec
from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.compression.refit import Refit
from kvzip_memory.compression.scorers import Scorer
from kvzip_memory.context import CompressedContext, checked_context
from kvzip_memory.contexts import Contexts
from kvzip_memory.errors import InputError
from kvzip_memory.finding import Finder
from kvzip_memory.inference.admission import Places
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.joining import Positions
from kvzip_memory.model_identity import ModelIdentity
from kvzip_memory.prompting.language import Language
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.owned import tokenizer_of
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.registry import ContextRegistry, Forgotten
from kvzip_memory.registry.identity import tenant_digest
from kvzip_memory.speech import Speech
from kvzip_memory.system.digests import digest
from kvzip_memory.system.flags import check_flags, checked_flag
from kvzip_memory.system.forks import is_parents, refuse_after_fork
from kvzip_memory.system.limits import host_nbytes
from kvzip_memory.system.paths import as_folder
from kvzip_memory.system.printable import brief
from kvzip_memory.system.sharing import Shared
from kvzip_memory.system.threads import release


class Library(Shared):
    """A model and what is loaded with it: texts become contexts, which are extended, found and forgotten.

    It answers nothing: that is what :class:`KVzipEngine` adds, and describes the options of.
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
        scorer: Scorer | str = "kvzip",
        allocator: Allocator | str = "global",
        refit: Refit | str = "auto",
        codec: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.ratio = checked_ratio(ratio)
        Builder.check_every(compress_every)
        if progress is not None:
            checked_flag("progress", progress)
        stages = Stages.of(scorer, allocator, refit, FittedCodec(codec, lambda: (self._model.model.dtype, self._model.reads_fewer_bits)))
        tokenizer = tokenizer_of(tokenizer)
        self._model = LanguageModel(model, tokenizer, attention, max_running=max_running, max_waiting=max_waiting)
        stages = stages.for_layers(self._model.windows, self._model.layout.latent, refit)
        stages.codec.identity()  # says so if nothing reads it
        self._speech = Speech(self._model, tokenizer, template_kwargs)
        salt, device = tenant_digest(tenant), self._model.device
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
            tenant=salt,
            secret=secret,
            check=self._model.check_layers,
            forgets=self._speech.forget,
        )
        self._model_identity = model_identity = ModelIdentity(self._model)
        builder = Builder(self._model, model_identity, stages, compress_every, progress, salt)
        self._access = access = Access(model_identity, builder, salt)
        self._finder = Finder(self.registry, self._model, model_identity, self._speech, access, self.cache_dir)
        self._contexts = Contexts(self.registry, builder, self._finder, model_identity, self._speech, access, self.window, self.cache_dir)
        release()
        refuse_after_fork(self, "_model", "registry", "shared", "_speech", "_finder", "_contexts")

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

    @property
    def tokenizer(self) -> Any:
        """As it was given."""
        return self._speech.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._speech.tokenizer = tokenizer

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
        joinable: bool = False,
        preamble: bool | str = True,
        nbytes: float | str | None = None,
    ) -> CompressedContext:
        """The compressed context of a source: found if it was loaded before, by whomever, else built.

        Building costs one prefill and about one more for ranking and refitting; at ratio 1.0 only the prefill. It happens
        once: other threads and processes that ask for the same wait for it. What was loaded at a larger ratio
        is cut down to a smaller one without the model, if it was not refitted. The receipt says what happened, and why.

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
            joinable: for documents that are to stand behind others, see :meth:`join`: they begin with a blank line, are whole whatever
                follows, and are read behind a text of our own that is dropped then. Alone such a context is a little farther from the full
                cache than one that is not.
            preamble: the text that ``joinable`` documents are read behind; one of about 1,000 tokens that is like them (another contract,
                other code) serves better than ours, which is prose. True is ours. With False, which is none, a join is farther from the
                full cache, and the context alone is not.
            nbytes: in place of a ratio, what the context may take: bytes, a size such as ``"20MB"``, or a fraction below 1 of what a dense
                cache takes in 16 bits. The largest ratio is taken at which it does, with the engine's codec; which codec is nearest to the
                full cache at so many bytes, ``docs/benchmarks.md`` says.

        Raises:
            InputError: nothing to load, a ratio outside (0, 1], or one beside ``nbytes``, fewer of these than a ratio of 0.02 takes, an
                unreadable file, roles the template refuses, a string to keep that does not occur.
            WindowError: more tokens than the window can hold beside a question.
            BudgetError: larger than ``device_bytes``, or running answers need all of it.
            ModelError: the model computed scores that are not finite.
        """
        check_flags(joinable=joinable, **({} if isinstance(preamble, str) else {"preamble": preamble}))
        if ratio is not None and nbytes is not None:
            raise InputError(f"ratio is {brief(ratio)} and nbytes is {brief(nbytes)}; give one of them")
        ratio = checked_ratio(self.ratio if ratio is None else ratio)
        return self._contexts.load(source, ratio, name, system, keep, tags, tools, joinable, preamble, nbytes)

    def join(
        self,
        contexts: Sequence[CompressedContext | str],
        *,
        name: str | None = None,
        tags: str | Sequence[str] | None = (),
        store: bool = True,
        repair: int = 0,
        positions: Positions = "sequential",
    ) -> CompressedContext:
        """Documents' contexts as one, one behind another: no pair is copied, and no token read but for those of ``repair``.

        The pairs stay where they are, shared; queries are turned to where each part stands. What a part was not told when it was read is
        missing: that others stand before it, and what they say. So a join is farther from the full cache than one build of all, and less
        so if its contexts were loaded ``joinable``; ``docs/benchmarks.md`` says how far.

        Args:
            contexts: two or more, of the same model, system prompt and tools; their names, keys, or what loaded them. In their order.
            name, tags: see :meth:`load`.
            store: whether the registry has it. If not, it is there as long as it is in use, and nothing that grows from it is stored
                either: for what a single question is about, say.
            positions: where the contexts stand: ``"sequential"``, one behind another; or in so many positions of the model's window, which
                they share, evenly, if they have more tokens than that: for more documents than the window holds. ``"shared"`` is half of
                the window. The more tokens a position, the farther from the full cache, see ``docs/benchmarks.md``.
            repair: so many tokens of each later context are read again where they stand, behind all that is before them. Their pairs, all
                of them, are the join's own. 64 take off a fifth to a quarter of what a join of ``joinable`` contexts still lacks. Of a
                context that shares pairs, such as a join, those that its first part has at most.

        Raises:
            InputError: fewer than two, or contexts of different system prompts, or of conversations; or one is not stored; or a ``repair``
                that is no number of tokens, or goes with ``positions`` that are shared; or fewer of these than the longest context takes.
            WindowError: together they do not fit into the window.
            UnsupportedModelError: the model tells positions otherwise than by rotations, or remembers states.
            BudgetError, IdentityMismatchError: as for :meth:`extend`.
        """
        check_flags(store=store)
        if isinstance(contexts, str | CompressedContext) or not isinstance(contexts, Iterable):
            raise InputError(f"contexts is {brief(contexts)}; give a list of two contexts or more, or of their names or keys")
        found = [self.get(context) if isinstance(context, str) else checked_context(context) for context in contexts]
        return self._contexts.join(found, name, tags, store, repair, positions)

    async def ajoin(self, contexts: Sequence[CompressedContext | str], **options: Any) -> CompressedContext:
        """:meth:`join` in a thread, see :meth:`aload`."""
        return await result_of(self.loads, self.join, contexts, **options)

    async def aload(self, source: Any, **options: Any) -> CompressedContext:
        """:meth:`load` in a thread, so that an event loop goes on.

        When it is cancelled, a build is given up within a chunk, unless others wait for it. ``asyncio.shield`` has it go on and be kept.

        Raises:
            QueueFullError: ``max_waiting`` calls wait for a thread; and as for :meth:`load`.
        """
        return await result_of(self.loads, self.load, source, **options)

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
        return self._contexts.load_marked(messages, self.ratio if ratio is None else ratio, tags, tools)

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
        share: bool | None = False,
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
            ratio: kept fraction of the pairs of both, the parent's ratio if None.
            keep: strings of what is new whose pairs are never evicted. The parent's stay kept, but for a parent of ratio
                1.0, which has ranked nothing.
            tags: see :meth:`load`.
            tools: as for a conversation in :meth:`load`; described anew only if the parent was made with others.
            behind: all messages are new, also those that say what the parent begins with once more.
            share: whether the parent's pairs stay as and where they are, for any number of contexts. This one then has pairs of its own for
                what is new alone, of which it keeps ``ratio``; what grows from it shares the same. None: if the parent is of documents
                alone and stored in this engine's registry. What shares with one that is not (it was opened) is not stored either.

        Raises:
            InputError: as for :meth:`load`; documents behind a conversation; a parent whose pairs another scorer ranked.
            WindowError, BudgetError, ModelError: see :meth:`load`.
            IdentityMismatchError: the parent is another model's.
        """
        check_flags(behind=behind, **({} if share is None else {"share": share}))
        return self._contexts.extend(context, more, ratio, name, keep, tags, tools, behind, share)

    async def aextend(self, context: CompressedContext, more: Any, **options: Any) -> CompressedContext:
        """:meth:`extend` in a thread, see :meth:`aload`."""
        return await result_of(self.loads, self.extend, context, more, **options)

    def get(self, reference: str) -> CompressedContext:
        """The context last loaded under a name with this model, or that of a key (8 digits of it at least).

        By its name it has the sources that it was loaded with under that name; by its key those that the text itself tells. A name is
        that of one context: when it is no longer stored, what was loaded under the name before is still found by its key alone. One that
        was loaded here and is still in use is also found by its key when its pairs have left the registry.

        Raises:
            InputError: nothing is stored under it that this model can use.
        """
        return self._finder.get(reference)

    def one_context(self, references: Sequence[CompressedContext | str | None], by_name: bool = True) -> CompressedContext | None:
        """The one context that a prompt refers to, by itself, its name or its key; None if it refers to none. Several are joined.

        Args:
            references: in the order in which they are joined; one that is there already adds nothing.
            by_name: whether texts may be names and beginnings of keys; else they are whole keys, which nobody guesses.

        Raises:
            InputError: one is not the whole key it has to be, :meth:`get` does not find it, or as for :meth:`join`.
            WindowError: as for :meth:`join`.
        """
        check_flags(by_name=by_name)
        found = self._finder.contexts(references, by_name)
        inside = {part.key for context in found for part in context.parts}
        found = [context for context in found if context.key not in inside]
        return self.join(found) if len(found) > 1 else next(iter(found), None)

    def open(self, path: str | Path) -> CompressedContext:
        """A context from a file written by :meth:`CompressedContext.save`, with the name and the sources of who saved it. For a ``ttl`` it
        is as old as its opening.

        Raises:
            IdentityMismatchError: written with another model, or for another tenant; names the fields.
            CorruptFileError: damaged, incomplete, of a newer format, or not a context file.
            InputError: a path that no file can have.
            OSError: the file cannot be read; in ``cache_dir`` what does not soundly say it is the tenant's is as one that is not there.
        """
        return self._finder.open(path)

    def stored_prefix(self, ids: Sequence[int], ratio: float | None = None) -> CompressedContext | None:
        """The stored context with the most tokens that a prompt's ids begin with, the finest of them; None if there is none.

        Args:
            ids: of the prompt.
            ratio: what keeps less of its pairs, or was grown from what does, is left out, and what was ranked otherwise than by this engine
                unless nothing was evicted. None is the engine's ratio.
        """
        return self._finder.prefix(self._language, ids, self.ratio if ratio is None else ratio)

    def leave_behind(self, key: str | None, tags: Sequence[str]) -> None:
        """Delete a context that a conversation of these tags has grown through, and that nobody else has named, tagged or pinned. The
        one it began with stays, and so does all that has no tag.
        """
        self._contexts.leave_behind(key, tags)

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
        return self._contexts.forget(tag)

    async def aforget(self, tag: str) -> Forgotten:
        """:meth:`forget` in a thread. Cancelled before it deletes it changes nothing; what it has begun it finishes."""
        return await result_of(self.loads, self.forget, tag)

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

    @property
    def _language(self) -> Language:
        return self._speech.now

    @property
    def _identity(self) -> dict[str, Any]:
        return self._model_identity.of(self._language)

    def __repr__(self) -> str:
        return f"<KVzipEngine {self.model.config.model_type} window {self.window:,} ratio {self.ratio} on {self._model.device}>"


def _memory_nbytes(device: torch.device) -> int:
    """Memory of a device; what this process may use of the host's for one that shares it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_nbytes()
