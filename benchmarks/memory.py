"""Agents that remember: what they read at each turn, and what they still know at the end.

1. Reading: an agent with tools, a SQLite checkpointer and KVzipMemoryMiddleware over 40 turns. Tokens that go through the
   model at each turn, beside those of the whole prompts, which a model without a cache reads again at every call.
2. Recall: 20 facts told over turns 1-30 and asked for at turns 31-40 (ten in each of two threads that part at turn 30).
   The model with the full, uncompressed history answers greedily; every method is teacher-forced on that answer: KL(full ||
   method) per token and top-1 agreement. And each answers by itself: the same text as the full history? the fact?
   Ten folds are held against one fold in the same way.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, SummarizationMiddleware
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from tqdm import tqdm

from common import RESULTS, save, smollm2
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.conversations import Memory, Recalled
from kvzip_memory.prompting.messages import as_message
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware

SYSTEM = "You are a helpful assistant. Answer in one short sentence, from what the user has told you."
HANDBOOK = Path(__file__).parent.parent / "examples" / "handbook.md"
TRIGGER, KEEP = ("tokens", 300), ("messages", 6)
#: What is told, what is asked, and what the answer must contain: forms that the model answers with the full history at hand.
FACTS = [
    ("The access code of the boathouse is 48213.", "What is the access code of the boathouse?", "48213"),
    ("My sister's name is Nadia.", "What is my sister's name?", "Nadia"),
    ("The dentist's name is Dr Okafor.", "What is the dentist's name?", "Okafor"),
    ("The new printer is on the third floor.", "On which floor is the new printer?", "third"),
    ("The password of the guest network is maple.", "What is the password of the guest network?", "maple"),
    ("The spare key is under the flowerpot.", "Where is the spare key?", "flowerpot"),
    ("The ferry to Arran costs 18 pounds.", "How much does the ferry to Arran cost?", "18"),
    ("The access code of the greenhouse is 90517.", "What is the access code of the greenhouse?", "90517"),
    ("The gardener's name is Tobias.", "What is the gardener's name?", "Tobias"),
    ("The parcel weighs 12 kilograms.", "How much does the parcel weigh?", "12"),
    ("The number of the locker is 219.", "What is the number of the locker?", "219"),
    ("The teacher's name is Mrs Quill.", "What is the teacher's name?", "Quill"),
    ("The bridge was built in 1887.", "When was the bridge built?", "1887"),
    ("The rent of the flat is 640 pounds.", "What is the rent of the flat?", "640"),
    ("The lecture is on Thursday.", "On which day is the lecture?", "Thursday"),
    ("The tower has 214 steps.", "How many steps does the tower have?", "214"),
    ("The doctor's telephone number is 5529.", "What is the doctor's telephone number?", "5529"),
    ("The wedding is in June.", "In which month is the wedding?", "June"),
    ("The baker's name is Amadou.", "What is the baker's name?", "Amadou"),
    ("The swimming pool closes at ten o'clock.", "When does the swimming pool close?", "ten"),
]
SMALL_TALK = [
    ("Thank you.", "You are welcome."),
    ("It is raining today.", "Then take an umbrella with you."),
    ("I had tea for breakfast.", "Tea is a good way to begin the day."),
    ("What is two plus two?", "Two plus two is four."),
    ("I am a little tired.", "A short walk might help you."),
    ("The garden looks lovely.", "That is nice to hear."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("I will be out tomorrow.", "All right. Have a good day out."),
    ("Which month comes after May?", "June comes after May."),
    ("That was quick.", "I am glad to help."),
]


# -- reading ---------------------------------------------------------------------------------------------------------

PAGES = [part for part in HANDBOOK.read_text().split("\n\n") if len(part) > 250]


@tool
def read_page(number: int) -> str:
    """Read a page of the handbook."""
    return PAGES[number % len(PAGES)]


class Choose(AgentMiddleware[Any, Any, Any]):
    """A model of this size cannot choose: call the tool where the user asks for a page, else answer."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        last = request.messages[-1]
        wants = isinstance(last, HumanMessage) and "page" in last.text
        return handler(request.override(tool_choice="read_page" if wants else "none"))


