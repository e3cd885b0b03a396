"""Binding of our compiled CPU kernels `decode.c`, `prefill.c`, `merge.c` and `linear.c`.

Holds their loading and calls. Must not know pages, masks, models or when a kernel is worth calling.
Read next: `longspan.native.layer`, for `layer.c`; `longspan.attention.native_cpu` and `longspan.models.linear`, which
call them; `docs/decisions/0004-decode-kernel.md` for why they exist.

The kernels are compiled when the package is installed, if there is a C compiler; else everything works, and decode is
slower. They are plain C behind ctypes, so they need no headers of Python or torch: one binary fits every version of
both. Their parallel loops run on torch's own OpenMP threads: the library leaves OpenMP's symbols open, and torch's
runtime resolves them. A second runtime would bring a second set of spinning threads.
"""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longspan.kv.stored import row_width

MAX_ROWS, MAX_WIDTH, LANES = 8, 576, 16
"""Limits of decode.c and linear.h (FEW_ROWS), and the vector width of lanes.h."""

MIN_PREFILL_LANES = 8
"""Fewest lanes of registers for which `prefill` is chosen."""

MIN_RUN_KEYS = 512
"""Fewest keys that another thread is worth in prefill."""

MAX_LINEAR_ROWS = 128
"""MAX_ROWS of linear.h. From more rows on oneDNN is as fast: rearranging the weights is spread over more rows."""

INTERFACE = 9
"""Number of the signatures below, as in prefill.c; it changes with them, so that an older binary is not called."""

FAR = 1 << 40
"""Distance in tokens that is larger than any between a key and a query."""

DTYPES = (torch.float32, torch.bfloat16)
"""Of queries and weights."""
_KINDS = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
"""Of keys and values, in the order of `lanes.h`. See `longspan.kv.stored`, Note [Stored rows]."""


_NAMES = {4: "_kernels", 8: "_kernels_avx2", 16: "_kernels_avx512"}
"""Names of the binaries of the same kernels, by the lanes of the registers that they are compiled for."""


def binaries() -> dict[int, Path]:
    """Paths of the libraries that were compiled when the package was installed and that this CPU can run, by lanes."""
    paths = {
        lanes: path
        for lanes, name in _NAMES.items()
        for suffix in EXTENSION_SUFFIXES
        if (path := Path(__file__).with_name(f"{name}{suffix}")).is_file()
    }
    if 4 not in paths or not _load_openmp():
        return {}
    try:
        most = ctypes.CDLL(str(paths[4])).longspan_lanes()
    except (OSError, AttributeError):  # it cannot be loaded, or is of older sources
        return {}
    return {lanes: path for lanes, path in paths.items() if lanes <= most}


@cache
def _binary() -> Path | None:
    """Path of the library for this CPU's largest registers; None where none could be compiled."""
    found = binaries()
    return found[max(found)] if found else None


