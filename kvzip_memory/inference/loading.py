"""Weights and tokenizer from a hub id, a local folder or a ``.gguf`` file."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from kvzip_memory.errors import InputError
from kvzip_memory.inference import conversions
from kvzip_memory.inference.layout import check_config, check_kind
from kvzip_memory.inference.packed import checked_weights, pack
from kvzip_memory.inference.text_part import TextModel, text_config, text_part
from kvzip_memory.system.limits import host_nbytes
from kvzip_memory.system.printable import brief, logger_of

logger = logger_of(__name__)

DEFAULT_CACHE = Path("~/.cache/kvzip_memory").expanduser().absolute()

# A tokenizer converted from GGUF and saved has been seen to come back as another class that splits text into garbage.
_TOKENIZER_PROBE = (
    "The quick brown fox jumps over 13 lazy dogs; naïve café, 東京, emoji 🙂.\n\n\tdef f(x):\n        return x**2  # don't\n"
    "Unverhältnismäßigkeit https://example.org/a?b=c&d=%20 [1, 2.5e-3]   trailing "
)


# What the language model of a multimodal checkpoint is called there, and in one of its own.
_TEXT_KEYS = {
    r"^(model\.language_model|language_model\.model|model\.text_model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


# Their whole model does not scale logits as its language model alone does.
_UNSCALED = frozenset({"aya_vision", "cohere2_vision"})
# Options of transformers for whatever it fetches.
_OF_ALL_FILES = ("revision", "trust_remote_code", "token", "subfolder", "local_files_only", "force_download", "proxies")


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    cache_dir: Path | None,
    weights: str | None = None,
    packed: Callable[[str, int, int], None] = lambda *_: None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer, on ``device``, in evaluation mode. Of one that also sees or hears the language model alone.

    A ``.gguf`` file is dequantised once into a folder under ``cache_dir`` and read from there ever after.

    Args:
        weights: what those of linear layers are packed as, one layer after another.
        packed: told which one, and how many of how many weights are.

    Raises:
        InputError: a file or folder that does not exist, an unknown dtype or device, weights that do not fit into the memory that is
            free, or that cannot be packed: on a GPU, or of a quantised model.
        UnsupportedModelError: the model computes what we do not, as far as its configuration says so.
        OSError: what transformers raises for an unknown hub id.
    """
    if not isinstance(model, str | Path) or not str(model) or (os.path.isfile(model) and Path(model).suffix != ".gguf"):
        raise InputError(f"a model is a hub id, a folder or a .gguf file, not {brief(model)}")
    if "torch_dtype" in model_kwargs:
        raise InputError("give dtype= in the place of torch_dtype=")
    dtype, device = _dtype(dtype), _device(device)
    weights = checked_weights(weights)
    if weights is not None and (device.type != "cpu" or "device_map" in model_kwargs or "quantization_config" in model_kwargs):
        raise InputError(f"weights={weights!r} is for CPUs and plain weights; on a GPU give a quantised model, or quantization_config=")
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32  # 16-bit matrix products are slow or emulated on most CPUs
    shared = {k: model_kwargs[k] for k in _OF_ALL_FILES if k in model_kwargs}
    source = Path(model).expanduser()
    is_gguf = source.suffix == ".gguf"
    if is_gguf or _is_path(model):
        if not (os.path.isfile(source) if is_gguf else os.path.exists(source)):
            raise InputError(f"{str(source)!r} does not exist; give a .gguf file, a model folder or a hub id")
        model = source
    with _conversion(source, dtype, (cache_dir or DEFAULT_CACHE).absolute()) if is_gguf else nullcontext(model) as model:
        if is_gguf and not Path(model, "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, **shared)
        config = model_kwargs.pop("config", None) or model
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config, **shared)
        if text_config(config) is not config and tokenizer.chat_template is None:
            with suppress(AttributeError):  # a processor's file that holds no mapping
                tokenizer.chat_template = ProcessorMixin.get_processor_dict(model, **shared)[0].get("chat_template")
        check_config(text_config(config))
        shapes, quantised = _shapes(config), getattr(config, "quantization_config", None)
        if weights is not None and quantised:
            raise InputError(f"weights={weights!r} is for plain weights, and those of {str(model)!r} are quantised already; leave it out")
        if shapes is not None and "device_map" not in model_kwargs and not quantised:
            _check_room(model, shapes, config, dtype, device)
        loaded = _read(model, config, dtype=dtype, **model_kwargs)
        if weights is not None:
            pack(loaded, weights, packed)
        if "device_map" not in model_kwargs:
            loaded = loaded.to(device)
    return loaded.eval(), tokenizer


