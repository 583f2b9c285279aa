"""A prompt is what the model was trained on: what ``apply_chat_template`` gives, token for token, on every kind of tokenizer.

``KVZIP_STRESS=1`` runs every family on every kind, and prints how many conversations of each are equal.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from conftest import STRESS
from kinds import KINDS, tiny
from kvzip_memory import Document, InputError, KVzipEngine
from kvzip_memory.prompting.frames import SEPARATOR
from kvzip_memory.prompting.messages import as_message
from kvzip_memory.prompting.prompts import PromptBuilder
from kvzip_memory.prompting.tools import in_plain_turns
from makers import mistral
from pairs import PAIRS, TINY, Pair
from templates import Family

Messages = list[dict[str, Any]]
#: The day of every prompt.
DAY = datetime.date(2024, 7, 26)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f'Tells the "{name}" of a town, as of today.',
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Its name."}}, "required": ["town"]},
        },
    }
    for name in ("weather", "height")
]


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def calls(*asked: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """An answer of calls. Their ids are made of what is called, as prompts write them."""
    made = []
    for name, arguments in asked:
        digest = hashlib.sha256(json.dumps([name, arguments]).encode()).hexdigest()[:9]
        made.append({"id": digest, "type": "function", "function": {"name": name, "arguments": arguments}})
    return {"role": "assistant", "content": "", "tool_calls": made}


def results(answer: Mapping[str, Any], *texts: str) -> Messages:
    pairs = zip(answer["tool_calls"], texts, strict=True)
    return [{"role": "tool", "content": text, "tool_call_id": call["id"], "name": call["function"]["name"]} for call, text in pairs]


SYSTEM = turn("system", "Be brief, and say so. /no_think")
ONE = calls(("weather", {"town": 'O"slo é'}))
TWO = calls(("weather", {"town": "Oslo"}), ("height", {"town": "Rome", "in": ["m", 3.5, None]}))
DOCUMENT = "# Lamp\n\nIt is wound at dusk; the code is 8306.\n\n  - Ferdinand carries oil\n\ton Tuesdays (about 5 l).\n"

CONVERSATIONS: dict[str, tuple[Messages, list[dict[str, Any]] | None]] = {
    "question": ([turn("user", "What is the capital of France?")], None),
    "system": ([SYSTEM, turn("user", "What is it?")], None),
    "turns": (
        [
            SYSTEM,
            turn("user", "Name a town."),
            turn("assistant", "Oslo."),
            turn("user", "Another?"),
            turn("assistant", "Rome"),
            turn("user", "Why"),
        ],
        None,
    ),
    "call": (
        [
            SYSTEM,
            turn("user", "How warm is Oslo?"),
            ONE,
            *results(ONE, '{"celsius": 4}'),
            turn("assistant", "4 degrees."),
            turn("user", "And Rome?"),
        ],
        TOOLS,
    ),
    "two calls": ([turn("user", "How warm is Oslo, how high Rome?"), TWO, *results(TWO, "4 degrees", '{"m": 21}')], TOOLS),
    "greeting": ([turn("assistant", "Hello! What can I do?"), turn("user", "Sing."), turn("assistant", "La."), turn("user", "More")], None),
    "thinking": (
        [turn("user", "Say it."), turn("assistant", "<think>\nHm, what?\n</think>\n\nIt."), turn("user", "Again, please.")],
        None,
    ),
    "white space": (
        [
            turn("system", "  Be brief. \n"),
            turn("user", " leading and trailing "),
            turn("assistant", "\nstarts with a line\n\n"),
            turn("user", "\t tab\r\nCRLF \r\n\r\n  x   y\n \n"),
            turn("assistant", "ends."),
            turn("user", "\n\n...what?  "),
        ],
        None,
    ),
    "unicode": (
        [
            turn("user", "Zoë's cafe\u0301 ﬁne 日本語 🦙👩‍👩‍👧 ½ ① \u00a0x\u200by"),
            turn("assistant", "x" * 300 + "ಠ_ಠ 1234567890 don't!"),
            turn("user", "¿Qué? «да» \U0001f642"),
        ],
        None,
    ),
    "document": ([SYSTEM, turn("user", f"{DOCUMENT}\n\nWhat does the page say?")], None),
}


pairs = pytest.mark.parametrize("name", PAIRS)


# -- the oracle --------------------------------------------------------------------------------------------------------


def as_written(family: Family, messages: Sequence[Mapping[str, Any]], tools: Any, fixed: bool = False) -> tuple[Messages, Any]:
    """Messages and tools as one who knows what the template takes would write them.

    ``fixed``: with the system prompt in front of what is said first, where the template would move it on with what is said last.
    """
    shown: list[Any] = [*messages]
    if family.tools is None and (tools or any(message["role"] == "tool" for message in messages)):
        shown = [*in_plain_turns([as_message(message) or {} for message in messages], tools or ())]
        tools = None
    if family.tools == "llama3":
        shown = list(_one_by_one(shown))
    if (family.system == "refused" or (family.system == "last" and fixed)) and shown[0]["role"] == "system":
        following = shown[1]["content"] if len(shown) > 1 and shown[1]["role"] == "user" else None
        shown[:2] = [turn("user", shown[0]["content"] if following is None else shown[0]["content"] + SEPARATOR + following)]
    if family.alternates:
        joined: Messages = []
        for message in shown:
            if joined and joined[-1]["role"] == message["role"] != "tool":
                joined[-1] = turn(message["role"], joined[-1]["content"] + SEPARATOR + message["content"])
            else:
                joined.append(message)
        shown = joined
    return shown, tools


def _one_by_one(messages: Messages) -> Iterator[dict[str, Any]]:
    """Two calls of an answer as two answers, each before its result."""
    for number, message in enumerate(messages):
        made = message.get("tool_calls", ())
        if len(made) > 1:
            for i, call in enumerate(made):
                yield {**message, "tool_calls": [call]}
                yield messages[number + 1 + i]
        elif not (message["role"] == "tool" and _is_second(messages, number)):
            yield message


def _is_second(messages: Messages, number: int) -> bool:
    asked = next(message for message in reversed(messages[:number]) if message["role"] != "tool")
    return len(asked["tool_calls"]) > 1


class _Refused(Exception):
    """The template does not take these messages, or they hold control tokens, however they are written."""


def rendered(pair: Pair, shown: Messages, tools: Any) -> str:
    """The rendering of messages as they are, on the day that prompts print."""
    template = re.sub(r"strftime_now\('(.*?)'\)", lambda found: repr(DAY.strftime(found[1])), pair.tokenizer.chat_template)
    kwargs = {"date_string": "26 Jul 2024", "chat_template": template, **pair.family.kwargs}
    shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} if m["role"] in pair.family.parts else m for m in shown]
    try:
        return pair.tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:
        raise _Refused from error


def own_ids(pair: Pair, messages: Sequence[Mapping[str, Any]], tools: Any = None, fixed: bool = False) -> list[int]:
    """Ids of the rendering as ``apply_chat_template(tokenize=True)`` makes them.

    Raises:
        _Refused: see there.
    """
    shown, tools = as_written(pair.family, messages, tools, fixed)
    text = rendered(pair, shown, tools)
    for token in [*pair.tokenizer.all_special_tokens, *pair.family.special, *pair.family.tags]:
        if any(token in message["content"] for message in shown):
            without = [{**message, "content": message["content"].replace(token, "")} for message in shown]
            if rendered(pair, without, tools).count(token) != text.count(token):
                raise _Refused
    return pair.tokenizer(text, add_special_tokens=False).input_ids


def asked(builder: PromptBuilder, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
    return builder.question(None, messages, tools)


def equal_ones(pair: Pair) -> dict[str, bool | None]:
    """Of each conversation, whether its prompt is the model's own; None where the template has no rendering of it to compare with."""
    builder, equal = pair.builder, {}
    for name, (messages, tools) in CONVERSATIONS.items():
        try:
            expected = own_ids(pair, messages, tools)
        except _Refused:
            equal[name] = None
            continue
        try:
            equal[name] = asked(builder, messages, tools) == expected
        except InputError:
            equal[name] = False
    return equal


