"""The driver of our compiled attention kernels on any CPU: plain products stand in for the kernels, and take all sizes.

The kernels themselves are proven in `tests/native`, on CPUs that have the registers which they are made for.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch

from longspan.attention.cpu import CPUBackend
from longspan.attention.partial import accumulation_dtype
from longspan.native import kernels


class NativeStandIns(CPUBackend):
    """The cpu backend where the compiled kernels take every call without a softcap."""

    def partial_attention(self, q, k, v, segments, params):
        stand_ins = {
            "is_available": lambda: True,
            "can_prefill": lambda width, v_width, dtype, kv_dtype: True,
            "can_decode": lambda num_rows, width, v_width, dtype: 1 <= num_rows <= kernels.MAX_ROWS,
            "prefill": prefill,
            "decode": decode,
            "decode_batch": decode_batch,
        }
        with ExitStack() as patches:
            for name, stand_in in stand_ins.items():
                patches.enter_context(patch.object(kernels, name, stand_in))
            return super().partial_attention(q, k, v, segments, params)


def softmax(scores, v):
    """out [..., Dv] and lse [...] of scores [..., s], 0 and -inf where all are hidden; v [..., s, Dv]."""
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill(lse.isneginf()[..., None], 0.0)
    return weights @ v, lse


def prefill(q, k, v, scale, seen, out, lse):
    """As `kernels.prefill`."""
    group_size, queries = q.shape[1] // k.shape[0], torch.arange(q.shape[0])[:, None]
    rows = torch.cat([torch.arange(run.row, run.row + run.num_keys) for run in seen])
    ages = [(run, queries + run.lead - torch.arange(run.num_keys)) for run in seen]
    hidden = torch.cat([(age < 0) | (age >= run.span) for run, age in ages], dim=1)  # [t, s]
    keys, values = (x[:, rows].to(out.dtype).repeat_interleave(group_size, dim=0) for x in (k, v))  # [H, s, D]
    scores = (q.to(out.dtype).transpose(0, 1) @ keys.mT * scale).masked_fill(hidden, -torch.inf)  # [H, t, s]
    found_out, found_lse = softmax(scores, values)
    out.copy_(found_out.transpose(0, 1))
    lse.copy_(found_lse.T)


def decode(rows, k, v, scale, num_runs):
    """As `kernels.decode`, but for the number of runs, which is 1."""
    dtype = accumulation_dtype(k.dtype)
    out, lse = softmax(rows.to(dtype) @ k.to(dtype).mT * scale, v.to(dtype))
    return out[None], lse[None]


def decode_batch(q, k, v, scale, batch, out, lse):
    """As `kernels.decode_batch`."""
    assert q.is_contiguous()
    for i, row in enumerate(batch.query_rows):
        runs = slice(batch.offsets[i], batch.offsets[i + 1])
        pairs = zip(batch.starts[runs], batch.lengths[runs], strict=True)
        index = torch.cat([torch.arange(start, start + length) for start, length in pairs])
        found_out, found_lse = decode(q[row].unflatten(0, (k.shape[0], -1)), k[:, index], v[:, index], scale, 1)
        out[row] = found_out.flatten(0, 2)
        lse[row] = found_lse.flatten()
