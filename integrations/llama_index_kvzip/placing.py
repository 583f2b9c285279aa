"""Which documents of an index lie in which context."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.schema import BaseNode
from llama_index.core.storage.docstore.types import BaseDocumentStore

from kvzip_memory import KVzipEngine, WindowError
from llama_index_kvzip.packing import readable, size

#: The ids and hashes of the nodes of a context.
Group = tuple[tuple[str, str], ...]

# Where a node is that has no text.
_NOWHERE = ""

# Where documents do not fit into one context, small ones share one of this part of what fits.
_SMALL = 8


def group_of(nodes: Sequence[BaseNode]) -> Group:
    """What tells the nodes of one context from others."""
    return tuple((node.node_id, node.hash) for node in nodes)


class Placing:
    """Which documents share a context: all, while they fit into one. Beyond that each has its own, so that questions can join those
    they are about; small ones share one. An index' structure has the number of the context of each node.

    Args:
        engine: counts tokens.
        limit: tokens of documents that a context may have.
        packed: so many that share one where they do not all fit; None is an eighth of ``limit``.
    """

    def __init__(self, engine: KVzipEngine, limit: int, packed: int | None = None) -> None:
        self._engine, self._limit = engine, limit
        self._packed = limit // _SMALL if packed is None else packed
        self._sizes: dict[tuple[str, str], int] = {}

    def groups(self, struct: IndexDict, docstore: BaseDocumentStore) -> dict[Group, list[BaseNode]]:
        """The nodes of each context."""
        groups: dict[str, list[str]] = {}
        for node_id, group in struct.nodes_dict.items():
            if group != _NOWHERE:
                groups.setdefault(group, []).append(node_id)
        found = [docstore.get_nodes(node_ids) for node_ids in groups.values()]
        return {group_of(nodes): nodes for nodes in found}

    def place(self, struct: IndexDict, docstore: BaseDocumentStore, nodes: Sequence[BaseNode]) -> None:
        """Give each node that has a text to the first context with room for it."""
        struct.nodes_dict |= {node.node_id: _NOWHERE for node in nodes}
        there = [node for group in self.groups(struct, docstore).values() for node in group]
        numbers = {group for group in struct.nodes_dict.values() if group != _NOWHERE}
        added = readable(nodes)
        limit = self._limit_of([*there, *added]) if len(numbers) < 2 else self._packed
        if limit < self._limit and len(numbers) == 1:  # no longer all in one
            there, added = [], [*there, *added]
        taken: dict[int, int] = {}
        for node in there:
            number = int(struct.nodes_dict[node.node_id])
            taken[number] = taken.get(number, 0) + self._size(node)
        for node in added:
            struct.nodes_dict[node.node_id] = str(self._first_with_room(taken, node, limit))

    def together(self, nodes: Sequence[BaseNode]) -> list[list[BaseNode]]:
        """Nodes in the contexts they would be placed in by themselves."""
        limit = self._limit_of(nodes)
        groups: dict[int, list[BaseNode]] = {}
        taken: dict[int, int] = {}
        for node in nodes:
            groups.setdefault(self._first_with_room(taken, node, limit), []).append(node)
        return [*groups.values()]

    def check_lengths(self, nodes: Sequence[BaseNode]) -> None:
        """Raises:
        WindowError: a document that is too long for a context.
        """
        for node in nodes:
            if (tokens := self._size(node)) > self._limit:
                raise WindowError(
                    f"document {node.ref_doc_id or node.node_id!r} has about {tokens:,} tokens; a context of this index may have "
                    f"{self._limit:,}: split the document, or use a model with a longer window",
                    tokens=tokens,
                    window=self._engine.window,
                )

    def _size(self, node: BaseNode) -> int:
        known = (node.node_id, node.hash)
        if known not in self._sizes:
            self._sizes[known] = size(self._engine, node)
        return self._sizes[known]

    def _limit_of(self, nodes: Sequence[BaseNode]) -> int:
        """Tokens of documents that share a context, if there are no others than these."""
        return self._limit if sum(map(self._size, nodes)) <= self._limit else self._packed

    def _first_with_room(self, taken: dict[int, int], node: BaseNode, limit: int) -> int:
        """The number of the first context with room for a document, which it is given; a new one's if there is none."""
        tokens, new = self._size(node), max(taken, default=-1) + 1
        number = next((number for number, before in taken.items() if before + tokens <= limit), new)
        taken[number] = taken.get(number, 0) + tokens
        return number
