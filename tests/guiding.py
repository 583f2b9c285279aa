"""What a guided model says: by the decode loop from random logits, and calls as it would write them."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import torch

from kvzip_memory import KVzipEngine
from kvzip_memory.inference.generation import Answer, GenerationParams, Sampler, decode
from kvzip_memory.prompting.forms import ToolForm
from kvzip_memory.prompting.guidance import Grammar


@functools.cache
def random_logits(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """``[32, vocab]``. Quotes are likely, or few strings would ever end."""
    logits = torch.randn(32, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, [i for token, i in tokenizer.get_vocab().items() if '"' in token]] += 2
    return logits


def babble(engine: KVzipEngine, grammar: Grammar, seed: int, limit: int) -> Answer:
    """An answer by the decode loop from random logits: a model that says anything, so that what validates does so by guidance alone."""
    logits, rng, answer = random_logits(engine.tokenizer, engine.model.config.vocab_size), random.Random(seed), Answer()
    sampler = Sampler(GenerationParams(grammar=grammar), engine.model.device, limit)
    tokens = (sampler(logits[rng.randrange(len(logits))]) for _ in itertools.count())
    for _ in decode(tokens, answer, (), limit, engine._model.eos_ids, engine.tokenizer, engine._prompts.call_ids, grammar):
        pass
    return answer


def written(form: ToolForm, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model writes them."""
    if form.named:
        shown = [form.open.format(name=name, id="a23456789") + json.dumps(arguments) for name, arguments in calls]
    else:
        shown = [f'{form.open}{{"name": "{name}", "{form.arguments}": {json.dumps(args)}}}{form.close}' for name, args in calls]
    return form.begin + form.between.join(shown) + form.end
