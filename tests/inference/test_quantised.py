"""Models that others have quantised: tensors of classes of their own, and layers that change while they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from conftest import TEXT, own_logits, tiny_model, tiny_tokenizer
from kvzip_memory import IdentityMismatchError, KVzipEngine, UnsupportedModelError
from kvzip_memory.inference.weights import Watch, checksum, fingerprint


def model_of(parts: tuple[float, float] = (1.0, 1.0)) -> Any:
    """A model one of whose weights is, as torchao's are, a tensor made of two others, which torch computes with one after another."""
    model = tiny_model()
    head = model.lm_head
    weight = head.weight.detach()
    head.weight = nn.Parameter(TwoTensor(weight * parts[0], weight * parts[1]), requires_grad=False)
    return model


class Answering(nn.Linear):
    """A linear layer whose weight is :class:`TwoTensor`, and which gives plain tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.a)


def test_what_a_tensor_is_made_of_is_in_fingerprint_and_checksum() -> None:
    for known in (fingerprint, checksum):
        assert len({known(model_of(parts)) for parts in ((1, 1), (2, 1), (1, 2), (2, 2))}) == 4
        assert known(model_of()) == known(model_of())


@pytest.mark.parametrize("part", ["a", "b"])
def test_a_write_to_what_a_tensor_is_made_of_is_noticed(part: str) -> None:
    model = model_of()
    model.lm_head.__class__ = Answering
    engine = KVzipEngine(model, tiny_tokenizer(), codec="none")
    context = engine.load(TEXT, ratio=1.0)
    ids = engine.prompt_ids(context, "Who?")
    torch.testing.assert_close(engine.logits(context, ids), own_logits(engine, context, ids), atol=1e-4, rtol=1e-4)
    watch = Watch(model)
    before = watch.stamp()
    assert watch.stamp() == before
    getattr(model.lm_head.weight, part).mul_(1.5)
    assert watch.stamp() != before
    with pytest.raises(IdentityMismatchError, match="weights"):
        engine.generate(context, "Who?", max_new_tokens=1)
    assert engine.load(TEXT, ratio=1.0).key != context.key


def test_layers_that_lay_their_weights_out_anew_while_they_compute_are_refused() -> None:
    model = tiny_model()
    model.lm_head.support_avx512bf16_for_cpu = True  # as bitsandbytes' Linear4bit says of itself
    with pytest.raises(UnsupportedModelError, match="weights='int4' or 'auto'"):
        KVzipEngine(model, tiny_tokenizer())
    model.lm_head.support_avx512bf16_for_cpu = False
    KVzipEngine(model, tiny_tokenizer())