@cache
def _load_openmp() -> bool:
    """Let kernels find the OpenMP runtime that torch has loaded; return whether there is one."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        (openmp, *_) = [line.split()[-1] for line in maps if "libgomp" in line or "libiomp5" in line]
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    except (OSError, ValueError):
        return False
    return True


@cache
def library() -> ctypes.CDLL | None:
    """Load the kernels; None where they were not compiled from these sources or have no OpenMP runtime."""
    binary = _binary()
    if binary is None:
        return None
    try:
        kernels = ctypes.CDLL(str(binary))
    except OSError:
        return None
    if not hasattr(kernels, "longspan_interface") or kernels.longspan_interface() != INTERFACE:
        return None
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernels.longspan_decode.argtypes = [
        *(pointer, pointer, pointer, long, long, long, long),
        *(integer, integer, long, integer, integer, integer, integer, integer, pointer, pointer),
    ]
    kernels.longspan_decode_batch.argtypes = [
        *(pointer, pointer, pointer, long, long, long, long),
        *(integer, integer, integer, integer, integer, integer, ctypes.c_float, long),
        *(pointer, pointer, pointer, pointer),
        *(integer, pointer, pointer),
    ]
    kernels.longspan_before_attention.argtypes = [pointer] * 4 + [integer] * 2 + [pointer] * 4
    kernels.longspan_behind_attention.argtypes = [pointer] * 3 + [integer] * 2 + [pointer] * 2
    kernels.longspan_project_attention.argtypes = [pointer] * 3 + [integer] * 2 + [pointer] * 2
    kernels.longspan_norm_rows.argtypes = [pointer, pointer, long, integer, pointer]
    kernels.longspan_finish_rows.argtypes = [pointer] * 6 + [long, integer] + [pointer] * 3 + [long]
    kernels.longspan_add_attention_rows.argtypes = [pointer, pointer, long, integer, pointer, pointer]
    kernels.longspan_gate_rows.argtypes = [pointer, pointer, long, integer, pointer]
    kernels.longspan_add_mlp_rows.argtypes = [pointer] * 3 + [long, integer, pointer]
    kernels.longspan_prefill.argtypes = [
        *(pointer, pointer, pointer, long, long, long, long, long, long),
        *(integer, integer, integer, integer, integer, integer, long),
        *(pointer, long, ctypes.c_float, long, integer, pointer, pointer),
    ]
    kernels.longspan_merge_rows.argtypes = [pointer] * 4 + [long, integer, integer]
    kernels.longspan_experts.argtypes = [pointer] * 4 + [integer] * 3 + [pointer] * 3
    kernels.longspan_delta_scratch.restype = long
    kernels.longspan_delta_rule.argtypes = [pointer, long, long, integer, pointer]
    kernels.longspan_rms_norm.argtypes = [pointer] * 3 + [long] * 2 + [ctypes.c_double, long, integer, pointer]
    kernels.longspan_convolve.argtypes = [pointer, long, long, pointer, pointer, *[long] * 5, integer, pointer]
    kernels.longspan_convolve_step.argtypes = [pointer] * 4 + [long] * 4 + [integer, pointer]
    kernels.longspan_shared_sum.argtypes = [
        *(pointer, integer, integer, long, ctypes.c_uint32, integer, pointer, pointer, long),
        *(ctypes.c_int64, ctypes.c_int64),
    ]
    kernels.longspan_linear.argtypes = [pointer, pointer, long, integer, long, integer, integer, pointer]
    kernels.longspan_packed_linear.argtypes = [
        *(pointer, pointer, pointer, pointer),
        *(long, long, integer, integer, long, integer, pointer),
    ]
    kernels.longspan_unpack.argtypes = [pointer, pointer, pointer, long, long, integer, long, integer, pointer]
    return kernels


def is_available() -> bool:
    """Whether the kernels were compiled and can be loaded."""
    return library() is not None


@cache
def fingerprint() -> str:
    """Hash of the compiled kernels, empty without them: measurements made with other kernels do not count."""
    binary = _binary()
    if binary is None or not is_available():
        return ""
    return hashlib.sha256(binary.read_bytes()).hexdigest()[:16]


def _is_width(width: int) -> bool:
    return width % LANES == 0 and 0 < width <= MAX_WIDTH


def can_decode(num_rows: int, width: int, v_width: int, dtype: torch.dtype) -> bool:
    """Whether `decode` takes this number of query rows per KV head, these head sizes and this dtype of keys."""
    return 1 <= num_rows <= MAX_ROWS and _is_width(width) and _is_width(v_width) and dtype in _KINDS


def decode(rows: Tensor, k: Tensor, v: Tensor, scale: float, num_runs: int) -> tuple[Tensor, Tensor]:
    """Compute attention of every query row over every key of its KV head.

    Args:
        rows: [Hkv, r, D], of a shape that `can_decode` admits.
        k: [Hkv, s, stored D] of a dtype that it admits, contiguous in the last dimension, s >= 1.
        v: [Hkv, s, stored Dv], contiguous in the last dimension; may be the first elements of `k` if these have no
            scales.
        scale: factor on the dot products.
        num_runs: number of runs that the keys are cut into, for more parallel work; no run may be empty.

    Returns:
        out [num_runs, Hkv, r, Dv] and lse [num_runs, Hkv, r], float32: one partial per run.
    """
    found = library()
    assert found is not None
    num_heads, num_rows, width = rows.shape
    v_width, num_threads = row_width(v), torch.get_num_threads()
    scaled = (rows.float() * scale).contiguous()
    out = torch.empty(num_runs, num_heads, num_rows, v_width)
    lse = torch.empty(num_runs, num_heads, num_rows)
    status = found.longspan_decode(
        *(scaled.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(num_heads, num_rows, k.shape[1], width, v_width, _KINDS.index(k.dtype), num_runs, num_threads),
        *(out.data_ptr(), lse.data_ptr()),
    )
    assert status == 0, f"decode kernel refused {num_heads} heads, {num_rows} rows, {k.shape[1]} keys, {num_runs} runs"
    return out, lse


class DecodeBatch:
    """Table for the kernel of the keys that every query of a batch sees. Made once per step, used in every layer."""

    def __init__(self, keys_of: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Build the table.

        Args:
            keys_of: runs (first key row, number of keys) by packed query row; at least one run, none empty.
        """
        self.num_queries = len(keys_of)
        runs = [run for runs in keys_of.values() for run in runs]
        ends = accumulate((len(runs) for runs in keys_of.values()), initial=0)
        self.query_rows = np.fromiter(keys_of, dtype=np.int64)
        self.offsets = np.fromiter(ends, dtype=np.int64)
        self.starts = np.array([start for start, _ in runs], dtype=np.int64)
        self.lengths = np.array([length for _, length in runs], dtype=np.int64)
        assert len(self.lengths) == 0 or self.lengths.min() > 0, "an empty run"


