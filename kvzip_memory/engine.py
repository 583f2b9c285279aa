"""The engine: a model, its tokenizer, and the contexts loaded with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvzip_memory.answering import Answerer
from kvzip_memory.bridge import result_of
from kvzip_memory.building import Builder
from kvzip_memory.compression import Stages
from kvzip_memory.compression.allocators import Allocator
from kvzip_memory.compression.codecs import FittedCodec
from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.compression.refit import Refit
from kvzip_memory.compression.scorers import Scorer
from kvzip_memory.context import CompressedContext
from kvzip_memory.inference import loading
from kvzip_memory.inference.attribution import Span
from kvzip_memory.inference.packed import checked_weights
from kvzip_memory.library import Library
from kvzip_memory.progress import Bar
from kvzip_memory.prompting.call_reader import read_calls
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.prompting.forms import ToolForm
from kvzip_memory.prompting.guidance import Guidance
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.prompts import PromptBuilder
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.registry import check_ttl, parse_bytes
from kvzip_memory.registry.identity import tenant_digest
from kvzip_memory.session import Session
from kvzip_memory.streaming import Reply, Stream
from kvzip_memory.system.checksums import Checksums
from kvzip_memory.system.flags import checked_flag
from kvzip_memory.system.paths import as_folder


class KVzipEngine(Library):
    """Loads texts into compressed contexts and answers from them.

    ``ratio`` is the fraction of a text's key-value pairs that is **kept** (kvpress' ``compression_ratio`` is the fraction removed).
    May be used from any number of threads: their answers are decoded together, builds take turns with them. A copy, deep or not, is
    the engine itself. It is the process' that made it: in a child that is forked later it raises :class:`ForkedError`.

    Args:
        model: a causal language model of transformers. It is not changed and goes on working for others.
        tokenizer: its tokenizer. It is copied: what others do with it meanwhile changes no text.
        ratio: kept fraction for :meth:`load`, in (0, 1]; template head and system prompt are kept beside it.
        cache_dir: contexts are stored there and found again by later engines of the same model; None stores nothing.
        device_bytes: budget of the contexts on the model's device, such as ``"4GiB"``. None: a quarter of its memory.
        host_bytes: budget of the contexts moved from there to the host's memory. None: an eighth of it where the model
            is on a GPU, else 0.
        disk_bytes: budget of the contexts in ``cache_dir``. None: no limit.
        ttl: seconds after which a context is built anew, whoever stored it, above 0 and at most 100 years; None never. A context is as old
            as the reading of its text, the first of it if it was grown.
        tenant: a salt for every key: an engine finds, uses and changes only what is its tenant's; the rest is as if it had never existed,
            but for contexts and files of no tenant that it is given. Only its digest is kept.
        secret: a text of 16 characters at least, given to all engines of ``cache_dir``: what is there is used only if it was written with
            it, and the folder may be one that others can write (``docs/security.md``). So are files that are saved and opened by hand.
        max_running: answers that threads get decoded together, a row each.
        max_waiting: answers that may wait behind them, of threads and of event loops together, first come first served; more is a
            :class:`QueueFullError`. As many other async calls may wait.
        attention: what computes attention over contexts: ``"auto"``, ``"cpu"``, ``"triton"``, ``"flash"`` or
            ``"reference"``, see :func:`kvzip_memory.attention.choose`; :meth:`stats` names what was chosen.
        progress: show progress bars; None shows them on a terminal only.
        compress_every: compress after so many tokens, before more are read. A build then never holds the whole dense
            cache, only so many tokens of it above what is kept, and is a little less faithful (``docs/benchmarks.md``).
            None reads everything first.
        scorer: how pairs are ranked: a name, ``"kvzip"``, or an object, see :mod:`kvzip_memory.compression.scorers`.
        allocator: how many are kept where: ``"global"``, ``"per_layer"``, ``"uniform"``, or an object.
        refit: what those that are kept say: ``"ridge"`` fits them to what all pairs weighed and said, at no cost later
            (``docs/benchmarks.md``); ``"none"`` leaves them as they are; or an object. ``"auto"`` is ridge, but for scorers of others that
            give it nothing to fit to.
        codec: how they are written: ``"none"``, in the model's own dtype; where the attention is ``cpu`` or ``reference`` also
            ``"fp16"``, ``"int8"``, ``"k8v4"`` (keys of 8 bits, values of 4) or ``"int4"``, with ever fewer bytes and less fidelity
            (``docs/benchmarks.md``). ``"auto"`` is fp16 for float32, as on a CPU, and none for others.
        template_kwargs: variables for the chat template, such as ``{"enable_thinking": False}``. The template is the tokenizer's own,
            which may be set at any time: contexts of another one are then not found, and are refused where they are given. So are those
            of a tokenizer that was changed otherwise, which is noticed by the next call.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed.
        InputError: a ratio outside (0, 1], an unknown scorer, allocator, refit or codec, a tenant that is no text,
            a ``ttl`` that is no such number of seconds, an attention that cannot compute on the model's device.
    """

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        ratio: float = 0.3,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        cache_dir: str | Path | None = None,
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = None,
        disk_bytes: int | str | None = None,
        ttl: float | None = None,
        tenant: str | None = None,
        secret: str | None = None,
        max_running: int = 32,
        max_waiting: int = 1024,
        attention: str = "auto",
        progress: bool | None = None,
        compress_every: int | None = None,
        scorer: Scorer | str = "kvzip",
        allocator: Allocator | str = "global",
        refit: Refit | str = "auto",
        codec: str = "auto",
        template_kwargs: Mapping[str, Any] | None = None,
        weights: str | None = None,
        **model_kwargs: Any,
    ) -> KVzipEngine:
        """An engine for a hub id, a local folder or a ``.gguf`` file (dequantised once, then read from a folder).

        Args:
            dtype: of the weights; ``"auto"`` is the checkpoint's on a GPU and float32 on a CPU.
            device: ``"auto"`` takes a GPU if there is one.
            weights: on a CPU, what the weights of linear layers are kept as: ``"int8"``, a third of the bytes of float32 and nearly
                the same answers; ``"int4"``, a sixth; or ``"auto"``, 4 bits for layers that had no more in a ``.gguf`` file (Q4_0, Q4_1,
                Q4_K), and 8 for others, of which 4 lose much if the model is small. A token takes less time as it reads fewer bytes
                (``docs/benchmarks.md``). None leaves them as they are.
            model_kwargs: handed to transformers' ``from_pretrained``.

        Raises:
            InputError, UnsupportedModelError: see the class. Ratio and allocator are checked before anything is loaded.
        """
        checked_ratio(ratio)
        checked_weights(weights)
        Builder.check_every(compress_every)
        if progress is not None:
            checked_flag("progress", progress)
        Stages.of(scorer, allocator, refit, FittedCodec(codec, lambda: (torch.float32, True)))
        for size, value in {"device_bytes": device_bytes, "host_bytes": host_bytes, "disk_bytes": disk_bytes}.items():
            parse_bytes(size, value)
        check_ttl(ttl)
        tenant_digest(tenant)  # tells what is wrong with it
        Checksums(secret)
        folder = None if cache_dir is None else as_folder(cache_dir, "cache_dir")
        with Bar(f"weights as {weights}", progress, " weights") as bar:
            loaded, tokenizer = loading.load_model(
                model, dtype=dtype, device=device, cache_dir=folder, weights=weights, packed=bar.show, **model_kwargs
            )
        return cls(
            loaded,
            tokenizer,
            ratio,
            cache_dir=folder,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            disk_bytes=disk_bytes,
            ttl=ttl,
            tenant=tenant,
            secret=secret,
            max_running=max_running,
            max_waiting=max_waiting,
            attention=attention,
            progress=progress,
            compress_every=compress_every,
            scorer=scorer,
            allocator=allocator,
            refit=refit,
            codec=codec,
            template_kwargs=template_kwargs,
        )

    @property
    def guidance(self) -> Guidance:
        """Makes grammars for the tokenizer as it is now."""
        return self._speech.guidance(self._language)

    @property
    def _answerer(self) -> Answerer:
        """Keeps nothing itself between calls."""
        neutral = self.shared.setdefault("relevance.neutral", WeakKeyDictionary())
        return Answerer(self._model, self._model_identity, self._speech, self._access, self._finder, self._contexts, neutral)

    @property
    def _prompts(self) -> PromptBuilder:
        return self._language.prompts

    def session(self, context: CompressedContext | None = None) -> Session:
        """A conversation over a context, or over none.

        Raises:
            IdentityMismatchError: the context is another model's; or, when it is asked or folded, its pairs are of weights, an adapter
                or a dtype that the model no longer has.
        """
        return self._answerer.session(context, self.ratio)

    def generate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """Answer one question from a context; the question is forgotten afterwards.

        Args:
            context: None answers without one, but for a stored context that the prompt's ids happen to begin with, see ``reuse``.
            question: text, or chat messages of which the last is the user's or a tool's.
            tools: what the model may call, in OpenAI's form; :meth:`read_calls` finds the calls in the answer's text.
            tool_choice: ``"auto"``, ``"none"``, ``"any"``, or the name of the tool to call. Kept to by guided decoding.
            parallel_tool_calls: whether one answer may call several times; None allows it where the model chooses.
            schema: a JSON schema; the answer is JSON that validates against it. With tools: or calls of them.
            form: how calls are written, if not as :attr:`tool_form` says.
            behind: messages come behind the context, also those that say what it begins with once more; otherwise such are taken for
                the whole conversation, of which the context holds a part.
            reuse: without a context, whether the longest stored one that the prompt begins with is answered from, if it keeps as much as
                the engine's ``ratio``, or as another ratio that is given; the receipt names it. False reads the whole prompt.
            params: ``max_new_tokens=256, temperature=0.0, top_p=None, top_k=None, seed=None, stop=None, repetition_penalty=None,
                no_repeat_ngram_size=None``, see :class:`~kvzip_memory.inference.generation.GenerationParams`.

        Raises:
            InputError: an empty question, a parameter outside its range, a schema with a keyword that cannot be kept to, or JSON or a call
                that ``max_new_tokens`` are too few for.
            WindowError: context and question fill the model's window.
            UnfinishedError: the JSON or the call was cut by ``stop``.
        """
        return self.stream(context, question, **params).whole()

    async def agenerate(self, context: CompressedContext | None, question: str | Sequence[Message], **params: Any) -> Reply:
        """:meth:`generate` in a thread, so that an event loop goes on. When it is cancelled, the answer ends within a token.

        As many run as the engine decodes together; ``max_waiting`` more wait, without threads.

        Raises:
            QueueFullError: so many wait; and as for :meth:`generate`.
        """
        return await result_of(self.places, self.generate, context, question, **params)

    def stream(
        self,
        context: CompressedContext | None,
        question: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: Any = None,
        schema: Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        form: ToolForm | None = None,
        behind: bool = False,
        reuse: bool | float = True,
        **params: Any,
    ) -> Stream:
        """The answer of :meth:`generate`, piece by piece."""
        options = tools, tool_choice, schema, parallel_tool_calls, form, behind, reuse
        return self._answerer.stream(context, question, self.ratio, *options, params)

    @property
    def tool_form(self) -> ToolForm:
        """How the model writes tool calls, by its chat template."""
        return self._prompts.form

    def read_calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """An answer's text without its tool calls, and the calls: ``id``, ``name`` and ``arguments``."""
        return read_calls(text, self.tool_form)

    def prompt_ids(
        self, context: CompressedContext | None, question: str | Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> list[int]:
        """The ids that follow the context for this question: separator or headers, question, assistant header."""
        return self._prompts.question(self._access.mine(context).recipe if context else None, question, tools)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, most: int | None = None) -> int:
        """Tokens of messages as a prompt. Of what has more than ``most`` no more is read than tells that, and a larger number given."""
        return self._prompts.count(messages, tools, most)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text alone, as the model's tokenizer makes them without special tokens of its own."""
        return list(self._language.tokenizer(clean(text, "a text"), add_special_tokens=False).input_ids)

    def token_offsets(self, text: str, *, alone: bool = True) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of each of a document's tokens, in the order in which they lie in its context.

        Args:
            text: of the document.
            alone: whether it is the only one in its context.

        Raises:
            InputError: the tokenizer does not know them; a fast one does.
        """
        return self._prompts.offsets(clean(text, "document"), checked_flag("alone", alone))

    def relevance(
        self, parts: Sequence[tuple[CompressedContext, Sequence[Span]]], question: str | Sequence[Message], answer: str = ""
    ) -> list[Tensor]:
        """How much a question is about spans of contexts, by the attention it pays them.

        Reads the question, and :data:`~kvzip_memory.inference.attribution.NEUTRAL` to compare with, over each context; nothing is
        generated. Of a list of messages only the last one counts.

        Args:
            parts: contexts, and ``[start, end)`` of tokens of each; they are compared with one another, over all contexts.
            question: as it is asked of them.
            answer: counted like the question. In our measurements that ranked worse.

        Returns:
            Scores ``[len(spans)]`` of each context's spans, higher is more.

        Raises:
            InputError: no span; or as for :meth:`generate`.
            WindowError: context and question fill the model's window.
        """
        return self._answerer.relevance(parts, question, answer)

    def logits(self, context: CompressedContext | None, ids: Sequence[int] | Tensor) -> Tensor:
        """Logits ``[len(ids), vocab]`` fp32 after each of ``ids``, fed behind the context. Nothing is kept.

        Raises:
            InputError: no ids.
            WindowError: more than the window holds.
        """
        return self._answerer.logits(context, ids)
