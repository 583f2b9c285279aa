"""The model's chat template: rendered with the real texts, and told where they lie in what comes out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.encoding import NONCE, THOUGHTS, Encoder, added_tokens, knows_mistral
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.tools import Tool

#: Used when a tokenizer has no chat template: plain text, the question on a line of its own, then ``Answer:``.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}\nAnswer:"
    "{% else %} {{ message['content'] }}\n\n{% endif %}{% endfor %}"
)

# Templates that print today's date would give another prefix, and so another key, every day. They get this one, by the
# variable some of them read and by a macro in the place of transformers' function.
_DATE = "26 Jul 2024"
_STRFTIME = "".join(
    f" | replace('{code}', '{text}')"
    for code, text in {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}.items()
)
_PINNED_CLOCK = "{% macro strftime_now(format) %}{{ format" + _STRFTIME + " }}{% endmacro %}"

# Put into texts before they are rendered, and gone before the prompt is tokenised. Plain letters, so that JSON leaves them.
_BREAK = f"[[kvzip {NONCE}]]"  # in a control token's spelling: no template takes it for one, and it is told from the template's
_MARK = re.compile(rf"\[\[kvzip {NONCE}(?: (\d+))?\]\]")

#: A place in a turn's text: the turn's number, and the character.
Place = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """A rendered prompt.

    Attributes:
        text: spelled, see :class:`~kvzip_memory.prompting.encoding.Encoder`.
        at: where in it each of the places lies that were asked for.
    """

    text: str
    at: tuple[int, ...]


class ChatTemplate:
    """Renders turns with a model's own template.

    Args:
        tokenizer: a transformers tokenizer.
        variables: handed to the template.

    Attributes:
        source: the template's text, which is part of a context's key.
        variables: that the template gets.
        encoder: makes ids of what is rendered.
        control_ids: tokens that only the template may write.
        thought: what the model writes around its reasoning, None if it does not.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self.variables: dict[str, Any] = {"date_string": _DATE, **(variables or {})}
        added = added_tokens(tokenizer)
        if knows_mistral(tokenizer):
            self.source, self.variables = "", dict(variables or {})
        elif tokenizer.chat_template is None:
            self.source = PLAIN_TEMPLATE
            first = tokenizer("a").input_ids[:1]
            adds_bos = bool(first) and first[0] == tokenizer.bos_token_id
            self.variables["bos_token"] = tokenizer.bos_token if adds_bos else ""
        else:
            self.source = tokenizer.get_chat_template()
        self._sources = [self.source]  # without tools, and with them where that is another one
        if isinstance(tokenizer.chat_template, Mapping) and "tool_use" in tokenizer.chat_template:
            self._sources.append(tokenizer.chat_template["tool_use"])
        self._sources = [_PINNED_CLOCK + source if "strftime_now" in source else source for source in self._sources]
        self.source = "\n".join(self._sources)
        # Special tokens, and the template's own tags (such as <think>) even where they are not flagged special.
        control = {
            i: token.content
            for i, token in added.items()
            if len(token.content) > 1 and (token.special or (len(token.content.strip()) > 2 and token.content in self.source))
        }
        self.control_ids = frozenset(control)
        #: Whether results stand in tags that are words of the vocabulary, not control tokens.
        self.frames_in_words = "</tool_response>" in self.source and "</tool_response>" not in control.values()
        self.encoder = Encoder(tokenizer, control)
        written = {*control.values(), *(token.content for token in added.values())}
        self.thought = next((tags for tags in THOUGHTS if tags[1] in self.source or {*tags} <= written), None)
        # A text has a break behind every sign that a control token begins with: a template may cut out what stands between two parts of
        # one. Of those that begin with letters, as words do, only what a text spells is broken.
        signs = {content[0] for content in control.values() if not content[0].isalnum() and not content[0].isspace()}
        words = [content for content in control.values() if content[0] not in signs]
        begins = [re.escape(sign) for sign in sorted(signs)] + [f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in words]
        self._begins = re.compile("|".join(begins) or "(?!)")
        # A control token may also be spelled across the border of a text and the template.
        spelled = [content for content in control.values() if len(content) > 1]
        self._heads = {content[:n] for content in spelled for n in range(1, len(content))}
        self._tails = {content[n:] for content in spelled for n in range(1, len(content))}
        self._longest = max(map(len, spelled), default=0)
        if knows_mistral(tokenizer):
            self.source = self._mistral_source()

    def layout(self, turns: Sequence[Message], tools: Sequence[Tool] = (), places: Sequence[Place] = (), moves: bool = False) -> Layout:
        """The prompt of these turns, and where the given places of their texts are in it.

        A place in white space that the template trims is where that was.

        Args:
            turns: messages in our one form. Marks of blocks in their texts do not show and do not count.
            moves: whether a system prompt may be shown behind other turns.

        Raises:
            InputError: the template refuses these turns, or does not show all of them once and in order.
        """
        turns = [{**turn, "content": turn["content"].replace(CUT, "")} for turn in turns]
        text = self._clean(self._rendered(turns, tools, []))[0]
        ends = [(number, len(turn["content"])) for number, turn in enumerate(turns) if turn["content"]]
        marked = [*ends, *places]
        clean, at = self._clean(self._rendered(turns, tools, marked))
        if clean != text:  # a mark keeps white space from being trimmed
            at = self._clean(self._rendered(turns, tools, [_inside(turns, place) for place in marked]))[1]
            self._check(turns, ends, at, moves)
            return Layout(text, self._by_turns(turns, tools, places, text))
        self._check(turns, ends, at, moves)
        try:
            return Layout(text, tuple(at[len(ends) + number][0] for number in range(len(places))))
        except KeyError:
            raise InputError("the model's chat template does not show a text that a context ends with") from None

    def shows(self, turns: Sequence[Message], tools: Sequence[Tool] = (), texts: Sequence[str] = ()) -> bool:
        """Whether the template shows all of these turns and, of their tools and calls, these texts."""
        try:
            text = self.layout(turns, tools).text
        except InputError:
            return False
        return all(said in text for said in texts)

    def opens_thought(self, text: str) -> bool:
        """Whether a prompt ends where the model's reasoning has begun."""
        return self.thought is not None and self.encoder.unspell(text[-256:]).rstrip().endswith(self.thought[0])

    def _by_turns(self, turns: Sequence[Message], tools: Sequence[Tool], places: Sequence[Place], text: str) -> tuple[int, ...]:
        """Where places are in the rendered text, some texts of which the template trims, or looks at."""
        found = dict[Place, int]()
        for number in {number for number, _ in places}:
            own = [place for place in places if place[0] == number]
            for candidates in (own, [_inside(turns, place) for place in own]):
                clean, at = self._clean(self._rendered(turns, tools, candidates))
                if clean == text and len(at) == len(own):
                    found |= {place: at[i][0] for i, place in enumerate(own)}
                    break
            else:  # a mark changes what comes before it, not what follows
                found |= {place: self._by_what_follows(turns, tools, _inside(turns, place), text) for place in own}
        return tuple(found[place] for place in places)

    def _by_what_follows(self, turns: Sequence[Message], tools: Sequence[Tool], place: Place, text: str) -> int:
        clean, at = self._clean(self._rendered(turns, tools, [place]))
        rest = clean[at[0][0] :] if at.get(0) else None
        if rest is None or not text.endswith(rest):
            raise InputError("the model's chat template changes texts in a way that is not understood; pass a plain chat_template")
        return len(text) - len(rest)

    def _check(self, turns: Sequence[Message], ends: Sequence[Place], at: Mapping[int, Sequence[int]], moves: bool) -> None:
        """That every text is shown once, and in order; a text beside calls may not be shown."""
        last = -1
        for number, (turn, _) in enumerate(ends):
            found = at.get(number, ())
            may_move = moves and turns[turn]["role"] == "system"
            if not found and turns[turn].get("tool_calls"):
                continue
            if len(found) != 1 or (found[0] < last and not may_move):
                raise InputError("the model's chat template drops, repeats or reorders messages; pass a plain chat_template")
            last = last if may_move else found[0]

    def _clean(self, rendered: str) -> tuple[str, dict[int, list[int]]]:
        """A rendered prompt spelled and without marks, and where the marks stood."""
        spelled, texts, at, length = self.encoder.spell(rendered), list[str](), dict[int, list[int]](), 0
        start = 0
        for mark in _MARK.finditer(spelled):
            texts.append(spelled[start : mark.start()])
            length += mark.start() - start
            if mark[1] is not None:
                at.setdefault(int(mark[1]), []).append(length)
            start = mark.end()
        return "".join([*texts, spelled[start:]]), at

    def guarded(self, text: str, places: Sequence[tuple[int, str]] = (), tags: Sequence[int] = ()) -> str:
        """A text with breaks where it could spell control tokens, but for ``tags`` that begin there, and with marks in their places."""
        breaks = [(found.end(), _BREAK) for found in self._begins.finditer(text) if found.start() not in tags]
        head, tail = text.lstrip(), text.rstrip()
        if not tags and any(head[:n] in self._tails for n in range(1, min(len(head), self._longest) + 1)):
            breaks.append((len(text) - len(head), _BREAK))
        if any(tail[-n:] in self._heads for n in range(1, min(len(tail), self._longest) + 1)):
            breaks.append((len(tail), _BREAK))
        pieces, start = list[str](), 0
        for at, mark in sorted([*breaks, *places], key=lambda item: item[0]):
            pieces += [text[start:at], mark]
            start = at
        return "".join([*pieces, text[start:]])

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.guarded(value)
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list | tuple) else value

    def _tags(self, turn: Message) -> tuple[int, ...]:
        """Where the tags are around the reasoning that an assistant's text begins with."""
        if turn["role"] != "assistant" or self.thought is None:
            return ()
        opening, closing = map(re.escape, self.thought)
        found = re.match(rf"\s*({opening}).*?({closing})", turn["content"], re.DOTALL)
        return (found.start(1), found.start(2)) if found else ()

    def _rendered(self, turns: Sequence[Message], tools: Sequence[Tool], places: Sequence[Place]) -> str:
        """The template's text, with the number of each place as a mark at it."""
        shown, names, marks = list[dict[str, Any]](), dict[Any, tuple[str, str]](), dict[int, list[tuple[int, str]]]()
        for place, (number, at) in enumerate(places):
            marks.setdefault(number, []).append((at, f"[[kvzip {NONCE} {place}]]"))
        for number, turn in enumerate(turns):
            message: dict[str, Any] = {
                "role": turn["role"],
                "content": self.guarded(turn["content"], marks.get(number, ()), self._tags(turn)),
            }
            if turn.get("reasoning"):
                message["reasoning_content"] = self.guarded(turn["reasoning"])
            for call in turn.get("tool_calls", ()):
                names[call["id"]] = call_id, name = _call_id(call), call["name"]
                function = {"name": self.guarded(name), "arguments": self._guarded(call["arguments"])}
                message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
            if turn["role"] == "tool":
                unknown = _call_id({"name": "", "arguments": turn.get("tool_call_id")}), ""
                call_id, name = names.get(turn.get("tool_call_id"), unknown)
                message |= {"tool_call_id": call_id, "name": self.guarded(name)}
            shown.append(message)
        if self._in_parts:
            shown = [{**m, "content": _part(m["content"])} if m["role"] in self._in_parts else m for m in shown]
        try:
            return self._applied(shown, self._guarded(list(tools)) or None)
        except Exception as error:  # templates raise whatever they like
            roles = [turn["role"] for turn in turns]
            raise InputError(f"the model's chat template does not accept this conversation, of the roles {roles}: {error}") from error

    @cached_property
    def _in_parts(self) -> frozenset[str]:
        """Roles whose texts show only as parts of a message, as in some templates of models that also see."""
        call = {"id": "123456789", "type": "function", "function": {"name": "a", "arguments": {}}}
        found = set[str]()

        def shows(role: str, content: Any) -> bool:
            said: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            for message in said:
                message["content"] = _part("a") if message["role"] in found else "a"
            tried = {"role": role, "content": content}
            if role == "tool":
                said, tried = [said[0], {**said[1], "tool_calls": [call]}], {**tried, "tool_call_id": call["id"], "name": "a"}
            talks = {"user": [tried], "system": [tried, said[0]], "assistant": [said[0], tried], "tool": [*said, tried]}
            try:
                text = self._applied(talks[role], None)
            except Exception:  # templates raise whatever they like
                return False
            return NONCE in text and not re.search("""['"]type['"]: ?['"]text['"]""", text)

        for role in () if knows_mistral(self._tokenizer) else ("user", "assistant", "system", "tool"):
            if not shows(role, NONCE) and shows(role, _part(NONCE)):
                found.add(role)
        return frozenset(found)

    def _applied(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        if knows_mistral(self._tokenizer):
            return self._decoded(self._mistral_ids(messages, tools))
        return self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self._sources[-1 if tools else 0],
            tokenize=False,
            add_generation_prompt=True,
            **self.variables,
        )

    # mistral-common makes ids at once, of pieces between control tokens. Their text, rendered so, is encoded to them again.

    def _mistral_ids(self, messages: Sequence[Any], tools: Any) -> list[int]:
        return self._tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=True, return_dict=False, **self.variables)

    def _decoded(self, ids: Sequence[int]) -> str:
        texts, piece = list[str](), list[int]()
        for i in [*ids, None]:
            if i is None or i in self.control_ids:
                texts.append(self._tokenizer.decode(piece, skip_special_tokens=True) if piece else "")
                texts.append("" if i is None else self._tokenizer.convert_ids_to_tokens(i))
                piece = []
            else:
                piece.append(i)
        return "".join(texts)

    def _mistral_source(self) -> str:
        """In the place of a template's text: which version it is, and how it shows a call."""
        call = {"id": "123456789", "type": "function", "function": {"name": "a", "arguments": {}}}
        user = {"role": "user", "content": "a"}
        talk = [
            user,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": call["id"]},
        ]
        version = self._tokenizer.tokenizer.instruct_tokenizer.tokenizer.version.value
        alone: list[Message] = [user]
        for messages in (talk, alone):
            try:
                return f"mistral-common {version} {self._decoded(self._mistral_ids(messages, None))}"
            except Exception:  # versions that know no calls
                continue
        return f"mistral-common {version}"


def _inside(turns: Sequence[Message], place: Place) -> Place:
    """The place without the white space at either end of its text."""
    number, at = place
    text = turns[number]["content"]
    return number, max(min(at, len(text.rstrip())), len(text) - len(text.lstrip())) if text.strip() else at


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _call_id(call: Mapping[str, Any]) -> str:
    """An id as Mistral's templates want them, made of what is called: the ids of frameworks are random and would be misses."""
    return hashlib.sha256(json.dumps([call["name"], call["arguments"]], default=str).encode()).hexdigest()[:9]
