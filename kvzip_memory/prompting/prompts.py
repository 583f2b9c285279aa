"""From sources and questions to token ids: prefixes that contexts are built from, and what follows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvzip_memory.context import CompressedContext, Recipe
from kvzip_memory.prompting.documents import Document
from kvzip_memory.prompting.encoding import added_tokens
from kvzip_memory.prompting.extensions import Extensions
from kvzip_memory.prompting.forms import FORMS, form_of
from kvzip_memory.prompting.layouts import Layouts
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.prefixes import Prefixes
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.prompting.questions import Questions
from kvzip_memory.prompting.roles import Roles
from kvzip_memory.prompting.template import ChatTemplate, Layout
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.prompting.window import Window


class PromptBuilder:
    """Renders and tokenises for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template_kwargs: variables handed to the chat template, such as ``enable_thinking=False``.
        window: tokens that the model can hold. Texts that have more are refused before they are tokenised whole; None refuses none.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, window: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._template = template = ChatTemplate(tokenizer, template_kwargs)
        self._encoder = template.encoder
        #: The template's text.
        self.template = template.source
        #: Tokens that only the template may write.
        self.control_ids = template.control_ids
        #: What the model writes around its reasoning, None if it does not.
        self.thought = template.thought
        form = form_of(self.template)
        #: In which calls are written.
        self.form = form or FORMS["hermes"]
        spelled = "".join([self.form.begin, self.form.open, self.form.close, self.form.end, self.form.prefix or "", *(self.thought or ())])
        #: Special tokens that calls and reasoning are written with; they show in an answer's text.
        self.call_ids = frozenset(i for i, token in added_tokens(tokenizer).items() if token.special and token.content in spelled)
        roles = Roles(template, calls=form is not None)
        #: Whether the template shows no more than one call in an answer.
        self.one_call = roles.one_call
        self._layouts = Layouts(template, roles, Window(self._encoder, window))
        self._prefixes = Prefixes(self._layouts)
        self._extensions = Extensions(self._layouts, self._prefixes, tokenizer)
        self._questions = Questions(self._layouts)

    def forget(self) -> None:
        """Keep no text that was read."""
        self._encoder.forget()

    # -- prefixes ------------------------------------------------------------------------------------------------

    def documents(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """See :meth:`Prefixes.documents`."""
        return self._prefixes.documents(documents, system, keep)

    def documents_apart(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """See :meth:`Prefixes.documents_apart`."""
        return self._prefixes.documents_apart(documents, system, keep)

    def conversation(
        self, messages: Sequence[Message], system: str | None = None, keep: Sequence[str] = (), tools: Sequence[Tool] | None = None
    ) -> Prompt:
        """See :meth:`Prefixes.conversation`."""
        return self._prefixes.conversation(messages, system, keep, tools)

    def until_mark(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Prompt | None:
        """See :meth:`Prefixes.until_mark`."""
        return self._prefixes.until_mark(messages, tools)

    def behind(self, read: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[Message] | None:
        """See :meth:`Prefixes.behind`."""
        return self._prefixes.behind(read, messages, tools)

    def head(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
        """See :meth:`Prefixes.head`."""
        return self._prefixes.head(question, tools)

    def offsets(self, text: str, alone: bool = True) -> list[tuple[int, int]]:
        """See :meth:`Prefixes.offsets`."""
        return self._prefixes.offsets(text, alone)

    def more_documents(self, context: CompressedContext, documents: Sequence[Document], keep: Sequence[str] = ()) -> Prompt:
        """See :meth:`Extensions.more_documents`."""
        return self._extensions.more_documents(context, documents, keep)

    def more_turns(
        self,
        context: CompressedContext,
        messages: Sequence[Message],
        keep: Sequence[str] = (),
        tools: Sequence[Tool] | None = None,
        behind: bool = False,
    ) -> Prompt:
        """See :meth:`Extensions.more_turns`."""
        return self._extensions.more_turns(context, messages, keep, tools, behind)

    def folded(self, context: CompressedContext | None, ids: Sequence[int], protected: int, tools: Sequence[Tool] | None = None) -> Prompt:
        """See :meth:`Extensions.folded`."""
        return self._extensions.folded(context, ids, protected, tools)

    # -- what follows --------------------------------------------------------------------------------------------

    def question(
        self,
        recipe: Recipe | None,
        question: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        fixed: bool = False,
        thinks: bool = True,
    ) -> list[int]:
        """See :meth:`Questions.question`."""
        return self._questions.question(recipe, question, tools, fixed=fixed, thinks=thinks)

    def rendered(
        self,
        recipe: Recipe | None,
        question: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        fixed: bool = False,
        thinks: bool = True,
    ) -> Layout:
        """See :meth:`Questions.rendered`."""
        return self._questions.rendered(recipe, question, tools, fixed=fixed, thinks=thinks)

    def ids(self, recipe: Recipe | None, layout: Layout) -> list[int]:
        """See :meth:`Questions.ids`."""
        return self._questions.ids(recipe, layout)

    def pieces(self, recipe: Recipe | None, layout: Layout) -> list[list[int]]:
        """See :meth:`Questions.pieces`."""
        return self._questions.pieces(recipe, layout)

    def count(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, most: int | None = None) -> int:
        """See :meth:`Questions.count`."""
        return self._questions.count(messages, tools, most)

    def check_tools(self, tools: Sequence[Tool]) -> None:
        """See :meth:`Questions.check_tools`."""
        self._questions.check_tools(tools)

    def free_recipe(self) -> Recipe:
        """See :meth:`Layouts.free_recipe`."""
        return self._layouts.free_recipe()

    # -- texts and ids -------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """See :meth:`Questions.text_ids`."""
        return self._questions.text_ids(text)

    def ids_behind(self, text: str, n: int) -> list[int]:
        """Ids of a rendered text's part behind its first ``n`` characters, as a model would write them."""
        return self._encoder.continued(self._encoder.behind(text, n))

    def unspelled(self, text: str) -> str:
        """A rendered text as a model would write it."""
        return self._encoder.unspell(text)

    def thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends where the model's reasoning has begun."""
        if self.thought is None:
            return False
        return bool(self.tokenizer.decode([*ids][-8:]).rstrip().endswith(self.thought[0]))
