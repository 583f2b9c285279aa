"""Models that also see: texts are read as by the whole model, and nothing of it is changed, left behind or asked for."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from llama_index.core import Document
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoTokenizer, PreTrainedModel, ProcessorMixin

from conftest import CHATML, TEXT, masked_logits, same_pairs, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine, UnsupportedModelError
from kvzip_memory.inference.text_part import text_part
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipIndex, KVzipLLM
from multimodal import CONFIGS, TEXT_CONFIG, VISION_CONFIG, tiny_multimodal

QUESTION = "Which day does the donkey carry oil?"
#: Transformers has a class of its own for their language model.
OWN_CLASS = ["gemma3", "gemma4", "mistral3", "smolvlm"]


@pytest.fixture(params=sorted(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that modules hold beside tensors and modules."""
    return {
        f"{name}.{field}": value
        for name, module in model.named_modules()
        for field, value in vars(module).items()
        if field[0] != "_" or field == "_attn_implementation"
    }


def test_at_ratio_1_logits_equal_those_of_the_whole_model(kind: str) -> None:
    model = tiny_multimodal(kind)
    before = {name: repr(value) for name, value in state(model).items() if name.rpartition(".")[2] != "config"}
    engine = KVzipEngine(model, tiny_tokenizer(), codec="none")
    context = engine.load(TEXT, ratio=1.0)
    ids = engine.prompt_ids(context, QUESTION)
    ours = engine.logits(context, ids)
    assert {name: repr(value) for name, value in state(model).items() if name.rpartition(".")[2] != "config"} == before
    with torch.inference_mode():
        own = model(input_ids=torch.tensor([[*context.token_ids.tolist(), *ids]])).logits[0, context.n_tokens :]
    torch.testing.assert_close(ours, own.float(), atol=5e-5, rtol=0)


def test_below_ratio_1_logits_equal_dense_attention_with_evicted_pairs_masked(kind: str) -> None:
    engine = KVzipEngine(tiny_multimodal(kind), tiny_tokenizer(), codec="none")
    context = engine.load(TEXT, ratio=0.3)
    ids = engine.prompt_ids(context, QUESTION)
    torch.testing.assert_close(engine.logits(context, ids), masked_logits(engine, context, ids), atol=1e-4, rtol=0)
    grown = engine.extend(context, "The lamp is blue.")
    torch.testing.assert_close(engine.logits(grown, ids), masked_logits(engine, grown, ids, context), atol=1e-4, rtol=0)


def test_what_is_not_about_texts_is_no_part_of_a_key(kind: str, tmp_path: Path) -> None:
    one, other = tiny_multimodal(kind), tiny_multimodal(kind)
    of_texts = {parameter.data_ptr() for part in (other.get_decoder(), other.get_output_embeddings()) for parameter in part.parameters()}
    changed = [parameter for parameter in other.parameters() if parameter.data_ptr() not in of_texts]
    assert changed
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(1.0)
    first = KVzipEngine(one, tiny_tokenizer(), cache_dir=tmp_path)
    built = first.load(TEXT, ratio=0.4)
    first.close()
    second = KVzipEngine(other, tiny_tokenizer(), cache_dir=tmp_path)
    found = second.load(TEXT, ratio=0.4)
    assert found.receipt.tier == "disk"  # type: ignore[union-attr]
    assert same_pairs(built, found)
    with torch.no_grad():
        next(other.get_decoder().parameters()).add_(1.0)
    assert second.load(TEXT, ratio=0.4).receipt.tier == "built"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", OWN_CLASS, indirect=True)
def test_its_contexts_are_those_of_the_language_model_alone(kind: str, tmp_path: Path) -> None:
    whole = tiny_multimodal(kind)
    part = KVzipEngine(whole, tiny_tokenizer(), cache_dir=tmp_path / "cache", codec="none")
    context = part.load(TEXT, ratio=0.4)
    part.model.save_pretrained(tmp_path / "alone")
    tiny_tokenizer().save_pretrained(tmp_path / "alone")
    part.close()
    alone = KVzipEngine.from_pretrained(tmp_path / "alone", cache_dir=tmp_path / "cache", codec="none")
    found = alone.load(TEXT, ratio=0.4)
    assert (found.key, found.receipt.tier) == (context.key, "disk")  # type: ignore[union-attr]


