"""What an answer was drawn from: whole documents, or the passages of them that the question is about."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llama_index.core.node_parser import NodeParser, TextSplitter
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, TextNode
from torch import Tensor

from kvzip_memory import BudgetError, CompressedContext, InputError, KVzipEngine, UnsupportedModelError
from kvzip_memory.frameworks.options import is_whole
from kvzip_memory.inference.attribution import Span, blend, bm25
from kvzip_memory.prompting.messages import Message
from kvzip_memory.system.printable import brief, logger_of

logger = logger_of(__name__)

#: In the metadata of a source: the tokens of the context that it covers, ``[start, end)``.
TOKENS_KEY = "kvzip_tokens"

# A part far behind the best has less than this share of its score; see docs/benchmarks.md.
_FAR = 0.3

# So many parts are ranked by what the question looks at in them.
_MOST_COMPARED = 16

# A paragraph shorter than this is joined with the next, as headings are; one that is longer is cut behind a line or a sentence.
_SHORT, _LONG = 100, 1500


# The last document's last tokens may not be in the context, see `Recipe.tail`; so many at most.
_TAIL = 2

# Passages of a part, and the tokens of its context that each covers, None if that is not known.
_Passages = list[tuple[TextNode, Span | None]]


@dataclass(frozen=True)
class Part:
    """A context and the nodes it was made of, and what stands for it in a join."""

    context: CompressedContext
    nodes: Sequence[NodeWithScore]
    joinable: CompressedContext | None = None


def joined(engine: KVzipEngine, parts: Sequence[Part]) -> Part:
    """Parts as one, in their order; nothing of it is stored.

    Raises:
        as :meth:`KVzipEngine.join`, if there are several.
    """
    if len(parts) == 1:
        return parts[0]
    contexts = [parts[0].context, *(part.joinable or part.context for part in parts[1:])]
    context = engine.join(contexts, store=False)
    return Part(context, whole(context, [scored.node for part in parts for scored in part.nodes]))


def joined_last(engine: KVzipEngine, parts: Sequence[Part]) -> Part:
    """As many of the last parts as can be one: a model's contexts may be none that can be joined, a device may have no room for all."""
    for first in range(len(parts) - 1):
        try:
            return joined(engine, parts[first:])
        except UnsupportedModelError:
            break
        except BudgetError as error:
            logger.info("%d contexts are answered from, not %d: %s", len(parts) - first - 1, len(parts) - first, error)
    return parts[-1]


def whole(context: CompressedContext, documents: Sequence[BaseNode]) -> list[NodeWithScore]:
    """Whole documents as sources, with the tokens they cover; no score, since nothing was ranked."""
    spans = context.sources if len(context.sources) == len(documents) else [None] * len(documents)
    nodes = []
    for document, span in zip(documents, spans, strict=True):
        start = getattr(document, "start_char_idx", None)
        metadata = {key: value for key, value in document.metadata.items() if key != TOKENS_KEY}
        node = TextNode(text=document.get_content(), id_=document.node_id, metadata=metadata, start_char_idx=start)
        node.relationships[NodeRelationship.SOURCE] = document.source_node or document.as_related_node_info()
        if span is not None:
            _mark(node, (span.start, span.end))
        nodes.append(NodeWithScore(node=node, score=None))
    return nodes


class Paragraphs(TextSplitter):
    """Splits a text into its paragraphs. Headings go with what follows them, very long paragraphs are cut."""

    def split_text(self, text: str) -> list[str]:
        """The paragraphs, word for word."""
        passages, start = [], 0
        for end in [*(found.end() for found in re.finditer(r"\n\s*\n", text)), len(text)]:
            if len(text[start:end].strip()) >= _SHORT or end == len(text):
                passages += _cut(text[start:end].strip())
                start = end
        return passages


def _cut(text: str) -> list[str]:
    pieces = []
    while len(text) > _LONG:
        ends = [found.end() for found in re.finditer(r"\n|[.!?。？！]\s?", text[:_LONG])]
        end = ends[-1] if ends else _LONG
        pieces.append(text[:end].strip())
        text = text[end:].strip()
    return [*pieces, text] if text else pieces


