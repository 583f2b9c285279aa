"""The contexts of nodes that are read together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from llama_index.core.schema import BaseNode

from kvzip_memory import CompressedContext
from llama_index_kvzip.llm import KVzipLLM
from llama_index_kvzip.packing import tag_of
from llama_index_kvzip.placing import Group, group_of
from llama_index_kvzip.sources import Part, whole

# So many handles are kept of contexts that are not of an index as it is, which spares reading their texts to find them.
_MOST_OTHERS = 64


@dataclass(frozen=True)
class _Read:
    context: CompressedContext
    apart: bool
    joinable: CompressedContext | None = None


class Reading:
    """Reads groups of nodes, and knows what it has read. Not safe for threads.

    Args:
        llm: whose engine and ratio they are read with.
        system: a system prompt that is put first.
        joinable: whether a group that is one of several is read a second time, for what is about several.
    """

    def __init__(self, llm: KVzipLLM, system: str | None, joinable: bool = False) -> None:
        self._llm, self._system, self._joinable = llm, system, joinable
        self._read: dict[Group, _Read] = {}
        self._present: set[Group] = set()
        self.known: set[str] = set()
        """Keys of all that was read."""

    def parts(self, groups: Collection[Sequence[BaseNode]], tags: Sequence[str] = (), *, apart: bool) -> list[Part]:
        """The context of each group, tagged by its documents and ``tags``; read where it is found nowhere.

        Args:
            apart: whether they are some of several, which may stand behind one another.

        Raises:
            InputError, WindowError, BudgetError, ModelError, UnsupportedModelError: as for :meth:`KVzipEngine.load`.
        """
        found = []
        for nodes in groups:
            group = group_of(nodes)
            read = self._read.get(group)
            if read is None or read.apart != apart:
                read = _Read(self._load(nodes, tags, apart=apart), apart)
            if apart and self._joinable and read.joinable is None:
                read = replace(read, joinable=self._load(nodes, tags, apart=True, preamble=True))
            self._read.pop(group, None)
            self._read[group] = read  # the last used is last
            found.append(Part(read.context, whole(read.context, nodes), read.joinable))
        return found

    def let_go(self, present: Collection[Group]) -> None:
        """Keep the handles of the groups that are present, and of those that never were the ones that were used last."""
        others = [group for group in self._read if group not in present]
        passed = [group for group in others if group in self._present]
        for group in {*passed, *others[:-_MOST_OTHERS]}:
            del self._read[group]  # found again by its text
        self._present = {*present}

    def without(self, nodes: Collection[tuple[str, str]]) -> None:
        """Let go of the handles of all contexts with other nodes than these."""
        self._read = {group: read for group, read in self._read.items() if all(node in nodes for node in group)}

    @property
    def keys(self) -> set[str]:
        """Of the contexts whose handles are kept."""
        return {context.key for read in self._read.values() for context in (read.context, read.joinable) if context is not None}

    def _load(self, nodes: Sequence[BaseNode], tags: Sequence[str], *, apart: bool, preamble: bool = False) -> CompressedContext:
        llm, all_tags = self._llm, tag_of(nodes, *tags)
        context = llm.engine.load(nodes, ratio=llm.ratio, system=self._system, tags=all_tags, joinable=apart, preamble=preamble)
        self.known.add(context.key)
        return context
