"""Compiles the Triton kernels without a GPU: `python tests/triton_kernels/compile_kernels.py --capability 90 [NAME]...`

Prints a line of JSON per kernel: its name, registers and bytes spilled to memory per thread, bytes of shared memory per
block, and for how many loads that are under way it waits in each place (0: for all of them).
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.triton_kernels.attention import (
    attention_kernel,
    blocks,
    compile_options,
    head_tiles,
    most_queries,
    tiling,
)
from longspan.triton_kernels.merge import accumulate_kernel, merge_kernel
from longspan.triton_kernels.store import store_kernel
from longspan.triton_kernels.stored import FP8, INT8, SAME

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Most bytes of shared memory of a block, by compute capability. Source: CUDA C++ Programming Guide."""


class Kernel(NamedTuple):
    """What is compiled."""

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, object]
    num_warps: int


POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def attention_case(
    width: int,
    dtype: torch.dtype,
    num_queries: int,
    group_size: int,
    softcap: bool = False,
    latent_width: int | None = None,
    capability: int = 90,
    stored: str = "",
) -> Kernel:
    """Attention over keys of a width; `latent_width` of their elements are the value, or values are as wide."""
    sizes = tiling(width, dtype, SHARED_BYTES[capability])
    tiles = head_tiles(group_size, sizes.most_rows)
    group_size //= tiles
    per_tile = most_queries(group_size, num_queries, sizes.most_rows)
    is_latent = latent_width is not None
    v_width = latent_width or width
    k_block, v_block = blocks(width, v_width, values_in_keys=is_latent)
    choices = compile_options(per_tile, group_size, width, dtype, sizes)
    num_warps = choices.pop("num_warps")
    pointer = POINTER[dtype]
    pointers = {"out_ptr": "*fp32", "lse_ptr": "*fp32", "q_ptr": pointer, "k_ptr": pointer, "v_ptr": pointer}
    pointers |= {"query_tiles": "*i32", "key_tiles": "*i32", "k_scales_ptr": "*fp32", "v_scales_ptr": "*fp32"}
    if stored:
        pointers |= dict.fromkeys(("k_ptr", "v_ptr"), {"int8": "*i8", "fp8": "*u8"}[stored])
    constants = {
        "NUM_KV_HEADS": 1 if is_latent else 8,
        "GROUP_SIZE": group_size,
        "HEAD_TILES": tiles,
        "K_WIDTH": width,
        "V_WIDTH": v_width,
        "K_BLOCK": k_block,
        "V_BLOCK": v_block,
        "HAS_SOFTCAP": softcap,
        "UPCAST": False,
        "STORED": {"": SAME, "int8": INT8, "fp8": FP8}[stored].value,
        "VALUES_IN_KEYS": is_latent,
        **choices,
    }
    name = f"{'prefill' if num_queries > 1 else 'decode'} {str(dtype).removeprefix('torch.')} {width}"
    name += f" of {stored}" * bool(stored)
    name += " softcap" * softcap + f" group of {group_size}" * (group_size == 7)
    name += f" of latents, {tiles * group_size} heads" * is_latent
    return Kernel(name, attention_kernel, pointers, constants, num_warps)