def _read(model: str | Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model with its weights. Those of a multimodal one that texts do not need are left where they are, if transformers can do that."""
    text, options = text_config(config), {**options, "output_loading_info": True}
    if text is config:
        return _whole(model, *AutoModelForCausalLM.from_pretrained(model, config=config, **options))
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        with _unreported():
            loaded, found = kind.from_pretrained(model, config=text, key_mapping=_TEXT_KEYS, **options)
        if not found["missing_keys"]:
            return TextModel.of(loaded) if config.model_type in _UNSCALED else loaded
        del loaded
    return text_part(_whole(model, *AutoModelForMultimodalLM.from_pretrained(model, config=config, **options)))


def _whole(model: str | Path, loaded: PreTrainedModel, found: dict[str, Any]) -> PreTrainedModel:
    """Raises:
    InputError: weights are missing, which transformers makes at random.
    """
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{str(model)!r} lacks weights of a {type(loaded).__name__}, {len(missing)} of them, such as {brief(missing[0])}")
    return loaded


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' report, in this thread, of all the weights that were left where they are."""
    here, reporter = threading.get_ident(), transformers.logging.get_logger("transformers.modeling_utils")

    def shown(record: Any) -> bool:
        return record.thread != here or "LOAD REPORT" not in record.getMessage()

    reporter.addFilter(shown)
    try:
        yield
    finally:
        reporter.removeFilter(shown)


def _is_path(model: str | Path) -> bool:
    """Whether it cannot be a hub id."""
    return isinstance(model, Path) or model.count("/") > 1 or model.startswith(("/", "./", "../", "~"))


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found not in ("auto", torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"dtype is {brief(dtype)}; give 'auto', 'float32', 'bfloat16', 'float16' or 'float64'")
    return found


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"device is {brief(device)}, which is not to be had here; give 'auto', 'cpu' or 'cuda': {error}") from error
    return found


def _shapes(config: PreTrainedConfig) -> PreTrainedModel | None:
    """What will be read, without its weights; None where transformers has no class for it.

    Raises:
        UnsupportedModelError: see :func:`~kvzip_memory.inference.layout.check_kind`.
    """
    text = text_config(config)
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_FOR_MULTIMODAL_LM_MAPPING
    read = text if kinds is MODEL_FOR_CAUSAL_LM_MAPPING else config
    if type(read) not in kinds:
        return None
    with torch.device("meta"):
        shapes: PreTrainedModel = kinds[type(read)](read)
    if read is text:
        check_kind(shapes, loaded=False)
    return shapes


def _check_room(
    model: str | Path, shapes: PreTrainedModel, config: PreTrainedConfig, dtype: str | torch.dtype, device: torch.device
) -> None:
    """Refuse weights that do not fit, before they are read. Of quantised ones the bytes are not known."""
    parts = (text_config(config), config)
    kind = next(filter(None, (getattr(part, "dtype", None) for part in parts)), torch.float32) if dtype == "auto" else dtype
    size = (getattr(torch, kind) if isinstance(kind, str) else kind).itemsize
    needed = size * sum(parameter.numel() for parameter in shapes.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else min(psutil.virtual_memory().available, host_nbytes())
    if needed > free:
        raise InputError(
            f"the weights of {str(model)!r} take {needed / 1e9:,.1f} GB in {str(kind).removeprefix('torch.')}, and {free / 1e9:,.1f} GB of "
            f"the memory of {device} are free; give another dtype, a quantised model, a smaller one, or a device_map"
        )


def _converted(source: Path, dtype: str | torch.dtype, cache_dir: Path) -> Path:
    """The folder of :func:`_conversion`, which may be deleted meanwhile."""
    with _conversion(source, dtype, cache_dir) as folder:
        return folder


def _conversion(source: Path, dtype: str | torch.dtype, cache_dir: Path) -> AbstractContextManager[Path]:
    """The folder a ``.gguf`` file was converted into; converts it if need be.

    Raises:
        StorageError: others can write ``cache_dir``, or something else is where a folder or file of ours belongs.
    """
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stem = source.stem.encode()[:100].decode(errors="ignore")  # a file's name has 255 bytes at most
    name = f"{stem}-{digest}-{str(dtype).removeprefix('torch.')}-transformers-{transformers.__version__}"
    return conversions.converted(cache_dir, name, lambda folder: _convert(source, dtype, folder))


def _convert(source: Path, dtype: str | torch.dtype, folder: Path) -> None:
    dequantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
    config = dequantised.config
    if hasattr(config, "quantization_config"):  # the weights are plain now, and only plain models can be saved
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dequantised.dtype)
    plain.load_state_dict(dequantised.state_dict())
    plain.generation_config = dequantised.generation_config
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    probe = _TOKENIZER_PROBE + " ".join(tokenizer.all_special_tokens)
    if again(probe).input_ids != tokenizer(probe).input_ids or again.chat_template != tokenizer.chat_template:
        logger.warning("the tokenizer of %s does not survive being saved; it will be read from the file each time", source.name)
        for file in folder.glob("token*"):
            file.unlink()
