"""How the triton backend cuts a call into programs, and that its kernels compile for GPUs this machine does not have."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from kvzip_memory.context import RaggedLayer

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from kvzip_memory.attention import triton
from kvzip_memory.attention.triton import COUNT, HEAD, KEYS, TAIL

N_HEADS, GROUP, DIM = 8, 4, 128
H100 = 2 * 132  # programs at one time


def context(tokens: int, ratio: float = 0.3) -> RaggedLayer:
    """Head lengths as a global choice of pairs leaves them: one head keeps four times what another does. One pair is all there is."""
    share = np.geomspace(1, 4, N_HEADS)
    lengths = tuple(int(x) for x in np.minimum(share / share.sum() * tokens * ratio * N_HEADS, tokens))
    pair = torch.empty(1, DIM, dtype=torch.bfloat16)
    return RaggedLayer(pair, pair, lengths, torch.zeros(1, dtype=torch.int32))


def cut(contexts: list[RaggedLayer], rows: int, tail: int = 256) -> np.ndarray:
    """Items of so many rows on each context."""
    each = [triton.part_owner([layer], (rows * i, rows * (i + 1)), 0, True) for i, layer in enumerate(contexts)]
    buffer = torch.empty(N_HEADS, tail, DIM, dtype=torch.bfloat16)
    tails = [triton.tail_owner([(buffer, buffer)], tail, (b, b + 1)) for b in range(rows * len(contexts))]
    size = triton.blocks(rows, GROUP, (DIM, DIM), 2)
    return triton.plan([*each, *tails], rows * len(contexts), size.entries, (2 * DIM, 2 * DIM), H100).items[0]


@pytest.mark.parametrize("tokens", [32_768, 131_072])
def test_one_row_on_a_long_context_fills_the_gpu_once(tokens: int) -> None:
    items = cut([context(tokens)], rows=1)
    assert 132 <= len(items) <= H100
    counts = items[items[:, TAIL] == 0][:, COUNT]
    assert counts.sum() > 0.85 * H100 * counts.max(), "programs end together"


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_pair_is_read_once_for_all_rows_on_a_context(rows: int) -> None:
    layer = context(32_768)
    items = cut([layer], rows)
    of_context = items[items[:, TAIL] == 0]
    for head, length in enumerate(layer.lengths):
        runs = of_context[of_context[:, HEAD] == head]
        starts = (runs[:, KEYS] - layer.keys.data_ptr()) // (2 * DIM) - layer.offsets[head]
        assert starts.tolist() == [0, *runs[:, COUNT].cumsum()[:-1]]
        assert runs[:, COUNT].sum() == length


def test_many_contexts_and_tails_are_cut_into_more_programs_than_run_at_one_time() -> None:
    items = cut([context(8192) for _ in range(32)], rows=1)
    assert len(items) > 2 * H100
    assert items[:, COUNT].min() > 0


def test_logits_beyond_float16_do_not_overflow() -> None:
    from kvzip_memory.attention import RowKV, Softmax, reference

    keys, values = torch.full((1, 40, 64), 60.0).half(), torch.randn(1, 40, 64).half()
    row = RowKV((), keys, values, n_new=1, context_tokens=0)
    query = torch.full((1, 1, 1, 64), 60.0).half()  # 64 * 60 * 60 is beyond float16
    call = query, [row], Softmax(0.125), None
    torch.testing.assert_close(triton.attention(*call), reference.attention(*call))


COMPILE = """
import re, subprocess, tempfile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kvzip_memory.attention import kernels, triton

def compiled(kernel, types, constants, capability, **options):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*" or "stride" in name}
    values = {(names.index(name),): value for name, value in constants.items()}
    return compile(ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", capability, 32), options=options)

strides = {f"{prefix}stride_{axis}": "i32" for prefix in ("", "key_", "value_") for axis in "bhn"}
tables = {"items": "*i64", "entries": "*i32", "parts": "*i32", "tails": "*i64", "lengths": "*i64", "positions": "*i64", "counts": "*i64"}
scalars = {"scale": "fp32", "cap": "fp32", "n": "i32", "window": "i32", "heads": "i32"}
for capability, limit, calls in (
    (80, 163 << 10, [(8, 128, False, False)]),
    (
        90,
        227 << 10,
        [(1, 128, False, False), (8, 128, False, False), (8, 128, False, True)]
        + [(32, 128, True, False), (8, 128, True, True), (1, 256, False, False)],
    ),
):
    for rows, dim, windowed, capped in calls:
        size = triton.blocks(rows, 4, (dim, dim), 2)
        shape = {"GROUP": 4, "DIM": dim, "DIM_V": dim, "BLOCK_D": size.d, "BLOCK_DV": size.dv, "BLOCK_M": size.m}
        types = tables | strides | scalars | {"query": "*bf16", "out": "*fp32", "lse": "*fp32"}
        kinds = {"WINDOWED": windowed, "CHUNKED": windowed and capped, "CAPPED": capped, "WIDE": False}
        constants = shape | kinds | {"BLOCK_N": size.n, "PRECISION": "tf32", "n": 1}
        found = compiled(kernels.attend, types, constants, capability, num_warps=triton.warps(size), num_stages=3)
        programs = triton.PROGRAMS if rows <= 8 and dim <= 128 else 1
        assert programs * found.metadata.shared <= limit, ("shared memory", capability, size, found.metadata.shared)
        wide = re.findall(r"cp.async.c[ag].shared.global [^;]* 0x10,", found.asm["ptx"])
        assert len(wide) >= 2 * size.n * size.d * 2 / 16 / (32 * triton.warps(size)), "loads of 16 bytes, ahead of use"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.search(r"STACK:0 ", usage), ("registers spill", usage)
    if capability == 90:
        types = tables | scalars | {"parts_out": "*fp32", "parts_lse": "*fp32", "out": "*bf16", "sinks": "*bf16"}
        shape = {"GROUP": 4, "DIM": 128, "BLOCK_D": 128, "BLOCK_M": 32, "BLOCK_P": 16, "SLOTS": 3}
        compiled(kernels.merge, types, shape, capability)
        compiled(kernels.merge, types, shape | {"sinks": None}, capability)
        shape = {"DIM": 128, "DIM_V": 128, "BLOCK_D": 128, "BLOCK_DV": 128}
        compiled(kernels.append, tables | strides | scalars | {"key": "*bf16", "value": "*bf16"}, shape, capability)
print("compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler for NVIDIA GPUs comes with its Linux wheels")
def test_the_kernels_compile_for_gpus_and_load_ahead_of_use(tmp_path: Path) -> None:
    """For Ampere and Hopper, without one: shared memory suffices, loads are wide and asynchronous, nothing spills."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "compiled\n", done.stderr


def test_the_gpu_benchmark_runs_every_code_path_in_small() -> None:
    script = ROOT / "benchmarks" / "gpu.py"
    done = subprocess.run([sys.executable, str(script), "--small"], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("every code path ran; nothing was measured\n"), done.stderr
