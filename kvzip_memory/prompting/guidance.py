"""Guided decoding: answers that keep to a JSON schema or another grammar, by masking logits. llguidance does the work.

Why llguidance, among three libraries, is measured in ``benchmarks/guidance.py``.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from llguidance.hf import from_tokenizer
from torch import Tensor

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.alphabet import Alphabet
from kvzip_memory.prompting.cleaning import MOST_OF_SCHEMA, check_nesting
from kvzip_memory.prompting.encoding import THOUGHTS, Encoder, added_tokens, knows_mistral, token_bytes
from kvzip_memory.prompting.endings import Ending, Unknown, shortest
from kvzip_memory.prompting.places import Place
from kvzip_memory.prompting.reach import Reach
from kvzip_memory.prompting.schemas import contradiction, guiding, json_rule, with_room
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.sharing import Shared

#: A grammar may have so many characters.
MOST_OF_GRAMMAR = 1_000_000


class Grammar(Shared):
    """What an answer may be; compiled, and used by any number of answers at a time.

    Args:
        matcher: at the beginning.
        alphabet: of the matcher's vocabulary.
        symbolic: a matcher of the same grammar and of the alphabet.
        slack: an answer that could have ended so many tokens ago may end, too. More than 0 where it may be any text.
    """

    _way_out = "make it from its schema there"

    def __init__(self, matcher: LLMatcher, alphabet: Alphabet, symbolic: LLMatcher, slack: int = 0) -> None:
        self._matcher, self._alphabet, self._symbolic, self._slack = matcher, alphabet, symbolic, slack

    def start(self, limit: int | None = None) -> Guide:
        """The guide of one answer.

        Args:
            limit: the guide sees to it that the answer ends within so many tokens, unless :attr:`least` are more, or it is too much to
                look at how.
        """
        reach = None
        if limit is not None and self.least <= limit:
            ending = self._shortest if isinstance(self._shortest, Ending) else None
            reach = Reach(self._alphabet, self._symbolic.deep_copy(), ending, limit, self.free)
        return Guide(self._matcher.deep_copy(), self._slack, reach)

    @property
    def free(self) -> bool:
        """Whether an answer may be any text."""
        return self._slack > 0

    @property
    def least(self) -> int:
        """Tokens of the shortest answer, or fewer where a grammar is too large to tell."""
        return len(self._shortest.tokens) if isinstance(self._shortest, Ending) else self._shortest

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        return self._alphabet.eos_ids

    @cached_property
    def _shortest(self) -> Ending | int:
        try:
            return shortest(self._alphabet, self._symbolic, Place())
        except Unknown as unknown:
            return unknown.least


class Guide:
    """Where in its grammar one answer is."""

    def __init__(self, matcher: LLMatcher, slack: int, reach: Reach | None = None) -> None:
        self._matcher, self._slack, self._reach = matcher, slack, reach
        self._owed = 0  # tokens since the answer could have ended

    def mask(self, logits: Tensor) -> Tensor:
        """``logits [vocab]`` with minus infinity where a token cannot follow."""
        if self._reach is not None and self._reach.only is not None:
            allowed = torch.zeros(logits.numel(), dtype=torch.bool)
            allowed[self._reach.only] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = torch.from_numpy(np.unpackbits(bits, count=logits.numel(), bitorder="little").view(bool))
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token: int) -> bool:
        """The answer goes on with ``token``, one that the mask allowed; False, and nothing happens, if it could not end in time then."""
        self._matcher.consume_token(token)
        complete = self._matcher.is_accepting()
        if self._reach is not None and not self._reach.take(token, complete):
            self._matcher.rollback(1)
            return False
        self._owed = 0 if complete else self._owed + 1
        return True

    def give_up(self) -> None:
        """The next token must be one that ends the answer."""
        if self._reach is not None:
            self._reach.give_up()

    @property
    def hurried(self) -> bool:
        """Whether the answer was not free to go on as the grammar allows: it had to end in time, or went round in circles."""
        reach = self._reach
        return reach is not None and (reach.forced or (reach.left == 0 and not self.ended))

    def forced(self) -> list[int]:
        """Tokens that must follow, spelled as the tokenizer spells them; a model may still spell them otherwise."""
        return list(self._matcher.compute_ff_tokens())

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._owed <= self._slack

    @property
    def ended(self) -> bool:
        """Whether the answer must end here."""
        return bool(self._matcher.is_stopped())


class Guidance(Shared):
    """Makes grammars for one tokenizer. Safe for threads; the vocabulary is prepared when first needed (0.3 to 5 s).

    Args:
        tokenizer: a fast transformers tokenizer, or one of mistral-common's.
        vocab_size: of the model, which may be larger than the tokenizer's.
        eos_ids: ids that end an answer.
    """

    _way_out = "make an engine there"

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, sorted(eos_ids)
        self._size = max(vocab_size, len(tokenizer))
        self._lock = threading.Lock()
        refuse_after_fork(self, "_lock")
        self._prepared: LLTokenizer | None = None
        self._alphabet: Alphabet | None = None
        added = added_tokens(tokenizer)
        self.added = {token.content: i for i, token in added.items()}
        # What may stand in free text: reasoning, too, some of whose tokens are special.
        thoughts = {tag for tags in THOUGHTS for tag in tags}
        self._plain_added = sorted(i for i, token in added.items() if not token.special or token.content in thoughts)
        self._added_pattern = re.compile("|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) or r"(?!)")

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that validates against a schema, properties in its order, no others than it names.

        Raises:
            InputError: not a schema, one that is too deep or too large, or one with a keyword that cannot be kept to; names it.
        """
        check_nesting(schema, "the schema", MOST_OF_SCHEMA)
        try:
            return self.lark(f"start: {json_rule(schema)}")
        except InputError as error:
            if not isinstance(schema, Mapping):
                raise
            names = guiding(schema)[1]
            why = f": {contradiction(schema)}" if "Unsatisfiable" in str(error) else ""
            left = f"; what cannot be kept to is {', '.join(map(repr, names))}" if names else ""
            raise InputError(f"{error}{why}{left}") from None

    def lark(self, grammar: str, slack: int = 0) -> Grammar:
        """A grammar in llguidance's variant of Lark. ``slack`` as for :class:`Grammar`.

        Raises:
            InputError: what is wrong with it, or that it is too long.
        """
        if len(grammar) > MOST_OF_GRAMMAR:
            raise InputError(
                f"the schemas of an answer and its calls take {len(grammar):,} characters; at most {MOST_OF_GRAMMAR:,} can guide: "
                "give fewer tools, or schemas that ask for less"
            )
        with self._lock:
            if self._prepared is None or self._alphabet is None:
                try:
                    prepare = _from_mistral if knows_mistral(self._tokenizer) else from_tokenizer
                    self._prepared = prepare(self._tokenizer, n_vocab=self._size, eos_token=self._eos_ids)
                except ValueError as error:
                    raise InputError(f"guided decoding cannot use this tokenizer ({error}); use its fast version") from error
                self._alphabet = Alphabet(self._prepared, self._eos_ids)
            prepared, alphabet = self._prepared, self._alphabet
        compiled = LLMatcher.grammar_from_lark(grammar)
        matcher, symbolic = with_room(lambda: [LLMatcher(made, compiled, log_level=0) for made in (prepared, alphabet.tokenizer)])
        if matcher.is_error():
            raise InputError(f"answers cannot be guided by this schema: {_reason(matcher)}")
        return Grammar(matcher, alphabet, symbolic, slack)

    def literal(self, text: str) -> str:
        """A grammar's expression for a text that may spell control tokens, which are addressed by their ids.

        A space behind one may be left out: SentencePiece puts it there, other tokenizers of the same family do not.
        """
        parts, start = [], 0
        for found in self._added_pattern.finditer(text):
            parts += [*_spaced(text[start : found.start()], start > 0), f"<[{self.added[found[0]]}]>"]
            start = found.end()
        parts += _spaced(text[start:], start > 0)
        return " ".join(part for part in parts if part != '""') or '""'

    def free_text(self, without: str | None) -> str:
        """The rules ``free``, any text without a given spelling or token, and ``TEXT``."""
        tokens = [i for i in self._plain_added if without is None or i != self.added.get(without)]
        unspelled = "" if without is None or without in self.added else f" & ~/(?s:.*){_in_regex(without)}(?s:.*)/"
        others = f" | <[{','.join(map(str, tokens))}]>" if tokens else ""
        return f"free: (TEXT{others})*\nTEXT: /(?s:.+)/{unspelled}"


class _Vocabulary:
    """mistral-common's tokens, as TokenizerWrapper asks for them."""

    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        control, spelled = added_tokens(tokenizer), token_bytes(tokenizer)
        self.eos_token_id, self.special_token_ids = tokenizer.eos_token_id, sorted(control)
        self.tokens = [control[i].content.encode() if i in control else spelled(i) for i in range(len(tokenizer))]
        if tokenizer.unk_token_id not in control:  # which no text is made of
            self.tokens[tokenizer.unk_token_id] = b""
        self._encoder = Encoder(tokenizer, {})

    def __call__(self, text: str) -> list[int]:
        return self._encoder.continued(text)


def _from_mistral(tokenizer: Any, n_vocab: int, eos_token: Sequence[int]) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=n_vocab, eos_token=[*eos_token])


def _spaced(text: str, behind: bool) -> list[str]:
    """Literals for a text, which may lack its first space if it stands ``behind`` a control token."""
    return ['" "?', json.dumps(text[1:])] if behind and text.startswith(" ") else [json.dumps(text)]


def _in_regex(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def _reason(matcher: LLMatcher) -> str:
    """What is wrong with a grammar, without where in it."""
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", matcher.get_error().strip().splitlines()[0]).rstrip(":")
