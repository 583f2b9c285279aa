"""Which attention is chosen where, and how flash attention libraries are called."""

from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import plain_varlen

from kvzip_memory import InputError
from kvzip_memory.attention import FEW_TOKENS, RowKV, Softmax, _by_length, choose, flash

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def lengths(starts: torch.Tensor) -> list[int]:
    assert starts.dtype == torch.int32
    return starts.diff().tolist()


def two(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float = 1.0, causal: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """``flash_attn_varlen_func`` as flash-attn 2 documents it."""
    assert (max_seqlen_q, max_seqlen_k) == (max(lengths(cu_seqlens_q)), max(lengths(cu_seqlens_k)))
    out, lse = plain_varlen(q, k, v, lengths(cu_seqlens_q), lengths(cu_seqlens_k), softmax_scale, causal)
    return (out, lse, None) if return_attn_probs else out


def early_three(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float = 1.0, causal: bool = False,
) -> Any:  # fmt: skip
    """The same as early releases of 3 have it: the log-sum-exp comes unasked."""
    return two(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal, True)[:2]


def torchs(*args: Any, **kwargs: Any) -> Any:
    """``torch.nn.attention.varlen.varlen_attn``, which computes on GPUs only: its own signature binds the arguments."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10")
    bound = signature(varlen.varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    assert given["enable_gqa"]
    assert given["return_aux"].lse
    causal = {(-1, 0): True, (-1, -1): False}[given["window_size"]]
    return plain_varlen(*args[:3], lengths(args[3]), lengths(args[4]), given["scale"], causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("library", [two, early_three, torchs])
def test_a_library_is_called_as_it_documents(library: Any, causal: bool) -> None:
    if library is torchs:
        varlen = flash._torch(SimpleNamespace(varlen_attn=torchs, AuxRequest=lambda lse: SimpleNamespace(lse=lse)))
    else:
        varlen = flash._dao(library)
    query, keys, values = torch.randn(9, 3, 16), torch.randn(14, 1, 16), torch.randn(14, 1, 16)
    call = (query, keys, values, [2, 4, 3], [5, 4, 5], 0.3, causal)
    torch.testing.assert_close(varlen(*call), plain_varlen(*call))


@pytest.mark.parametrize(
    ("name", "message"),
    [("fastest", "auto, cpu, reference, flash, triton"), ("flash", "float16 or bfloat16"), ("triton", "needs a CUDA GPU")],
)
def test_an_attention_that_cannot_compute_here_is_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvzip_memory.attention._kernels", lambda device: None)
    with pytest.raises(InputError, match=message):
        choose(name, CPU, torch.float32)
    assert choose("auto", CPU, torch.float32).name == "cpu"


def test_on_a_gpu_triton_decodes_and_a_library_reads_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("auto", CUDA, torch.bfloat16).name == "triton, torch varlen"
    assert choose("flash", CUDA, torch.bfloat16).name == "torch varlen"
    assert choose("auto", CUDA, torch.float32).name == "triton", "libraries compute in half precision"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("auto", CUDA, torch.float16).name == "triton", "before Ampere there is no library"
    monkeypatch.setattr("kvzip_memory.attention._kernels", lambda device: None)
    assert choose("auto", CUDA, torch.float16).name == "cpu"


@pytest.mark.parametrize(
    ("tokens", "dim", "dim_v", "cap", "expected"),
    [
        (1, 128, 128, None, "decode"),
        (FEW_TOKENS, 128, 128, None, "decode"),
        (FEW_TOKENS + 1, 128, 128, None, "read"),
        (99, 512, 512, None, "decode"),
        (99, 128, 64, None, "decode"),
        (99, 128, 128, 50.0, "decode"),
    ],
)
def test_long_questions_go_to_the_library_if_it_takes_them(tokens: int, dim: int, dim_v: int, cap: float | None, expected: str) -> None:
    names: list[str] = []
    attention = _by_length(*(lambda *call, name=name: names.append(name) for name in ("decode", "read")))
    row = RowKV((), torch.empty(1, tokens, dim), torch.empty(1, tokens, dim_v), tokens, 0)
    attention(torch.empty(1, 1, tokens, dim), [row], Softmax(1.0, cap), None)
    assert names == [expected]
