"""A model in training mode: contexts and answers as in evaluation mode, and nobody's modules are switched."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoConfig

from conftest import TEXT, same_pairs, tiny_model, tiny_tokenizer
from kvzip_memory import KVzipEngine, ModelError


class Adapted(nn.Module):
    """As PEFT wraps a linear layer, with dropout before what it adds; and statistics that training would move."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.dropouts = nn.ModuleDict({"default": nn.Dropout(0.5)})
        self.added = nn.Linear(layer.in_features, layer.out_features, bias=False)
        self.norm = nn.BatchNorm1d(layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = self.base_layer(x) + self.added(self.dropouts["default"](x))
        return self.norm(added.flatten(0, 1)).view_as(added)


def adapt(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)


def by_method(model: Any) -> None:
    """As kernels are put onto layers."""
    adapt(model)
    module = model.model.layers[0]
    module.forward = MethodType(type(module).forward, module)


def by_partial(model: Any) -> None:
    """As accelerate puts its hooks onto layers."""
    adapt(model)
    for module in model.model.layers:
        module._old_forward = module.forward
        module.forward = partial(lambda module, *args, **kwargs: module._old_forward(*args, **kwargs), module)


def nothing(model: Any) -> None:
    pass


MODELS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None]]] = {
    "attention dropout": ("llama", {"attention_dropout": 0.5}, nothing),
    "residual dropout": ("phi3", {"resid_pdrop": 0.5, "attention_dropout": 0.5}, nothing),
    "adapters": ("llama", {}, adapt),
    "checkpointing": ("llama", {}, lambda model: model.activation_checkpointing_enable()),
    "sliding layers": ("gemma3", {"attention_dropout": 0.5}, lambda model: (adapt(model), model.activation_checkpointing_enable())),
    "another method": ("llama", {}, by_method),
    "hooks": ("llama", {}, by_partial),
    "longrope": (
        "phi3",
        {
            "resid_pdrop": 0.5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 1024,
            },
        },
        nothing,
    ),
}


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_training_computes_as_in_evaluation(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    architecture, changes, prepare = MODELS[kind]
    model = tiny_model(architecture, **changes)
    prepare(model)
    model.eval()
    engines = [KVzipEngine(each, tiny_tokenizer(), 0.4) for each in (copy.deepcopy(model), model)]
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        contexts = [engine.load(TEXT) for engine in engines]
        assert contexts[0].key == contexts[1].key
        assert same_pairs(*contexts)
        sessions = [engine.session(context) for engine, context in zip(engines, contexts, strict=True)]
        for question in ("Who?", "When?"):
            replies = [session.ask(question, max_new_tokens=8) for session in sessions]
            assert replies[0].text == replies[1].text
        assert same_pairs(*[session.fold(0) for session in sessions])
    assert all(modes(model))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert sum("model.eval()" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("part", ["layers.1", "layers.1.self_attn.v_proj.dropouts"])
def test_a_part_in_training_alone_is_noticed(part: str) -> None:
    model = tiny_model()
    adapt(model)
    model.eval()
    engine = KVzipEngine(model, tiny_tokenizer())
    context = engine.load(TEXT)
    expected = engine.logits(context, [5, 6, 7])
    model.model.get_submodule(part).train()
    before = modes(model)
    assert torch.equal(engine.logits(context, [5, 6, 7]), expected)
    assert modes(model) == before
    assert any(before)


def test_modes_may_change_while_an_answer_runs() -> None:
    model = tiny_model()
    adapt(model)
    model.eval()
    engine = KVzipEngine(model, tiny_tokenizer())
    context = engine.load(TEXT)
    expected = engine.generate(context, "Who?", max_new_tokens=12, speculate=False).text
    seen: list[bool] = []

    def switch(module: nn.Module, *inputs: object) -> None:
        """Another thread's training begins and ends, within forwards."""
        seen.append(model.training)
        if len(seen) % 3 != 1:
            model.train(len(seen) % 3 == 2)

    model.model.layers[1].register_forward_pre_hook(switch)
    assert engine.generate(context, "Who?", max_new_tokens=12, speculate=False).text == expected
    assert {True, False} == set(seen)


def test_a_build_within_which_training_begins_is_refused() -> None:
    model = tiny_model()
    adapt(model)
    engine = KVzipEngine(model.eval(), tiny_tokenizer())
    hook = model.model.layers[1].register_forward_pre_hook(lambda *inputs: model.train() and None)
    with pytest.raises(ModelError, match="training mode while it read"):
        engine.load(TEXT)
    hook.remove()
    trained = engine.load(TEXT)
    model.eval()
    engine.registry.remove(trained.key)
    assert same_pairs(trained, engine.load(TEXT))


def test_a_forward_that_is_not_a_method_is_refused_in_training() -> None:
    model = tiny_model()
    layer = model.model.layers[0]
    layer.forward = partial(layer.forward)
    engine = KVzipEngine(model, tiny_tokenizer())
    context = engine.load(TEXT)
    model.train()
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        engine.generate(context, "Who?")
    model.eval()
    assert engine.generate(context, "Who?", max_new_tokens=1).receipt.hit


@pytest.mark.parametrize("config", [OlmoConfig, MixtralConfig])
def test_an_untested_architecture_is_compared_without_dropout_and_noise(config: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    noise = {"router_jitter_noise": 0.9} if config is MixtralConfig else {"clip_qkv": None}
    model = AutoModelForCausalLM.from_config(config(**sizes, num_key_value_heads=2, pad_token_id=0, attention_dropout=0.9, **noise))
    engine = KVzipEngine(model.train(), tiny_tokenizer())
    first = engine.logits(None, [5, 6, 7])
    assert torch.equal(first, engine.logits(None, [5, 6, 7]))
    assert all(modes(model))
