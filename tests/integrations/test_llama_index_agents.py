"""Query engines as tools of agents, behind routers and sub-questions, and under LlamaIndex' evaluators; agents that hand over.

The model is random: where it has to choose, a schema names what there is to choose from and decoding keeps to it.
"""

from typing import Annotated, Any, Literal

import pytest
from llama_index.core.agent.workflow import AgentInput, AgentOutput, AgentStream, AgentWorkflow, FunctionAgent, ToolCallResult
from llama_index.core.base.base_selector import MultiSelection, SingleSelection
from llama_index.core.evaluation import (
    AnswerRelevancyEvaluator,
    BaseEvaluator,
    BatchEvalRunner,
    ContextRelevancyEvaluator,
    CorrectnessEvaluator,
    FaithfulnessEvaluator,
    GuidelineEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
)
from llama_index.core.evaluation.guideline import EvaluationData
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.question_gen.types import SubQuestion
from llama_index.core.selectors import LLMSingleSelector, PydanticMultiSelector
from llama_index.core.selectors.prompts import DEFAULT_MULTI_PYD_SELECT_PROMPT_TMPL
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from pydantic import BaseModel, Field, create_model

from conftest import tiny_model, tiny_tokenizer
from documents import DOCUMENTS
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine

Question = Literal["Who?", "When?"]


@pytest.fixture
def engine() -> KVzipEngine:
    return KVzipEngine(tiny_model(max_position_embeddings=16384), tiny_tokenizer())  # the prompts of LlamaIndex are long


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=300)


@pytest.fixture
def tools(llm: KVzipLLM) -> list[QueryEngineTool]:
    """Over a document each."""
    return [
        QueryEngineTool(
            KVzipQueryEngine.from_documents([document], llm=llm, max_tokens=12, streaming=streaming),
            ToolMetadata(name=name, description=f"Knows {name}.", fn_schema=create_model("Ask", input=(Question, ...))),
        )
        for name, document, streaming in zip(("keepers", "codes"), DOCUMENTS, (False, True), strict=True)
    ]


# -- agents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])
async def test_an_agent_asks_a_query_engine(llm: KVzipLLM, tools: list[QueryEngineTool], at: int) -> None:
    name = tools[at].metadata.get_name()
    agent = FunctionAgent(tools=tools, llm=llm.model_copy(update={"max_tokens": 100}), initial_tool_choice=name, system_prompt="Be brief.")
    handler = agent.run("Who?", max_iterations=3)
    events = [event async for event in handler.stream_events()]
    answer = str(await handler)
    [called] = [event for event in events if isinstance(event, ToolCallResult)]
    expected = tools[at].query_engine.query(called.tool_kwargs["input"])
    assert called.tool_output.content == str(expected)
    assert [node.node.ref_doc_id for node in called.tool_output.raw_output.source_nodes] == [DOCUMENTS[at].doc_id]
    read = [event.input for event in events if isinstance(event, AgentInput)][-1]
    assert [message.role.value for message in read] == ["system", "user", "assistant", "tool"]
    assert answer == agent.llm.chat_with_tools(tools, chat_history=read, allow_parallel_tool_calls=True).message.content
    assert answer == "".join(event.delta for event in events if isinstance(event, AgentStream) and not event.tool_calls)


class ToTheKeeper(AgentWorkflow):
    def _get_handoff_tool(self, current_agent: Any) -> Any:
        tool = super()._get_handoff_tool(current_agent)
        tool.metadata.fn_schema = create_model("handoff", to_agent=(Literal["keeper"], ...), reason=(Literal["it knows"], ...))
        return tool


async def test_agents_over_documents_of_their_own_hand_over(llm: KVzipLLM, engine: KVzipEngine) -> None:
    own, other = (engine.load(document.text, ratio=0.4) for document in DOCUMENTS)
    about: dict[str, Any] = {"description": "Answers.", "tools": []}
    desk = FunctionAgent(name="desk", llm=llm.with_context(own), initial_tool_choice="handoff", **about)
    keeper = FunctionAgent(name="keeper", llm=llm.with_context(other), can_handoff_to=[], **about)
    handler = ToTheKeeper(agents=[desk, keeper], root_agent="desk").run("Which code?", max_iterations=3)
    events = [event async for event in handler.stream_events()]
    answer = await handler
    outputs = [event for event in events if isinstance(event, AgentOutput)]
    assert [output.current_agent_name for output in outputs] == ["desk", "keeper"]
    assert [output.raw["kvzip"]["context"] for output in outputs] == [own.key, other.key]
    read = [event.input for event in events if isinstance(event, AgentInput)][-1]
    assert [message.role.value for message in read] == ["user", "assistant", "tool"]
    assert "Agent keeper is now handling the request" in str(read[-1].content)
    assert str(answer) == llm.with_context(other).chat(read).message.content
    streamed = [event for event in events if isinstance(event, AgentStream) and event.current_agent_name == "keeper"]
    assert "".join(event.delta for event in streamed) == str(answer)
    assert len(streamed) > 2


class Verdict(BaseModel):
    """Whether it is so."""

    verdict: Literal["YES", "NO"]


async def test_an_agents_structured_answer_is_read_from_its_memory_block(llm: KVzipLLM, engine: KVzipEngine) -> None:
    block = KVzipMemoryBlock(llm=llm)
    options: dict[str, Any] = {"token_limit": 200, "token_flush_size": 40, "tokenizer_fn": engine.tokenizer.tokenize}
    memory = Memory.from_defaults(session_id="ana", memory_blocks=[block], **options)
    for i in range(20):
        await memory.aput_messages([ChatMessage(f"Line {i}."), ChatMessage("Noted.", role="assistant")])
    before = block.context("ana")
    assert before is not None
    agent = FunctionAgent(tools=[], llm=llm.model_copy(update={"max_tokens": 100}), system_prompt="Be brief.", output_cls=Verdict)
    answer = await agent.run("Is it so?", memory=memory)
    read = engine.get(answer.raw["kvzip"]["context"])
    assert read.token_ids[: before.n_tokens].tolist() == before.token_ids.tolist()
    assert answer.structured_response["verdict"] in ("YES", "NO")


