"""Which documents of an index a question may be answered from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn, node_to_metadata_dict

from kvzip_memory import InputError
from kvzip_memory.system.printable import brief

# What a group of filters inside another one gave, as a filter of the outer group sees it.
_HOLDS, _HOLDS_NOT = 1, 0


@dataclass(frozen=True)
class Choice:
    """Chooses documents; all of them if nothing is given.

    Args:
        filters: on metadata, with the meaning that LlamaIndex' in-memory vector store gives them. Groups may lie in groups.
        doc_ids: the ids of documents that may be read; none of them if it is empty.

    Raises:
        InputError: anything else; when called, a filter that cannot be applied to a document's metadata.
    """

    filters: MetadataFilters | None = None
    doc_ids: Collection[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.filters, MetadataFilters | None):
            raise InputError(f"filters is {brief(self.filters)}; give MetadataFilters(filters=[MetadataFilter(key=..., value=...)])")
        ids: Any = self.doc_ids
        if ids is not None and (not isinstance(ids, Collection) or isinstance(ids, str) or not all(isinstance(id_, str) for id_ in ids)):
            raise InputError(f"doc_ids is {brief(ids)}; give a list of ids of documents")

    @property
    def is_of_all(self) -> bool:
        """Whether nothing is left out, whatever the documents."""
        return self.filters is None and self.doc_ids is None

    def __call__(self, node: BaseNode) -> bool:
        """Whether a document may be read."""
        if self.doc_ids is not None and (node.ref_doc_id or node.node_id) not in self.doc_ids:
            return False
        if self.filters is None:
            return True
        facts = node_to_metadata_dict(TextNode(metadata=node.metadata, relationships=node.relationships))  # as vector stores see it
        del facts["_node_content"]
        try:
            return _hold(self.filters, facts)
        except (TypeError, ValueError) as error:  # such as a number compared with a text
            raise InputError(
                f"filters cannot be applied to the metadata of document {node.ref_doc_id or node.node_id!r}, {node.metadata}: {error}"
            ) from error


def _hold(filters: MetadataFilters, facts: Mapping[str, Any]) -> bool:
    """By LlamaIndex' own function, which knows no groups in groups: each is a fact of its own."""
    known = dict(facts)
    alone: list[MetadataFilter | MetadataFilters] = []
    for number, each in enumerate(filters.filters):
        if isinstance(each, MetadataFilters):
            key = f"\0{number}"
            known[key] = _HOLDS if _hold(each, facts) else _HOLDS_NOT
            each = MetadataFilter(key=key, value=_HOLDS)
        alone.append(each)
    return build_metadata_filter_fn(lambda _: known, MetadataFilters(filters=alone, condition=filters.condition))("")
