"""Nodes of an index, of which each is a document, whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.schema import BaseNode, NodeRelationship, TextNode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore


class WholeDocuments(TransformComponent):
    """A node a document, whole."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        nodes_of_documents = []
        for document in nodes:
            # Not the document's own id: under that the docstore keeps the hash by which changes are told, and pages may share it.
            id_ = f"{document.node_id}/{document.hash[:16]}"
            node = TextNode(text=document.get_content(), id_=id_, metadata=dict(document.metadata))
            node.relationships[NodeRelationship.SOURCE] = document.as_related_node_info()
            nodes_of_documents.append(node)
        return nodes_of_documents


#: What documents go through in an index.
WHOLE: list[TransformComponent] = [WholeDocuments()]


@contextmanager
def unchanged_on_failure(docstore: BaseDocumentStore, nodes: Sequence[BaseNode]) -> Iterator[None]:
    """If the block fails, the docstore has of the documents of these nodes what it had before."""
    hashes = {id_: docstore.get_document_hash(id_) for id_ in {node.ref_doc_id or node.node_id for node in nodes}}

    def node_ids() -> set[str]:
        infos = [info for id_ in hashes if (info := docstore.get_ref_doc_info(id_))]
        return {node.node_id for node in nodes}.union(*(info.node_ids for info in infos))

    stored = docstore.get_nodes(list(node_ids()), raise_error=False)
    try:
        yield
    except BaseException:
        for node_id in node_ids():
            docstore.delete_document(node_id, raise_error=False)
        for id_ in hashes:
            docstore.delete_ref_doc(id_, raise_error=False)
        docstore.add_documents(stored)
        docstore.set_document_hashes({id_: its_hash for id_, its_hash in hashes.items() if its_hash})
        raise
