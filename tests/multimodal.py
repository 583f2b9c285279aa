"""Tiny multimodal models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

import families
from conftest import SHAPE

TEXT_CONFIG = SHAPE | {"head_dim": 16}
VISION_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ROTATION = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_QWEN = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
_SIGLIP = {"model_type": "siglip_vision_model"}
_IMAGE = {"image_token_id": 299}
_UNTIED = {"tie_word_embeddings": False}
_MARKS = _IMAGE | {"video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}


def _config(kind: str, text: dict[str, Any], vision: dict[str, Any], marks: dict[str, Any]) -> PreTrainedConfig:
    parts = {"text_config": TEXT_CONFIG | text, "vision_config": VISION_CONFIG | vision}
    return type(AutoConfig.for_model(kind))(**deepcopy(parts), **marks)  # some configurations write to what they get


_GEMMA = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = families.HYBRIDS["qwen3_5_text"] | {"layer_types": ["linear_attention", "full_attention"]}
_DEEP_TEXT = families.LATENT["deepseek_v3"] | {"head_dim": 8, "first_k_dense_replace": 1}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
    "llama_4_scaling_beta": 0.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_DEEP = {"deepstack_visual_indexes": [0]}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: _config("gemma3", _GEMMA, {}, {"mm_tokens_per_image": 4, "image_token_index": 299}),
    "gemma4": lambda: _config("gemma4", _GEMMA4, {}, _IMAGE),
    "kimi_k25": lambda: _config("kimi_k25", _DEEP_TEXT | {"model_type": "deepseek_v3"}, {}, _MARKS),
    "llama4": lambda: _config(
        "llama4",
        families.ATTENTION["llama4_text"] | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
        {},
        {"image_token_index": 299},
    ),
    "mistral4": lambda: _config(
        "mistral3",
        _DEEP_TEXT | {"model_type": "mistral4", "rope_parameters": _YARN, "n_shared_experts": 1},
        {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 299} | _UNTIED,
    ),
    "mistral3": lambda: _config(
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": 299} | _UNTIED,
    ),
    "qwen2_vl": lambda: _config("qwen2_vl", _ROTATION, {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 64}, _MARKS),
    "qwen2_5_vl": lambda: _config("qwen2_5_vl", _ROTATION, _QWEN, _MARKS),
    "qwen3_5": lambda: _config("qwen3_5", _ROTATION | _LINEAR, _QWEN, _MARKS),
    "qwen3_5_moe": lambda: _config("qwen3_5_moe", _ROTATION | _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 32}, _QWEN, _MARKS),
    "qwen3_vl": lambda: _config("qwen3_vl", _ROTATION, _QWEN | _DEEP, _MARKS),
    "qwen3_vl_moe": lambda: _config("qwen3_vl_moe", _ROTATION | _EXPERTS, _QWEN | _DEEP, _MARKS),
    "glm4v": lambda: _config("glm4v", _ROTATION, _QWEN, _IMAGE | {"video_token_id": 298}),
    "internvl": lambda: _config("internvl", {"model_type": "qwen2"}, {"image_size": [28, 28], "patch_size": [14, 14]}, _IMAGE | _UNTIED),
    "smolvlm": lambda: _config("smolvlm", {"model_type": "llama"}, {}, _IMAGE),
    "idefics3": lambda: _config("idefics3", {"model_type": "llama"}, {}, _IMAGE),
    "llava": lambda: _config("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}, {"image_token_index": 299}),
    "llava_onevision": lambda: _config(
        "llava_onevision", {"model_type": "qwen2"}, _SIGLIP, {"image_token_index": 299, "video_token_index": 298}
    ),
    # their heads give other logits than those of the language model alone: they are not scaled
    "aya_vision": lambda: _config(
        "aya_vision",
        {"model_type": "cohere2", "sliding_window": 32, "layer_types": _GEMMA["layer_types"]},
        _SIGLIP,
        {"image_token_index": 299},
    ),
    "cohere2_vision": lambda: _config(
        "cohere2_vision", {"model_type": "cohere2", "sliding_window": 32, "layer_types": _GEMMA["layer_types"]}, _SIGLIP, _IMAGE
    ),
}


#: Checkpoints of each family.
EXAMPLES = {
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision",
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "gemma4": "Gemma 4 with its towers",
    "glm4v": "GLM-4.1V",
    "idefics3": "Idefics3",
    "internvl": "InternVL3",
    "kimi_k25": "Kimi K2.5, K2.6",
    "llama4": "Llama 4 Scout, Maverick",
    "llava": "LLaVA",
    "llava_onevision": "LLaVA-OneVision",
    "mistral3": "Mistral Small 3.1, 3.2",
    "mistral4": "Mistral Small 4",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_5": "Qwen3.5, Qwen3.6 with their towers",
    "qwen3_5_moe": "Qwen3.5 35B-A3B with its tower",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL 30B-A3B",
    "smolvlm": "SmolVLM",
}


def tiny_multimodal(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model whose attention is sharp enough for evictions to matter."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model
