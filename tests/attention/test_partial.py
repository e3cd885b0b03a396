"""The merge law: empty rows, poison, huge lse, rounding, sinks, wrong bases and layouts.

Must not know kernels; partials here are random or come from a dense softmax written out below.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention.partial import PartialAttention, accumulation_dtype, merge_partials, merge_rows_, merge_sinks_
from longspan.native import kernels

NAN, INF = float("nan"), float("inf")


def dense(scores: torch.Tensor, values: torch.Tensor) -> PartialAttention:
    """Attention for scores [T, H, S] and values [H, S, Dv]; S may be 0."""
    num_rows, num_heads, num_keys = scores.shape
    if num_keys == 0:
        return PartialAttention.empty(num_rows, num_heads, values.shape[2], scores.dtype, scores.device)
    out = torch.einsum("ths,hsd->thd", torch.softmax(scores, dim=-1), values)
    return PartialAttention(out=out, lse=torch.logsumexp(scores, dim=-1))


def in_parts(scores: torch.Tensor, values: torch.Tensor, sizes: list[int]) -> list[PartialAttention]:
    return [dense(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes, 1), strict=True)]


def problem(num_rows: int, num_heads: int, num_keys: int, dtype=torch.float64, seed=0, v_width=5):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(num_rows, num_heads, num_keys, generator=generator, dtype=torch.float64)
    values = torch.randn(num_heads, num_keys, v_width, generator=generator, dtype=torch.float64)
    return scores.to(dtype), values.to(dtype)


def by_rows(partials: list[PartialAttention]) -> PartialAttention:
    """The same merge through `merge_rows_`, in two row ranges each."""
    first = partials[0]
    num_rows, num_heads, v_width = first.out.shape
    acc = PartialAttention.empty(num_rows, num_heads, v_width, first.lse.dtype, "cpu")
    middle = num_rows // 2
    for part in partials:
        merge_rows_(acc, 0, PartialAttention(part.out[:middle], part.lse[:middle]))
        merge_rows_(acc, middle, PartialAttention(part.out[middle:], part.lse[middle:]))
    return acc


def pairwise(partials: list[PartialAttention]) -> PartialAttention:
    merged = merge_partials(partials[0])
    for part in partials[1:]:
        merged = merge_partials(part, merged)
    return merged


MERGES = [lambda parts: merge_partials(*parts), pairwise, by_rows]
merges = pytest.mark.parametrize("merge", MERGES, ids=["n_ary", "pairwise", "by_rows"])


def assert_close(got: PartialAttention, want: PartialAttention, atol: float) -> None:
    torch.testing.assert_close(got.lse.double(), want.lse.double(), atol=atol, rtol=0)
    torch.testing.assert_close(got.out.double(), want.out.double(), atol=atol, rtol=0)


@merges
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8), num_rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_any_cut_of_the_keys_merges_to_the_whole(merge, sizes, num_rows, seed):
    scores, values = problem(num_rows, 3, sum(sizes), seed=seed)
    assert_close(merge(in_parts(scores, values, sizes)), dense(scores, values), atol=1e-13)


def test_merge_is_associative_and_commutative():
    a, b, c = in_parts(*problem(4, 2, 12), [5, 0, 7])
    assert_close(merge_partials(merge_partials(a, b), c), merge_partials(a, merge_partials(c, b)), atol=1e-14)


def test_merge_is_the_law_of_the_note_and_its_base_is_e():
    a = PartialAttention(torch.tensor([[[1.0]]]), torch.tensor([[math.log(4)]]))
    b = PartialAttention(torch.tensor([[[2.0]]]), torch.tensor([[math.log(12)]]))
    merged = merge_partials(a, b)
    assert merged.out.item() == pytest.approx(1.75, rel=1e-6)
    assert merged.lse.item() == pytest.approx(math.log(16), rel=1e-6)


@merges
def test_a_base_two_lse_would_be_noticed(merge):
    scores, values = problem(4, 3, 30)
    parts, want = in_parts(scores, values, [4, 26]), dense(scores, values)
    wrong = merge([PartialAttention(part.out, part.lse / math.log(2)) for part in parts])
    assert (wrong.out - want.out).abs().max() > 1e-2
    assert (wrong.lse * math.log(2) - want.lse).abs().max() > 1e-2


def test_a_swapped_layout_would_be_noticed_even_where_heads_equal_rows():
    scores, values = problem(4, 4, 30)
    parts, want = in_parts(scores, values, [4, 26]), dense(scores, values)
    wrong = merge_partials(*(PartialAttention(part.out, part.lse.t()) for part in parts))
    assert (wrong.out - want.out).abs().max() > 1e-2


@merges
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
def test_every_rank_may_be_empty_in_turn(merge, num_ranks):
    for empty_rank in range(num_ranks):
        sizes = [0 if rank == empty_rank else 3 for rank in range(num_ranks)]
        scores, values = problem(3, 2, sum(sizes), seed=empty_rank)
        assert_close(merge(in_parts(scores, values, sizes)), dense(scores, values), atol=1e-13)
    for full_rank in range(num_ranks):
        sizes = [3 if rank == full_rank else 0 for rank in range(num_ranks)]
        scores, values = problem(3, 2, 3)
        assert_close(merge(in_parts(scores, values, sizes)), dense(scores, values), atol=1e-15)


@merges
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_rows_empty_everywhere_stay_empty_even_with_poisoned_outputs(merge, num_ranks):
    part = PartialAttention(torch.full((4, 2, 3), NAN), torch.full((4, 2), -INF))
    merged = merge([part] * num_ranks)
    assert torch.equal(merged.out, torch.zeros(4, 2, 3))
    assert torch.equal(merged.lse, torch.full((4, 2), -INF))


@merges
def test_the_output_of_an_empty_row_is_never_read(merge):
    scores, values = problem(4, 2, 9)
    want = dense(scores, values)
    parts = in_parts(scores, values, [5, 4])
    for rows in ([0], [1, 3], [0, 1, 2, 3]):
        poison = PartialAttention(torch.zeros(4, 2, 5).double(), torch.full((4, 2), -INF).double())
        poison.out[rows] = NAN
        for order in ([*parts, poison], [poison, *parts], [parts[0], poison, parts[1]]):
            assert_close(merge(order), want, atol=1e-14)


def test_a_poisoned_accumulator_row_that_is_empty_is_replaced():
    acc = PartialAttention(torch.tensor([[[NAN]], [[3.0]], [[NAN]]]), torch.tensor([[-INF], [0.0], [-INF]]))
    merge_rows_(
        acc, 0, PartialAttention(torch.tensor([[[5.0]], [[NAN]], [[NAN]]]), torch.tensor([[1.0], [-INF], [-INF]]))
    )
    assert acc.out.flatten().tolist() == [5.0, 3.0, 0.0]
    assert acc.lse.flatten().tolist() == [1.0, 0.0, -INF]


@merges
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_lse_neither_overflows_nor_loses_the_weights(merge, shift):
    lse_a, lse_b = torch.tensor([[shift]]), torch.tensor([[shift + 1]])
    merged = merge([PartialAttention(torch.zeros(1, 1, 1), lse_a), PartialAttention(torch.ones(1, 1, 1), lse_b)])
    assert merged.out.item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)
    assert merged.lse.item() == pytest.approx(shift + 1 + math.log1p(math.exp(-1)), abs=2e-3)


@merges
def test_lse_far_apart_keeps_the_larger_side_exactly(merge):
    low = PartialAttention(torch.tensor([[[7.0]]]), torch.tensor([[-1e4]]))
    high = PartialAttention(torch.tensor([[[3.0]]]), torch.tensor([[1e4]]))
    for order in ([low, high], [high, low]):
        merged = merge(order)
        assert merged.out.item() == 3.0
        assert merged.lse.item() == 1e4


@merges
def test_the_error_of_bfloat16_partials_is_flat_in_the_number_of_ranks(merge):
    scores, values = problem(8, 4, 256)
    want = dense(scores, values)
    errors = {}
    for num_ranks in range(1, 17):
        sizes = [256 // num_ranks] * (num_ranks - 1)
        parts = in_parts(scores, values, [*sizes, 256 - sum(sizes)])
        wire = [PartialAttention(part.out.bfloat16(), part.lse.float()) for part in parts]
        merged = merge(wire)
        assert merged.out.dtype == torch.float32
        errors[num_ranks] = (merged.out.double() - want.out).abs().max().item()
    assert max(errors.values()) <= 2 * max(errors[1], 1e-3)


def test_parts_of_any_strides_merge_in_place():
    scores, values = problem(6, 4, 20)
    a, b = in_parts(scores, values, [9, 11])
    b = PartialAttention(b.out.transpose(0, 1).contiguous().transpose(0, 1), b.lse.t().contiguous().t())
    acc = PartialAttention(a.out.clone(), a.lse.clone())
    out = acc.out
    merge_rows_(acc, 0, b)
    assert acc.out is out
    assert_close(acc, dense(scores, values), atol=1e-14)


def test_merge_rows_touches_only_its_rows():
    acc = PartialAttention.empty(5, 2, 3, torch.float32, "cpu")
    merge_rows_(acc, 2, PartialAttention(torch.ones(2, 2, 3), torch.zeros(2, 2)))
    assert acc.out[:, 0, 0].tolist() == [0, 0, 1, 1, 0]
    assert acc.lse[:, 0].tolist() == [-INF, -INF, 0, 0, -INF]
    merge_rows_(acc, 5, PartialAttention.empty(0, 2, 3, torch.float32, "cpu"))


@pytest.mark.parametrize("row", [-1, 4, 5])
def test_rejects_rows_outside_the_accumulator(row):
    acc = PartialAttention.empty(5, 2, 3, torch.float32, "cpu")
    with pytest.raises(ValueError, match="not in a partial of 5 rows"):
        merge_rows_(acc, row, PartialAttention.empty(2, 2, 3, torch.float32, "cpu"))


def test_rejects_nothing_to_merge_and_unequal_shapes():
    with pytest.raises(ValueError, match="at least one"):
        merge_partials()
    with pytest.raises(ValueError, match="differ in shape"):
        merge_partials(
            PartialAttention.empty(1, 2, 3, torch.float32, "cpu"), PartialAttention.empty(2, 2, 3, torch.float32, "cpu")
        )


def test_a_sink_is_one_more_key_without_a_value():
    scores, values = problem(4, 3, 10)
    sinks = torch.tensor([0.5, -INF, 40.0]).double()
    with_sink = torch.cat([scores, sinks.view(1, 3, 1).expand(4, 3, 1)], dim=-1)
    want = dense(with_sink, torch.cat([values, torch.zeros(3, 1, 5).double()], dim=1))
    acc = merge_partials(*in_parts(scores, values, [4, 0, 6]))
    merge_sinks_(acc, sinks)
    assert_close(acc, want, atol=1e-13)
    per_shard = in_parts(scores, values, [4, 6])
    for part in per_shard:
        merge_sinks_(part, sinks)
    assert (merge_partials(*per_shard).out - want.out).abs().max() > 1e-2  # counted twice


def test_a_sink_on_an_empty_row_takes_all_the_weight():
    acc = PartialAttention(torch.full((2, 2, 3), NAN), torch.full((2, 2), -INF))
    merge_sinks_(acc, torch.tensor([1.5, -INF]))
    assert torch.equal(acc.out, torch.zeros(2, 2, 3))
    assert acc.lse.tolist() == [[1.5, -INF]] * 2


def test_partials_are_kept_in_float32_unless_the_queries_are_float64():
    assert accumulation_dtype(torch.bfloat16) == accumulation_dtype(torch.float32) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64


@pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("v_width", [1, 16, 100])
def test_the_kernel_merges_like_torch(v_width, num_threads, monkeypatch):
    """Also rows that are empty, with NaN beside them, on either side or on both, and shares next to 0 and 1."""
    generator = torch.Generator().manual_seed(v_width)
    lses = torch.tensor([-INF, -200.0, -1.0, 0.0, 1.0, 3000.0])
    acc_lse, lse = (side.repeat(120, 1).contiguous() for side in torch.cartesian_prod(lses, lses).T)
    acc_out, out = (torch.randn(120, 36, v_width, generator=generator) for _ in range(2))
    for empty in (acc_lse, lse):
        (acc_out if empty is acc_lse else out)[torch.isneginf(empty)] = NAN

    def merged() -> PartialAttention:
        acc = PartialAttention(acc_out.clone(), acc_lse.clone())
        merge_rows_(acc, 0, PartialAttention(out, lse))
        return acc

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = merged()
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(kernels, "can_merge", lambda *_: False)
    expected = merged()
    torch.testing.assert_close(found.out, expected.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-6, atol=0)