def reading(engine: KVzipEngine, turns: int, trigger: int) -> list[dict[str, Any]]:
    """Tokens of every turn: of the prompts, those our calls read, and those that folds read and rank."""
    llm = KVzipChatModel(engine=engine, max_tokens=40)
    rows, seen, context = [], 0, None
    with tempfile.TemporaryDirectory() as folder, sqlite3.connect(Path(folder, "agent.db"), check_same_thread=False) as database:
        memory = KVzipMemoryMiddleware(trigger=("tokens", trigger), keep=KEEP, ratio=0.5)
        agent = create_agent(
            llm, tools=[read_page], system_prompt=SYSTEM, middleware=[memory, Choose()], checkpointer=SqliteSaver(database)
        )
        thread: Any = {"configurable": {"thread_id": "one"}}
        for turn in tqdm(range(1, turns + 1), desc="turns"):
            text = f"Please read page {turn // 2} of the handbook." if turn % 2 == 0 else f"This is turn {turn}. What did you read about?"
            agent.invoke({"messages": [HumanMessage(text)]}, thread)
            values = agent.get_state(thread).values
            usages = [message.usage_metadata for message in values["messages"][seen:] if isinstance(message, AIMessage)]
            seen = len(values["messages"])
            row = {
                "turn": turn,
                "calls": len(usages),
                "prompts": sum(usage["input_tokens"] for usage in usages),
                "read": sum(usage["input_tokens"] - usage["input_token_details"]["cache_read"] for usage in usages),
                "folded": 0,
            }
            while (handle := values.get("kvzip_memory")) is not None and handle["key"] != (context and context.key):
                before, context = context.n_tokens if context else 0, engine.get(handle["key"])
                row["folded"] = context.n_tokens - before
            rows.append(row)
    return rows


# -- recall ----------------------------------------------------------------------------------------------------------