def decode_batch(q: Tensor, k: Tensor, v: Tensor, scale: float, batch: DecodeBatch, out: Tensor, lse: Tensor) -> None:
    """Compute attention of every query of a batch over its own keys; other rows of `out` and `lse` are left alone.

    Args:
        q: [T, H, D] float32 or bfloat16, contiguous; H / Hkv, D, Dv and k's dtype such that `can_decode` admits them.
        k: [Hkv, rows, stored D], contiguous in the last dimension.
        v: [Hkv, rows, stored Dv], contiguous in the last dimension; may be the first elements of `k` if these have no
            scales.
        scale: factor on the dot products.
        batch: keys that each query sees.
        out: [T, H, Dv] float32, contiguous, written.
        lse: [T, H] float32, contiguous, written.
    """
    found = library()
    assert found is not None
    assert q.is_contiguous()
    assert q.dtype in DTYPES
    num_kv_heads, width = k.shape[0], q.shape[2]
    group_size, kind = q.shape[1] // num_kv_heads, _KINDS.index(k.dtype)
    status = found.longspan_decode_batch(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(num_kv_heads, group_size, width, row_width(v), q.dtype is torch.bfloat16, kind, scale, batch.num_queries),
        *(batch.query_rows.ctypes.data, batch.offsets.ctypes.data, batch.starts.ctypes.data, batch.lengths.ctypes.data),
        *(torch.get_num_threads(), out.data_ptr(), lse.data_ptr()),
    )
    assert status == 0, f"decode kernel refused {batch.num_queries} queries of {q.shape[1]} heads of {width}"