# -- equality ----------------------------------------------------------------------------------------------------------


@pairs
def test_a_prompt_is_the_models_own_rendering(name: str) -> None:
    equal = equal_ones(PAIRS[name])
    assert [conversation for conversation, same in equal.items() if same is False] == []
    assert sum(same is not None for same in equal.values()) >= 7


def test_a_prompt_of_the_demo_model_is_its_own_rendering(smollm2: KVzipEngine) -> None:
    pair = Pair("smollm2", Family(None), lambda *_: smollm2.tokenizer)
    assert {conversation for conversation, same in equal_ones(pair).items() if not same} == set()


@pairs
def test_a_greeting_first_works_on_every_template(name: str) -> None:
    pair = PAIRS[name]
    messages, _ = CONVERSATIONS["greeting"]
    ids = asked(pair.builder, messages)
    places = [place(pair, ids, message["content"]) for message in messages]
    assert -1 not in places
    assert places == sorted(places)


DOCUMENTS = {
    "word": "The lamp is wound at dusk by Ferdinand",
    "lines": "# Lamp\n\nIt is wound at dusk; the code is 8306.\n  x\n\tAnd so on",
    "letters": "日本語 🦙 Zoë don't 1234",
}
#: Texts whose last token may merge with the line break behind them, or that a template trims.
LOOSE_DOCUMENTS = {"point": "It is wound at dusk.", "line": DOCUMENT, "spaces": "  It is wound at dusk;  "}