# -- routers and sub-questions -----------------------------------------------------------------------------------


async def test_a_router_asks_the_query_engine_that_is_chosen(llm: KVzipLLM, tools: list[QueryEngineTool]) -> None:
    choice = create_model("Choice", choice=(Literal[1, 2], ...), reason=(Literal["it fits"], ...))
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(llm=llm.as_structured_llm(choice)), tools, llm=llm)
    response = router.query("Who?")
    chosen = tools[response.metadata["selector_result"].ind].query_engine.query("Who?")
    assert [node.node_id for node in response.source_nodes] == [node.node_id for node in chosen.source_nodes]
    assert str(response) == str(chosen) == str(await router.aquery("Who?"))


class Selection(SingleSelection):
    index: Literal[1, 2]
    reason: Literal["it fits"]


class Selections(MultiSelection):
    """What fits."""

    selections: Annotated[list[Selection], Field(min_length=2, max_length=2)]


async def test_a_router_combines_the_answers_of_several(llm: KVzipLLM, tools: list[QueryEngineTool]) -> None:
    program = FunctionCallingProgram.from_defaults(Selections, DEFAULT_MULTI_PYD_SELECT_PROMPT_TMPL, llm=llm)
    router = RouterQueryEngine(PydanticMultiSelector(program), tools, llm=llm.model_copy(update={"max_tokens": 12}))
    response = await router.aquery("Who?")
    chosen = [tools[at].query_engine.query("Who?") for at in response.metadata["selector_result"].inds]
    assert [node.node_id for node in response.source_nodes] == [node.node_id for each in chosen for node in each.source_nodes]
    assert str(response) == str(router.query("Who?")) != ""


class Sub(SubQuestion):
    sub_question: Question
    tool_name: Literal["keepers", "codes"]


class Subs(BaseModel):
    """Questions, each for one tool."""

    items: Annotated[list[Sub], Field(min_length=2, max_length=2)]


async def test_sub_questions_are_answered_by_the_query_engines_they_name(llm: KVzipLLM, tools: list[QueryEngineTool]) -> None:
    questions = LLMQuestionGenerator.from_defaults(llm.as_structured_llm(Subs))
    query_engine = SubQuestionQueryEngine.from_defaults(
        tools, llm=llm.model_copy(update={"max_tokens": 12}), question_gen=questions, verbose=False
    )
    response = await query_engine.aquery("Who and when?")
    *told, first, second = [node.node for node in response.source_nodes]
    for node, source in zip(told, (first, second), strict=True):
        [tool] = [tool for tool, document in zip(tools, DOCUMENTS, strict=True) if document.doc_id == source.ref_doc_id]
        question = node.get_content().splitlines()[0].removeprefix("Sub question: ")
        assert node.get_content() == f"Sub question: {question}\nResponse: {tool.query_engine.query(question)}"
    assert str(response) != ""


# -- evaluators --------------------------------------------------------------------------------------------------


def score_of(said: str) -> tuple[float, str]:
    return float(Score.model_validate_json(said).score), said


class Score(BaseModel):
    """How good it is."""

    score: Literal[1, 5]


class Guided(EvaluationData):
    feedback: Literal["fine", "bad"]


class Better(BaseModel):
    """Which is better."""

    winner: Literal["[[A]]", "[[B]]", "[[C]]"]


EVALUATORS: dict[str, Any] = {
    "faithfulness": lambda llm: FaithfulnessEvaluator(llm=llm.as_structured_llm(Verdict)),
    "relevancy": lambda llm: RelevancyEvaluator(llm=llm.as_structured_llm(Verdict)),
    "correctness": lambda llm: CorrectnessEvaluator(llm=llm.as_structured_llm(Score), parser_function=score_of),
    "answer relevancy": lambda llm: AnswerRelevancyEvaluator(llm=llm.as_structured_llm(Score), parser_function=score_of),
    "context relevancy": lambda llm: ContextRelevancyEvaluator(llm=llm.as_structured_llm(Score), parser_function=score_of),
    "guideline": lambda llm: GuidelineEvaluator(llm=llm.as_structured_llm(Guided)),
}


async def test_evaluators_judge_answers_by_their_sources(llm: KVzipLLM) -> None:
    query_engine = KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_query_engine(max_tokens=12)
    evaluators: dict[str, BaseEvaluator] = {name: make(llm) for name, make in EVALUATORS.items()}
    results = await BatchEvalRunner(evaluators).aevaluate_queries(query_engine, ["Who?"])
    judged = {name: result for name, [result] in results.items()}
    answer = str(query_engine.query("Who?"))
    assert {name for name, result in judged.items() if result.invalid_result or result.query != "Who?"} == set()
    assert {name for name, result in judged.items() if result.response != answer} == {"context relevancy"}
    for name in ("faithfulness", "relevancy"):
        assert judged[name].contexts == [document.text for document in DOCUMENTS]
        assert judged[name].passing == ("YES" in str(judged[name].feedback))
    assert judged["correctness"].score in (1.0, 5.0)
    better = PairwiseComparisonEvaluator(llm=llm.as_structured_llm(Better), enforce_consensus=False)
    assert (await better.aevaluate(query="Who?", response=answer, second_response="Oriel.")).score in (0.0, 0.5, 1.0)
