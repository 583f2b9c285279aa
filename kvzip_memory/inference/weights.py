"""What a model computes with: a fingerprint of all of it by value, and two ways to tell at less cost whether it has changed: a checksum
of all of it, and a stamp."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from kvzip_memory.system.digests import digest
from kvzip_memory.system.modes import no_autocast

#: Values of each tensor that a stamp looks at. One that a step of an optimizer has left alone nearly everywhere is noticed by another's.
SAMPLE = 32

# 8-byte words in a row of the matrix that sums are taken of, and rows that stay in a CPU's cache while they are.
_ROW, _ROWS = 4096, 32
# Bytes that are hashed at a time, and threads that do it: a GPU's weights take 48 MB of the host's memory meanwhile.
_PIECE, _HASHERS = 8 << 20, min(4, os.cpu_count() or 1)
# Of tensors that are what they seem.
_PLAIN = frozenset({Tensor, nn.Parameter})
# What torch.compile puts into the names of what a module holds.
_COMPILED = "_orig_mod."
# Of one of a model's tensors, its number, and size and stride of the values that are looked at.
_Spread = tuple[int, tuple[int], tuple[int]]


class Stamp(NamedTuple):
    """Differs whenever a model computes something else, as far as can be told without reading all of its weights.

    Attributes:
        modules: which they are, what the adapters among them do, and their own numbers.
        parameters: of each its place in memory, its size, and torch's count of writes to it.
        buffers: the same of each buffer. A model's own forward may write to them.
        sample: some values of all. Steps of fused optimizers, and whatever writes through ``.data`` or by numpy, are not counted.
    """

    modules: tuple[Any, ...]
    parameters: tuple[tuple[int, int, int], ...]
    buffers: tuple[tuple[int, int, int], ...]
    sample: tuple[bytes, ...]

    @property
    def places(self) -> tuple[Any, ...]:
        """Equal ones mean that whoever has the tensors' addresses may go on with them."""
        return self.modules, [place[:2] for place in (*self.parameters, *self.buffers)]

    def written(self, since: Stamp) -> set[int]:
        """Numbers of the buffers that were written to or replaced since another stamp, and -1 if anything else has changed, too."""
        others = self._replace(buffers=()) != since._replace(buffers=()) or len(self.buffers) != len(since.buffers)
        pairs = zip(self.buffers, since.buffers, strict=False)
        return {-1} if others else {i for i, (now, then) in enumerate(pairs) if now != then}


class Watch:
    """Gives a model's stamps. Holds none of its tensors, which may be moved or replaced and then want their memory back.

    Of 135M parameters in 272 tensors a stamp takes 0.9 ms, the checksum 0.1 s, and the fingerprint 0.3 s (one CPU core).

    What escapes it is a write that torch does not count and that leaves the places of all tensors and the sampled values of each
    as they were: ``weight.data[0, 0] = 1``. Hooks, and methods that are put onto a module, are in none of the three.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._planned: tuple[tuple[Any, ...], list[list[_Spread]], list[tuple[int, str]]] = ((), [], [])

    def stamp(self) -> Stamp:
        modules, parameters, buffers = _held(self._model)
        held = [*parameters, *buffers]
        which, places, sizes = (*map(id, modules), _adapters(modules)), [*map(Tensor.data_ptr, held)], [*map(Tensor.numel, held)]
        counts = [0 if tensor.is_inference() else tensor._version for tensor in held]
        known, groups, numbers = self._planned
        where = (*which, *places, *sizes)
        if where != known:
            groups, numbers = _groups(held), [(i, name) for i, module in enumerate(modules) for name in _numbers(module)]
            self._planned = where, groups, numbers
        which = (*which, *(vars(modules[i]).get(name) for i, name in numbers))
        tensors, first = tuple(zip(places, sizes, counts, strict=True)), len(parameters)
        with torch.inference_mode(), no_autocast():
            sampled = [torch.cat([held[i].as_strided(size, stride) for i, size, stride in group]) for group in groups]
            sample = tuple(values.view(torch.uint8).cpu().numpy().tobytes() for values in sampled)
        return Stamp(which, tensors[:first], tensors[first:], sample)


def _held(model: nn.Module) -> tuple[list[nn.Module], list[Tensor], list[Tensor]]:
    """All modules of a model, and the parameters and buffers they compute with. ``model.modules()`` alone takes twice as long."""
    modules: list[Any] = [model]
    parameters: list[Tensor | None] = []
    buffers: list[Tensor | None] = []
    for module in modules:
        own = vars(module)
        if own["_parameters"]:
            parameters += own["_parameters"].values()
        if own["_buffers"]:
            passing = _passing(module)
            buffers += [buffer for name, buffer in own["_buffers"].items() if name not in passing]
        if own["_modules"]:
            modules += [child for child in own["_modules"].values() if child is not None]
    return modules, _inner(parameters), _inner(buffers)


def _inner(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Tensors as they lie in memory: of one of a class of its own, such as torchao's, those that it is made of."""
    found = list[Tensor]()
    for tensor in tensors:
        if tensor is not None:
            found += (each for _, each in _parts("", tensor)) if type(tensor) not in _PLAIN else (tensor,)
    return found


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor under its name; or what it is made of, each under a longer one."""
    if type(tensor) in _PLAIN or not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{type(tensor).__name__}.{inner}", getattr(tensor, inner))


def _groups(tensors: Sequence[Tensor]) -> list[list[_Spread]]:
    """Where to look at up to :data:`SAMPLE` values of each tensor; together those of one device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[_Spread]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() and not tensor.is_meta:
            groups.setdefault((tensor.device, tensor.dtype), []).append(_spread(i, tensor.shape, tensor.stride()))
    return [*groups.values()]