def document_and_question(pair: Pair, text: str, system: str | None) -> tuple[list[int], list[int], list[int]]:
    """A document's prefix, the ids of a question behind it, and both as the model's own rendering."""
    builder = pair.builder
    prompt = builder.documents([Document(text)], system)
    messages = [*([turn("system", system)] if system else []), turn("user", f"{text}\n\nWhat is it?")]
    return [*prompt.token_ids], builder.question(prompt.recipe, "What is it?"), own_ids(pair, messages)


@pairs
@pytest.mark.parametrize("system", [None, "Be brief."], ids=["", "system"])
def test_a_document_and_a_question_are_the_models_own_rendering(name: str, system: str | None) -> None:
    for text in DOCUMENTS.values():
        assert_equal(*document_and_question(PAIRS[name], text, system), PAIRS[name])


@pairs
def test_behind_a_document_at_most_a_merge_at_the_cut_differs(name: str) -> None:
    for text in LOOSE_DOCUMENTS.values():
        assert_joined(*document_and_question(PAIRS[name], text, None), PAIRS[name])


@pairs
def test_the_places_of_a_documents_tokens_are_known(name: str) -> None:
    builder = PAIRS[name].builder
    for text in [*DOCUMENTS.values(), *LOOSE_DOCUMENTS.values()]:
        alone = builder.documents([Document(text)]).sources[0]
        assert len(builder.offsets(text)) == alone.end - alone.start
        behind = builder.documents([Document("A page."), Document(text)]).sources[1]
        assert 0 <= len(builder.offsets(text, alone=False)) - (behind.end - behind.start) <= 2  # less what is read with the question


def assert_equal(prefix: list[int], rest: list[int], whole: list[int], pair: Pair) -> None:
    """No token of a maker's vocabulary spans these cuts; the tiny ones have such."""
    if pair in TINY:
        assert_joined(prefix, rest, whole, pair)
    else:
        assert [*prefix, *rest] == whole


def assert_joined(prefix: list[int], rest: list[int], whole: list[int], pair: Pair) -> None:
    """``prefix + rest`` is ``whole`` but for a merge across the cut: two tokens on either side, of the same text."""
    head = next((i for i, (x, y) in enumerate(zip(prefix, whole, strict=False)) if x != y), min(len(prefix), len(whole)))
    tail = next((i for i, (x, y) in enumerate(zip(rest[::-1], whole[::-1], strict=False)) if x != y), min(len(rest), len(whole)))
    assert head >= len(prefix) - 2, pair.tokenizer.convert_ids_to_tokens(prefix[head:])
    assert tail >= len(rest) - 2, pair.tokenizer.convert_ids_to_tokens(rest[: len(rest) - tail])
    assert pair.tokenizer.decode([*prefix, *rest]) == pair.tokenizer.decode(whole)


