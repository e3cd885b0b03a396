"""Query heads that share a KV head as rows of one product, and one call's keys as runs for several threads.

Holds the reshaping and the number of runs. Must not know kernels or segments.
Read next: `longspan.attention.native_cpu` and `longspan.attention.flash_cpu`, which call kernels on them.

Note [Fold or expand]
    A group of G query heads that share a KV head either becomes G times as many query rows (fold: the kernel reads each
    key once for the group; needs a copy of q, and no causality inside the call) or G heads on a stride-0 view of the
    KV head (expand: no copy). Measured on 2 threads of an AVX-512 machine, 8/2 heads of 64, 16k keys, matmul rate 140
    to 180: fold 153 GFLOP/s at 512 queries against 104; 135 against 143 at 2048; decode 10 GB/s against 6. So FULL
    folds, CAUSAL and BAND expand.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kv.pool import are_in_keys

MAX_RUNS = 64
"""Most runs of keys that a call is split into; each has at least MIN_RUN_KEYS keys, so none is empty."""
MIN_RUN_KEYS = 512
"""Fewest keys of a run: the flash kernel's own key block is 512."""


def fold(q: Tensor) -> Tensor:
    """Reshape [t, Hkv, G, D] to [Hkv, t * G, D]; a view for one query."""
    num_queries, num_kv_heads, group_size, width = q.shape
    return q.transpose(0, 1).reshape(num_kv_heads, num_queries * group_size, width)


def unfold(out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `fold`.

    Args:
        out: [Hkv, t * G, Dv], or with a first dimension of 1.
        lse: [Hkv, t * G], or with a first dimension of 1.
        q: [t, Hkv, G, D], the queries that were folded.

    Returns:
        Views [t, Hkv, G, Dv] and [t, Hkv, G].
    """
    num_queries, num_kv_heads, group_size, _ = q.shape
    grouped = (num_kv_heads, num_queries, group_size)
    return out.reshape(*grouped, out.shape[-1]).transpose(0, 1), lse.reshape(grouped).transpose(0, 1)


def count_key_runs(num_kv_heads: int, num_rows: int, num_keys: int, num_threads: int) -> int:
    """Number of runs of keys that a call is cut into so that every thread works.

    A kernel gives a thread whole (head, block of rows) pairs; a decode with one KV head would leave all but one idle.
    """
    if num_threads == 1:
        return 1
    block_rows = 256 if num_rows >= 768 else 64 if num_rows >= 192 else 32  # the flash kernel's own choice
    units = num_kv_heads * -(-num_rows // block_rows)
    if units >= 4 * num_threads:
        return 1
    return max(1, min(num_threads // gcd(units, num_threads), num_keys // MIN_RUN_KEYS, MAX_RUNS))


def merge_key_runs(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the partials of runs of keys, none of them empty: [runs, Hkv, r, D] and [runs, Hkv, r]."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    shares = torch.softmax(lse, dim=0).unsqueeze(-1)
    return (out * shares).sum(dim=0), torch.logsumexp(lse, dim=0)


def pad_to_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad q and k [..., D] or v [..., Dv] to one width for kernels that need it: with zeros, which change no score.

    Values that are the first elements of their keys are padded with the rest of these, without a copy.
    """
    width, v_width = q.shape[-1], v.shape[-1]
    if v_width == width:
        return q, k, v
    if are_in_keys(v, k):
        return q, k, k
    widest = max(v_width, width)
    q, k, v = (F.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in (q, k, v))
    return q, k, v