def _spread(i: int, shape: Sequence[int], stride: Sequence[int]) -> _Spread:
    """Size and stride of values all over a tensor's memory, in different columns."""
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    count = min(SAMPLE, extent)
    step = extent // count
    while len(shape) > 1 and step > 1 and math.gcd(step, shape[-1]) > 1:
        step -= 1
    return i, (count,), (step,)


def _passing(module: nn.Module) -> set[str]:
    """Names of buffers of a "dynamic" or "longrope" rotation that are as the last forward, whosever it was, has left them.

    Ours, which are short enough for the original one, begin by setting that; it has a buffer of its own beside them.
    """
    types = getattr(module, "rope_type", None)
    if types is None:
        return set()
    named = types if isinstance(types, dict) else {"": types}
    return {f"{name}_inv_freq".lstrip("_") for name, kind in named.items() if "dynamic" in kind or kind == "longrope"}


def _numbers(module: nn.Module) -> list[str]:
    """Names of what a module computes with beside tensors, such as attention's ``scaling``; a rotation's are of its last forward."""
    own = vars(module)
    return [] if "rope_type" in own else sorted(name for name, value in own.items() if type(value) is float)


def _adapters(modules: Iterable[nn.Module]) -> str:
    """What PEFT's layers do besides their weights: which adapters are active, how scaled, merged or disabled; empty without any."""
    facts = [
        [getattr(module, field, None) for field in ("active_adapters", "scaling", "disable_adapters", "merged")]
        for module in modules
        if "active_adapters" in vars(module) or _has_adapters(type(module))  # type: ignore[arg-type]
    ]
    return json.dumps(facts, default=str) if facts else ""


@lru_cache(maxsize=1024)
def _has_adapters(kind: type) -> bool:
    return isinstance(getattr(kind, "active_adapters", None), property)  # transformers' models have a method of that name


def adapter_state(model: nn.Module) -> str | None:
    """Hash of what a model's adapters do besides their weights, None without adapters."""
    facts = _adapters(_held(model)[0])
    return hashlib.sha256(facts.encode()).hexdigest() if facts else None


