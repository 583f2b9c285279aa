"""A transformers model behind the one door the rest of the package uses. What cannot work is refused here, before any work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip_memory.attention import BACKENDS, AttentionCall, attach, choose
from kvzip_memory.context import Lease, RaggedLayer, States
from kvzip_memory.errors import IdentityMismatchError, InputError, ModelError, UnsupportedModelError
from kvzip_memory.inference.admission import Admission, Place, Places
from kvzip_memory.inference.batching import Batcher, Choose
from kvzip_memory.inference.cache import LastLayerSeen, Row, SessionCache, Tail
from kvzip_memory.inference.ends import eos_ids
from kvzip_memory.inference.graphs import DecodeSteps
from kvzip_memory.inference.layout import check_config, check_kind, layout_of, window_of
from kvzip_memory.inference.made import Made, is_read, told
from kvzip_memory.inference.packed import is_packed
from kvzip_memory.inference.rotation import Rotations
from kvzip_memory.inference.text_part import text_part
from kvzip_memory.inference.weights import Stamp, Watch
from kvzip_memory.inference.worker import Worker
from kvzip_memory.system.calls import Gate, check, within
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.modes import as_written, evaluation_copy, in_evaluation
from kvzip_memory.system.printable import brief, logger_of

T = TypeVar("T")

logger = logger_of(__name__)

#: Architectures compared with transformers' own output in our tests. Others are compared once, when they are loaded.
TESTED = frozenset({"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss"})
#: How far logits of others may be from their own on a test forward, as a part of the largest one. Of families that work they are 1e-5 in
#: float32, more on GPUs, whose products have fewer bits, and up to 0.06 with random weights in 16 bits.
TOLERANCE, TOLERANCE_ON_GPUS, TOLERANCE_16_BITS = 1e-4, 0.02, 0.1

#: Tokens of one forward of a question, a prefill or a repeat. It bounds the memory of activations and how long running
#: answers wait: while answers run chunks of builds are half as long. Larger chunks were no faster there.
CHUNK_TOKENS = 256
#: The same on a GPU, which small chunks would leave idle.
GPU_CHUNK_TOKENS = 2048

#: Loads that event loops wait for at one time: threads of asyncio's own pool, at most.
LOADS = 32

# Our calls mask by position. A mask that is four-dimensional already is handed through as it is, so none is made.
_NO_MASK = torch.empty(1, 1, 0, 0)


class LanguageModel:
    """A decoder-only model with our attention attached, run by one thread of its own for any number of others.

    Answers of several threads are decoded together, a row each; answers and builds take turns step by step and chunk
    by chunk.

    Args:
        model: a transformers causal language model; it goes on working for others. A compiled one is run as it was written, and of one
            that also sees or hears the part that is about texts.
        tokenizer: its tokenizer.
        backend: attention, one of :data:`~kvzip_memory.attention.NAMES`.
        max_running: answers decoded together.
        max_waiting: answers that may wait for their turn.

    Attributes:
        window: tokens the model can hold: context, questions and answers together.
        layout: which of its layers have pairs, and of what kind.
        windows: what each layer that has pairs sees, None for full attention.
        kinds: KV heads, and the dimensions of keys and of values, of each layer that has pairs.
        state_shapes: of what layers without attention remember.
        tokenizer: the engine's copy.
        chunk_tokens: tokens of one forward at most.
        backend: the attention that was chosen.
        watch: gives stamps of what the model computes with.
        places: threads for answers that an event loop waits for.
        loads: threads for everything else that one waits for.

    Raises:
        UnsupportedModelError: naming the property of the model that stands in the way.
        InputError: an attention that is unknown or cannot compute on the model's device.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, backend: str = "auto", max_running: int = 32, max_waiting: int = 1024
    ) -> None:
        model = as_written(model) if isinstance(model, torch.nn.Module) else model
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"a model of transformers is wanted, not {brief(model)}; KVzipEngine.from_pretrained takes ids and folders")
        if model.get_output_embeddings() is None and not model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"a {type(model).__name__} gives no logits of tokens; take the same as AutoModelForCausalLM or AutoModelForImageTextToText"
            )
        whole, model = model.config.model_type, text_part(model)
        config, self._kind = model.config, repr(model.config.model_type)
        if whole != config.model_type:
            self._kind += f" of {whole!r}"
        check_config(config)
        check_kind(model)
        self.model = model
        self.window = window_of(config)
        self.layout = layout_of(config, self.window)
        self.windows = self.layout.windows
        self.kinds = tuple((n_heads, dim, dim) for n_heads, dim in self.layout.shapes)
        self.state_shapes: dict[str, tuple[int, ...]] = {}
        self.tokenizer, self.watch = tokenizer, Watch(model)
        self.chunk_tokens = CHUNK_TOKENS if self.device.type == "cpu" else GPU_CHUNK_TOKENS
        self._attention, self._made_on = backend, self.device
        self._choose()
        self._worker, self._warned = Worker(), False
        self._building = threading.Lock()  # one chunk of one build at most is ahead of a running answer
        self._batcher = Batcher(self._forward, self._worker, padded_tokens=self.chunk_tokens)
        self._admission = Admission(max_running, max_waiting)
        self._builders = Admission(max_running)  # each holds dense pairs
        self.places = Places(max_running, max_waiting, away=max_waiting, admission=self._admission)
        self.loads = Places(LOADS, max_waiting)
        refuse_after_fork(self, "_worker", "_building", "_batcher", "_admission", "_builders", "places", "loads")
        if config.model_type not in TESTED or self.layout.stateful:
            self._compare_with_original()

    def check_layers(self, layers: Sequence[RaggedLayer], states: States, where: str) -> None:
        """Look whether layers and states are such as this model makes, see :meth:`~kvzip_memory.inference.made.Made.check`."""
        Made(self.windows, self.kinds, self.state_shapes, self.layout.latent, self.model.dtype, self.reads_fewer_bits).check(
            layers, states, where
        )

    @property
    def reads_fewer_bits(self) -> bool:
        """Whether the attention reads pairs of fewer bits than the model's."""
        return self.backend in BACKENDS

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return eos_ids(self.model, self.tokenizer)

    def row(self, lease: Lease, start: int, tail: Tail) -> Row:
        """A row behind a leased context of ``start`` tokens.

        Raises:
            UnsupportedModelError: parts of it have moved, and the model cannot tell.
        """
        row = Row(self.checked(lease).layers, start, tail, lease.states, lease.before, lease.shifts, lease.nearer)
        if row.moved:
            self.rotations.measure()
        return row

    def checked(self, lease: Lease) -> Lease:
        """A lease of any engine's context; InputError if its pairs have fewer bits than the model's, which the attention does not read."""
        layers = () if self.reads_fewer_bits else (layer for part in lease.parts for layer in part)
        odd = next((some for x in layers for some in (x.keys, x.values) if not is_read(some, self.model.dtype)), None)
        if odd is not None:
            raise InputError(f"the context's pairs are {told(odd)}, which attention {self.backend!r} does not read; use attention='cpu'")
        return lease

    @property
    def alone(self) -> bool:
        """Whether at most one answer is running."""
        return self._admission.running <= 1

    def load(self) -> dict[str, int | float]:
        """How many answers run, how many wait for their turn, and for how many seconds the oldest has waited."""
        waiting = [*self._admission.waiting, *self.places.waiting]
        return {
            "running": self._admission.running,
            "waiting": len(waiting),
            "oldest_wait_s": time.monotonic() - min(waiting) if waiting else 0.0,
        }

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _choose(self) -> None:
        latent = self.layout.latent and self._attention == "auto"  # keys of some 576 dimensions, which no kernel has room for
        chosen, self._dtype = choose("cpu" if latent else self._attention, self.device, self.model.dtype), self.model.dtype
        self.backend, self._backend = chosen.name, chosen.attend
        layout = self.layout
        alike = len(layout.owners) == len(layout.places) and len(set(layout.shapes)) == 1 and not (layout.stateful or layout.latent)
        self.rotations = Rotations(self.fill, self.model, layout, self.window)
        self._steps = DecodeSteps(self.model, self.windows, chosen.kernels) if chosen.kernels is not None and alike else None

    def changed(self, moved: bool) -> None:
        """Go on with weights that were changed: with what can attend in their dtype, and without old graphs if they have ``moved``.

        Raises:
            IdentityMismatchError: they are on another device.
            InputError: the attention cannot compute with their dtype.
        """
        if self.device != self._made_on:
            raise IdentityMismatchError(
                f"the engine was made for its model on {self._made_on}, where its contexts are, and that is on {self.device} now; move it "
                "back, or make another engine for it: with the same cache_dir that finds the contexts",
                fields=("device",),
            )
        if self.model.dtype != self._dtype:
            self._worker.check()
            self._worker.run(self._choose)
        elif moved and self._steps is not None:
            self._worker.submit(self._steps.forget)

    def untouched(self, since: Stamp, until: Stamp) -> bool:
        """Whether nobody has written to what the model computes with between two stamps, but its own forwards to buffers.

        What they write to is seen by one over a single token; few models have such buffers.
        """
        written = until.written(since)
        if not written or -1 in written:
            return not written
        before = self.watch.stamp()
        self.forward([Row((), 0, Tail())], [[0]])
        return written <= self.watch.stamp().written(before)

    def forward(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int = 1) -> list[Tensor]:
        """Feed each row its new tokens and append their pairs to its tail.

        Args:
            rows: sessions; their tails are distinct, their contexts may repeat.
            ids: new tokens of each row, at least one, any number a row.
            n_logits: so many of each row's last tokens get logits, fewer if it has fewer.

        Returns:
            Logits of each row, ``[min(n_logits, len(ids[row])), vocab]`` fp32.
        """
        check()
        return self._worker.run(partial(self._forward, rows, ids, n_logits))

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[Tensor]:
        attach(self.model)  # again, should somebody have switched the model's attention since
        self._check_ids([max(row_ids) for row_ids in ids])
        counts = [len(row_ids) for row_ids in ids]
        logits: Iterable[Tensor] | None = self._steps.run(rows, ids, n_logits) if self._steps is not None else None
        if logits is not None:
            for row, count in zip(rows, counts, strict=True):
                row.tail.advance(count)
        elif self.layout.stateful:
            logits = self._in_groups(rows, ids, n_logits)
        else:
            logits, cache = self._eager(rows, ids, n_logits)
            cache.advance()
        return [row_logits[-min(n_logits, count) :].float() for row_logits, count in zip(logits, counts, strict=True)]

    def _in_groups(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[Tensor]:
        """Rows of one number of tokens together, for padding would change what is remembered. They count once all are computed."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for b, row in enumerate(rows):
            groups.setdefault((len(ids[b]), bool(row.remembered)), []).append(b)
        found, caches = dict[int, Tensor](), []
        for members in groups.values():
            logits, cache = self._eager([rows[b] for b in members], [ids[b] for b in members], n_logits)
            found |= zip(members, logits, strict=True)
            caches.append(cache)
        for cache in caches:
            cache.advance()
        return [found[b] for b in range(len(rows))]

    def _eager(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> tuple[Tensor, SessionCache]:
        """Logits, and the cache whose pairs do not count yet."""
        counts = [len(row_ids) for row_ids in ids]
        width = max(counts)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            input_ids[b, width - count :] = torch.as_tensor(ids[b])
            positions[b, width - count :] = torch.arange(row.position, row.position + count)
        while True:  # once more if the mode was switched meanwhile: nothing of this counts yet
            model, cache = self._evaluating(), SessionCache(rows, counts, self.layout, self._backend, self.rotations)
            cache.positions = positions.to(self.device)
            try:
                logits: Tensor = model(
                    input_ids=input_ids.to(self.device),
                    position_ids=cache.positions,
                    attention_mask=_NO_MASK,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=n_logits,
                    kvzip=cache,
                ).logits
            except Exception:
                if not self._switched(model):
                    raise
                continue
            if not self._switched(model):
                return logits, cache

    def _evaluating(self) -> PreTrainedModel:
        """The model in evaluation mode, itself or a copy."""
        if in_evaluation(self.model):
            return self.model
        if not self._warned and any(module.training for module in self.model.modules()):
            self._warned = True
            logger.warning(
                "the model is in training mode: contexts and answers are computed without dropout, by a copy of its modules that is made "
                "for every forward; call model.eval() to save that"
            )
        return evaluation_copy(self.model)

    def _switched(self, model: PreTrainedModel) -> bool:
        """Whether the model itself has just computed, and somebody has meanwhile put it into training mode."""
        return model is self.model and not in_evaluation(model)

    def append(self, row: Row, ids: Sequence[int]) -> Iterator[int]:
        """Append the pairs of ``ids`` to a row's tail, in chunks; yields the size of each. No logits are computed."""
        for chunk in self._chunks(ids):
            cache = SessionCache([row], [len(chunk)], self.layout, self._backend, self.rotations, pairs_only=True)
            self._fill(chunk, row.position, cache, cache)
            cache.advance()
            yield len(chunk)

    def feed(self, row: Row, ids: Sequence[int], choose: Choose, n_logits: int = 1, cancelled: threading.Event | None = None) -> list[int]:
        """Append tokens to one row, in chunks, together with the rows of other threads.

        Returns:
            What ``choose`` makes of the logits ``[n_logits, vocab]`` fp32 after the last tokens, on the model's thread;
            nothing if it was ``cancelled`` between two chunks.
        """
        *chunks, last = [ids[start : start + self.chunk_tokens] for start in range(0, len(ids), self.chunk_tokens)]
        for chunk in chunks:
            self._batcher.step(row, chunk, 1, _nothing)
            if cancelled is not None and cancelled.is_set():
                return []
        return self._batcher.step(row, last, n_logits, choose)

    @contextmanager
    def answering(self, tail: Tail, entry: Gate | None = None) -> Iterator[Place]:
        """Around an answer into a tail, from its question to its last token; it does not wait for its turn once its ``entry`` is open.

        Raises:
            QueueFullError: more answers run and wait than the engine allows.
            ForkedError: the process was forked since the engine was made.
        """
        self._worker.check()
        with self._admission.admitted(entry) as place:
            try:
                yield place
            finally:
                self._batcher.leave(tail)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Around a build: no more of them at a time than answers. Who waits for a context in it is not one of them meanwhile.

        Raises:
            ForkedError: the process was forked since the engine was made.
        """
        self._worker.check()
        with self._builders.admitted() as place, within(place=place):
            yield

    def compute(self, work: Callable[[], T]) -> T:
        """What ``work`` of a build gives, computed by the thread that computes everything, between the steps of answers."""
        check()
        with self._building:
            return self._worker.run(torch.inference_mode()(work))

    def fill(self, ids: Sequence[int], position: int, cache: Cache, call: AttentionCall | None = None) -> Iterator[int]:
        """Run the layers over ``ids`` from ``position`` on, into or over ``cache``, in chunks; yields the size of each.

        With a ``call`` attention is what that object says, else it is the model's own. No logits are computed, and
        nothing of the last layer once ``cache`` or ``call`` has seen its pairs and raised
        :class:`~kvzip_memory.inference.cache.LastLayerSeen`.
        """
        for chunk in self._chunks(ids):
            self._fill(chunk, position, cache, call)
            position += len(chunk)
            yield len(chunk)

    def _chunks(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Pieces of ``ids`` for one forward each, half as long while answers run, which wait for them."""
        start = 0
        while start < len(ids):
            size = self.chunk_tokens // (2 if self._admission.running else 1)
            yield ids[start : start + size]
            start += size

    def _check_ids(self, ids: Sequence[int]) -> None:
        """On a GPU such an id would end the process."""
        n = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if n is not None and max(ids) >= n:
            raise InputError(f"token id {max(ids)}: the model has embeddings of {n} tokens. Another model's tokenizer was given with it")

    def _fill(self, ids: Sequence[int], position: int, cache: Cache, call: AttentionCall | None) -> None:
        self._check_ids(ids)
        extra = {} if call is None else {"kvzip": call, "attention_mask": _NO_MASK}
        positions = torch.arange(position, position + len(ids), device=self.device)[None]
        input_ids = torch.tensor([ids], device=self.device)
        if call is not None:
            call.positions = positions

        @torch.inference_mode()
        def forward() -> None:
            attach(self.model)
            model = self._evaluating()
            try:
                with suppress(LastLayerSeen):
                    model.base_model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True, **extra)
            finally:
                if self._switched(model):  # the cache may hold what it has computed
                    raise ModelError("the model was put into training mode while it read a text; do that again, or train a copy of it")

        check()
        with self._building:
            self._worker.run(forward)

    def _compare_with_original(self) -> None:
        """Refuse an architecture we have not tested if a short forward through our attention differs from its own."""
        kind, original = self._kind, self.model.config._attn_implementation
        ids = torch.arange(48, device=self.device) % self.model.config.vocab_size
        with torch.inference_mode():
            theirs: Tensor = self._evaluating()(input_ids=ids[None]).logits[0, 40:].float()
        row = Row((), 0, Tail())
        try:
            self.forward([row], [ids[:40].tolist()])  # then some, and one, which some models compute otherwise
            ours = torch.cat([self.forward([row], [ids[i:j].tolist()], n_logits=7)[0] for i, j in ((40, 47), (47, 48))])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever its own code makes of a call it does not expect
            self.model.set_attn_implementation(original)
            raise UnsupportedModelError(
                f"{kind} does more with its masks or its cache than hand them to its attention: on a test forward, "
                f"{type(error).__name__}: {error}"
            ) from error
        difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        exact = TOLERANCE if self.device.type == "cpu" else TOLERANCE_ON_GPUS
        tolerance = TOLERANCE_16_BITS if self.model.dtype.itemsize <= 2 or is_packed(self.model) else exact
        if not difference <= tolerance * largest:
            self.model.set_attn_implementation(original)
            raise UnsupportedModelError(
                f"{kind} computes otherwise with our attention and cache than with its own: on a test forward logits differ by "
                f"{difference:.3g} (largest logit {largest:.3g})"
            )
        pairs = row.tail.pairs(1)
        if len(pairs) != len(self.windows):
            self.model.set_attn_implementation(original)
            raise UnsupportedModelError(f"{kind} has {len(self.windows)} layers with attention, of which a text passes {len(pairs)}")
        self.kinds = tuple((len(keys), keys.shape[2], values.shape[2]) for keys, values in pairs)
        self.state_shapes = {name: tuple(state.shape) for name, state in row.remembered.items()}
        logger.info("%s is not among the tested architectures; a test forward agrees to %.1e", kind, difference)


def _nothing(logits: Tensor) -> list[int]:
    return []
