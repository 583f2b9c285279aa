"""Tools with which an agent keeps documents of its own."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote
from weakref import WeakValueDictionary

from langchain_core.tools import BaseTool, StructuredTool, ToolException

from kvzip_memory import Document, KVzipEngine
from kvzip_memory.bridge import result_of
from kvzip_memory.errors import KVzipError
from kvzip_memory.inference.admission import Places
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.registry import Entry
from kvzip_memory.system.calls import check
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import held, lock_in
from kvzip_memory.system.paths import as_path
from kvzip_memory.system.printable import brief
from langchain_kvzip.folders import LARGEST_FILE, read_below

#: An agent's namespace may have so many documents, and their names so many characters.
MOST_DOCUMENTS, LONGEST_DOCUMENT_NAME = 1000, 256


def create_memory_tools(
    engine: KVzipEngine, *, folder: str | Path | None = None, namespace: str = "agent", max_tokens: int = 256
) -> list[BaseTool]:
    """Tools to load, list, ask and forget documents: ``load_document``, ``list_documents``, ``ask_document``, ``forget_document``.

    An agent sees and forgets only what it has loaded itself, in its namespace, under names of its own: they are tags
    ``memory:{namespace}:{name}`` of the contexts, not the names by which :meth:`KVzipEngine.get` finds them. The text loaded
    last under a name is the one that is asked. A text that others use, too, stays for them. What goes wrong is told to the
    model as the tool's result. It keeps at most 1,000 documents in a namespace, with names of 256 characters, and reads files of
    at most 64 MiB.

    Args:
        engine: holds the documents and answers from them.
        folder: the agent loads text files from inside this folder, by their relative paths; links in it are not followed. None: it
            loads texts it gives itself.
        namespace: kept apart from the documents of other namespaces.
        max_tokens: of an answer of ``ask_document``.
    """
    prefix = f"memory:{quote(clean(namespace, 'namespace'), safe='')}:"
    root = None if folder is None else as_path(folder, "folder").resolve()
    lock = f"tools-{hashlib.sha256(f'{engine.registry.tenant}{prefix}'.encode()).hexdigest()[:2]}"  # no tenant waits for another's builds

    @contextmanager
    def changing() -> Iterator[None]:
        """One tool at a time in all threads and processes: two that load under one name would each delete the other's text."""
        in_process = engine.shared.setdefault("langchain.memory_tools", _Locks()).of(prefix)
        with in_process, held(lock_in(engine.cache_dir, lock), "changing an agent's documents") if engine.cache_dir else nullcontext():
            yield
            engine.registry.flush()  # it is on disk when the agent is told so

    def mine() -> dict[str, Entry]:
        entries = reversed(engine.registry.contexts())
        return {tag.removeprefix(prefix): entry for entry in entries for tag in entry.tags if tag.startswith(prefix)}

    @contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except (KVzipError, OSError) as error:  # the latter is the disk's
            raise ToolException(_without_paths(error, engine)) from error

    def let_go(name: str, but: str | None = None) -> None:
        """Take the name from all contexts but one; delete those that nobody else uses."""
        engine.registry.forget(lambda key, tag: tag == prefix + name and key != but)

    def entry_of(name: str) -> Entry:
        found = mine()
        if name not in found:
            raise ToolException(f"no document {brief(name)}; there are {brief(sorted(found))}")
        return found[name]

    def load_document(name: str, text: str) -> str:
        """Keep a text under a name, to ask questions about it later."""
        return loaded(name, text)

    def load_file(path: str) -> str:
        """Keep a text file under its path, to ask questions about it later."""
        assert root is not None
        found = read_below(root, path)
        if found is None:
            raise ToolException(f"there is no file {brief(path)}")
        if len(found) > LARGEST_FILE:
            raise ToolException(f"{brief(path)} has more than {LARGEST_FILE:,} bytes, which is the limit; load a smaller file")
        try:
            return loaded(path, found.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ToolException(f"{path!r} is no text in UTF-8: {error.reason} at byte {error.start:,}") from error

    def loaded(name: str, text: str) -> str:
        name = clean(name, "name")
        if not name.strip():
            raise ToolException("the name is empty; give one to ask for the document by")
        if len(name) > LONGEST_DOCUMENT_NAME:
            raise ToolException(f"the name {brief(name)} has {len(name):,} characters; give one of at most {LONGEST_DOCUMENT_NAME}")
        with changing():
            engine.registry.check_changeable()  # the text before will have to go, and this one some day
            if name not in (kept := mine()) and len(kept) >= MOST_DOCUMENTS:
                raise ToolException(f"{len(kept):,} documents are kept, at most {MOST_DOCUMENTS:,} may be; forget one first")
            context = engine.load(Document(text, name, {"source": name}), tags=prefix + name)
            let_go(name, but=context.key)
        on_disk = engine.cache_dir is None or "disk" in engine.registry.tiers(context.key)
        return f"{name!r} is kept{'' if on_disk else ' in memory only, until this process ends'}: {context.n_tokens:,} tokens"

    def list_documents() -> str:
        """The names of all documents that are kept."""
        lines = [f"{' '.join(name.splitlines())}: {entry.n_tokens:,} tokens" for name, entry in sorted(mine().items())]
        return "\n".join(lines) or "no documents"

    def ask_document(name: str | list[str], question: str) -> str:
        """Answer a question from a document that is kept, or from several, by the list of their names."""
        names = [name] if isinstance(name, str) else name
        context = engine.one_context([entry_of(clean(one, "name")).key for one in names])
        if context is None:
            raise ToolException("no name is given; give that of a document, or several")
        return engine.generate(context, question, max_new_tokens=max_tokens).text

    def forget_document(name: str) -> str:
        """Delete a document that is kept."""
        name = clean(name, "name")
        with changing():
            entry_of(name)
            engine.registry.check_changeable()
            check()  # from the first write on it is finished
            let_go(name)
        return f"{name!r} is forgotten"

    def tool(name: str, function: Callable[..., str], places: Callable[[KVzipEngine], Places] = attrgetter("loads")) -> BaseTool:
        @wraps(function)
        def now(*args: Any, **given: Any) -> str:
            with told():
                return function(*args, **given)

        async def later(**given: Any) -> str:
            return await result_of(places(engine), now, **given)

        return StructuredTool.from_function(now, later, name=name, handle_tool_error=True, handle_validation_error=True)

    return [
        tool("load_document", load_document if root is None else load_file),
        tool("list_documents", list_documents),
        tool("ask_document", ask_document, attrgetter("places")),
        tool("forget_document", forget_document),
    ]


class _Locks:
    """A lock for each namespace, for as long as somebody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        refuse_after_fork(self, "_lock")
        self._of: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def of(self, namespace: str) -> threading.Lock:
        with self._lock:
            return self._of.setdefault(namespace, threading.Lock())


# A path by its root, up to what cannot be in one of ours.
_PATH = re.compile(r"(?<![\w./])(?:[A-Za-z]:)?[/\\](?:[^\s'\":;,()]*[/\\])+([^\s'\":;,()/\\]*)")


def _without_paths(error: Exception, engine: KVzipEngine) -> str:
    """What went wrong in words for a model, which need not know where on the machine things are."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if engine.cache_dir is not None:
        text = text.replace(str(engine.cache_dir), "cache_dir")
    return _PATH.sub(r"\1", text)