@dataclass(frozen=True)
class Ranking:
    """Which sources an answer has: all documents it could draw on, or the passages that the question is about most.

    Passages are ranked by the attention that the question pays them and by its words in them; by the words alone where it is not
    known which tokens of the context are the document's. Scores lie in [0, 1] and compare the passages of one answer. The answer
    itself does not count: with a small model that ranked worse.

    Args:
        engine: whose contexts they are.
        top_k: so many passages, fewer if there are fewer; None gives whole documents without scores.
        node_parser: splits documents into passages; None takes paragraphs.

    Raises:
        InputError: a ``top_k`` that is no whole number of at least 1; when called, a parser that changes the text, so that it is not
            known where its nodes are.
    """

    engine: KVzipEngine
    top_k: int | None = None
    node_parser: NodeParser | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            raise InputError(
                f"source_top_k is {brief(self.top_k)}; give a whole number of passages, at least 1, or None for whole documents "
                "(similarity_top_k is another name of it)"
            )

    def __call__(self, parts: Sequence[Part], question: str | Sequence[Message]) -> list[NodeWithScore]:
        """The sources of an answer from these parts, best first."""
        if self.top_k is None:
            return [node for part in parts for node in part.nodes]
        found = self._found(parts)
        passages = [passage for of_part in found for passage, _ in of_part]
        if not passages:
            return []
        kinds = [torch.cat(scores) for scores in (_words(found, question), self._attention(parts, found, question)) if scores]
        scores = blend(*kinds)
        best = scores.argsort(descending=True, stable=True)[: self.top_k]
        return [NodeWithScore(node=passages[i], score=float(scores[i])) for i in best.tolist()]

    def about(self, parts: Sequence[Part], question: str, room: int) -> list[Part]:
        """What a question is answered from: the one part it is about, if its words and the attention it pays agree that no other is near;
        else as many parts as have ``room`` for their tokens, what it is about most last, next to the question.

        The attention it pays is looked at in the parts that its words speak for most.
        """
        if len(parts) < 2:
            return list(parts)
        words = _best(_words(self._found(parts, located=False), question))
        order = words.argsort(descending=True, stable=True).tolist()
        compared = [parts[i] for i in order[:_MOST_COMPARED]]
        attention = [_best(scores) for scores in [self._attention(compared, self._found(compared), question)] if scores]
        scores = blend(words[order[:_MOST_COMPARED]], *attention)
        best = int(scores.argmax())
        if attention and _only(words) == order[best] and _only(attention[0]) == best:
            return [compared[best]]
        ranked = [compared[i] for i in scores.argsort(descending=True, stable=True).tolist()] + [parts[i] for i in order[_MOST_COMPARED:]]
        chosen: list[Part] = []
        for part in ranked:
            if not chosen or part.context.positions <= room:
                chosen.insert(0, part)
                room -= part.context.positions
        return chosen

    def _found(self, parts: Sequence[Part], located: bool = True) -> list[_Passages]:
        parser = self.node_parser or Paragraphs(include_prev_next_rel=False)
        return [_passages(self.engine, part, parser, located) for part in parts]

    def _attention(self, parts: Sequence[Part], found: Sequence[_Passages], question: str | Sequence[Message]) -> list[Tensor]:
        """Scores of each part's passages; nothing if it is not known where they lie."""
        spans = [[span for _, span in of_part if span] for of_part in found]
        if [*map(len, spans)] != [*map(len, found)] or not any(spans):
            return []
        return self.engine.relevance([(part.context, of_part) for part, of_part in zip(parts, spans, strict=True)], question)


def _words(found: Sequence[_Passages], question: str | Sequence[Message]) -> list[Tensor]:
    """Scores of each part's passages."""
    asked = question if isinstance(question, str) else str(question[-1]["content"])
    scores = bm25(asked, [passage.text for of_part in found for passage, _ in of_part])
    return list(scores.split([*map(len, found)]))


def _only(scores: Tensor) -> int | None:
    """The part that leaves all others far behind."""
    near = (scores >= _FAR * scores.max()).nonzero().flatten().tolist() if scores.max() > 0 else []
    return near[0] if len(near) == 1 else None


def _best(scores: Sequence[Tensor]) -> Tensor:
    """Of each part's best passage."""
    return torch.stack([of_part.max() if len(of_part) else torch.zeros(()) for of_part in scores])


def _passages(engine: KVzipEngine, part: Part, parser: NodeParser, located: bool) -> _Passages:
    """Passages of a part's documents and, if they are to be located, the tokens they cover."""
    found: _Passages = []
    for scored in part.nodes:
        document, covered = scored.node, scored.node.metadata.get(TOKENS_KEY)
        before = getattr(document, "start_char_idx", None) or 0  # of a node that is a piece of its document
        offsets = _offsets(engine, document.get_content(), covered) if located and covered is not None else []
        for passage in parser([document]):
            if not isinstance(passage, TextNode) or passage.start_char_idx is None or passage.end_char_idx is None:
                raise InputError(f"{type(parser).__name__} changes the text of {document.node_id!r}; use a parser that only splits it")
            start, end = passage.start_char_idx, passage.end_char_idx
            passage.start_char_idx, passage.end_char_idx = before + start, before + end
            passage.id_ = f"{document.node_id}/{start}-{end}"
            span = None
            if covered is not None and len(offsets) == covered[1] - covered[0]:
                first = bisect_right(offsets, start, key=lambda offset: offset[1])
                span = covered[0] + first, covered[0] + max(first + 1, bisect_left(offsets, end, key=lambda offset: offset[0]))
                _mark(passage, span)
            else:
                passage.metadata.pop(TOKENS_KEY, None)
            found.append((passage, span))
    return found


def _offsets(engine: KVzipEngine, text: str, covered: Span) -> list[Span]:
    """Characters of the tokens that a document covers, whether it was loaded alone or with others; none if they are not known."""
    n = covered[1] - covered[0]
    try:
        both = [engine.token_offsets(text, alone=alone) for alone in (True, False)]
    except InputError:  # a slow tokenizer
        return []
    return next((offsets[:n] for more in range(_TAIL + 1) for offsets in both if len(offsets) == n + more), [])


def _mark(node: TextNode, span: Span) -> None:
    """Note the tokens that a node covers, for programs and not for models."""
    node.metadata[TOKENS_KEY] = list(span)
    for keys in (node.excluded_llm_metadata_keys, node.excluded_embed_metadata_keys):
        if TOKENS_KEY not in keys:
            keys.append(TOKENS_KEY)