def can_prefill(width: int, v_width: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether `prefill` takes these head sizes and dtypes of queries and keys, and this CPU has registers for it."""
    fits = _is_width(width) and _is_width(v_width) and dtype in DTYPES and kv_dtype in _KINDS
    found = library() if fits else None
    return found is not None and found.longspan_own_lanes() >= MIN_PREFILL_LANES


class SeenKeys(NamedTuple):
    """Consecutive keys, and which of them consecutive queries see; by default all of them."""

    row: int
    num_keys: int
    lead: int = FAR
    """Index offset, in tokens: query i sees keys up to `i + lead`."""
    span: int = 2 * FAR
    """Window in tokens: query i sees the last `span` keys of those up to `i + lead`."""


def prefill(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Sequence[SeenKeys], out: Tensor, lse: Tensor) -> None:
    """Compute attention of consecutive queries over several runs of keys in one call.

    Args:
        q: [t, H, D], contiguous in the last dimension; sizes and dtypes of q and k are such that `can_prefill` admits
            them.
        k: [Hkv, rows, stored D], contiguous in the last dimension.
        v: [Hkv, rows, stored Dv], contiguous in the last dimension; may be the first elements of `k` if these have no
            scales.
        scale: factor on the dot products.
        seen: disjoint runs of keys.
        out: [t, H, Dv] float32, contiguous, written; 0 for a query that sees nothing.
        lse: [t, H] float32, contiguous, written; -inf for a query that sees nothing.
    """
    found = library()
    assert found is not None
    assert q.dtype in DTYPES
    num_queries, num_heads, width = q.shape
    num_kv_heads, num_threads = k.shape[0], torch.get_num_threads()
    spans = np.array(seen, dtype=np.int64)  # [runs, 4]
    state_rows = found.longspan_state_rows()  # query rows that meet every key together, on one thread
    tasks = num_kv_heads * -(-num_queries * (num_heads // num_kv_heads) // state_rows)
    num_runs = max(1, min(num_threads // tasks, sum(run.num_keys for run in seen) // MIN_RUN_KEYS))
    outs, lses = (
        (out, lse) if num_runs == 1 else (out.new_empty(num_runs, *out.shape), lse.new_empty(num_runs, *lse.shape))
    )
    status = found.longspan_prefill(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(num_kv_heads, num_heads // num_kv_heads, width, row_width(v), q.dtype is torch.bfloat16),
        *(_KINDS.index(k.dtype), num_queries),
        *(spans.ctypes.data, len(seen), scale, num_runs, num_threads, outs.data_ptr(), lses.data_ptr()),
    )
    assert status == 0, f"prefill kernel refused {num_queries} queries of {num_heads} heads of {width}, {v.shape[2]}"
    if num_runs > 1:  # few rows, and several threads that each took some of the keys
        out.copy_(outs[0])
        lse.copy_(lses[0])
        for part_out, part_lse in zip(outs[1:], lses[1:], strict=True):
            merge_rows(out, lse, part_out, part_lse)


def can_merge(*tensors: Tensor) -> bool:
    """Whether `merge_rows` takes these outputs and log-sum-exps."""
    fits = all(t.dtype is torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return fits and is_available()


def merge_rows(acc_out: Tensor, acc_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge a partial into another one of the same shape, in place.

    Args:
        acc_out: [T, H, Dv]; `can_merge` holds for all four tensors. Rows that stay empty become 0.
        acc_lse: [T, H] natural logarithm, -inf in empty rows.
        out: [T, H, Dv]; anything in empty rows.
        lse: [T, H] natural logarithm, -inf in empty rows.
    """
    found = library()
    assert found is not None
    assert (out.shape, lse.shape) == (acc_out.shape, acc_lse.shape), "partials differ in shape"
    status = found.longspan_merge_rows(
        *(acc_out.data_ptr(), acc_lse.data_ptr(), out.data_ptr(), lse.data_ptr()),
        *(acc_lse.numel(), acc_out.shape[-1], torch.get_num_threads()),
    )
    assert status == 0, f"merge kernel refused {acc_lse.numel()} rows of {acc_out.shape[-1]}"


def can_multiply(num_rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `linear` takes this number of rows, this number of inputs and this dtype."""
    most = MAX_LINEAR_ROWS if dtype is torch.float32 else MAX_ROWS
    return 1 <= num_rows <= most and width % LANES == 0 and width > 0 and dtype in DTYPES


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply a few rows by the transpose of a weight matrix, accumulating in float32.

    Args:
        x: [..., width] of weight's dtype, with as many rows as `can_multiply` admits.
        weight: [num_out, width], contiguous.

    Returns:
        [..., num_out] in x's dtype.
    """
    found = library()
    assert found is not None
    num_out, width = weight.shape
    rows = x.float().contiguous()
    num_rows = rows.numel() // width
    out = torch.empty(*x.shape[:-1], num_out)
    status = found.longspan_linear(
        *(rows.data_ptr(), weight.data_ptr(), width, num_rows, num_out),
        *(weight.dtype is torch.bfloat16, torch.get_num_threads(), out.data_ptr()),
    )
    assert status == 0, f"linear kernel refused {num_rows} rows of {width} for {num_out} outputs"
    return out.to(x.dtype)
