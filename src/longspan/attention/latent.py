"""Attention over latents: queries projected into their space, or keys and values of all heads expanded from them.

Holds the projections, the choice between both ways, and the backend that wraps any other one. Must not know pages,
ranks or models.
Read next: `longspan.kv.layout`, Note [Latents]; `longspan.attention.key_blocks`, which says what is expanded together;
`longspan.models.latent`, which takes the weights from a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.attention.base import AttentionBackend, RowSegment, RowSegments
from longspan.attention.key_blocks import Work, divide
from longspan.attention.partial import PartialAttention, merge_rows_
from longspan.attention.stored import are_stored, attend_converted
from longspan.kv.layout import KVSpec
from longspan.native import onednn
from longspan.types import AttentionParams

EXPANDED_BYTES = 32 << 20
"""Most bytes of keys and values that are expanded at a time, unless MIN_EXPANDED_KEYS take more. On a CPU 16 and 64 MiB
are as fast, 4 MiB are a fifth slower."""
MIN_EXPANDED_KEYS = 128


class LatentWeights(NamedTuple):
    """Projections of one layer. See Note [Latents] in `longspan.kv.layout`."""

    w_k: Tensor
    """[H, nope, rank]: a latent's key in every head, without the part that carries the position."""
    w_v: Tensor
    """[H, Dout, rank]: a latent's value in every head."""

    def absorb(self, q: Tensor) -> Tensor:
        """Project queries [T, H, nope + rotated] into the latent space: [T, H, rank + rotated]."""
        num_heads, nope, rank = self.w_k.shape
        absorbed = q.new_empty(q.shape[0], num_heads, rank + q.shape[2] - nope)
        torch.bmm(q[..., :nope].transpose(0, 1), self.w_k, out=absorbed[..., :rank].transpose(0, 1))
        absorbed[..., rank:] = q[..., nope:]
        return absorbed

    def project(self, partial: PartialAttention) -> PartialAttention:
        """Project outputs [T, H, rank] over latents to those of the heads: [T, H, Dout]; `lse` stays."""
        out = partial.out.to(self.w_v.dtype).transpose(0, 1)  # [H, T, rank]
        projected = torch.bmm(out, self.w_v.transpose(1, 2)).to(partial.out.dtype)  # [H, T, Dout]
        return PartialAttention(projected.transpose(0, 1).contiguous(), partial.lse)

    def expand(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, s, nope + rotated] and values [H, s, Dout] of all heads, from latents [1, s, rank + rotated]."""
        num_heads, nope, rank = self.w_k.shape
        stored, rotated = latents[..., :rank], latents[..., rank:]
        if stored.device.type == "cpu" and stored.dtype is torch.float32 and onednn.is_available():
            keys = stored.new_empty(num_heads, stored.shape[1], nope + rotated.shape[2])
            keys[..., nope:] = rotated
            values = stored.new_empty(num_heads, stored.shape[1], self.w_v.shape[1])
            rows = stored[0].contiguous()
            for head in range(num_heads):
                keys[head, :, :nope] = onednn.linear(rows, self.w_k[head], None)
                values[head] = onednn.linear(rows, self.w_v[head], None)
            return keys, values
        keys = torch.matmul(stored, self.w_k.transpose(1, 2))  # [H, s, nope]
        values = torch.matmul(stored, self.w_v.transpose(1, 2))
        return torch.cat((keys, rotated.expand(num_heads, -1, -1)), dim=2), values


class LatentParams(AttentionParams, frozen=True, eq=False, kw_only=True):
    """Parameters of one layer of latent attention, on a rank that has the weights."""

    weights: LatentWeights
    spec: KVSpec

    @property
    def of_heads(self) -> AttentionParams:
        """Parameters of a call whose keys are expanded, or whose queries are absorbed: both have the same scores."""
        return AttentionParams(self.scale, self.softcap, self.window)


class LatentBackend:
    """Backend that computes latent attention by another backend, and leaves other layers to it."""

    def __init__(self, inner: AttentionBackend) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """Name of the other backend."""
        return self._inner.name

    def unsupported(self, spec: KVSpec, params: AttentionParams) -> str | None:
        """See `AttentionBackend.unsupported`."""
        return self._inner.unsupported(spec, params)

    def partial_attention(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[RowSegment], params: AttentionParams
    ) -> PartialAttention:
        """See `AttentionBackend.partial_attention`.

        For a layer of `LatentParams` q is [T, H, nope + rotated], k is [1, S, rank + rotated], v its first elements,
        and the result [T, H, Dout].
        """
        if not isinstance(params, LatentParams):
            return self._inner.partial_attention(q, k, v, segments, params)
        if are_stored(q, k):
            width = params.spec.out_width
            return attend_converted(self.partial_attention, q, k, v, segments, params, out_width=width)
        weights, plain = params.weights, params.of_heads
        work = self._work(segments, params)
        if work.left or not work.blocks:
            absorbed = self._inner.partial_attention(weights.absorb(q), k, v, work.left, plain)
            acc = weights.project(absorbed)
        else:
            dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
            acc = PartialAttention.empty(q.shape[0], q.shape[1], params.spec.out_width, dtype, q.device)
        for block in work.blocks:
            rows = [k[:, start:end] for start, end in block.runs]
            keys, values = weights.expand(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
            part = self._inner.partial_attention(
                q[block.first_row : block.last_row], keys, values, block.segments, plain
            )
            merge_rows_(acc, block.first_row, part)
        return acc

    def _work(self, segments: Sequence[RowSegment], params: LatentParams) -> Work:
        """Divide a call's segments, once for all layers of a step."""
        derived = segments.derived if isinstance(segments, RowSegments) else {}
        key = ("latent", params.spec, params.weights.w_k.shape[0])
        if key not in derived:
            derived[key] = self._divide(segments, params)
        found = derived[key]
        assert isinstance(found, Work)
        return found

    def _divide(self, segments: Sequence[RowSegment], params: LatentParams) -> Work:
        spec, heads = params.spec, params.weights.w_k.shape[0]
        least = spec.min_expanded_queries
        if sum(s.num_queries for s in segments) < least:
            return Work(segments, ())
        expanded = KVSpec.uniform(heads, spec.q_width, spec.out_width, spec.compute_dtype, spec.window)
        if self._inner.unsupported(expanded, params.of_heads) is not None:
            return Work(segments, ())
        most_keys = max(MIN_EXPANDED_KEYS, EXPANDED_BYTES // expanded.layout.token_bytes)
        return divide(segments, params.window, least, most_keys)