def history() -> list[dict[str, str]]:
    """30 turns: 20 facts, each repeated by the assistant, and small talk between them."""
    messages = [{"role": "system", "content": SYSTEM}]
    for i, (fact, _, _) in enumerate(FACTS):
        messages += [{"role": "user", "content": fact}, {"role": "assistant", "content": fact}]
        if i % 2:
            said, answer = SMALL_TALK[i // 2]
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return messages


@dataclass
class Asked:
    """A question of turns 31-40 and what the full history says to it."""

    messages: list[dict[str, str]]
    fact: str
    answer: str
    logits: torch.Tensor


def asked(engine: KVzipEngine, ratio: float = 1.0) -> list[Asked]:
    """All questions, with the answers of the full history (below ratio 1.0: of one fold of it), in two threads."""
    told, found = history(), []
    full = engine.load(told, ratio=ratio)
    for facts in (FACTS[::2], FACTS[1::2]):
        messages = list(told)
        for _, question, fact in facts:
            messages = [*messages, {"role": "user", "content": question}]
            rest = messages[len(told) :]
            answer = engine.generate(full, rest, max_new_tokens=24).text
            found.append(Asked(messages, fact, answer, forced(engine, full, rest, answer)))
            messages = [*messages, {"role": "assistant", "content": answer}]
    return found


def forced(engine: KVzipEngine, context: CompressedContext | None, messages: Sequence[Any], answer: str) -> torch.Tensor:
    """Logits of every token of an answer to messages behind a context."""
    ids = engine._prompts.text_ids(answer)
    return engine.logits(context, engine.prompt_ids(context, messages) + ids[:-1])[-len(ids) :]


Method = Callable[[list[dict[str, str]]], tuple[CompressedContext | None, Sequence[Any]]]


def remembering(engine: KVzipEngine, ratio: float) -> Method:
    """What KVzipMemoryMiddleware sends: at every turn what the one before has left is recalled."""
    memory = Memory(TRIGGER, KEEP)
    known: dict[str, Recalled] = {}  # by messages: the threads are the same up to turn 30

    def method(messages: list[dict[str, str]]) -> tuple[CompressedContext | None, Sequence[Any]]:
        recalled, turns = Recalled(), [m for message in messages if (m := as_message(message))]
        for count in range(2, len(messages) + 1, 2):
            said = repr(messages[:count])
            if said not in known:
                known[said] = memory.recall(engine, turns[:count], handle=recalled.handle, ratio=ratio)
            recalled = known[said]
        return recalled.context, messages[recalled.messages :]

    return method


def folding(engine: KVzipEngine, ratio: float, folds: int) -> Method:
    """All 30 turns in a context, in so many folds of equal numbers of turns."""
    told = history()
    edges = [1 + 2 * round(30 * fold / folds) for fold in range(folds + 1)]
    context = engine.load(told[: edges[1]], ratio=ratio)
    for start, end in pairwise(edges[1:]):
        context = engine.extend(context, told[start:end])
    return lambda messages: (context, messages[len(told) :])


def summarising(engine: KVzipEngine) -> Method:
    """LangChain's SummarizationMiddleware, the model writing its own summaries."""
    summariser = SummarizationMiddleware(KVzipChatModel(engine=engine, max_tokens=200), trigger=TRIGGER, keep=KEEP)  # type: ignore[arg-type]
    known: dict[str, list[Any]] = {}  # by messages, as above

    def method(messages: list[dict[str, str]]) -> tuple[CompressedContext | None, Sequence[Any]]:
        state: list[Any] = []
        for count in range(2, len(messages) + 1, 2):
            said = repr(messages[:count])
            if said not in known:
                new = messages[max(1, count - 2) : count]
                state = [*state, *(HumanMessage(m["content"]) if m["role"] == "user" else AIMessage(m["content"]) for m in new)]
                update = summariser.before_model({"messages": state}, None)  # type: ignore[arg-type]
                known[said] = update["messages"][1:] if update else state
            state = known[said]
        return None, [SystemMessage(SYSTEM), *state]

    return method


def last_messages(count: int) -> Method:
    return lambda messages: (None, [messages[0], *messages[1:][-count:]])


def scored(engine: KVzipEngine, method: Method, questions: list[Asked], name: str) -> dict[str, Any]:
    """How close a method comes to the full history."""
    kl = agree = tokens = same = knows = full_knows = both = read = 0.0
    for question in tqdm(questions, desc=name):
        context, rest = method(question.messages)
        logits = forced(engine, context, rest, question.answer).log_softmax(-1)
        full = question.logits.log_softmax(-1)
        kl += (full.exp() * (full - logits)).sum().item()
        agree += (full.argmax(-1) == logits.argmax(-1)).sum().item()
        tokens += len(full)
        answer = engine.generate(context, rest, max_new_tokens=24).text
        right, full_right = question.fact.lower() in answer.lower(), question.fact.lower() in question.answer.lower()
        same, knows, full_knows, both = (
            same + (answer == question.answer),
            knows + right,
            full_knows + full_right,
            both + (right and full_right),
        )
        read += len(engine.prompt_ids(context, rest))
    n = len(questions)
    row = {
        "method": name,
        "kl": round(kl / tokens, 4),
        "top1": round(agree / tokens, 4),
        "same_answer": round(same / n, 3),
        "right": int(knows),
        "of_full_right": round(both / full_knows, 3),
        "full_right": int(full_knows),
        "tokens_behind_context": round(read / n),
    }
    print(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--only", choices=["recall", "reading"])
    parser.add_argument("--trigger", type=int, default=1000)
    args = parser.parse_args()
    first = KVzipEngine.from_pretrained(smollm2(), progress=False)

    def fresh() -> KVzipEngine:  # a registry of its own: a prompt finds whatever is stored that it begins with
        return KVzipEngine(first.model, first.tokenizer, progress=False)

    result: dict[str, Any] = {}
    if args.only != "reading":
        full = asked(first)
        methods: dict[str, Callable[[KVzipEngine], Method]] = {
            "memory, 0.5": lambda engine: remembering(engine, 0.5),
            "memory, 0.3": lambda engine: remembering(engine, 0.3),
            "one fold, 0.5": lambda engine: folding(engine, 0.5, 1),
            "ten folds, 0.5": lambda engine: folding(engine, 0.5, 10),
            "one fold, 0.3": lambda engine: folding(engine, 0.3, 1),
            "ten folds, 0.3": lambda engine: folding(engine, 0.3, 10),
            "summarisation": summarising,
            "last 6 messages": lambda engine: last_messages(6),
            "last 20 messages": lambda engine: last_messages(20),
        }
        recall = [scored(engine := fresh(), make(engine), full, name) for name, make in methods.items()]
        folds = [scored(engine := fresh(), folding(engine, ratio, 10), asked(first, ratio), f"ten folds, {ratio}") for ratio in (0.5, 0.3)]
        tokens = first.count_tokens(history())
        result |= {"recall_tokens": tokens, "recall_trigger": TRIGGER, "keep": KEEP, "recall": recall, "against_one_fold": folds}
    if args.only != "recall":
        result |= {"trigger": args.trigger, "turns": reading(fresh(), args.turns, args.trigger)}
    if args.only and (RESULTS / "memory.json").exists():  # the other half stays as it was measured
        result = json.loads((RESULTS / "memory.json").read_text()) | result
        del result["machine"]
    save("memory", result)


if __name__ == "__main__":
    main()
