"""What a model's configuration says of its layers: which have pairs, which remember states, and which we cannot compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from kvzip_memory.context import Window
from kvzip_memory.errors import UnsupportedModelError

# Kinds of layers, as transformers names them. Those of "hybrid" ones have attention beside a recurrence.
_ATTENDING = frozenset({"full_attention", "sliding_attention", "chunked_attention", "hybrid"})
_STATEFUL = frozenset({"linear_attention", "mamba", "conv", "hybrid"})
# What bitsandbytes says of itself where it does so.
_REPACKED = "support_avx512bf16_for_cpu"
_NEITHER = frozenset({"mlp", "moe"})


class Layout(NamedTuple):
    """Which layers of a model have pairs. These are counted from 0, whatever lies between them; a context has as many.

    Attributes:
        owners: of those with pairs the number that the model gives them.
        windows: what they see, None for full attention.
        shapes: their KV heads and head dimensions.
        places: of each layer with attention the one whose pairs it attends to, which may be an earlier layer's.
        stateful: whether there are layers that remember states in place of pairs.
        latent: whether pairs are latents, one for all heads, which are keys and values at once.
    """

    owners: tuple[int, ...]
    windows: tuple[Window | None, ...]
    shapes: tuple[tuple[int, int], ...]
    places: Mapping[int, int]
    stateful: bool
    latent: bool = False

    @property
    def plain(self) -> bool:
        """Whether a context has nothing but keys and values, of layers with full or sliding attention."""
        return not self.stateful and not self.latent and not any(window.chunked for window in self.windows if window is not None)


def check_config(config: Any) -> None:
    """Refuse a model that computes what we do not, as far as its configuration says so.

    Raises:
        UnsupportedModelError: naming the property of the model that stands in the way.
    """
    kind, kinds = config.model_type, {*_layer_types(config)}
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind!r} is an encoder-decoder; kvzip_memory needs a decoder-only language model")
    if not _differ(config) and not hasattr(config, "num_key_value_heads"):
        raise UnsupportedModelError(f"{kind!r} does not say how many KV heads it has; only transformers with attention can be compressed")
    if foreign := sorted(kinds - _ATTENDING - _STATEFUL - _NEITHER):
        raise UnsupportedModelError(
            f"{kind!r} has layers of type {foreign}, which we do not compute; we know full, sliding-window and chunked attention, "
            "recurrences and convolutions"
        )
    if not kinds & _ATTENDING:
        raise UnsupportedModelError(f"{kind!r} has no layer with attention; there are no pairs to evict")
    layout_of(config, window_of(config))


def check_kind(model: PreTrainedModel, loaded: bool = True) -> None:
    """Refuse a model that computes what we do not, as far as its modules say so.

    Args:
        loaded: whether it must have its weights.

    Raises:
        UnsupportedModelError: naming the property of the model that stands in the way.
    """
    config, kind = model.config, model.config.model_type
    if any("indexer" in name for name, _ in model.named_modules()):
        raise UnsupportedModelError(f"{kind!r} chooses the pairs that a token sees by an index of its own, which we do not compute")
    latent = [module for module in model.modules() if hasattr(module, "kv_b_proj")]
    if getattr(config, "kv_lora_rank", None) and not (latent and all(hasattr(module, "expand_kv") for module in latent)):
        raise UnsupportedModelError(f"{kind!r} caches latents shared by all heads, otherwise than transformers' own models do")
    if loaded and any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"some weights of {kind!r} are not in memory, such as those that accelerate keeps on disk; load them whole"
        )
    if loaded and any(getattr(module, _REPACKED, False) and module.weight.device.type == "cpu" for module in model.modules()):
        raise UnsupportedModelError(
            "4-bit layers of bitsandbytes lay their weights out anew while they compute on this processor, and are damaged where they are "
            "looked at then; take the model as it was, with weights='int4' or 'auto'"
        )
    if not getattr(model, "_supports_attention_backend", False) and not {*_layer_types(config)} & _STATEFUL:
        raise UnsupportedModelError(f"{kind!r} does not look its attention up by name (transformers' AttentionInterface)")


def layout_of(config: Any, length: int) -> Layout:
    """Which layers have pairs. Those that reuse others' come behind those.

    Args:
        length: tokens the model can hold; a sliding window of as many is none.

    Raises:
        UnsupportedModelError: they do not, or pairs of layers with full attention differ.
    """
    layer_types = _layer_types(config)
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(layer_types)
    attending = [layer for layer, kind in enumerate(layer_types) if kind in _ATTENDING]
    owners = [layer for layer in attending if modes[layer] != "reuse"]
    if owners != attending[: len(owners)]:
        raise UnsupportedModelError(f"{config.model_type!r} has layers with pairs of their own behind some that reuse others' pairs")
    last = {layer_types[layer]: place for place, layer in enumerate(owners)}
    windows = [_window(config, layer_types[i], length) for i in owners]
    if all(windows):
        raise UnsupportedModelError(
            f"no layer of {config.model_type!r} sees more than {max(window.size for window in windows if window)} tokens; there is no "
            "full-attention cache to compress"
        )
    rank = getattr(config, "kv_lora_rank", None)
    shapes = [(1, rank + config.qk_rope_head_dim) if rank else _shape(config, i) for i in owners]
    if len({shape for shape, window in zip(shapes, windows, strict=True) if window is None}) > 1:
        raise UnsupportedModelError(f"{config.model_type!r} has layers with full attention of different numbers of heads or dimensions")
    places = {layer: owners.index(layer) if layer in owners else last[layer_types[layer]] for layer in attending}
    return Layout(tuple(owners), tuple(windows), tuple(shapes), places, any(kind in _STATEFUL for kind in layer_types), bool(rank))


def _window(config: Any, layer_type: str, length: int) -> Window | None:
    """Raises:
    UnsupportedModelError: a token would see nothing but itself.
    """
    fields = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    size = getattr(config, fields.get(layer_type, ""), None)
    if size is None or (size == 0 and layer_type == "sliding_attention"):
        return None
    if size < 2:
        raise UnsupportedModelError(f"{config.model_type!r} has {fields[layer_type]} {size}, in which a token sees nothing but itself")
    return Window(size, layer_type == "chunked_attention") if size < length else None


def _layer_types(config: Any) -> list[str]:
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return list(types)


def _differ(config: Any) -> bool:
    """Whether a configuration has other values for some layers; for these it has none as a whole."""
    return bool(getattr(config, "is_heterogeneous", False))


def _shape(config: Any, layer: int) -> tuple[int, int]:
    """KV heads and head dimension of a layer."""
    if _differ(config):
        config = config.per_layer_config[layer]
    return config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config: Any) -> int:
    """The configured window, cut where the rotation of earlier keys would have to change.

    "dynamic" and "longrope" models rotate all keys anew once a text passes their original length; stored keys cannot.
    """
    window = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rotation in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):  # one for all layers, or for each type of them
        kind = str(rotation.get("rope_type") or rotation.get("type"))
        if "dynamic" in kind or kind == "longrope":
            originals = (rotation.get("original_max_position_embeddings"), getattr(config, "original_max_position_embeddings", None))
            window = min([window, *(int(original) for original in originals if original)])
    return window