def cuts(pair: Pair, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """After how many messages a context may end."""
    return [
        k
        for k in range(1, len(messages))
        if not messages[k - 1].get("tool_calls")
        and messages[k]["role"] != "tool"
        and not (messages[k - 1]["role"] == "system" and (k > 1 or pair.family.system != "own"))
    ]


@pairs
def test_turns_and_what_follows_them_are_the_models_own_rendering(name: str) -> None:
    pair = PAIRS[name]
    builder = pair.builder
    different = []
    for conversation, (messages, tools) in CONVERSATIONS.items():
        if (tools and pair.family.tools == "mistral") or (conversation == "greeting" and pair.family.alternates):
            continue  # tools are shown before the last question only, which another one no longer is
        try:
            whole = own_ids(pair, messages, tools, fixed=True)
        except _Refused:
            continue
        checked = [as_message(message) or {} for message in messages]
        for k in cuts(pair, messages):
            prompt = builder.conversation(checked[:k], tools=tools)
            compare = assert_joined if conversation == "white space" else assert_equal  # a space at the cut may merge
            try:
                compare([*prompt.token_ids], builder.question(prompt.recipe, checked[k:], tools), whole, pair)
            except AssertionError:
                different.append((conversation, k))
    assert different == []


# -- Mistral's own -----------------------------------------------------------------------------------------------------

_MISTRALS = {
    "v1": Family(None, system="first"),
    "v2": Family(None, system="last", tools="mistral"),
    "v3": Family(None, system="last", tools="mistral"),
    "v7": Family(None, tools="mistral"),
    "tekken-v3": Family(None, system="last", tools="mistral"),
    "tekken-v7": Family(None, tools="mistral"),
    "tekken-v11": Family(None, tools="mistral-args"),
    "tekken-v13": Family(None, tools="mistral-args"),
}
MISTRALS = {version: family for version, family in _MISTRALS.items() if STRESS or version not in ("v2", "tekken-v7", "tekken-v11")}


@pytest.mark.parametrize("version", MISTRALS)
def test_a_prompt_is_what_mistral_common_encodes(version: str) -> None:
    tokenizer, family = mistral(version), MISTRALS[version]
    builder = PromptBuilder(tokenizer)
    different = []
    for conversation, (messages, tools) in CONVERSATIONS.items():
        if version == "v2" and conversation in ("call", "two calls"):
            continue  # it takes one result, and drops those of earlier questions
        shown, described = as_written(family, messages, tools)
        whole = tokenizer.apply_chat_template(shown, tools=described, add_generation_prompt=True, return_dict=False)
        if asked(builder, messages, tools) != whole:
            different.append(conversation)
    assert different == []


@pytest.mark.parametrize("version", MISTRALS)
def test_a_document_and_a_question_are_what_mistral_common_encodes(version: str) -> None:
    tokenizer = mistral(version)
    builder = PromptBuilder(tokenizer)
    for text in DOCUMENTS.values():
        prompt = builder.documents([Document(text)], "Be brief.")
        messages, _ = as_written(MISTRALS[version], [turn("system", "Be brief."), turn("user", f"{text}\n\nWhat is it?")], None)
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert [*prompt.token_ids, *builder.question(prompt.recipe, "What is it?")] == whole


# -- texts stay texts --------------------------------------------------------------------------------------------------


def spellings(pair: Pair) -> list[str]:
    """Texts that spell control tokens, and texts that come to spell them when they are cut, joined, or normalised."""
    tags = [tag for tag in pair.family.tags if tag in pair.tokenizer.chat_template]  # others are words of the vocabulary
    tokens = dict.fromkeys([*pair.family.special, *tags, *pair.tokenizer.all_special_tokens])
    attacks = ["done" + "".join(f"{token}\n{token} {token}x" for token in tokens)]
    attacks += [f"{token[:3]}{token}{token[3:]}" for token in [*tokens][:3]]
    if "unigram" not in pair.name:  # which reads the names of bytes in any text
        attacks.append("<0x0A><0x3C>s>")
    return [*attacks, "x" + "".join(map(_wide, [*tokens][:4]))]


def _wide(text: str) -> str:
    """Letters that compatibility normalisation makes of it again."""
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def filled(text: str) -> tuple[Messages, list[dict[str, Any]]]:
    """A conversation with a text everywhere that one can stand."""
    call = calls(("weather", {"town": text, text: [text]}))
    messages = [turn("system", text), turn("user", text), call, *results(call, text), turn("assistant", text), turn("user", f"{text}!")]
    described = json.loads(json.dumps(TOOLS))
    described[0]["function"]["description"] = text
    described[0]["function"]["parameters"]["properties"][text] = {"enum": [text]}
    return messages, described


def control(pair: Pair, ids: Sequence[int]) -> list[int]:
    """The control ids among some: special ones and tags of the template, without the one for unknown characters."""
    tags = {tag for tag in pair.family.tags if tag in pair.tokenizer.chat_template}
    names = {*pair.tokenizer.all_special_tokens, *pair.family.special, *tags} - {pair.tokenizer.unk_token}
    known = set(pair.tokenizer.convert_tokens_to_ids([*names]))
    return [i for i in ids if i in known]


def place(pair: Pair, ids: Sequence[int], text: str) -> int:
    """Where a text begins in what the ids spell, as far as the tokenizer keeps characters at all; -1 if it cannot be read there."""
    shown, text = pair.tokenizer.decode(ids).replace("▁", " "), text.replace("▁", " ")  # SentencePiece takes one for the other
    if "unknown" in pair.name:
        known = pair.tokenizer.get_vocab()
        found = re.search("".join(re.escape(char) if char in known or char == " " else "(<unk>)?" for char in text), shown)
        return -1 if found is None else found.start()
    if "NFKC" in pair.name or "normalized" in pair.name:
        text, shown = unicodedata.normalize("NFKC", text), unicodedata.normalize("NFKC", shown)
    return shown.find(text)


@pairs
def test_texts_never_become_control_tokens(name: str) -> None:
    pair = PAIRS[name]
    builder = pair.builder
    for attack in spellings(pair):
        harmless, tools = filled("words")
        expected = control(pair, asked(builder, harmless, tools))
        messages, described = filled(attack)
        ids = asked(builder, messages, described)
        assert control(pair, ids) == expected, attack


@pairs
def test_texts_with_spelled_control_tokens_are_kept(name: str) -> None:
    pair = PAIRS[name]
    builder = pair.builder
    for attack in spellings(pair):
        said = [turn("user", attack), turn("assistant", "Yes."), turn("user", f"{attack}!")]
        assert place(pair, asked(builder, said), f"{attack}!") > -1, attack
        prompt = builder.documents([Document(attack)], "Be brief.")
        ids = [*prompt.token_ids, *builder.question(prompt.recipe, f"{attack}?")]
        assert place(pair, ids, attack + SEPARATOR + attack + "?") > -1, attack
        assert attack.endswith(prompt.recipe.tail)  # which is read with the question
        assert place(pair, [*prompt.token_ids], attack.removesuffix(prompt.recipe.tail)) > -1, attack


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_spelled_across_a_border(kind: str) -> None:
    """Neither by a text and the template's next letters, nor by two texts."""
    template = "{{ '<|im_start|>' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '|im_end|>' }}{{ '<|im_end|>' }}{# <think> #}"
    special, tags = ("<|im_start|>", "<|im_end|>"), ("<think>",)
    tokenizer = tiny(kind, special, tags)
    tokenizer.chat_template = template
    pair = Pair(kind, Family(template, special, tags), lambda *_: tokenizer)
    builder = PromptBuilder(tokenizer)
    for first, second in [("a<|im_", "end|>b"), ("a<th", "ink>b"), ("<|im_start|", "><"), ("a<", "/s><"), ("a", "<")]:
        ids = asked(builder, [turn("system", first), turn("user", second)])
        assert control(pair, ids) == control(pair, asked(builder, [turn("system", "a"), turn("user", "b")]))
        assert place(pair, ids, first + second + "|im_end|>") > -1, (first, second)


# -- the matrix --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not STRESS, reason="KVZIP_STRESS=1 prints it")
def test_the_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for name, pair in PAIRS.items():
        equal = equal_ones(pair)
        wrong = [conversation for conversation, same in equal.items() if same is False]
        given = [same for same in equal.values() if same is not None]
        lines.append(f"{name:34} {sum(given):2} of {len(given):2}  {', '.join(wrong)}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))  # noqa: T201
    assert all(same is not False for pair in PAIRS.values() for same in equal_ones(pair).values())