def kernels(capability: int) -> Iterator[Kernel]:
    """All that are compiled for a compute capability."""
    attention = partial(attention_case, capability=capability)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (64, 96, 128, 256):
            for num_queries in (1, 2048):
                yield attention(width, dtype, num_queries, 4)
    yield attention(128, torch.bfloat16, 2048, 4, softcap=True)
    yield attention(256, torch.bfloat16, 1, 2, softcap=True)
    yield attention(128, torch.bfloat16, 2048, 7)
    for dtype in (torch.bfloat16, torch.float32):
        for num_queries in (1, 2048):
            for num_heads in (16, 128):
                yield attention(576, dtype, num_queries, num_heads, latent_width=512)
    for stored in ("int8", "fp8"):
        for num_queries in (1, 2048):
            yield attention(128, torch.bfloat16, num_queries, 4, stored=stored)
        yield attention(576, torch.bfloat16, 1, 16, latent_width=512, stored=stored)
    for part in ("*bf16", "*fp32"):
        pointers = {"out_ptr": "*bf16", "out_lse_ptr": "*fp32", "part_ptr": part, "part_lse_ptr": "*fp32"}
        constants = {"NUM_HEADS": 32, "WIDTH": 128, "WIDTH_BLOCK": 128, "HAS_SINKS": True}
        for rows, parts in ((16, 1), (1, 16)):
            sizes = {"BLOCK_ROWS": rows, "BLOCK_PARTS": parts}
            name = f"merge {part}" + " of few rows" * (rows == 1)
            yield Kernel(name, merge_kernel, pointers | {"sinks_ptr": "*fp32"}, constants | sizes, 4)
    pointers = {"acc_ptr": "*fp32", "acc_lse_ptr": "*fp32", "part_ptr": "*bf16", "part_lse_ptr": "*fp32"}
    constants = {"WIDTH": 128, "WIDTH_BLOCK": 128, "BLOCK_ROWS": 16}
    yield Kernel("accumulate", accumulate_kernel, pointers, constants, 4)
    for name, held, kind in (("store", "*bf16", SAME), ("store int8", "*i8", INT8), ("store fp8", "*u8", FP8)):
        pointers = dict.fromkeys(("pool_k_ptr", "pool_v_ptr"), held) | dict.fromkeys(("k_ptr", "v_ptr"), "*bf16")
        pointers |= {"pool_k_scales_ptr": "*fp32", "pool_v_scales_ptr": "*fp32", "rows_ptr": "*i64"}
        constants = {"K_WIDTH": 128, "V_WIDTH": 128, "BLOCK": 128, "STORED": kind.value}
        yield Kernel(name, store_kernel, pointers, constants, 1)


def compiled(kernel: Kernel, capability: int) -> dict[str, object]:
    """Registers, spills, shared memory and waits of a kernel."""
    names = kernel.function.arg_names
    floats = {"scale_log2", "softcap"}
    signature = {
        name: "constexpr"
        if name in kernel.constants
        else kernel.pointers.get(name, "fp32" if name in floats else "i32")
        for name in names
    }
    constants = {(names.index(name),): value for name, value in kernel.constants.items()}
    # As a launch finds them: pointers are aligned, and strides are multiples of the head size, but not of stored rows.
    aligned_strides = {
        name
        for name in names
        if name.endswith("stride") and name not in ("lse_split_stride", "part_lse_stride", "out_lse_group_stride")
    }
    if kernel.constants.get("STORED"):
        aligned_strides = {name for name in aligned_strides if name.startswith(("q_", "out_"))}
    aligned = [
        i
        for i, name in enumerate(names)
        if name not in kernel.constants and (name in kernel.pointers or name in aligned_strides)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {"num_warps": kernel.num_warps}
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = result.asm["ptx"]
    name = re.search(r"\.target (sm_\w+)", ptx)
    assert name is not None, ptx
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if capability >= 100:
        ptxas = ptxas.with_name("ptxas-blackwell")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={name[1]}", str(file), "-o", str(Path(directory) / "kernel.cubin")]
        assembled = subprocess.run(command, capture_output=True, text=True)
    said = assembled.stdout + assembled.stderr
    assert assembled.returncode == 0, said
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None, said
    assert spills is not None, said
    return {
        "kernel": kernel.name,
        "registers": int(registers[1]),
        "spilled_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": result.metadata.shared,
        "most_shared_bytes": SHARED_BYTES[capability],
        "waits": [int(count) for count in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)],
        "num_warps": kernel.num_warps,
    }


def main() -> None:
    """Compile all that the arguments name, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, choices=SHARED_BYTES)
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args()
    wanted = [kernel for kernel in kernels(chosen.capability) if not chosen.names or kernel.name in chosen.names]
    with ThreadPoolExecutor(2) as threads:
        for line in threads.map(partial(compiled, capability=chosen.capability), wanted):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
