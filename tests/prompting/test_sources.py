"""Sources of answers: attention to spans of a context beside the model's own, passages and their places, all who show them."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from typing import Any

import pytest
import torch
from llama_index.core import Document
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeWithScore

from conftest import TEXT, masked_attention, tiny_engine, tiny_model
from kvzip_memory import CompressedContext, InputError, KVzipEngine, WindowError
from kvzip_memory.inference.attribution import NEUTRAL, attention_mass, blend, bm25, compared
from kvzip_memory.inference.cache import Row, Tail
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipQueryEngine
from llama_index_kvzip.sources import TOKENS_KEY, Paragraphs, Part, Ranking, joined, whole

SPANS = [(0, 40), (40, 41), (100, 200), (150, 280)]
PAGES = [
    "The keeper of the lamp is Oriel. She winds it at dusk, in winter at four, and writes down the hour in the book of the station.",
    "# Animals\n\nFerdinand the donkey carries oil on Tuesdays. He is given two carrots when he has come back, and none before.",
    "The boat is green and belongs to the company. It sails for the islands on every first Monday, if the harbour master lets it.",
]
DOCUMENTS = [
    Document(text="\n\n".join(PAGES), metadata={"file_name": "a.txt"}, doc_id="a"),
    Document(text=TEXT, metadata={"file_name": "b.txt"}, doc_id="b"),
]


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=12)


def masses(engine: KVzipEngine, context: CompressedContext, ids: list[int], first: int = 0) -> torch.Tensor:
    return attention_mass(engine._model, Row(context.layers, context.n_tokens, Tail()), ids, SPANS, first)


def mean_mass(weights: torch.Tensor, context: CompressedContext) -> torch.Tensor:
    """``[H, spans]`` of attention ``[H * G, n, tokens]``."""
    of_each = torch.stack([weights[..., start:end].sum(-1).mean(-1) for start, end in SPANS], -1)
    return of_each.unflatten(0, (next(layer.n_heads for layer in context.layers if layer.window is None), -1)).mean(1)


# -- the attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_the_mass_of_a_span_is_that_of_the_models_own_attention(architecture: str, ratio: float) -> None:
    engine = tiny_engine(architecture)
    context, ids, first = engine.load(TEXT, ratio=ratio), list(range(20, 60)), 12
    full = [context.layers[place].window is None for place in engine._model.layout.places.values()]
    weights = compress(masked_attention(engine, context, ids), full)
    expected = torch.stack([mean_mass(of_layer[:, first:], context) for of_layer in weights])
    torch.testing.assert_close(masses(engine, context, ids, first), expected, atol=1e-5, rtol=1e-4)
    engine._model.chunk_tokens = 16  # fed in pieces, of which the first does not count
    torch.testing.assert_close(masses(engine, context, ids, first), expected, atol=1e-5, rtol=1e-4)


def test_the_oracle_is_what_transformers_calls_attentions(engine: KVzipEngine) -> None:
    context, ids = engine.load(TEXT, ratio=1.0), list(range(20, 60))
    model = tiny_model()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        everything = torch.cat([context.token_ids.long(), torch.tensor(ids)])
        attentions = model(input_ids=everything[None], output_attentions=True).attentions
    expected = torch.stack([mean_mass(weights[0, :, context.n_tokens :], context) for weights in attentions])
    torch.testing.assert_close(masses(engine, context, ids), expected, atol=1e-5, rtol=1e-4)


async def test_of_several_contexts_the_one_that_a_question_is_about_alone_is_asked(smollm2: KVzipEngine) -> None:
    llm = KVzipLLM(engine=smollm2, ratio=0.5, max_tokens=4)
    documents = [Document(text=page, doc_id=str(number)) for number, page in enumerate(PAGES)]
    index = KVzipIndex.from_documents(documents, llm=llm, context_tokens=140)

    def asked(response: Any) -> list[str]:
        return [id_ for part in response.metadata["parts"] for id_ in part["ref_doc_ids"]]

    query_engine, streaming = index.as_query_engine(), index.as_query_engine(streaming=True)
    for question, number in {"Who is given two carrots?": 1, "Who is the keeper of the lamp?": 0}.items():
        response = query_engine.query(question)
        alone = KVzipQueryEngine.from_context(index.parts()[number].context, [documents[number]], llm=llm).query(question)
        assert str(response) == str(await query_engine.aquery(question)) == str(streaming.query(question)) == str(alone)
        assert asked(response) == [node.node.ref_doc_id for node in response.source_nodes] == [str(number)]
        assert response.metadata["usage"] == alone.metadata["usage"]
    assert {n.node.ref_doc_id for n in index.as_query_engine(source_top_k=2).query("Who is given two carrots?").source_nodes} == {"1"}
    for question in ("Summarise all documents.", "¿Quién es?", "Who is given two carrots, and who is the keeper of the lamp?"):
        assert sorted(asked(query_engine.query(question))) == ["0", "1", "2"]
    assert sorted(asked(await query_engine.aquery("Summarise all documents."))) == ["0", "1", "2"]
    everything = index.as_query_engine(response_mode="accumulate").query("Who is given two carrots?")
    assert len(everything.metadata["parts"]) == 3


def test_what_is_compared_with_is_read_once_over_each_context(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = engine._model.fill
    monkeypatch.setattr(engine._model, "fill", lambda *args, **kwargs: read.append(1) or plain(*args, **kwargs))
    one, other = engine.load(TEXT, ratio=0.4), engine.load(TEXT[::-1], ratio=0.4)
    counts, scores = [], []
    for question, spans in (("Who?", SPANS), ("Who?", SPANS), ("When?", SPANS), ("Who?", SPANS[:1]), ("Who?", SPANS)):
        read.clear()
        scores.append(engine.relevance([(one, spans), (other, spans)], question))
        counts.append(len(read))
    assert counts == [4, 2, 2, 4, 4]
    assert all(torch.equal(a, b) for at in (1, 4) for a, b in zip(scores[0], scores[at], strict=True))


def test_relevance_counts_the_question_and_its_answer_and_compares_all_contexts(engine: KVzipEngine) -> None:
    one, other = engine.load(TEXT, ratio=0.4), engine.load(TEXT[::-1], ratio=0.4)
    closing = len(engine._prompts.text_ids("Who?")) + len(one.recipe.closing)

    def mass(context: CompressedContext, question: str, answer: str) -> torch.Tensor:
        ids = engine.prompt_ids(context, question)
        counted = len(engine._prompts.text_ids(question)) + len(context.recipe.closing)
        return masses(engine, context, [*ids, *engine._prompts.text_ids(answer)], len(ids) - counted)

    assert len(engine.prompt_ids(one, "Who?")) > closing  # the separator before it does not count
    asked, neutral = (torch.cat([mass(c, *said) for c in (one, other)], -1) for said in (("Who?", "Ito."), (NEUTRAL, "")))
    scores = engine.relevance([(one, SPANS), (other, SPANS)], "Who?", "Ito.")
    torch.testing.assert_close(torch.cat(scores), compared(asked, neutral))
    assert [len(of_one) for of_one in scores] == [4, 4]
    # of messages it is the last one
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}, {"role": "user", "content": "Who?"}]
    assert engine.relevance([(one, SPANS), (other, [])], "Who?", "Ito.")[1].shape == (0,)
    (from_talk,) = engine.relevance([(one, SPANS)], talk)
    assert from_talk.isfinite().all()
    assert not torch.equal(from_talk, engine.relevance([(one, SPANS)], "Who?")[0])


def test_relevance_refuses_what_it_cannot_compare(engine: KVzipEngine) -> None:
    context = engine.load(TEXT)
    with pytest.raises(InputError, match="no span"):
        engine.relevance([(context, [])], "Who?")
    with pytest.raises(WindowError, match="the model's window is 2,048"):
        engine.relevance([(context, SPANS)], "Who? " * 600)
    assert engine.relevance([(context, SPANS)], "Who?", "me " * 2000)[0].isfinite().all()  # as much of the answer as fits


def test_threads_get_the_scores_they_get_alone(engine: KVzipEngine) -> None:
    context, questions = engine.load(TEXT, ratio=0.4), ["Who?", "When?", "Where is it?"] * 2
    alone = [engine.relevance([(context, SPANS)], question)[0] for question in questions]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(engine.generate, context, "Who?", max_new_tokens=20) for _ in range(2)]
        together = list(pool.map(lambda question: engine.relevance([(context, SPANS)], question)[0], questions))
        assert len({answer.result().text for answer in answers}) == 1
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_scores() -> None:
    torch.manual_seed(0)
    mass = torch.rand(3, 4, 5)
    assert compared(mass, mass).abs().max() == 0
    more = mass.clone()
    more[1, 2, 3] *= 4
    assert compared(more, mass).argmax() == 3
    assert compared(torch.zeros(3, 4, 5), mass).isfinite().all()  # no pair of any of them is left
    # one of two texts of equal length has the word, once: idf = ln(1 + 1.5 / 1.5), tf = 2.5 / 2.5
    torch.testing.assert_close(bm25("a lamp?", ["The Lamp", "the boat"]), torch.tensor([math.log(2), 0.0]))
    assert bm25("Who?", ["", ""]).tolist() == [0, 0]
    assert blend(torch.tensor([2.0, -1, 1]), torch.tensor([0.0, 4, 0])).tolist() == [0.5, 0.5, 0.25]
    assert blend(torch.zeros(2)).tolist() == [0, 0]


# -- passages ----------------------------------------------------------------------------------------------------


def test_paragraphs_are_word_for_word_and_of_some_length() -> None:
    long = "One sentence of many. " * 100
    passages = Paragraphs().split_text(f"# Heading\n\n{PAGES[0]}\n \n{PAGES[1]}\n\n{long}\n\nThe end.")
    assert passages[0] == f"# Heading\n\n{PAGES[0]}"
    assert passages[1] == PAGES[1]
    assert " ".join(passages[2:]) == f"{long.strip()} The end."
    assert all(len(passage) <= 1500 for passage in passages)
    assert Paragraphs().split_text("x" * 4000) == ["x" * 1500, "x" * 1500, "x" * 1000]
    assert Paragraphs().split_text("") == []


@pytest.mark.parametrize("parser", [None, SentenceSplitter(chunk_size=40, chunk_overlap=10)])
def test_sources_are_passages_with_their_places(engine: KVzipEngine, parser: SentenceSplitter | None) -> None:
    context = engine.load(DOCUMENTS, ratio=0.4)
    every = Ranking(engine, 1000, parser)([Part(context, whole(context, DOCUMENTS))], "Which donkey carries oil?")
    texts = {document.doc_id: document.text for document in DOCUMENTS}
    for source in every:
        node = source.node
        text = texts[node.ref_doc_id]
        assert text[node.start_char_idx : node.end_char_idx] == node.text
        start, end = node.metadata[TOKENS_KEY]
        assert engine.tokenizer.decode(context.token_ids[start:end]) == node.text
        assert node.metadata["file_name"] == f"{node.ref_doc_id}.txt"
        assert TOKENS_KEY not in node.get_content("llm")
    if parser is None:
        assert sorted(source.node.text for source in every) == sorted([*PAGES, TEXT.strip()])
    assert len({source.node.node_id for source in every}) == len(every) > 3
    scores = [source.score for source in every]
    assert scores == sorted(scores, reverse=True)
    assert 1 >= scores[0] >= scores[-1] >= 0
    again = Ranking(engine, 2, parser)([Part(context, whole(context, DOCUMENTS))], "Which donkey carries oil?")
    assert [(s.node.node_id, s.score) for s in again] == [(s.node.node_id, s.score) for s in every[:2]]


def test_words_decide_where_tokens_are_not_known(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    context = engine.load(DOCUMENTS, ratio=0.4)
    others = whole(context, DOCUMENTS[:1])  # not all it was made of, so nobody knows where they are
    first, second, _ = Ranking(engine, 3)([Part(context, others)], "Who gives the donkey carrots?")
    best, words = first, bm25("Who gives the donkey carrots?", PAGES).sort(descending=True).values
    assert best.node.text == PAGES[1]
    assert (first.score, second.score) == pytest.approx((1, (words[1] / words[0]).item()))
    assert TOKENS_KEY not in best.node.metadata
    monkeypatch.setattr(engine, "token_offsets", unknown)
    (best,) = Ranking(engine, 1)([Part(context, whole(context, DOCUMENTS))], "Who gives the donkey carrots?")
    assert best.node.text == PAGES[1]
    assert TOKENS_KEY not in best.node.metadata


def unknown(text: str, **_: object) -> list[tuple[int, int]]:
    """As with a slow tokenizer."""
    raise InputError("this needs a tokenizer that knows its tokens' places in the text")


# -- who shows them ----------------------------------------------------------------------------------------------


def shown(sources: list[NodeWithScore]) -> list[tuple[str, float | None]]:
    return [(source.node.node_id, source.score) for source in sources]


async def test_query_engines_show_passages_of_all_contexts(llm: KVzipLLM, engine: KVzipEngine) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm, context_tokens=600)
    parts = index.parts()
    assert len(parts) == 2
    query_engine = index.as_query_engine(source_top_k=2)
    response = query_engine.query("Which donkey carries oil?")
    ranking = Ranking(engine, 2)
    expected = ranking([joined(engine, ranking.about(parts, "Which donkey carries oil?", engine.window))], "Which donkey carries oil?")
    assert shown(response.source_nodes) == shown(expected)
    assert set(response.metadata) >= {source.node.node_id for source in expected}
    assert shown((await query_engine.aquery("Which donkey carries oil?")).source_nodes) == shown(expected)
    streaming = index.as_query_engine(source_top_k=2, streaming=True)
    assert shown(streaming.query("Which donkey carries oil?").source_nodes) == shown(expected)
    assert shown((await streaming.aquery("Which donkey carries oil?")).source_nodes) == shown(expected)
    retriever = index.as_retriever(source_top_k=2)
    expected = ranking(parts, "Which donkey carries oil?")
    assert shown(retriever.retrieve("Which donkey carries oil?")) == shown(expected)
    assert shown(await retriever.aretrieve("Which donkey carries oil?")) == shown(expected)
    with pytest.raises(InputError, match="source_top_k is 0"):
        index.as_query_engine(source_top_k=0)


def test_a_query_engine_over_a_context_shows_passages(llm: KVzipLLM) -> None:
    parser = SentenceSplitter(chunk_size=40, chunk_overlap=0)
    query_engine = KVzipQueryEngine.from_documents(DOCUMENTS, llm=llm, source_top_k=3, node_parser=parser)
    sources = query_engine.query("Which donkey carries oil?").source_nodes
    assert len(sources) == 3
    assert all(len(source.node.text) < 200 for source in sources)


def test_chat_engines_show_passages_for_the_last_message(llm: KVzipLLM, engine: KVzipEngine) -> None:
    context = engine.load(DOCUMENTS, ratio=0.4)
    chat_engine = KVzipChatEngine.from_context(context, DOCUMENTS, llm=llm, source_top_k=2)
    assert isinstance(chat_engine, SimpleChatEngine)
    part = Part(context, whole(context, DOCUMENTS))
    talk = []
    for message in ("Hello!", "Which donkey carries oil?", "And when?"):
        response = chat_engine.chat(message)
        talk.append({"role": "user", "content": message})
        assert shown(response.source_nodes) == shown(Ranking(engine, 2)([part], talk[-3:]))
        talk.append({"role": "assistant", "content": str(response)})
    said = [*talk[-2:], {"role": "user", "content": "Who?"}]
    streamed = chat_engine.stream_chat("Who?")
    assert shown(streamed.source_nodes) == shown(Ranking(engine, 2)([part], said))
    assert "".join(streamed.response_gen)

    async def main() -> list[NodeWithScore]:
        chat_engine.reset()
        return (await chat_engine.achat("Hello!")).source_nodes

    assert len(asyncio.run(main())) == 2


def test_the_passage_that_was_asked_about_is_among_the_best(smollm2: KVzipEngine, excerpt: str, excerpt_context: CompressedContext) -> None:
    part = Part(excerpt_context, whole(excerpt_context, [Document(text=excerpt, doc_id="handbook")]))
    for question, told in [
        ("Who founded the company?", "founded in 1871 by Philippa Dunmarrow"),
        ("What is the telephone number of the head office?", "5529"),
        ("Who decides when boats may sail?", "Juniper Falk"),
    ]:
        sources = Ranking(smollm2, 3)([part], question)
        assert any(told in source.node.text for source in sources)
