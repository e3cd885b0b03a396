"""Kernels of a step's attention: store rows, attend, merge. Here are those in plain torch.

Holds the protocol and the reference that runs where there is no GPU. Must not know ranks or requests.
Read next: `longspan.integrations.vllm.runner.flash`, the kernels for GPUs.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.partial import PartialAttention, merge_partials
from longspan.types import AttentionParams


@dataclass(frozen=True)
class DeviceCall:
    """Arguments of one kernel call, on the device."""

    block_table: Tensor
    """[runs, blocks] int32: blocks of this rank that hold the run's keys, in sequence order."""
    query_starts: Tensor
    """[runs + 1] int32: first query of each run, and the number of queries."""
    key_lens: Tensor
    """[runs] int32: keys that the run sees; 0 is legal."""
    max_query_len: int
    max_key_len: int
    is_causal: bool
    """Whether the last query of a run sees all its keys, the one before all but the last, and so on."""


class Kernels(Protocol):
    """What computes on one device. KV memory is vLLM's, [blocks, Hkv, block_size, D + Dv]: keys, then values."""

    def store(self, k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Store `k` [T, Hkv, D] and `v` [T, Hkv, Dv] at `slots` [T] int64, `block * block_size` and the place in it."""

    def attend(self, q: Tensor, kv_cache: Tensor, call: DeviceCall, params: AttentionParams, out: Tensor) -> Tensor:
        """Attend to keys in KV memory.

        Args:
            q: [T, H, D], packed by run.
            kv_cache: KV memory of one layer.
            call: what sees what.
            params: scale and softcap.
            out: [T, H, Dv], dtype of `q`: written; anything in rows that see no key.

        Returns:
            [T, H] float32 natural log of the softmax denominators; anything in rows that see no key.
        """

    def merge(self, parts: Tensor, lses: Tensor, out: Tensor) -> None:
        """Merge `parts` [P, T, H, Dv] with `lses` [P, T, H] float32, -inf where no key was seen, into `out` [T, H, Dv].

        Empty rows of `parts` may hold anything.
        """


class TorchKernels:
    """Kernels in plain torch, in float32: exact, and slow."""

    def store(self, k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        blocks, places = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
        kv_cache[blocks, :, places] = torch.cat([k, v], dim=-1)  # [T, Hkv, D + Dv]

    def attend(self, q: Tensor, kv_cache: Tensor, call: DeviceCall, params: AttentionParams, out: Tensor) -> Tensor:
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32)
        starts = call.query_starts.tolist()
        for i, num_keys in enumerate(call.key_lens.tolist()):
            rows = slice(starts[i], starts[i + 1])
            if num_keys == 0 or rows.start == rows.stop:
                continue
            blocks = call.block_table[i, : -(-num_keys // kv_cache.shape[2])].long()
            keys = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :num_keys].float()  # [Hkv, S, D + Dv]
            out[rows], lse[rows] = _attend(q[rows].float(), keys, call.is_causal, params)
        return lse

    def merge(self, parts: Tensor, lses: Tensor, out: Tensor) -> None:
        out.copy_(merge_partials(*(PartialAttention(o, lse) for o, lse in zip(parts, lses, strict=True))).out)


def _attend(q: Tensor, kv: Tensor, is_causal: bool, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Return attention [T, H, Dv] and lse [T, H] of `q` [T, H, D] to `kv` [Hkv, S, D + Dv], all float32."""
    num_queries, num_heads, width = q.shape
    num_kv_heads, num_keys, _ = kv.shape
    k, v = kv[..., :width], kv[..., width:]
    grouped = q.view(num_queries, num_kv_heads, -1, width)  # [T, Hkv, G, D]
    scores = torch.einsum("tkgd,ksd->tkgs", grouped, k) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if is_causal:
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)
    out = torch.einsum("tkgs,ksd->tkgd", torch.softmax(scores, dim=-1), v)
    return out.reshape(num_queries, num_heads, -1), torch.logsumexp(scores, dim=-1).reshape(num_queries, num_heads)
