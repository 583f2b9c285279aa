"""The engine's own copy of a tokenizer. A tokenizer is not ours alone.

Calls with truncation or padding write into the backend that all users of a tokenizer share, and its owner may change it at any
time. So texts, keys, prompts and answers are made with a copy that nobody else has; the owner's is looked at for changes only.
"""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.encoding import added_tokens
from kvzip_memory.system.printable import brief

# Parts of a fast tokenizer, all of them small.
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# What can be set on a backend's model; its vocabulary cannot be changed in place. Dropout is for training, and no part of a copy.
_MODEL = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
# Held once more by some fast tokenizers, which read them when they are made only.
_SPENT = ("_vocab", "_merges")
# Copies that are tried while somebody changes the tokenizer.
_TRIES = 5
#: More added tokens are not looked at one by one, which takes 0.1 ms for Llama's 256 and 5 ms for Gemma's 6,000: only further ones.
FEW = 64


def tokenizer_of(given: Any) -> Any:
    """The tokenizer in a processor, with the processor's chat template if it has none of its own; a tokenizer is given back.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(given, ProcessorMixin):
        if not isinstance(given, PreTrainedTokenizerBase):
            raise InputError(f"a tokenizer or processor of transformers is wanted, not {brief(given)}; see AutoTokenizer.from_pretrained")
        return given
    tokenizer: Any = given.tokenizer
    if tokenizer.chat_template is None and given.chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = given.chat_template
    return tokenizer


class Owned:
    """A copy of a tokenizer, as it was at one moment.

    Making one takes 0.1 to 1.5 seconds and up to 170 MB, by the size of the vocabulary, and a moment where only the chat template
    is another one than ``before``.

    Raises:
        InputError: the tokenizer is being changed all the time.
    """

    tokenizer: Any

    def __init__(self, tokenizer: Any, before: Owned | None = None) -> None:
        for _ in range(_TRIES):
            added = added_tokens(tokenizer)
            self._each, self._end = len(added) <= FEW, max([tokenizer.vocab_size - 1, *added]) + 1  # where the next one goes
            self._template, self._rest = self._stamp(tokenizer)
            if before is not None and before._rest == self._rest:
                self.tokenizer = copy.copy(before.tokenizer)
                self.tokenizer.chat_template = self._template
                return
            try:
                self.tokenizer = _copied(tokenizer)
            except RuntimeError:  # a table has changed while it was read
                continue
            if self.same(tokenizer):
                return
        raise InputError("the tokenizer is being changed by another thread all the time; change it before the engine is used")

    def same(self, tokenizer: Any) -> bool:
        """Whether the owner's is as it was. Takes some 20 microseconds, however large the vocabulary is.

        What escapes is not followed, and changes nothing here: the flags of one of more than :data:`FEW` added tokens, or a word of
        the vocabulary that becomes one; and what a tokenizer's own Python code keeps elsewhere.
        """
        return self._stamp(tokenizer) == (self._template, self._rest)

    def _stamp(self, tokenizer: Any) -> tuple[Any, tuple[Any, ...]]:
        """The chat template, and what else differs when the owner has changed something."""
        fields = vars(tokenizer)
        named = {name: _state(token) for name, token in fields.get("_special_tokens_map", {}).items()}
        extra = [_state(token) for token in fields.get("_extra_special_tokens", ())]
        backend = fields.get("_tokenizer")
        own = self._of_backend(backend) if isinstance(backend, Tokenizer) else self._of_python(tokenizer)
        return copy.deepcopy(tokenizer.chat_template), (self._end, named, extra, *own)

    def _of_backend(self, backend: Tokenizer) -> tuple[Any, ...]:
        parts = [None if (part := getattr(backend, name)) is None else part.__getstate__() for name in _PARTS]
        model = backend.model
        flags = [getattr(model, name, None) for name in _MODEL]
        added = repr(backend.get_added_tokens_decoder()) if self._each else backend.id_to_token(self._end)
        return backend, backend.get_vocab_size(False), added, parts, type(model), flags

    def _of_python(self, tokenizer: Any) -> tuple[Any, ...]:
        added = vars(tokenizer).get("_added_tokens_decoder", {})
        return type(tokenizer), len(tokenizer), [(i, _state(token)) for i, token in added.items()] if self._each else len(added)


def _state(token: Any) -> Any:
    """An added token's spelling and flags: two are called equal if only their spellings are."""
    return token if isinstance(token, str | None) else token.__getstate__()


def _copied(tokenizer: Any) -> Any:
    twin = copy.copy(tokenizer)
    for name, value in [*vars(tokenizer).items()]:
        if isinstance(value, Tokenizer):
            value = Tokenizer.from_str(value.to_str())
            value.no_truncation()
            value.no_padding()
            value.encode_special_tokens = tokenizer.split_special_tokens
            if getattr(value.model, "dropout", None):
                value.model.dropout = None
        elif name not in _SPENT:
            value = _deep(value)
        vars(twin)[name] = value
    return twin


def _deep(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except RuntimeError:
        raise
    except Exception:  # what cannot be copied is shared: mistral-common's, whose file may be gone, are only read
        return value
