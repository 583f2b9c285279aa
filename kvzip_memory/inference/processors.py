"""What is done to logits before a token is picked: transformers' own processors, as ``model.generate`` applies them.

A model's ``generation_config`` says what it was published with, and a call's parameters come before that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from kvzip_memory.errors import InputError

#: Above this temperature all tokens are equally likely, also those that a grammar forbids once it overflows.
_HOT = 1e30

#: Other ways of generating than token by token: the values that ask for none of them, and why it is none.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "answers are not searched with beams"),
    "num_beam_groups": ((1,), "answers are not searched with beams"),
    "constraints": ((), "answers are not searched with beams; a schema guides them"),
    "force_words_ids": ((), "answers are not searched with beams; a schema guides them"),
    "guidance_scale": ((1,), "a second prompt is not computed beside the first"),
    "penalty_alpha": ((0,), "there is no contrastive search"),
    "dola_layers": ((), "layers are not contrasted"),
    "token_healing": ((False,), "prompts are not healed; they end where the chat template ends them"),
    "max_time": ((), "answers are not cut by the clock; close their stream"),
}


def own_settings(model: Any) -> GenerationConfig:
    """A copy of a model's ``generation_config`` as it is now.

    Raises:
        InputError: it asks for what is not done here.
    """
    settings = copy.deepcopy(getattr(model, "generation_config", None)) or GenerationConfig()
    for name, (neutral, why) in _REFUSED.items():
        value = getattr(settings, name, None)
        if value is not None and value not in neutral:
            raise InputError(f"the model's generation_config has {name}={value!r}: {why}. Set model.generation_config.{name} = None")
    return settings


class Processors:
    """The processors of one answer, and the tokens that they look at.

    Args:
        settings: the model's own.
        given: parameters of the call, which come before the settings; None stands for what the settings say. ``temperature`` 0 or
            None is greedy, whatever the settings say.
        config: the model's.
        device: of the logits.
        ids: all that the answer sees, what its context has evicted included.
        limit: tokens that the answer may have.
        eos_ids: ids that end it.

    Attributes:
        rules: hold for greedy answers, too, before a grammar is looked at.
        sampling: come behind that.

    Raises:
        InputError: a setting that transformers cannot use.
    """

    def __init__(
        self,
        settings: GenerationConfig,
        given: dict[str, Any],
        config: Any,
        device: torch.device,
        ids: ArrayLike,
        limit: int,
        eos_ids: Sequence[int],
    ) -> None:
        seen = np.array(ids, dtype=np.int64)
        settings = copy.copy(settings)
        for name, value in given.items():
            if value is not None:
                setattr(settings, name, value)
        settings.do_sample, settings.num_beams = bool(given.get("temperature")), 1
        settings.temperature = min(given.get("temperature") or 1.0, _HOT)
        settings.guidance_scale = None
        settings.max_length = len(seen) + limit
        settings._eos_token_tensor = torch.tensor(sorted(eos_ids), device=device) if eos_ids else None
        try:
            everything = _Maker(config).made(settings, seen, device)
            greedy = copy.copy(settings)
            greedy.do_sample = False
            plain = _Maker(config).made(greedy, seen, device) if settings.do_sample else everything
        except Exception as error:  # of many kinds
            raise InputError(f"the model's generation_config cannot be used ({error}); set the field that it names to None") from error
        last = (settings.watermarking_config is not None) + (settings.renormalize_logits is True)  # behind those of sampling
        count = len(plain) - last if settings.do_sample else len(plain)
        self.rules, self.sampling = LogitsProcessorList(everything[:count]), LogitsProcessorList(everything[count:])
        self._count, self._seen = len(seen), torch.empty(1, 0, dtype=torch.long, device=device)
        if everything:
            self._seen = torch.zeros(1, len(seen) + limit + 1, dtype=torch.long, device=device)
            self._seen[0, : len(seen)] = torch.from_numpy(seen)

    @property
    def seen(self) -> Tensor:
        """``[1, n]`` ids so far."""
        return self._seen[:, : self._count]

    def append(self, token: int) -> None:
        if self._seen.shape[1]:
            if self._count == self._seen.shape[1]:
                self._seen = torch.cat([self._seen, torch.zeros_like(self._seen)], 1)
            self._seen[0, self._count] = token
            self._count += 1


class _Maker(GenerationMixin):
    """Makes processors as ``generate`` does, of whatever a model is wrapped in."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def made(self, settings: GenerationConfig, seen: np.ndarray[Any, Any], device: torch.device) -> LogitsProcessorList:
        prompt = None
        if settings.encoder_repetition_penalty is not None or settings.encoder_no_repeat_ngram_size:
            prompt = torch.from_numpy(seen)[None].to(device)  # which generate takes for an encoder's
        return self._get_logits_processor(settings, input_ids_seq_length=len(seen), encoder_input_ids=prompt, device=device)
