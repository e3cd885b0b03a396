"""Cases for attention backends: any segments, and what they mean, row by row in float64."""

import os

import torch
from hypothesis import strategies as st

from longspan.attention.base import RowSegment
from longspan.attention.partial import PartialAttention
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams

DEVICE = os.environ.get("LONGSPAN_TEST_DEVICE", "cpu")
"""Where Triton's kernels are tested: in its interpreter on a CPU, or on a GPU."""
NAN = float("nan")
NONE, FULL, CAUSAL, BAND = Visibility.NONE, Visibility.FULL, Visibility.CAUSAL, Visibility.BAND


def tensors(num_rows, num_keys, heads=(4, 2), width=8, v_width=None, dtype=torch.float64, seed=0, device="cpu"):
    """q [T, H, D], k [Hkv, S, D], v [Hkv, S, Dv]; k and v are views into a wider pool."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    q = torch.randn(num_rows, num_heads, width, generator=generator, dtype=torch.float64, device="cpu")
    k = torch.randn(num_kv_heads, num_keys + 9, width, generator=generator, dtype=torch.float64, device="cpu")
    v = torch.randn(
        num_kv_heads, num_keys + 9, v_width or width, generator=generator, dtype=torch.float64, device="cpu"
    )
    q, k, v = (2 * q).to(device, dtype), k.to(device, dtype), v.to(device, dtype)
    return q, k[:, 4 : 4 + num_keys], v[:, 4 : 4 + num_keys]


def oracle(q, k, v, segments, params) -> PartialAttention:
    """Attention row by row and head by head, in float64, from the definition of the segments alone."""
    q, k, v = q.cpu(), k.cpu(), v.cpu()
    num_rows, num_heads, _ = q.shape
    group_size = num_heads // k.shape[0]
    want = PartialAttention.empty(num_rows, num_heads, v.shape[2], torch.float64, "cpu")
    for row in range(num_rows):
        keys = []
        for s in segments:
            if not s.query_row <= row < s.query_row + s.num_queries or s.visibility is NONE:
                continue
            position = s.query_position + row - s.query_row
            for index in range(s.num_keys):
                if s.visibility in (CAUSAL, BAND) and s.key_position + index > position:
                    continue
                if s.visibility is BAND and s.key_position + index <= position - params.window:
                    continue
                keys.append(s.key_row + index)
        if not keys:
            continue
        for head in range(num_heads):
            scores = k[head // group_size, keys].double() @ q[row, head].double() * params.scale
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            want.lse[row, head] = torch.logsumexp(scores, dim=0)
            want.out[row, head] = torch.softmax(scores, dim=0) @ v[head // group_size, keys].double()
    return want


def assert_close(got: PartialAttention, want: PartialAttention, atol: float) -> None:
    torch.testing.assert_close(got.lse.double().cpu(), want.lse.double(), atol=atol, rtol=0)
    torch.testing.assert_close(got.out.double().cpu(), want.out.double(), atol=atol, rtol=0)


@st.composite
def cases(draw):
    """Segments over disjoint query rows or disjoint key rows, any visibility, mid-page starts, gaps of NaN between."""
    window = draw(st.none() | st.integers(1, 20))
    softcap = draw(st.none() | st.just(2.0))
    segments, query_row, key_row = [], 0, 0
    for _ in range(draw(st.integers(0, 3))):  # requests
        query_row += draw(st.integers(0, 2))
        num_queries, position = draw(st.integers(0, 12)), draw(st.integers(0, 25))
        for _ in range(draw(st.integers(0, 3))):  # key runs of the request, at disjoint positions or not
            key_row += draw(st.integers(0, 2))
            num_keys, key_position = draw(st.integers(0, 14)), draw(st.integers(0, 30))
            seen = draw(st.sampled_from([NONE, FULL, CAUSAL] + ([BAND] if window else [])))
            first = draw(st.integers(0, num_queries))  # covers the tail of the request's rows only
            segments.append(
                RowSegment(
                    query_row + first,
                    num_queries - first,
                    position + first,
                    key_row,
                    num_keys,
                    key_position if seen in (CAUSAL, BAND) else None,
                    seen,
                )
            )
            key_row += num_keys
        query_row += num_queries
    num_rows, num_keys = query_row + draw(st.integers(0, 2)), key_row + draw(st.integers(0, 2))
    return num_rows, num_keys, draw(st.permutations(segments)), AttentionParams(0.3, softcap, window)


def hide_unread(q, k, v, segments) -> None:
    """NaN into every row that no segment names."""
    live = [s for s in segments if s.num_queries and s.num_keys and s.visibility is not NONE]
    for tensor, axis, runs in (
        (q, 0, [(s.query_row, s.num_queries) for s in live]),
        (k, 1, [(s.key_row, s.num_keys) for s in live]),
        (v, 1, [(s.key_row, s.num_keys) for s in live]),
    ):
        unused = torch.ones(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
        for start, length in runs:
            unused[start : start + length] = False
        tensor.index_fill_(axis, unused.nonzero().flatten(), NAN)
