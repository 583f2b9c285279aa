"""Pieces of text join to the tokenizer's own decoding, in linear time, and what can no longer become a character is shown."""

import copy
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conftest import tiny_engine, tiny_tokenizer
from kinds import KINDS, tiny
from kvzip_memory.inference.generation import Answer, Detokenizer, decode
from kvzip_memory.prompting.reasoning import ReasoningReader
from makers import maker, mistral

BROKEN = 0xFF
PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
_LEVEL = bytes_to_unicode()
ALL = [*KINDS, "tiny", "mistral v3", "mistral tekken-v3", "maker llama2", "maker qwen3"]


@cache
def tokenizer_of(kind: str) -> Any:
    if kind == "tiny":
        return tiny_tokenizer()
    if kind.startswith("mistral "):
        return mistral(kind.removeprefix("mistral "))
    return maker(kind.removeprefix("maker ")) if kind.startswith("maker ") else tiny(kind, ["<|im_end|>"])


@cache
def byte_ids(kind: str) -> list[int] | None:
    """Ids of the single bytes; None where a tokenizer has none."""
    tokenizer = tokenizer_of(kind)
    if kind == "mistral tekken-v3":
        pieces = {tokenizer.tokenizer.instruct_tokenizer.tokenizer.id_to_byte_piece(i): i for i in range(1000, 1500)}
        return [pieces[bytes([byte])] for byte in range(256)]
    vocab = tokenizer.get_vocab()
    for spelled in ([f"<0x{byte:02X}>" for byte in range(256)], [_LEVEL[byte] for byte in range(256)]):
        if all(token in vocab for token in spelled):
            return [vocab[token] for token in spelled]
    return None


def level(kind: str) -> bool:
    """Whether all its tokens are bytes; else only what its vocabulary lacks is."""
    return kind in ("tiny", "mistral tekken-v3", "maker qwen3") or kind.startswith("bytes")


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


