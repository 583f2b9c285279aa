"""Answering: context and question become an answer; and what a model makes of a question without one: logits, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kvzip_memory.access import Access
from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.context import CompressedContext, Storage
from kvzip_memory.contexts import Contexts
from kvzip_memory.errors import InputError, WindowError
from kvzip_memory.finding import Finder
from kvzip_memory.inference.attribution import NEUTRAL, Span, attention_mass, compared
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.model_identity import ModelIdentity
from kvzip_memory.prompting.call_grammar import calls_grammar
from kvzip_memory.prompting.cleaning import MOST_OF_SCHEMA, clean, cleaned
from kvzip_memory.prompting.forms import ToolForm
from kvzip_memory.prompting.language import Language
from kvzip_memory.prompting.messages import Message, as_messages
from kvzip_memory.prompting.tools import Tool, checked_tools
from kvzip_memory.session import Session
from kvzip_memory.speech import Speech
from kvzip_memory.streaming import Stream
from kvzip_memory.system.flags import check_flags
from kvzip_memory.system.printable import brief


class Answerer:
    """Answers questions from contexts. Errors are those of :class:`KVzipEngine`'s methods.

    Args:
        model: which computes them.
        identity: tells which model it is.
        speech: in which language.
        access: which contexts may be used.
        finder: finds the one that a prompt begins with.
        contexts: makes those that turns are folded into.
        neutral: what :data:`NEUTRAL` pays to spans of contexts, as known so far, for as long as anybody holds these.
    """

    def __init__(
        self,
        model: LanguageModel,
        identity: ModelIdentity,
        speech: Speech,
        access: Access,
        finder: Finder,
        contexts: Contexts,
        neutral: MutableMapping[Storage, dict[tuple[int, ...], Tensor]],
    ) -> None:
        self._model, self._identity, self._speech = model, identity, speech
        self._access, self._finder, self._contexts = access, finder, contexts
        self._neutral = neutral

    def session(self, context: CompressedContext | None, ratio: float) -> Session:
        """See :meth:`KVzipEngine.session`.

        Args:
            ratio: of what is folded where there is no context.
        """
        language = self._speech.now
        self._access.check(language, context)
        return self._session(language, context, ratio)

    def _session(self, language: Language, context: CompressedContext | None, ratio: float) -> Session:
        context = None if context is None else self._access.mine(context)
        fold = partial(self._contexts.fold, language, ratio)
        return Session(self._model, language.prompts, context, fold, partial(self._identity.of, language))

    def stream(
        self,
        context: CompressedContext | None,
        question: str | Sequence[Message],
        ratio: float,
        tools: Sequence[Tool] | None,
        tool_choice: Any,
        schema: Mapping[str, Any] | None,
        parallel_tool_calls: bool | None,
        form: ToolForm | None,
        behind: bool,
        reuse: bool | float,
        params: dict[str, Any],
    ) -> Stream:
        """See :meth:`KVzipEngine.stream`.

        Args:
            ratio: the least of what is reused, unless ``reuse`` gives another.
        """
        several = {} if parallel_tool_calls is None else {"parallel_tool_calls": parallel_tool_calls}
        check_flags(behind=behind, **several)
        least = ratio if isinstance(reuse, bool) else checked_ratio(reuse, "reuse")
        tools, language = checked_tools(tools), self._speech.now
        prompts = language.prompts
        schema = cleaned(schema, "the schema", MOST_OF_SCHEMA) if isinstance(schema, Mapping) else schema
        if parallel_tool_calls is None and prompts.one_call:
            parallel_tool_calls = False
        if tools:
            prompts.check_tools(tools)
            guidance = self._speech.guidance(language)
            params["grammar"] = calls_grammar(guidance, form or prompts.form, tools, tool_choice, schema, parallel_tool_calls)
        elif schema is not None:
            params["grammar"] = self._speech.guidance(language).json(schema)
        if context is not None:
            return self._session(language, context, ratio).stream(question, tools, behind, **params)
        checked = GenerationParams.of(params)
        ids = prompts.question(None, question, tools, thinks=checked.free)
        if reuse:
            context = self._finder.prefix(language, ids, least)
        return self._session(language, context, ratio).stream_ids(ids[context.n_tokens :] if context else ids, checked)

    def logits(self, context: CompressedContext | None, ids: Sequence[int] | Tensor) -> Tensor:
        """See :meth:`KVzipEngine.logits`."""
        self._access.check(self._speech.now, context)
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not ids:
            raise InputError("no ids to compute logits for; give at least one")
        size = self._model.model.config.vocab_size
        if odd := [i for i in ids if type(i) is not int or not 0 <= i < size]:
            raise InputError(f"{brief(odd[0])} is no id of the model's, which are 0 to {size - 1:,}")
        start = context.n_tokens if context else 0
        if (tokens := start + len(ids)) > self._window(context):
            raise self._too_much(tokens, context, "give fewer ids")
        step = self._model.chunk_tokens
        chunks = [ids[i : i + step] for i in range(0, len(ids), step)]
        with context.lease() if context else nullcontext(None) as lease:
            row = self._model.row(lease, start, Tail()) if lease else Row((), 0, Tail())
            return torch.cat([self._model.forward([row], [chunk], n_logits=len(chunk))[0] for chunk in chunks])

    def relevance(
        self, parts: Sequence[tuple[CompressedContext, Sequence[Span]]], question: str | Sequence[Message], answer: str
    ) -> list[Tensor]:
        """See :meth:`KVzipEngine.relevance`."""
        if not any(spans for _, spans in parts):
            raise InputError("no span to compare; give some tokens of the contexts")
        masses = [self._masses(context, spans, question, answer) for context, spans in parts]
        scores = compared(*(torch.cat(mass, -1) for mass in zip(*masses, strict=True)))
        return list(scores.split([len(spans) for _, spans in parts]))

    def _masses(
        self, context: CompressedContext, spans: Sequence[Span], question: str | Sequence[Message], answer: str
    ) -> tuple[Tensor, Tensor]:
        """Attention to spans of a context: of the last message with its answer, and of :data:`NEUTRAL`."""
        language = self._speech.now
        self._access.check(language, context)
        prompts, recipe, window = language.prompts, context.recipe, self._window(context)
        closing = len(recipe.closing)

        def mass(row: Row, ids: list[int], said: str, more: list[int]) -> Tensor:
            if (tokens := row.start + len(ids)) >= window:
                raise self._too_much(tokens, context, "ask shorter")
            first = max(0, len(ids) - closing - len(prompts.text_ids(said)))
            return attention_mass(self._model, row, [*ids, *more][: window - row.start], spans, first)

        last, answer = as_messages(question)[-1]["content"], clean(answer, "answer")
        with context.lease() as lease:
            n = context.n_tokens
            asked = mass(self._model.row(lease, n, Tail()), prompts.question(recipe, question), last, prompts.text_ids(answer))
            ids = prompts.question(recipe, NEUTRAL)
            known, of = self._neutral.setdefault(context.storage, {}), (*ids, *chain.from_iterable(spans))
            if (neutral := known.get(of)) is None:
                neutral = mass(self._model.row(lease, n, Tail()), ids, NEUTRAL, [])
                known.clear()  # of other spans
                known[of] = neutral
            return asked, neutral

    def _window(self, context: CompressedContext | None) -> int:
        """Tokens that fit into the model's window with a context."""
        return self._model.window + (context.saved if context else 0)

    def _too_much(self, tokens: int, context: CompressedContext | None, way_out: str) -> WindowError:
        window, tokens = self._model.window, tokens - (context.saved if context else 0)
        return WindowError(
            f"{tokens:,} tokens with the context; the model's window is {window:,}; {way_out}, or load less", tokens=tokens, window=window
        )
