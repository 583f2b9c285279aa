"""Finding contexts that are there: by name, key, file, or by what a prompt begins with."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from kvzip_memory.access import Access, not_stored
from kvzip_memory.chain import Managed, Step, leased
from kvzip_memory.context import CompressedContext, Receipt
from kvzip_memory.errors import CorruptFileError, IdentityMismatchError, InputError, KVzipError
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.model_identity import ModelIdentity
from kvzip_memory.prompting.language import Language
from kvzip_memory.registry import ContextRegistry, Entry, Label, Wanted
from kvzip_memory.registry.disk.files import read_context
from kvzip_memory.registry.identity import model_fields
from kvzip_memory.speech import Speech
from kvzip_memory.system.paths import as_path
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)

_WHOLE_KEY, _SHORT_OF_A_KEY = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{1,7}")


class Finder:
    """Gives handles of contexts that are there already; nothing is built.

    Args:
        registry: where they are stored.
        model: they are to be of.
        identity: tells which that is.
        speech: in which language.
        access: which of them may be used.
        cache_dir: of the registry, None without one.
    """

    def __init__(
        self,
        registry: ContextRegistry,
        model: LanguageModel,
        identity: ModelIdentity,
        speech: Speech,
        access: Access,
        cache_dir: Path | None,
    ) -> None:
        self._registry, self._model, self._identity, self._speech = registry, model, identity, speech
        self._access, self._cache_dir = access, cache_dir
        self._loaded: WeakValueDictionary[str, Managed] = WeakValueDictionary()

    def remember(self, key: str, storage: Managed) -> None:
        """What was loaded, so that it is found by its key for as long as it is in use."""
        self._loaded[key] = storage

    def get(self, reference: str) -> CompressedContext:
        """See :meth:`KVzipEngine.get`."""
        asked = time.time()
        (entries, labels), here = self._registry.looked_up(reference), self._identity.of(self._speech.now)
        usable = [entry for entry in entries if model_fields(entry.identity) == here]
        if usable:
            return self._handle(usable[-1], asked, labels.get(usable[-1].key))
        if (loaded := self._loaded.get(reference)) is not None and not self._registry.is_removed(reference, loaded.step.wanted.loaded):
            return loaded.handle()
        raise not_stored(reference, self._why(reference, entries))

    def _why(self, reference: str, entries: Sequence[Entry]) -> str:
        """What there is in place of what is not stored: entries of other models, older ones of the name; or why it is not seen."""
        other = f"; {len(entries)} of other models are" if entries else ""
        older = [entry.key[:12] for entry in self._registry.contexts() if reference in entry.former]
        other += f"; older ones of that name are, under their keys {', '.join(older)}" if older else ""
        held = ""
        if self._registry.is_held:
            held = "; another process holds the index of cache_dir now, so what lies there is not found by its name"
        elif self._registry.no_disk is not None:
            held = f"; only what is in memory is seen: {self._registry.no_disk}"
        short = "; a key is known by its first 8 digits at least" if _SHORT_OF_A_KEY.fullmatch(reference) else ""
        return other + held + short

    def contexts(self, references: Sequence[CompressedContext | str | None], by_name: bool = True) -> list[CompressedContext]:
        """The contexts of references, each once; see :meth:`KVzipEngine.one_context`."""
        for reference in references:
            if isinstance(reference, str) and not by_name and not _WHOLE_KEY.fullmatch(reference):
                raise InputError(
                    f"a message brings the context {reference[:80]!r} (a block's file_id is read as a context's key); messages bring "
                    "contexts by their whole keys (context.as_block(), context.key), and by other names only for a model made with "
                    "contexts_by_name=True"
                )
        contexts = [self.get(reference) if isinstance(reference, str) else reference for reference in references if reference is not None]
        return [*{self._access.mine(context).key: context for context in contexts}.values()]

    def prefix(self, language: Language, ids: Sequence[int], ratio: float) -> CompressedContext | None:
        """See :meth:`KVzipEngine.stored_prefix`."""
        registry, asked = self._registry, time.time()
        if registry.is_empty():
            return None
        entry = registry.longest_prefix(self._identity.of(language), ids, lambda entry: self._access.is_as_fine(entry, ratio))
        if entry is None or not all(map(self._access.is_way_of, self._stored_parts(entry))):
            return None
        try:
            context = self._handle(entry, asked)
        except KVzipError as error:  # lost meanwhile, or no room for it: the prompt is computed
            logger.debug("a stored beginning of the prompt is not used: %s", error)
            return None
        return context if list(ids[: context.n_tokens]) == context.token_ids.tolist() else None

    def _stored_parts(self, entry: Entry) -> list[Entry]:
        """What a stored context shares, as far as it is stored."""
        return [part for key in entry.parts for part in self._registry.find(key)]

    def _handle(self, entry: Entry, asked: float, label: Label | None = None) -> CompressedContext:
        """A context that was there when it was ``asked`` for and that nobody gave the text of, with what was told of it when it got a name.

        Raises:
            InputError: it is no longer stored.
        """
        wanted = Wanted(entry.key, entry.identity, entry.group, loaded=asked)

        def make(*given: Any) -> CompressedContext:
            raise InputError(f"context {label.name if label else entry.key[:12]!r} is no longer stored; load its text again")

        step = Step(self._registry, wanted, make, before=self._shared(entry, asked))
        with leased(step) as (context, lease):
            handle = Managed(step, context).handle(receipt=lease.receipt)
        if label is None:
            return handle
        sources = handle.sources
        if len(label.sources) == len(sources):
            told = zip(sources, label.sources, strict=True)
            sources = tuple(replace(source, name=name, metadata=deepcopy(metadata)) for source, (name, metadata) in told)
        return replace(handle, name=label.name, sources=sources)

    def _shared(self, entry: Entry, asked: float) -> tuple[Step, ...]:
        """How what a stored context shares is found: all parts, each by itself or together with those that it shares in its turn.

        Raises:
            InputError: one is not stored.
        """
        steps, left = list[Step](), dict.fromkeys(entry.parts)
        while left:
            key, _ = left.popitem()
            said = f"context {entry.key[:12]} shares the pairs of context {key[:12]}, which is not stored; load the text of that one again"
            if (part := next(iter(self._registry.find(key)), None)) is None:
                raise InputError(said)
            steps.append(self._part(part, said, asked))
            left = dict.fromkeys(other for other in left if other not in part.parts)
        return tuple(reversed(steps))

    def _part(self, part: Entry, said: str, asked: float) -> Step:
        def make(*given: Any) -> CompressedContext:
            raise InputError(said)

        return Step(self._registry, Wanted(part.key, part.identity, part.group, loaded=asked), make, before=self._shared(part, asked))

    def open(self, path: str | Path) -> CompressedContext:
        """See :meth:`KVzipEngine.open`."""
        began = time.perf_counter()
        file, mine = as_path(path, "path"), False

        def admit(facts: Mapping[str, Any]) -> None:
            nonlocal mine
            mine = self._access.is_mine(facts["identity"])
            if not mine:
                raise IdentityMismatchError(f"{file} was saved for another tenant; open it with an engine of that", fields=("tenant",))
            if facts["identity"].get("parts") and not facts["before"]:
                raise CorruptFileError(f"{file} is of a cache folder, and lacks what it shares; open what its context's save() has written")

        try:
            context = read_context(file, self._model.device, admit=admit, checksums=self._registry.checksums)
        except (IdentityMismatchError, CorruptFileError, OSError):
            if mine or not self._is_stored(file):
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from None  # as for a key that is not stored
        self._identity.check(context.identity, self._speech.now, str(path))
        with context.lease() as lease:
            for layers in lease.parts:
                self._model.check_layers(layers, lease.states, str(path))
        ms = {"load": 1e3 * (time.perf_counter() - began)}
        receipt = Receipt(context.key, hit=True, tier="disk", nbytes=context.nbytes, ms=ms, fitted=context.fitted)
        return replace(context, receipt=receipt, created=time.time(), expires=None)

    def _is_stored(self, file: Path) -> bool:
        """Whether a file lies in ``cache_dir``."""
        return self._cache_dir is not None and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(self._cache_dir))
