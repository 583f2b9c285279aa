"""Loading contexts: found if they were loaded before, else built; grown from others; forgotten."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvzip_memory import turns
from kvzip_memory.access import Access
from kvzip_memory.building import Builder, Computed
from kvzip_memory.chain import Make, Managed, Step, leased
from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.context import CompressedContext, Part, Source, as_told, checked_context, parts_of
from kvzip_memory.errors import BudgetError, IdentityMismatchError, InputError
from kvzip_memory.finding import Finder
from kvzip_memory.joining import Front, Join, Joinable, Positions
from kvzip_memory.model_identity import ModelIdentity
from kvzip_memory.prompting.cleaning import MOST_KEPT, as_texts, clean
from kvzip_memory.prompting.documents import Document, check_metadata
from kvzip_memory.prompting.fronts import Fronts, front
from kvzip_memory.prompting.language import Language
from kvzip_memory.prompting.messages import Message, as_messages
from kvzip_memory.prompting.preamble import PREAMBLE, PREAMBLE_TOKENS
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.prompting.sources import read_source
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.prompting.window import FREE_TOKENS, check_room
from kvzip_memory.registry import ContextRegistry, Forgotten, Wanted, check_name, check_tag
from kvzip_memory.registry.holders import MARKED, Naming
from kvzip_memory.registry.identity import group_of, key_of, label
from kvzip_memory.registry.wanted import MOST_TAGS
from kvzip_memory.speech import Speech
from kvzip_memory.system.calls import check
from kvzip_memory.system.digests import digest
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.threads import release

logger = logger_of(__name__)

# Tokens a position of joined contexts; with more nothing was measured, and little is right with as many.
_CROWD = 4.5
# A context that shares another's pairs may be shared in its turn, so many times.
_LEVELS = 64

#: The fewest tokens of a prompt's beginning that a context of their own is worth: building one costs more than reading them again.
FEWEST_TOKENS = 256

Words = str | Sequence[str] | None


class Contexts:
    """Gets contexts of texts and conversations out of the registry, or has them built. Errors are those of :class:`KVzipEngine`'s methods.

    Args:
        registry: where they are stored.
        builder: builds them.
        finder: finds what a conversation can go on from.
        identity: tells which model they are of.
        speech: in which language.
        access: which of them may be gone on from.
        window: of the model, in tokens.
        cache_dir: of the registry, None without one.
    """

    def __init__(
        self,
        registry: ContextRegistry,
        builder: Builder,
        finder: Finder,
        identity: ModelIdentity,
        speech: Speech,
        access: Access,
        window: int,
        cache_dir: Path | None,
    ) -> None:
        self._registry, self._builder, self._finder, self._identity, self._speech = registry, builder, finder, identity, speech
        self._access, self._window, self._cache_dir = access, window, cache_dir
        self._fronts = Fronts()

    def load(
        self,
        source: Any,
        ratio: float,
        name: str | None,
        system: str | None,
        keep: Words,
        tags: Words,
        tools: Sequence[Tool] | None,
        joinable: bool,
        preamble: bool | str,
        nbytes: float | str | None,
    ) -> CompressedContext:
        """See :meth:`KVzipEngine.load`; the ratio does not count beside ``nbytes``."""
        labels = _labels(name, tags)
        began = time.perf_counter()
        language = self._speech.now
        if isinstance(preamble, str) and not (joinable and clean(preamble, "preamble").strip()):
            raise InputError("preamble is a text for documents with joinable=True to be read behind; give both, and some words")
        prompt = self.prompt(language, source, system, _strings(keep), tools, joinable)
        if nbytes is not None:
            ratio = self._builder.sizes.ratio_within(nbytes, len(prompt.token_ids), prompt.protected, prompt.keep)
        if not joinable or preamble is False:
            return self._load_text(language, prompt, ratio, name, labels, began)
        front = self._front(language, prompt, PREAMBLE if preamble is True else clean(preamble, "preamble"))
        return self._load_joinable(language, prompt, ratio, name, labels, began, front)

    def load_marked(self, messages: Sequence[Message], ratio: float, tags: Words, tools: Sequence[Tool] | None) -> CompressedContext | None:
        """See :meth:`KVzipEngine.load_marked`."""
        began = time.perf_counter()
        ratio, labels = checked_ratio(ratio), [MARKED, *_labels(None, tags)]
        language = self._speech.now
        prompt = language.prompts.until_mark(messages, tools)
        if prompt is None or len(prompt.token_ids) < FEWEST_TOKENS:
            if prompt is not None:
                logger.debug("cache_control after %d tokens is ignored; it takes %d", len(prompt.token_ids), FEWEST_TOKENS)
            return None
        check_room(prompt, self._window)
        before = self._finder.prefix(language, [*prompt.token_ids, -1], ratio)  # of all of them, too
        if len(labels) > 1 and self._fronts.changes(tuple(labels), front(as_messages(messages), tools)) > 1 and before is None:
            logger.warning(
                "cache_control is ignored in %s: its system prompt or its tools change at every call, so that nothing would be found "
                "again; put what changes behind the mark",
                labels[-1],
            )
            return None
        if before is None:
            return self._load_text(language, prompt, ratio, None, labels, began)
        self._registry.join(before.key, labels)
        if len(prompt.token_ids) - before.n_tokens < FEWEST_TOKENS:
            return before
        left_behind = before.identity.get("parent")
        try:
            context = self._load(language, replace(prompt, protected=before.protected), ratio, None, labels, began, before)
        except IdentityMismatchError:  # as in _load_text
            return self._load_text(language, prompt, ratio, None, labels, began)
        self.leave_behind(left_behind, labels)
        return context

    def leave_behind(self, key: str | None, tags: Sequence[str]) -> None:
        """See :meth:`KVzipEngine.leave_behind`."""
        for entry in self._registry.find(key) if key and tags else []:
            if set(tags) <= set(entry.tags) and entry.identity.get("parent") and "shift" not in entry.identity:
                try:
                    self._registry.leave(entry.key, tags)
                except (InputError, OSError) as error:
                    logger.debug("context %s, which a conversation has left behind, stays: %s", entry.key[:12], error)

    def extend(
        self,
        context: CompressedContext,
        more: Any,
        ratio: float | None,
        name: str | None,
        keep: Words,
        tags: Words,
        tools: Sequence[Tool] | None,
        behind: bool,
        share: bool | None,
    ) -> CompressedContext:
        """See :meth:`KVzipEngine.extend`."""
        began = time.perf_counter()
        if ratio is not None:
            checked_ratio(ratio)
        labels, kept = _labels(name, tags), _strings(keep)
        language = self._speech.now
        share = self._is_shared(checked_context(context)) if share is None else share
        self._access.check_parent(language, context, share)
        documents, messages = _read(more, tools)
        prompt = (
            language.prompts.more_documents(context, documents, kept)
            if documents
            else language.prompts.more_turns(context, messages, kept, tools, behind)
        )
        check_room(prompt, self._window, saved=context.saved)
        return self._load(language, prompt, context.ratio if ratio is None else ratio, name, labels, began, context, share=share)

    def fold(
        self,
        language: Language,
        default: float,
        context: CompressedContext | None,
        prompt: Prompt,
        computed: Computed | None,
        ratio: float | None,
        name: str | None,
        tags: Words,
    ) -> CompressedContext:
        """The context of another one, or of none, and of turns in a language, whose pairs may be there already.

        Args:
            default: the ratio where neither it nor a context is given.
        """
        began, labels = time.perf_counter(), _labels(name, tags)
        now, then = self._identity.of(self._speech.now), self._identity.of(language)
        if differing := tuple(field for field in ("tokenizer", "template") if now[field] != then[field]):
            raise IdentityMismatchError(
                f"the session began with another {' and another '.join(map(label, differing))} than the tokenizer has now; set that one "
                "again to fold it",
                fields=differing,
            )
        share = context is not None and self._is_shared(context)
        if context is not None:
            self._access.check_parent(language, context, share)
        check_room(prompt, self._window, saved=context.saved if context else 0)
        if ratio is None:
            ratio = context.ratio if context else default
        return self._load(language, prompt, ratio, name, labels, began, context, computed, share)

    def _is_shared(self, context: CompressedContext) -> bool:
        """Whether what conversations over a context fold shares its pairs."""
        return context.is_shareable and self._is_here(context) and self._access.is_own(context)

    def _is_here(self, context: CompressedContext) -> bool:
        """Whether the registry has a context and all that it shares."""
        if isinstance(context.storage, Managed) and context.storage.step.registry is self._registry:
            return context.storage.step.stored
        return all(self._registry.find(key) for key in (context.key, *(part.key for part in context.parts)))

    def _load_text(
        self, language: Language, prompt: Prompt, ratio: float, name: str | None, tags: Sequence[str], began: float
    ) -> CompressedContext:
        """:meth:`_load` of what is built from its text alone: under the key of the weights as they are, had they changed unseen."""
        with suppress(IdentityMismatchError):
            return self._load(language, prompt, ratio, name, tags, began)
        return self._load(language, prompt, ratio, name, tags, began)

    def _load(
        self,
        language: Language,
        prompt: Prompt,
        ratio: float,
        name: str | None,
        tags: Sequence[str],
        began: float,
        parent: CompressedContext | None = None,
        computed: Computed | None = None,
        share: bool = False,
        front: Front | None = None,
    ) -> CompressedContext:
        """A prompt's context out of the registry, built if need be, of pairs that are ``computed`` already if they are given."""
        ratio, share = checked_ratio(ratio), share or (parent is not None and parent.is_one)
        tokenized = time.perf_counter()
        joinable = front and front.joinable
        identity = self._builder.identity(language, prompt, ratio, parent, computed=computed is not None, share=share, joinable=joinable)
        ms = {"tokenize": 1e3 * (tokenized - began), "identify": 1e3 * (time.perf_counter() - tokenized)}
        shared = sum(part.n_tokens for part in parts_of(identity))
        beside = 0 if parent is None or not shared else parent.shared_nbytes + (parent.nbytes if share else 0)
        start, known = (parent.n_tokens, len(parent.sources)) if parent else (0, 0)
        above = parent.storage.step if parent and isinstance(parent.storage, Managed) else parent
        make = partial(self._builder.build, language)
        step = self._step(identity, prompt, name, tags, make, above, start, known)
        if front is not None:
            step = replace(step, parent=front.step, ids=step.ids[front.joinable.head.n_tokens :], before=(front.head,))  # type: ignore[index]
        else:
            step = replace(step, before=_before(above, parts_of(identity)))
        if parent is not None and shared:
            step = replace(step, stored=self._is_here(parent))
        elif isinstance(above, Step):
            step = replace(step, stored=above.stored)
        if step.levels > _LEVELS:
            raise InputError(f"{step.levels} contexts would share one behind another; at most {_LEVELS} may: extend without share=True")
        now = step if computed is None else replace(step, make=partial(make, computed=computed))
        nbytes = beside + self._builder.sizes.nbytes(len(prompt.token_ids), prompt.protected, ratio, shared)
        return self._leased(now, step, name, prompt.sources, nbytes, ms, len(prompt.token_ids) - start)

    def _step(
        self,
        identity: Mapping[str, Any],
        prompt: Prompt,
        name: str | None,
        tags: Sequence[str],
        make: Make,
        above: Step | CompressedContext | None = None,
        start: int = 0,
        known: int = 0,
    ) -> Step:
        """How a prompt's context is made behind the first ``start`` tokens and ``known`` sources."""
        wanted = Wanted(key_of(identity), identity, group_of(identity), name, tuple(sorted(set(tags))), prompt.sources)
        ids = torch.tensor(prompt.token_ids[start:], dtype=torch.int32, device="cpu")
        sources = as_told(prompt.sources)[known:]
        return Step(self._registry, wanted, make, above, ids, prompt.protected, prompt.keep, prompt.recipe, sources)

    def _leased(
        self, now: Step, step: Step, name: str | None, sources: tuple[Source, ...], nbytes: int, ms: Mapping[str, float], new: int
    ) -> CompressedContext:
        """The context of a step, made as it can be made ``now``, if it is not there.

        Args:
            nbytes: that it will take, with what it shares.
            new: tokens that are read then.
        """
        check_metadata(sources)
        wanted = self._registry.with_room(step.wanted)
        now, step = replace(now, wanted=wanted), replace(step, wanted=wanted)
        self._registry.check_fits(nbytes)
        if step.stored:
            self._registry.readmit(wanted.key)
        with self._builder.bar(name) as bar, leased(now, bar.show) as (context, lease):
            built = lease.receipt.tier == "built" and lease.receipt.shrunk_from is None
            receipt = replace(lease.receipt, ms={**ms, **lease.receipt.ms}, read=new if built else 0)
            storage = Managed(step, context)
            self._finder.remember(wanted.key, storage)
        release()
        return storage.handle(name=name, sources=sources, receipt=receipt)

    def _load_joinable(
        self, language: Language, prompt: Prompt, ratio: float, name: str | None, tags: Sequence[str], began: float, front: Front
    ) -> CompressedContext:
        """The context of a prompt that is read behind a preamble."""
        self._builder.check_movable()
        while True:
            for key in (front.joinable.head.key, front.joinable.front):
                self._registry.readmit(key)
            try:
                context = self._load(language, prompt, ratio, name, tags, began, front=front)
            except BudgetError as error:
                raise type(error)(
                    f"{error}. While a joinable text is read, {front.joinable.dropped:,} tokens that stand before it and are dropped take "
                    "room, too; preamble=False does without them"
                ) from error
            if not self._registry.is_removed(front.joinable.head.key):  # meanwhile, with the last other text that was read behind it
                return context

    def _front(self, language: Language, prompt: Prompt, preamble: str) -> Front:
        """What a prompt is read behind: steps of contexts that are the same for all prompts of a template head."""
        if not prompt.protected:
            raise InputError("joinable=True: the template puts nothing before a text, which all parts share; load with preamble=False, too")
        head = prompt.token_ids[: prompt.protected]
        room = max(0, self._window - FREE_TOKENS - len(prompt.token_ids))
        length = next((length for length in PREAMBLE_TOKENS if length <= room), 0)
        ids = language.prompts.text_ids(preamble)[:length]

        def step(token_ids: Sequence[int]) -> Step:
            alone = replace(prompt, token_ids=tuple(token_ids), sources=(), keep=(), text_digest=digest(["front", token_ids]))
            identity = self._builder.identity(language, alone, 1.0)
            return self._step(identity, alone, None, (), partial(self._builder.build, language))

        first, front = step(head), step([*head, *ids])
        return Front(first, front, Joinable(Part(first.wanted.key, len(head)), front.wanted.key, len(ids)))

    def join(
        self,
        contexts: Sequence[CompressedContext],
        name: str | None,
        tags: Words,
        store: bool,
        repair: int,
        positions: Positions,
    ) -> CompressedContext:
        """See :meth:`KVzipEngine.join`."""
        began = time.perf_counter()
        labels, language = _labels(name, tags), self._speech.now
        if not store and (name is not None or labels):
            raise InputError("store=False with a name or tags; they are of what is stored")
        for context in contexts:
            self._access.check_parent(language, context, share=True)
        join = Join.of(contexts, self._window, repair, positions)
        self._builder.check_movable()
        first, last = contexts[0], contexts[-1]
        prompt = Prompt(tuple(join.token_ids.tolist()), first.protected, last.recipe, join.sources, (), None, first.identity["system"])
        check_room(prompt, self._window, 'join fewer contexts, or with positions="shared",', join.saved)
        if (crowd := len(prompt.token_ids) / (len(prompt.token_ids) - join.saved)) > _CROWD:
            logger.warning("%.1f tokens share a position in a join of %d contexts; answers from it may be of no use", crowd, len(contexts))
        identity = self._builder.joined_identity(language, prompt, contexts, join)
        above = tuple(context.storage.step if isinstance(context.storage, Managed) else context for context in contexts)
        step = self._step(identity, prompt, name, labels, partial(self._builder.join, language))
        step = replace(step, before=above, sources=join.told, stored=store and all(map(self._is_here, contexts)))
        ms = {"identify": 1e3 * (time.perf_counter() - began)}
        sizes = {context.key: context.nbytes for context in contexts}
        for part in (part for context in contexts for part in context.parts if part.key not in sizes):
            sizes[part.key] = max((entry.nbytes for entry in self._registry.find(part.key)), default=0)
        nbytes = max(sum(sizes.values()), *(context.nbytes + context.shared_nbytes for context in contexts))
        nbytes += self._builder.sizes.nbytes(n := len(prompt.token_ids), prompt.protected, 1.0, n - join.read) if join.read else 0
        return self._leased(step, step, name, prompt.sources, nbytes, ms, join.read)

    def prompt(
        self,
        language: Language,
        source: Any,
        system: str | None = None,
        keep: Sequence[str] = (),
        tools: Sequence[Tool] | None = None,
        joinable: bool = False,
    ) -> Prompt:
        """What the context of a source is built from.

        Raises:
            InputError, WindowError: see :meth:`KVzipEngine.load`.
        """
        prompts = language.prompts
        documents, messages = _read(source, tools)
        system = None if system is None else clean(system, "system prompt")
        if joinable and not documents:
            raise InputError("joinable=True is for documents; a conversation stands behind them: extend() or fold() puts it there")
        if documents:
            prompt = prompts.documents_apart(documents, system, keep) if joinable else prompts.documents(documents, system, keep)
        else:
            prompt = prompts.conversation(messages, system, keep, tools)
        check_room(prompt, self._window)
        return prompt

    def forget(self, tag: str) -> Forgotten:
        """See :meth:`KVzipEngine.forget`."""
        check_tag(tag)
        self._registry.flush()
        check()  # from the first write on it is finished
        forgotten = self._registry.forget(Naming(tag))
        if self._cache_dir is not None:  # last: contexts can be made of turns again
            turns.erase(self._cache_dir, self._registry.tenant, tag, self._registry.checksums)
        return forgotten


def _before(above: Step | CompressedContext | None, shared: Sequence[Part]) -> tuple[Step | CompressedContext, ...]:
    """Who has what a context shares: its parent, or whoever has what that shares."""
    if above is None or not shared:
        return ()
    return above.before if isinstance(above, Step) and above.wanted.key not in [part.key for part in shared] else (above,)


def _read(source: Any, tools: Sequence[Tool] | None) -> tuple[list[Document], list[Message]]:
    """Documents, or else messages, to which alone tools belong."""
    documents, messages = read_source(source)
    if documents and tools:
        raise InputError("tools belong to a conversation; give them with the question about these documents")
    return documents, messages


def _strings(keep: Words) -> list[str]:
    return [clean(wanted, "keep") for wanted in as_texts(keep, "keep", MOST_KEPT)]


def _labels(name: str | None, tags: Words) -> list[str]:
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