class Fingerprint:
    """A model's fingerprint, as it was last computed: anew only where something has changed since."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = "", ""  # the checksum, and the fingerprint of what has it

    def get(self, anew: bool = False) -> str:
        """The fingerprint. All weights are read for their checksum, whose equality is enough where nobody but the program itself had
        them in its hands; ``anew`` if that is not known, as when others were loaded.
        """
        now = checksum(self._model)
        if anew or now != self._known[0]:
            self._known = now, fingerprint(self._model)
        return self._known[1]


@torch.inference_mode()
@no_autocast()
def fingerprint(model: nn.Module) -> str:
    """sha256 of every parameter and buffer by value, wherever they were loaded from and whatever was done to them since: nobody can make
    two models with one fingerprint.

    The hash of the hashes of a tensor's name, shape and dtype, of each 8 MiB of its bytes, and so on. The same on every device, whether or
    not the model is compiled. Buffers that are in no checkpoint count, too, and numbers that modules keep.
    """

    def items() -> Iterator[bytes | memoryview]:  # the former tell how many of the latter follow
        for label, tensor in _contents(model):
            yield label
            if tensor is not None:
                data = tensor.detach().contiguous().flatten().view(torch.uint8)
                yield from (memoryview(piece.cpu().numpy()) for piece in data.split(_PIECE) if len(piece))

    whole = hashlib.sha256()
    for each in _hashes(items()):
        whole.update(each)
    return whole.hexdigest()


@torch.inference_mode()
@no_autocast()
def checksum(model: nn.Module) -> str:
    """What tells by accident only that nothing of the same has changed: two models with one can be made on purpose.

    A tensor enters as its name, shape, dtype and the sums, modulo 2^64, of its mixed 8-byte words along both axes of a matrix of them:
    one changed bit changes a row's and a column's sum. Computed where the tensor lies.
    """
    summary = hashlib.sha256()
    for label, tensor in _contents(model):
        summary.update(label)
        for part in () if tensor is None else _sums(tensor):
            summary.update(part.cpu().numpy().tobytes())
    return summary.hexdigest()


def _contents(model: nn.Module) -> Iterator[tuple[bytes, Tensor | None]]:
    """What a model computes with in an order of its own: what each tensor is called and is, and itself, None where it was there before
    under another name; at last numbers that modules keep."""
    named = dict(model.named_buffers(remove_duplicate=False)) | dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in _passing(module):
            named.pop(f"{prefix}.{name}".lstrip("."), None)
    held = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    whole = (_parts(name.replace(_COMPILED, ""), tensor) for name, tensor in (named | held).items())
    plain = {name: tensor for parts in whole for name, tensor in parts}
    seen: dict[Any, str] = {}
    for name, tensor in sorted(plain.items()):
        first = seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        label = json.dumps([name, tuple(tensor.shape), str(tensor.dtype), first]).encode()
        yield label, tensor if first == name else None
    numbers = {
        f"{prefix}.{name}".replace(_COMPILED, ""): vars(module)[name]
        for prefix, module in model.named_modules()
        for name in _numbers(module)
    }
    yield repr(sorted(numbers.items())).encode(), None


def _hashes(items: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """sha256 of each, in their order; a few are read ahead, for as many threads."""
    with ThreadPoolExecutor(_HASHERS, thread_name_prefix="kvzip-hash") as pool:
        begun: deque[Future[bytes]] = deque()
        for item in items:
            begun.append(pool.submit(_sha256, item))
            if len(begun) > _HASHERS:
                yield begun.popleft().result()
        yield from (each.result() for each in begun)


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Sums of a tensor's words along the rows and the columns of a matrix of them, and what is left over.

    On a CPU numpy adds them, in this thread alone: torch would give it OpenMP threads beside the model's, see
    :mod:`~kvzip_memory.system.threads`.
    """
    words, rest = _words(tensor)
    whole = len(words) // _ROW * _ROW
    on_cpu = tensor.device.type == "cpu"
    matrix: Any = words[:whole].view(-1, _ROW)
    columns, step = matrix.new_zeros(_ROW), 64 * _ROWS
    if on_cpu:
        matrix, columns, step = matrix.numpy(), columns.numpy(), _ROWS
    for first in range(0, len(matrix), step):
        rows = matrix[first : first + step]
        mixed = rows >> 32
        mixed ^= rows  # two upper bits that flip would cancel otherwise
        columns += mixed.sum(0)
        yield torch.as_tensor(mixed.sum(1), device=tensor.device)
    yield torch.as_tensor(columns, device=tensor.device)
    yield words[whole:]
    yield rest


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's bytes as int64 words, and up to 7 bytes that are left over."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(data) // 8 * 8
    words = data[:whole]
    if words.data_ptr() % 8 or words.storage_offset() % 8:
        words = words.clone()
    return words.view(torch.int64), data[whole:]


# Parts of a configuration that change neither a key nor a value.
_NEUTRAL = {"_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype", "name_or_path"}


def weights_identity(model: PreTrainedModel, weights: str | None = None) -> dict[str, Any]:
    """The fields of a key that a model in memory decides.

    Args:
        weights: their fingerprint; None has them read (measured: about 0.6 s a GB on one CPU core).
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NEUTRAL}
    quantization = config.pop("quantization_config", None)
    return {
        "architecture": model.config.model_type,
        "config": digest(config),
        "weights": weights or fingerprint(model),
        "adapter": adapter_state(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": None if quantization is None else digest(quantization),
    }
