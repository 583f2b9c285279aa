"""The language model inside one that also sees or hears. Texts alone are read, so the rest of it is not asked, not part of a key, and
need not be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvzip_memory.errors import UnsupportedModelError
from kvzip_memory.system.modes import evaluation_copy

#: What a model has beside its modules and its configuration that calls depend on.
_KEPT = ("generation_config", "hf_device_map", "_hf_peft_config_loaded", "hf_quantizer", "is_quantized", "quantization_method")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that is about texts; the configuration itself where all of it is."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """A causal language model over the modules that a multimodal one answers texts with; any other model is given back.

    Modules are shared: weights, adapters and modes that are changed in one are so in the other. Those that are replaced by others are not.

    Raises:
        UnsupportedModelError: it does not compute what the whole model does for a text.
    """
    config = text_config(model.config)
    if config is model.config:
        return model
    body, head = model.get_decoder(), model.get_output_embeddings()
    ids = _words(model.config).to(model.device)[None]
    with torch.inference_mode():
        try:
            theirs = evaluation_copy(model)(input_ids=ids).logits.float()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedModelError(f"{model.config.model_type!r} cannot read a text alone: {error}") from error
        for part in _parts(config, body, head):
            for name in _KEPT:
                if hasattr(model, name):
                    setattr(part, name, getattr(model, name))
            ours = evaluation_copy(part)(input_ids=ids).logits.float()
            if (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max():
                return part
    raise UnsupportedModelError(
        f"{model.config.model_type!r} computes something for texts that its language model {type(body).__name__} alone does not"
    )


def _parts(config: PreTrainedConfig, body: PreTrainedModel, head: nn.Module) -> Iterator[PreTrainedModel]:
    """Models around modules that are there: of the class that transformers has for a text configuration, and of ours."""
    if body.get_output_embeddings() is head:
        yield body
        return
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):  # whatever its constructor sets beside the modules
            part = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        setattr(part, part.base_model_prefix, body)
        part.set_output_embeddings(head)
        part.training = False  # of its own it has nothing that could be
        yield part
    yield TextModel(config, body, head)


def _words(config: PreTrainedConfig) -> Tensor:
    """Some ids of tokens, of which none stands for something else than text."""
    told = [*config.to_dict().items(), *text_config(config).to_dict().items()]
    values = [value for name, value in told if name.endswith(("_token_id", "_token_index"))]
    marks = {mark for value in values for mark in (value if isinstance(value, list) else [value])}
    return torch.tensor([i for i in range(text_config(config).vocab_size) if i not in marks][:32])


class TextModel(PreTrainedModel):
    """A body and a head, of families whose language model transformers has only as a part of another (Qwen3-VL, GLM-4V)."""

    base_model_prefix = "model"

    def __init__(self, config: PreTrainedConfig, body: PreTrainedModel, head: nn.Module) -> None:
        nn.Module.__init__(self)  # all that PreTrainedModel's would look at was looked at when the body was made
        self.config, self.training = config, False
        self.model, self.lm_head = body, head
        for name in ("_supports_attention_backend", "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            setattr(self, name, getattr(body, name, False))

    @classmethod
    def of(cls, model: PreTrainedModel) -> TextModel:
        """A language model without what it does to its logits."""
        part = cls(model.config, model.base_model, model.get_output_embeddings())
        part.generation_config = model.generation_config
        return part

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, -logits_to_keep:]))  # of all of them for 0
