"""Tiny random models of the families that users run, one a kind of layers or of code that computes them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import conftest

SHAPE = conftest.SHAPE | {"num_hidden_layers": 4, "max_position_embeddings": 8192}
_SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
_HEAD = {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}

#: Attention in every layer, full or sliding.
ATTENTION: dict[str, dict[str, Any]] = {
    "afmoe": _EXPERTS | _SLIDING | {"num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": _SLIDING,
    "cwm": {},
    "dots1": _ROUTED | _HEAD | {"n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": _SLIDING,
    "exaone_moe": _EXPERTS | _SLIDING,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma2": _SLIDING | _HEAD | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": _SLIDING | _HEAD,
    "gemma3n_text": _SLIDING
    | {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
    }
    | _SLIDING,
    "glm": {},
    "glm4": {},
    "glm4_moe": _ROUTED,
    "gpt_oss": _LOCAL | _HEAD | _SLIDING | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {},
    "granitemoe": {},
    "helium": _HEAD,
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": _HEAD | {"num_experts": 4, "moe_topk": 2},
    "internlm3": {},
    "jetmoe": {},
    "llama": {},
    "llama4_text": _LOCAL
    | _HEAD
    | {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0] * 2, "attention_chunk_size": 48}
    | {"intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "floor_scale": 100},
    "mimo_v2_flash": _ROUTED
    | _SLIDING
    | {"head_dim": 16, "v_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 8}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "minimax_m2": _LOCAL,
    "ministral": _SLIDING | _HEAD,
    "mistral": {"sliding_window": None},
    "mixtral": _LOCAL,
    "nanochat": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "phi4_multimodal": {
        "vision_config": dict.fromkeys(("hidden_size", "intermediate_size"), 32)
        | {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "crop_size": 28, "image_token_id": 298},
        "audio_config": dict.fromkeys(("hidden_size", "intermediate_size", "ext_pw_out_channel", "depthwise_separable_out_channel"), 32)
        | {"num_blocks": 1, "num_attention_heads": 2, "nemo_conv_channels": 8, "audio_token_id": 299},
        "original_max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "eos_token_id": 2,
    },
    "phimoe": _LOCAL,
    "qwen2": {},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3": _HEAD,
    "qwen3_moe": _EXPERTS,
    "seed_oss": _HEAD,
    "smollm3": {},
    "solar_open": _ROUTED,
    "starcoder2": {},
    "vaultgemma": _SLIDING,
}

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_DEEP = _LATENT | _ROUTED | {"first_k_dense_replace": 3}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
#: Attention in some layers, recurrences or convolutions in others, or beside it.
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "granitemoehybrid": _MAMBA | _MIXED | {"num_local_experts": 0, "shared_intermediate_size": 96},
    "kimi_linear": _LATENT
    | _MIXED
    | {"q_lora_rank": None, "linear_head_dim": 16, "linear_num_heads": 4, "mlp_layer_types": ["dense"] * 4}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention", "conv", "conv"], "num_dense_layers": 1},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "use_mamba_kernels": False,
        "head_dim": 16,
    },
    "olmo_hybrid": _LINEAR,
    "qwen3_5_moe_text": _LINEAR | _HEAD | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _LINEAR | _HEAD,
    "qwen3_next": _LINEAR | _HEAD | _EXPERTS | {"shared_expert_intermediate_size": 32},
}

#: Latents, one for all heads.
LATENT: dict[str, dict[str, Any]] = {
    "deepseek_v2": _DEEP | {"topk_method": "greedy", "n_shared_experts": 1},
    "deepseek_v3": _DEEP,
    "glm4_moe_lite": _DEEP,
    "longcat_flash": _LATENT
    | {"num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2}
    | {"head_dim": 8},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
}
FAMILIES = ATTENTION | HYBRIDS | LATENT

#: Checkpoints of each family.
EXAMPLES = {
    "afmoe": "Trinity Mini",
    "apertus": "Apertus 8B",
    "arcee": "AFM 4.5B",
    "bamba": "Bamba 9B",
    "bitnet": "BitNet b1.58 2B",
    "cohere": "Command R",
    "cohere2": "Command R7B",
    "cwm": "Code World Model",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3, R1",
    "dots1": "dots.llm1",
    "exaone4": "EXAONE 4.0",
    "exaone_moe": "K-EXAONE",
    "falcon_h1": "Falcon-H1",
    "flex_olmo": "FlexOlmo",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n_text": "Gemma 3n",
    "gemma4_text": "Gemma 4",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4 0414",
    "glm4_moe": "GLM-4.5, 4.6",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "gpt_oss": "gpt-oss 20B, 120B",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4",
    "helium": "Helium 1",
    "hunyuan_v1_dense": "Hunyuan 7B",
    "hunyuan_v1_moe": "Hunyuan A13B",
    "internlm3": "InternLM3 8B",
    "jetmoe": "JetMoE 8B",
    "kimi_linear": "Kimi Linear 48B-A3B",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 8B-A1B",
    "llama": "Llama 2, 3; SmolLM2",
    "llama4_text": "Llama 4, its language model",
    "longcat_flash": "LongCat-Flash",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minicpm3": "MiniCPM3",
    "minimax_m2": "MiniMax-M2",
    "ministral": "Ministral 8B",
    "mistral": "Mistral 7B, Nemo",
    "mixtral": "Mixtral",
    "nanochat": "nanochat",
    "nemotron_h": "Nemotron-H, Nemotron 3 Nano",
    "olmo": "OLMo 1",
    "olmo2": "OLMo 2",
    "olmo3": "Olmo 3",
    "olmo_hybrid": "Olmo Hybrid",
    "olmoe": "OLMoE",
    "phi": "Phi-2",
    "phi3": "Phi-3, Phi-4",
    "phi4_multimodal": "Phi-4 multimodal",
    "phimoe": "Phi-3.5 MoE",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen1.5 MoE",
    "qwen3": "Qwen3",
    "qwen3_5_moe_text": "Qwen3.5 35B-A3B, Qwen3.6 35B-A3B",
    "qwen3_5_text": "Qwen3.5, Qwen3.6",
    "qwen3_moe": "Qwen3 30B-A3B",
    "qwen3_next": "Qwen3-Next",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "solar_open": "Solar Open",
    "starcoder2": "StarCoder2",
    "vaultgemma": "VaultGemma",
    "youtu": "Youtu-LLM",
}


#: Of which an engine says why it cannot compress their contexts.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BART", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
    "bloom": ("BLOOM", {"n_layer": 2, "n_head": 4}),
    "deepseek_v32": ("DeepSeek V3.2", _DEEP),
    "deepseek_v4": ("DeepSeek V4", {}),
    "diffllama": ("DiffLlama", {}),
    "falcon": ("Falcon 7B, 40B", {}),
    "glm_moe_dsa": ("GLM-5", _DEEP | {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}),
    "gptj": ("GPT-J", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "jamba": ("Jamba", {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "mamba2": ("Mamba 2", {"head_dim": 16, "num_heads": 8, "state_size": 8, "n_groups": 1}),
    "minimax": ("MiniMax-Text-01, M1", _LOCAL | _MIXED | {"block_size": 32}),
    "mpt": ("MPT", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "nemotron": ("Nemotron 4", {}),
    "recurrent_gemma": ("RecurrentGemma", {"block_types": ["recurrent", "attention"], "lru_width": 64}),
    "rwkv": ("RWKV 4", {"attention_hidden_size": 64}),
    "stablelm": ("StableLM", {}),
    "t5": ("T5", {"d_model": 32, "d_ff": 32, "num_layers": 1, "d_kv": 8}),
    "zamba2": (
        "Zamba 2",
        {"mamba_d_state": 8, "n_mamba_heads": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "use_mem_rope": True},
    ),
}


def tiny_refused(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = type(AutoConfig.for_model(kind))(**SHAPE | REFUSED[kind][1])
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config, dtype=torch.float32).eval()


def tiny_family(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose attention is sharp enough for evictions to matter."""
    torch.manual_seed(seed)
    config = type(AutoConfig.for_model(kind))(**deepcopy(SHAPE | FAMILIES[kind] | changes))  # some write to what they get
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=2.0)
    return model