class Counted:
    """Counts the tokens that a copy of a tokenizer decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded, decode = copy.copy(tokenizer), 0, tokenizer.decode

        def counting(ids: Sequence[int], **options: Any) -> str:
            self.decoded += len(ids)
            return str(decode(ids, **options))

        vars(self.tokenizer)["decode"] = counting


def parts(kind: str, rng: random.Random) -> list[int]:
    """A piece of text, of characters that are spelled in bytes, or of bytes that make none."""
    tokenizer, single = tokenizer_of(kind), byte_ids(kind)
    choice = rng.randrange(4 if single else 2)
    plain = rng.choice([" It's so", "\n\nend", "  x", "naïve", "東京 🙂", "👩‍👩‍👧‍👦", " don't , do ."])
    options = {} if kind.startswith("mistral ") else {"add_special_tokens": False}
    if choice == 0:
        return (
            list(tokenizer(plain, add_special_tokens=False, **options).input_ids)
            if not options
            else list(tokenizer(plain, **options).input_ids)
        )
    if choice == 1:
        return [tokenizer.eos_token_id] * rng.randrange(3)
    assert single is not None
    if choice == 2:
        return [single[byte] for byte in rng.choice(["東", "🙂", "é", "👩‍👧"]).encode()]
    broken = rng.choice([b"\xff", b"\xe6\x9d", b"\xf0\x9f", b"\x80\x80", b"\xff\xe6", b"\xf0\x9f\x99\xff\xff", b"\xc3"]) * rng.choice(
        [1, 2, 5]
    )
    return [single[byte] for byte in broken]


@pytest.mark.parametrize("kind", ALL)
def test_pieces_join_to_the_tokenizers_own_decoding(kind: str) -> None:
    tokenizer, rng = tokenizer_of(kind), random.Random(kind)
    between = tokenizer(" and", add_special_tokens=False).input_ids
    for _ in range(60):
        ids = list[int]()
        for _ in range(rng.randrange(1, 7)):
            ids += parts(kind, rng)
            if not level(kind) or rng.random() < 0.3:  # a SentencePiece decoder spoils all bytes beside one that makes no character
                ids += between
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, **PLAIN)


@pytest.mark.parametrize("kind", [kind for kind in ALL if level(kind)])
def test_pieces_of_any_bytes_join_to_the_tokenizers_own_decoding(kind: str) -> None:
    tokenizer, single, rng = tokenizer_of(kind), byte_ids(kind), random.Random(kind)
    assert single is not None
    for _ in range(150):
        heavy = rng.choice([[0xE6, 0x9D, 0xB1, 0xFF], [0xF0, 0x9F, 0x99, 0x82, 0x80], [*range(256)], [0xC3, 0xA9, 0x41, 0xED, 0xA0]])
        ids = [single[byte] for byte in rng.choices(heavy, k=rng.randrange(1, 24))]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, **PLAIN)


@pytest.mark.parametrize("kind", ALL)
def test_bytes_that_never_make_a_character_are_shown_as_they_come_in_linear_time(kind: str) -> None:
    single = byte_ids(kind)
    if single is None:
        assert kind == "prepend unknown"  # which has no bytes at all
        return
    for broken in (b"\xff", b"\xe6", b"\xe6\x9d", b"\xf0\x9f\x99", b"\x80"):
        counted = Counted(tokenizer_of(kind))
        detokenizer, shown = Detokenizer(counted.tokenizer), ""
        ids = [single[byte] for byte in broken * 100]
        for n, token in enumerate(ids, 1):
            shown += detokenizer.push(token)
            settled = tokenizer_of(kind).decode(ids[: max(0, n - 4)], **PLAIN)
            assert len(shown) >= len(settled) - (settled.endswith("\ufffd"))
        assert shown + detokenizer.flush() == tokenizer_of(kind).decode(ids, **PLAIN)
        assert counted.decoded < 60 * len(ids)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("said", ["special", "text", "spaces", "emoji"])
def test_a_long_answer_takes_linear_time(kind: str, said: str) -> None:
    counted = Counted(tokenizer_of(kind))
    tokenizer = counted.tokenizer
    text = {"text": "It is so. ", "spaces": " \n ", "emoji": "👩‍👩‍👧‍👦"}.get(said, "")
    ids = [tokenizer.eos_token_id] * 5 if said == "special" else list(tokenizer_of(kind)(text, add_special_tokens=False).input_ids)
    ids = ids * (400 // len(ids) + 1)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer_of(kind).decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert counted.decoded < 30 * len(ids)


@pytest.mark.parametrize("kind", [kind for kind in ALL if not level(kind) and kind != "prepend unknown"])
def test_characters_that_were_shown_stay_when_a_broken_byte_follows(kind: str) -> None:
    tokenizer, single = tokenizer_of(kind), byte_ids(kind)
    assert single is not None
    ids = [single[byte] for byte in "東é".encode() + b"\xff" * 9]
    ids += tokenizer(" and", add_special_tokens=False).input_ids
    assert "".join(pieces_of(tokenizer, ids)).replace("  ", " ") == "東é" + "\ufffd" * 9 + " and"


@pytest.mark.parametrize("kind", ["tiny", "prepend", "unigram", "mistral v3"])
def test_a_stop_string_ends_an_answer_behind_bytes_that_make_no_character(kind: str) -> None:
    tokenizer, single = tokenizer_of(kind), byte_ids(kind)
    assert single is not None
    broken = [single[BROKEN]]
    stopping = tokenizer("STOP", add_special_tokens=False).input_ids
    for stop, ids in (("STOP", [*broken * 3, *stopping, *broken * 50]), ("\ufffd\ufffd", broken * 50)):
        answer, taken = Answer(), list[int]()
        tokens = (taken.append(token) or token for token in ids)
        text = "".join(decode(tokens, answer, [stop], 100, frozenset({2}), tokenizer))
        assert answer.finish_reason == "stop"
        assert answer.cut
        assert text == answer.text
        assert text.replace("\ufffd", "").strip() == ""
        assert len(taken) < 20


def test_a_reader_of_reasoning_shows_them_too() -> None:
    reader, tokenizer = ReasoningReader(("<think>", "</think>"), inside=True), tokenizer_of("tiny")
    detokenizer, shown = Detokenizer(tokenizer), ""
    single = byte_ids("tiny")
    assert single is not None
    for byte in b"\xff" * 40 + b"</think>\xff\xff\xff\xff\xff\xff":
        shown += "".join(reader.push(detokenizer.push(single[byte])))
    assert reader.reasoning == "\ufffd" * 40
    assert reader.text.startswith("\ufffd\ufffd")


def test_an_answer_cut_by_a_long_stop_string_is_read_a_few_times_only() -> None:
    """Its tokens up to the stop string stay in the session."""
    engine = tiny_engine()
    whole = engine.generate(None, "Go on.", max_new_tokens=300)
    stop = whole.text[120:260]
    session = engine.session()
    counted = Counted(session._prompts.tokenizer)
    session._prompts.tokenizer = counted.tokenizer
    reply = session.ask("Go on.", max_new_tokens=300, stop=stop)
    assert (reply.text, reply.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    ids = session._talk.ids[len(engine.prompt_ids(None, "Go on.")) :]
    assert session._text(ids).rstrip("\ufffd") == reply.text.rstrip("\ufffd")
    assert counted.decoded < 100 * 300
