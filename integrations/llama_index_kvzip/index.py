"""A LlamaIndex index whose documents lie whole in compressed contexts."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.indices.managed.base import BaseManagedIndex
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.llms.utils import LLMType
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, Document
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.storage.storage_context import StorageContext

from kvzip_memory import InputError
from kvzip_memory.bridge import result_of
from kvzip_memory.registry.holders import document_tag, escaped, parts
from kvzip_memory.system.calls import check
from kvzip_memory.system.flags import checked_flag
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.sharing import Shared
from llama_index_kvzip.chat_engine import KVzipChatEngine
from llama_index_kvzip.filters import Choice
from llama_index_kvzip.llm import KVzipLLM, given_or_set_kvzip
from llama_index_kvzip.nodes import WHOLE, unchanged_on_failure
from llama_index_kvzip.options import (
    CHAT_ENGINES,
    CHAT_OPTIONS,
    CONVERSATION_OPTIONS,
    QUERY_OPTIONS,
    SOURCE_OPTIONS,
    check_index_options,
    check_names,
    check_update_options,
    chosen,
    known_options,
)
from llama_index_kvzip.packing import document_of, encodable, room
from llama_index_kvzip.placing import Group, Placing
from llama_index_kvzip.query_engine import KVzipQueryEngine
from llama_index_kvzip.reading import Reading
from llama_index_kvzip.retriever import DocumentRetriever
from llama_index_kvzip.sources import Part, Ranking, joined
from llama_index_kvzip.structured import unwrapped

# Where the structure keeps an index's first id, in a dictionary that LlamaIndex does not use.
_FIRST_ID = "first index id"

# Begins the part of a context's tag that names the index; the other parts name the documents.
_INDEX = "index: "


_ALL = Choice()


class KVzipIndex(Shared, BaseManagedIndex):
    """Whole documents in compressed contexts; every question is answered from those that it is about, in one call.

    .. code-block:: python

        index = KVzipIndex.from_documents(SimpleDirectoryReader("contracts").load_data(), llm=llm)
        print(index.as_query_engine().query("Which contracts renew automatically?"))

        index.storage_context.persist("contracts.index")
        index = KVzipIndex.from_storage(StorageContext.from_defaults(persist_dir="contracts.index"), llm=llm)

    Texts and the split into contexts are persisted by the ``StorageContext``; the contexts lie in the registry of the model's
    engine, on disk if it has a ``cache_dir``, and are built again only if they are found nowhere. All documents lie in one context while
    they fit into the window. Beyond that each has its own, small ones share one, and a question joins the contexts that it is about, as
    many as the window takes; see :class:`KVzipQueryEngine`.

    A change rebuilds the contexts that the changed documents leave and join, no others; one that fails leaves the documents as they were.
    Query engines and retrievers made before a change see it, also copies of them: a copy of the index, deep or not, is the index itself.

    What ``filters`` or ``doc_ids`` leave out is in no context that is asked: the documents that remain of a context are read into
    one of their own, once for each set of them.

    Args:
        llm: what reads the documents and answers; None is ``Settings.llm``.
        system: a system prompt that is put first and never evicted.
        context_tokens: at most so many tokens of documents in one context; few make a change quick, since the documents of a context are
            read together. None is what the window leaves beside a question and an answer of ``llm.max_tokens``, and an eighth
            of that where the documents do not all fit.
        joinable: where there are several contexts, build each a second time, to be joined (see :meth:`KVzipEngine.load`): twice the time
            and the bytes. A join is then two to three times closer to the full cache; small models do not answer better.

    Raises:
        UnsupportedModelError: ``joinable`` contexts of a model that has none.
        InputError: ``context_tokens`` outside the window, ``transformations``, unknown options, or no :class:`KVzipLLM`.
        WindowError: a document that is too long for a context.
        BudgetError, ModelError: as for :meth:`KVzipEngine.load`.
    """

    index_struct_cls = IndexDict
    _way_out = "persist() its storage context, and open it there by from_storage"

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        llm: KVzipLLM | None = None,
        system: str | None = None,
        context_tokens: int | None = None,
        joinable: bool = False,
        **kwargs: Any,
    ) -> None:
        check_index_options(kwargs, WHOLE)
        llm = given_or_set_kvzip(llm)
        self._llm, self._system = llm, system
        most = room(llm, system, context_tokens)
        self._placing = Placing(llm.engine, most, None if context_tokens is None else most)
        self._reading = Reading(llm, system, checked_flag("joinable", joinable))
        self._gone: set[str] = set()  # tags of documents that are deleted by a change under way
        self._persisted = kwargs.get("index_struct") is not None
        self._lock, self._changing = threading.RLock(), False
        llm.engine.shared.setdefault("llama_index.indexes", WeakSet()).add(self)
        refuse_after_fork(self, "_lock")
        super().__init__(nodes, **{**kwargs, "transformations": WHOLE})

    @classmethod
    def from_documents(cls, documents: Sequence[Document], **kwargs: Any) -> KVzipIndex:  # type: ignore[override]
        """An index of documents; arguments and errors as for the class."""
        check_index_options(kwargs)
        documents = [encodable(document) for document in documents]
        storage = kwargs.get("storage_context")
        with nullcontext() if storage is None else unchanged_on_failure(storage.docstore, documents):
            return super(BaseManagedIndex, cls).from_documents(documents, **{**kwargs, "transformations": WHOLE})

    @classmethod
    def from_storage(
        cls, storage_context: StorageContext, *, llm: KVzipLLM | None = None, index_id: str | None = None, **kwargs: Any
    ) -> KVzipIndex:
        """The index that was persisted in a storage context.

        Raises:
            InputError: it holds none, or several and no ``index_id``.
        """
        structs = [struct for struct in storage_context.index_store.index_structs() if index_id in (None, struct.index_id)]
        if len(structs) != 1:
            raise InputError(f"{len(structs)} indices in the storage context; give the index_id of one")
        return cls(index_struct=structs[0], storage_context=storage_context, llm=llm, **kwargs)

    # -- what is in which context --------------------------------------------------------------------------------

    def parts(self, choice: Choice = _ALL) -> list[Part]:
        """The contexts and their documents, those that are chosen; built where they are found nowhere."""
        with self._lock:
            groups = self._groups_of_nodes()
            read = [*groups.values()] if choice.is_of_all else self._chosen(choice, groups)
            parts = self._reading.parts(read, self._tag, apart=len(groups) > 1)
            self._reading.let_go(groups)
            return parts

    def _chosen(self, choice: Choice, groups: Mapping[Group, Sequence[BaseNode]]) -> list[Sequence[BaseNode]]:
        """Groups of which all documents are chosen, as they are, and the rest of the chosen ones."""
        chosen = [[node for node in nodes if choice(node)] for nodes in groups.values()]
        whole = [part for part, nodes in zip(chosen, groups.values(), strict=True) if len(part) == len(nodes)]
        rest = [node for part, nodes in zip(chosen, groups.values(), strict=True) if len(part) < len(nodes) for node in part]
        return [*whole, *self._placing.together(rest)]

    def _groups_of_nodes(self) -> dict[Group, list[BaseNode]]:
        """The nodes of each context."""
        return self._placing.groups(self._index_struct, self.docstore)

    @property
    def _tag(self) -> tuple[str, ...]:
        """What names the index at every run; nothing while that is a random id that nobody knows."""
        return (self._own_tag,) if self._persisted or _FIRST_ID in self._index_struct.doc_id_dict else ()

    @property
    def _own_tag(self) -> str:
        """Of the id it had first, which other objects of the same index may have given."""
        return _INDEX + escaped(self._index_struct.doc_id_dict.get(_FIRST_ID, [self.index_id])[0])

    def _forget_unused(self) -> None:
        """Let go of the contexts that this index no longer has, and of all that others without a name have of deleted documents."""
        self._reading.without({node for group in self._groups_of_nodes() for node in group})
        used, known = self._reading.keys, self._reading.known
        indexes: list[KVzipIndex] = [index for index in self._llm.engine.shared["llama_index.indexes"] if index is not self]
        others = set[str]().union(*(index._reading.keys for index in indexes))
        gone, self._gone = self._gone, set()
        own = {self._own_tag}

        def let_go(key: str, tag: str) -> bool:
            named = parts(tag)
            if key in used:
                return False
            if indices := {part for part in named if part.startswith(_INDEX)}:
                return indices == own
            if key in others:
                return False
            if tag.startswith("llama_index:"):  # of earlier versions: whose it is is not known
                return key in known
            return bool(named & gone) or (key in known and all(part.startswith(document_tag("")) for part in named))

        self._llm.engine.registry.forget(let_go)

    # -- BaseIndex -----------------------------------------------------------------------------------------------

    def set_index_id(self, index_id: str) -> None:
        """Give the index another id; the contexts it has loaded stay its own."""
        with self._lock:
            self._index_struct.doc_id_dict.setdefault(_FIRST_ID, [self.index_id])
            super().set_index_id(index_id)

    def build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> IndexDict:
        check_names(build_kwargs, set())
        self._placing.check_lengths(nodes)
        self._docstore.add_documents(nodes, allow_update=True)
        self._index_struct = IndexDict()
        self._placing.place(self._index_struct, self.docstore, nodes)
        self.parts()
        return self._index_struct

    @contextmanager
    def _change(self, nodes: Sequence[BaseNode], forget: bool = False) -> Iterator[None]:
        """A change of the documents of ``nodes``; the contexts are built when it is done. If that fails, the documents are as before."""
        with self._lock:
            if self._changing:  # a part of another
                yield
                return
            self._placing.check_lengths(nodes)
            if forget:
                self._llm.engine.registry.check_changeable()
            check()
            placed = dict(self._index_struct.nodes_dict)
            stored = copy.deepcopy(self.storage_context.index_store.get_index_struct(self.index_id))  # another object may have changed it
            self._changing = True
            try:
                with unchanged_on_failure(self.docstore, nodes):
                    yield
                    self.parts()
            except BaseException:
                self._index_struct.nodes_dict = placed
                self.storage_context.index_store.add_index_struct(self._index_struct if stored is None else stored)
                raise
            finally:
                self._changing = False
            if forget:
                self._forget_unused()

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Add a document; the contexts it joins are built again."""
        check_names(insert_kwargs, set())
        super().insert(encodable(document), **insert_kwargs)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """:meth:`insert` in a thread."""
        await result_of(self._llm.engine.loads, self.insert, document, **insert_kwargs)

    def insert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """Add documents; the contexts they join are built again."""
        check_names(insert_kwargs, set())
        with self._change(nodes):
            super().insert_nodes(nodes, **insert_kwargs)

    async def ainsert_nodes(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        """:meth:`insert_nodes` in a thread."""
        await result_of(self._llm.engine.loads, self.insert_nodes, nodes, **insert_kwargs)

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        self._placing.place(self._index_struct, self.docstore, nodes)

    def _delete_node(self, node_id: str, **delete_kwargs: Any) -> None:
        self._index_struct.nodes_dict.pop(node_id, None)  # others' nodes may be of the same document

    def delete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Remove documents by the ids of their nodes, as :meth:`delete_ref_doc` does."""
        check_names(delete_kwargs, set())
        with self._lock:
            forget = delete_from_docstore and not self._changing
            if forget:
                self._llm.engine.registry.check_changeable()
                self.parts()  # so that those of the other documents are known; they are found, not built
            check()  # from the first write on it is finished
            if delete_from_docstore:
                self._gone |= {document_of(node) for node in self.docstore.get_nodes(list(node_ids), raise_error=False)}
            super().delete_nodes(list(node_ids), delete_from_docstore, **delete_kwargs)  # the docstore may change the list itself
            if forget:
                self._forget_unused()

    async def adelete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """:meth:`delete_nodes` in a thread. Cancelled before it deletes it changes nothing; what it has begun it finishes."""
        await result_of(self._llm.engine.loads, self.delete_nodes, node_ids, delete_from_docstore, **delete_kwargs)

    def delete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Remove a document; the context it was in is built again when it is next asked.

        With ``delete_from_docstore`` its text is forgotten: contexts of the document that are no longer used leave the registry, also those
        of earlier runs and of synthesizers, unless they were loaded under a name, with other tags or by another index, too: one that has
        an id of its own or was persisted, or one of this process.
        """
        check_names(delete_kwargs, set())
        with self._lock:
            super(BaseManagedIndex, self).delete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)

    def forget(self, ref_doc_id: str) -> None:
        """Delete a document, its text included: :meth:`delete_ref_doc` with ``delete_from_docstore``.

        Raises:
            StorageError: another process holds the index of the engine's folder; nothing was deleted.
        """
        self.delete_ref_doc(ref_doc_id, delete_from_docstore=True)

    async def adelete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """:meth:`delete_ref_doc` in a thread. Cancelled before it deletes it changes nothing; what it has begun it finishes."""
        await result_of(self._llm.engine.loads, self.delete_ref_doc, ref_doc_id, delete_from_docstore, **delete_kwargs)

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Replace a document by its new version, or insert it; what this index had of it is forgotten as by :meth:`delete_ref_doc`."""
        check_update_options(update_kwargs)
        with self._change([document], forget=True), self._callback_manager.as_trace("update_ref_doc"):
            if old := self.ref_doc_info.get(document.id_):
                self.delete_nodes(old.node_ids, delete_from_docstore=True)
            self.insert(document)

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """:meth:`update_ref_doc` in a thread."""
        await result_of(self._llm.engine.loads, self.update_ref_doc, document, **update_kwargs)

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Insert those of these documents that are not in the index and update the changed ones; all of them or, after an error, none.

        Returns:
            of each document whether that was so.

        Raises:
            InputError: two documents of one id.
        """
        check_names(update_kwargs, {"update_kwargs", "insert_kwargs"})
        check_update_options(update_kwargs.get("update_kwargs", {}))
        check_update_options({"insert_kwargs": update_kwargs.get("insert_kwargs", {})})
        counts = Counter(document.id_ for document in documents)
        if twice := [id_ for id_, count in counts.items() if count > 1]:
            raise InputError(f"the ids {twice} are of several documents each, of which a refresh would keep the last; give each its own")
        documents = [encodable(document) for document in documents]
        with self._change(documents, forget=True), self._callback_manager.as_trace("refresh_ref_docs"):
            there = self.ref_doc_info
            old = [document.id_ in there and self.docstore.get_document_hash(document.id_) == document.hash for document in documents]
            for document in (document for document, is_old in zip(documents, old, strict=True) if not is_old):
                self.update_ref_doc(document)
            return [not is_old for is_old in old]

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """:meth:`refresh_ref_docs` in a thread."""
        return await result_of(self._llm.engine.loads, self.refresh_ref_docs, documents, **update_kwargs)

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents in the index."""
        found: dict[str, RefDocInfo] = {}
        for node in self.docstore.get_nodes(list(self._index_struct.nodes_dict)):
            found.setdefault(node.ref_doc_id or node.node_id, RefDocInfo(metadata=node.metadata)).node_ids.append(node.node_id)
        return found

    def as_retriever(self, source_top_k: int | None = None, node_parser: NodeParser | None = None, **kwargs: Any) -> BaseRetriever:
        """Gives all documents for every question, without scores; or the ``source_top_k`` passages that it is about most.

        Args:
            source_top_k: as for :class:`KVzipQueryEngine`; ``similarity_top_k`` is another name of it.
            node_parser: splits documents into passages; None takes paragraphs.
            kwargs: ``filters`` and ``doc_ids``, which choose documents; see :class:`~llama_index_kvzip.filters.Choice`.

        Raises:
            InputError: unknown options, a ``source_top_k`` that is no whole number of at least 1, or ``filters`` or ``doc_ids`` that are
                none. When asked: filters that cannot be applied to the metadata.
        """
        options = known_options({"source_top_k": source_top_k, "node_parser": node_parser, **kwargs}, SOURCE_OPTIONS)
        choice = chosen(options)
        ranking = Ranking(self._llm.engine, options.get("source_top_k"), options.get("node_parser"))
        return DocumentRetriever(partial(self.parts, choice), ranking)

    def as_query_engine(self, llm: LLMType | None = None, **kwargs: Any) -> BaseQueryEngine:
        """A :class:`KVzipQueryEngine` over all documents, or over those that are chosen.

        Args:
            llm: a :class:`KVzipLLM` over the same engine, or ``as_structured_llm`` of one; None is the index's own.
            kwargs: ``filters`` and ``doc_ids``, see :class:`~llama_index_kvzip.filters.Choice`; ``response_mode``, ``streaming``,
                ``source_top_k`` or ``similarity_top_k``, ``node_parser``, ``output_cls``, and options of every call such as ``max_tokens``.

        Raises:
            InputError: another engine's model, which cannot read these contexts; or as for :meth:`as_retriever`.
        """
        self._checked(llm)
        answering: Any = llm or self._llm
        options = known_options(kwargs, QUERY_OPTIONS)
        return KVzipQueryEngine(answering, partial(self.parts, chosen(options)), **options)

    def as_chat_engine(self, chat_mode: ChatMode = ChatMode.BEST, llm: LLMType | None = None, **kwargs: Any) -> BaseChatEngine:
        """A :class:`KVzipChatEngine` over all or the chosen documents as they are now, or what LlamaIndex makes of another mode.

        The first answers from these documents whatever becomes of them; to converse over changed ones make another.

        Args:
            chat_mode: ``ChatMode.BEST``, the documents in front of the conversation, or one of LlamaIndex' chat engines.
            llm: as for :meth:`as_query_engine`.
            kwargs: ``filters``, ``doc_ids``, ``memory``, ``chat_history``, ``system_prompt``, ``source_top_k`` or ``similarity_top_k``,
                ``node_parser``; for another mode those of LlamaIndex' chat engines and of :meth:`as_query_engine`.

        Raises:
            InputError: unknown options; contexts that do not fit into the window together; or as for :meth:`as_query_engine`.
            UnsupportedModelError, BudgetError: several contexts, as for :meth:`KVzipEngine.join`.
        """
        if isinstance(llm, StructuredLLM):
            raise InputError("a chat engine answers in text; give the llm itself, or the structured one to as_query_engine")
        model = self._checked(llm)
        if chat_mode in CHAT_ENGINES:
            options = known_options(kwargs, QUERY_OPTIONS | CHAT_OPTIONS)
            query_engine = self.as_query_engine(model, **{name: options[name] for name in options if name in QUERY_OPTIONS})
            retriever = self.as_retriever(**{name: options[name] for name in options if name in SOURCE_OPTIONS})
            return CHAT_ENGINES[chat_mode].from_defaults(llm=model, query_engine=query_engine, retriever=retriever, **options)
        if chat_mode != ChatMode.BEST:
            return super().as_chat_engine(chat_mode, model)  # tells what is wrong with it
        options = known_options(kwargs, CONVERSATION_OPTIONS)
        choice = chosen(options)
        parts = self.parts(choice)
        if not parts:
            raise InputError(f"there are no documents to talk about; insert some{'' if choice.is_of_all else ', or choose others'}")
        if len(parts) > 1 and sum(part.context.positions for part in parts) > room(model):
            raise InputError(
                f"the documents lie in {len(parts)} contexts that do not fit into the window together, beside a question and an answer; "
                "use chat_mode=ChatMode.CONDENSE_QUESTION, choose some documents, or use a model with a longer window"
            )
        return KVzipChatEngine._over(joined(model.engine, parts), model, **options)

    def _checked(self, llm: LLMType | None) -> KVzipLLM:
        model, _ = unwrapped(llm or self._llm)
        if model.engine is not self._llm.engine:
            raise InputError(f"llm is {llm!r}; contexts are read by the model that made them: give a KVzipLLM over the same engine")
        return model