def test_a_folder_is_read_without_libraries_for_images(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_multimodal(kind)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with suppress(ImportError):  # where it is installed transformers asks it for Mistral's tokenizers, and it wants PIL for itself
        import_module("transformers.integrations.mistral.tokenizer")
    for library in ("PIL", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)
    engine = KVzipEngine.from_pretrained(tmp_path, codec="none")
    context = engine.load(TEXT, ratio=1.0)
    ids = engine.prompt_ids(context, QUESTION)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([[*context.token_ids.tolist(), *ids]])).logits[0, context.n_tokens :]
    torch.testing.assert_close(engine.logits(context, ids), wanted.float(), atol=5e-5, rtol=0)
    own = KVzipEngine(model, tiny_tokenizer(), codec="none")
    assert (
        engine.generate(context, QUESTION, max_new_tokens=8).text
        == own.generate(own.load(TEXT, ratio=1.0), QUESTION, max_new_tokens=8).text
    )
    assert not [name for name, _ in engine.model.named_modules() if "vision" in name or "visual" in name]


def test_what_is_left_out_is_not_reported(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_multimodal(kind).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    reports, reporter, handler = list[str](), logging.getLogger("transformers.modeling_utils"), logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: reports.append(record.getMessage()))
    monkeypatch.setattr(reporter, "handlers", [*reporter.handlers, handler])
    KVzipEngine.from_pretrained(tmp_path)
    assert not [report for report in reports if "LOAD REPORT" in report]


def test_a_template_that_only_the_processor_has_is_found(tmp_path: Path) -> None:
    tiny_multimodal("gemma3").save_pretrained(tmp_path)
    tiny_tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    engine = KVzipEngine.from_pretrained(tmp_path, codec="none")
    assert engine.tokenizer.chat_template == CHATML


class Processor(ProcessorMixin):
    """A processor of texts alone."""

    attributes = ("tokenizer",)

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.mark.parametrize("whose", ["the processor's", "the tokenizer's", "both"])
def test_a_processor_is_as_good_as_its_tokenizer(whose: str) -> None:
    of_tokenizer = None if whose == "the processor's" else CHATML
    processor = Processor(tiny_tokenizer(of_tokenizer), CHATML if of_tokenizer is None else CHATML.replace("im_start", "im_end"))
    engine, other = (KVzipEngine(tiny_multimodal("gemma3"), given) for given in (processor, tiny_tokenizer()))
    assert engine.load(TEXT, ratio=0.4).key == other.load(TEXT, ratio=0.4).key


def test_both_frameworks_take_a_folder_of_one(kind: str, tmp_path: Path) -> None:
    tiny_multimodal(kind).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    chat = KVzipChatModel(model=str(tmp_path), max_tokens=8)
    answer = chat.with_context(chat.engine.load(TEXT)).invoke(QUESTION)
    llm = KVzipLLM(model=str(tmp_path), max_tokens=8)
    assert KVzipIndex.from_documents([Document(text=TEXT)], llm=llm).as_query_engine(llm=llm).query(QUESTION).source_nodes
    assert answer.usage_metadata["output_tokens"] <= 8  # type: ignore[index]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(InputError, match="image"):
        chat.invoke([HumanMessage([{"type": "text", "text": "See:"}, image])])


def test_a_model_whose_head_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_multimodal("qwen3_vl")
    original = type(model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="computes something for texts"):
        KVzipEngine(model, tiny_tokenizer())


def test_a_model_that_reads_no_text_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_multimodal("llava")

    def wants_pixels(self: Any, **kwargs: Any) -> Any:
        raise ValueError("You have to specify pixel_values")

    monkeypatch.setattr(type(model), "forward", wants_pixels)
    with pytest.raises(UnsupportedModelError, match="cannot read a text alone: You have to specify pixel_values"):
        KVzipEngine(model, tiny_tokenizer())


def test_layers_that_a_text_does_not_pass_are_a_reason_to_refuse() -> None:
    config = type(AutoConfig.for_model("mllama"))(
        text_config=TEXT_CONFIG | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}, vision_config=VISION_CONFIG
    )
    with pytest.raises(UnsupportedModelError, match="4 layers with attention, of which a text passes 2"):
        KVzipEngine(AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval(), tiny_tokenizer())


@pytest.mark.parametrize("eos", [2, [1, 106], None])
def test_any_way_to_say_what_ends_an_answer_is_read(eos: Any) -> None:
    model = tiny_multimodal("gemma3")
    model.config.eos_token_id = eos
    assert KVzipEngine(model, tiny_tokenizer()).load(TEXT, ratio=1.0).n_tokens


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip_memory.inference import loading

    for kind in CONFIGS:
        tiny_multimodal(kind).save_pretrained(tmp_path / kind)
        tiny_tokenizer().save_pretrained(tmp_path / kind)
        for file in (tmp_path / kind).glob("*.safetensors"):
            file.write_bytes(b"nothing that could be read")
        monkeypatch.setattr(loading, "host_nbytes", lambda: 1000)
        with pytest.raises(InputError, match=r"GB in float32.*are free"):
            KVzipEngine.from_pretrained(tmp_path / kind)


def test_a_language_model_is_given_back_as_it_is() -> None:
    model = text_part(tiny_multimodal("llava"))
    assert text_part(model) is model
