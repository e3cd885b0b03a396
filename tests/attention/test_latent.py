"""Attention over latents, absorbed or expanded, against a dense float64 softmax over every head's keys and values."""

import pytest
import torch
from attention_cases import CAUSAL, FULL, assert_close, cases, hide_unread, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from native_stand_ins import NativeStandIns

from longspan.attention import latent
from longspan.attention.base import RowSegment, RowSegments
from longspan.attention.cpu import CPUBackend
from longspan.attention.key_blocks import divide
from longspan.attention.latent import LatentBackend, LatentParams, LatentWeights
from longspan.attention.reference import ReferenceBackend, visible_pairs
from longspan.kv.layout import EXPANSION_WEIGHT, KVGroup, KVSpec
from longspan.types import AttentionParams

RANK, ROTATED, NOPE, OUT = 16, 4, 5, 3
BACKENDS = [ReferenceBackend(), CPUBackend(), NativeStandIns()]
backends = pytest.mark.parametrize("backend", BACKENDS, ids=["reference", "cpu", "native_stand_ins"])


def problem(num_rows, num_keys, num_heads, dtype=torch.float64, seed=0, window=None):
    """q [T, H, D], latents [1, S, rank + rotated], parameters with weights, and what they mean: k, v of every head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, stored = draw(num_rows, num_heads, NOPE + ROTATED), draw(1, num_keys + 5, RANK + ROTATED)[:, 2 : 2 + num_keys]
    both = draw(num_heads, NOPE + OUT, RANK) / RANK**0.5  # as in a model: parts of one matrix
    weights = LatentWeights(both[:, :NOPE], both[:, NOPE:])
    name = str(dtype).removeprefix("torch.")
    params = LatentParams(
        0.3, None, window, weights=weights, spec=KVSpec.latents(RANK, ROTATED, NOPE + ROTATED, OUT, name)
    )
    return q, stored, params


def expanded(stored, params):
    """k [H, S, D] and v [H, S, Dv], by the definition."""
    w_k, w_v = (weight.double() for weight in params.weights)
    c, rotated = stored[0, :, :RANK].double(), stored[0, :, RANK:].double()
    nope = torch.einsum("hnr,sr->hsn", w_k, c)
    return torch.cat([nope, rotated.expand(len(w_k), -1, -1)], -1), torch.einsum("hvr,sr->hsv", w_v, c)


def check(backend, q, stored, segments, params, atol=1e-12):
    got = LatentBackend(backend).partial_attention(q, stored, stored[:, :, :RANK], segments, params)
    assert got.out.shape == (*q.shape[:2], OUT)
    assert_close(got, oracle(q, *expanded(stored, params), segments, params), atol)
    return got


@pytest.fixture(params=["absorbed", "expanded", "mixed"])
def way(request, monkeypatch):
    """How keys are met; mixed is what the rule says, over runs of 4 keys."""
    least = {"absorbed": 10**9, "expanded": 0}.get(request.param)
    monkeypatch.setattr(latent, "MIN_EXPANDED_KEYS", 4)
    monkeypatch.setattr(latent, "EXPANDED_BYTES", 0)
    if least is not None:
        monkeypatch.setattr(KVSpec, "min_expanded_queries", property(lambda self: least))
    return request.param


@backends
@settings(max_examples=40, deadline=None)
@given(
    case=cases(), num_heads=st.sampled_from([1, 4, 7, 8]), seed=st.integers(0, 9), least=st.sampled_from([0, 3, 10**9])
)
def test_any_segments_match_float64_and_rows_outside_them_are_not_read(backend, case, num_heads, seed, least):
    num_rows, num_keys, segments, params = case
    q, stored, layer = problem(num_rows, num_keys, num_heads, seed=seed, window=params.window)
    hide_unread(q, stored, stored, segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "MIN_EXPANDED_KEYS", 4)
        patch.setattr(latent, "EXPANDED_BYTES", 0)
        patch.setattr(KVSpec, "min_expanded_queries", property(lambda self: least))
        check(backend, q, stored, segments, layer)


@backends
@pytest.mark.parametrize("num_heads", [1, 5, 8, 16])
def test_a_chunk_with_its_past_and_a_decode_beside_it(backend, num_heads, way):
    q, stored, params = problem(21, 140, num_heads)
    segments = RowSegments(
        [
            RowSegment(0, 20, 60, 3, 60, None, FULL),
            RowSegment(0, 20, 60, 70, 20, 60, CAUSAL),
            RowSegment(20, 1, 30, 100, 31, None, FULL),
        ]
    )
    hide_unread(q, stored, stored, segments)
    got = check(backend, q, stored, segments, params)
    again = check(backend, q, stored, segments, params)  # with what was derived from the segments
    assert torch.equal(got.out, again.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_twice_that_of_eager_attention_in_the_same_dtype(dtype, way):
    q, stored, params = problem(40, 90, 8, dtype)
    segments = [RowSegment(0, 40, 50, 0, 90, 0, CAUSAL)]
    keys, values = expanded(stored, params)
    want = oracle(q, keys, values, segments, params)
    got = LatentBackend(CPUBackend()).partial_attention(q, stored, stored[:, :, :RANK], segments, params)
    c = stored[0, :, :RANK]
    eager_k = torch.cat([c @ params.weights.w_k.mT, stored[:, :, RANK:].expand(8, -1, -1)], -1)
    eager_v = c @ params.weights.w_v.mT
    scores = torch.einsum("thd,hsd->hts", q, eager_k) * params.scale
    hidden = torch.arange(90)[None, :] > torch.arange(50, 90)[:, None]
    weights = torch.softmax(scores.float().masked_fill(hidden, -torch.inf), -1).to(dtype)
    eager = torch.einsum("hts,hsd->thd", weights, eager_v)
    assert (got.out - want.out).norm() <= 2 * (eager.double() - want.out).norm() + 1e-6


@backends
def test_zero_rows_and_zero_keys_are_empty_partials_of_the_heads_width(backend, way):
    for num_rows, num_keys in ((0, 0), (0, 3), (3, 0), (3, 2)):
        q, stored, params = problem(num_rows, num_keys, 4)
        for segments in ([], [RowSegment(0, num_rows, 5, 0, 0, None, FULL)]):
            got = check(backend, q, stored, segments, params)
            assert not got.out.any()
            assert got.lse.isneginf().all()
    q, stored, params = problem(4, 6, 2)
    got = check(backend, q, stored, [RowSegment(0, 4, 0, 0, 6, 3, CAUSAL)], params)
    assert got.lse[:3].isneginf().all()


def test_layers_without_latents_are_left_to_the_other_backend():
    q, k = torch.randn(3, 4, 8).double(), torch.randn(2, 9, 8).double()
    segments, params = [RowSegment(0, 3, 8, 0, 9, None, FULL)], AttentionParams(0.3)
    got = LatentBackend(CPUBackend()).partial_attention(q, k, k, segments, params)
    assert_close(got, oracle(q, k, k, segments, params), 1e-12)
    assert LatentBackend(CPUBackend()).name == "cpu"


# -- the choice --------------------------------------------------------------------------------------------------------


def test_deepseek_v3_expands_keys_that_239_queries_see():
    spec = KVSpec.latents(512, 64, 192, 128, "bfloat16")
    assert 170 < spec.min_expanded_queries / EXPANSION_WEIGHT < 171
    assert 238 < spec.min_expanded_queries < 239
    group = KVGroup(tuple(range(61)), spec, 128)
    assert group.pair_flops(1) == 2 * 128 * (576 + 512)
    assert group.pair_flops(1024) == 128 * (2 * (192 + 128) + EXPANSION_WEIGHT * 2 * 512 * 256 / 1024)
    assert group.pair_flops(239) == pytest.approx(group.pair_flops(238), rel=0.01), "the cost has no step there"
    assert KVSpec.uniform(8, 128, 128, "bfloat16").min_expanded_queries == float("inf")
    assert KVSpec.latents(16, 4, 64, 64, "float32").min_expanded_queries == float("inf"), "absorbed is always fewer"


def test_the_notes_example():
    segments = [
        RowSegment(0, 256, 2000, 0, 1280, None, FULL),
        RowSegment(256, 256, 2256, 0, 1024, None, FULL),
    ]
    work = divide(segments, None, 300, 512)
    assert [(block.runs, len(block.segments)) for block in work.blocks] == [(((0, 512),), 2), (((512, 1024),), 2)]
    assert [(s.query_row, s.key_row, s.num_keys) for s in work.left] == [(0, 1024, 256)]


@settings(max_examples=150, deadline=None)
@given(case=cases(), least=st.sampled_from([0, 1, 4, 10]), most_keys=st.integers(1, 9))
def test_every_pair_of_query_and_key_is_met_once(case, least, most_keys):
    num_rows, num_keys, segments, params = case
    work = divide(segments, params.window, least, most_keys)
    found = visible_pairs(num_rows, num_keys, work.left, params.window, "cpu").int()
    for block in work.blocks:
        rows = torch.cat([torch.arange(start, end) for start, end in block.runs])
        assert 0 < len(rows) <= most_keys
        num_queries = block.last_row - block.first_row
        pairs = visible_pairs(num_queries, len(rows), block.segments, params.window, "cpu")
        found[block.first_row : block.last_row, rows] += pairs
    assert torch.equal(found, visible_pairs(num_rows, num_keys, segments, params.window, "cpu").int())


def test_a_batch_of_decodes_over_a_shared_prefix_is_expanded_and_its_tails_are_not():
    prefix = [RowSegment(i, 1, 900 + i, 0, 512, None, FULL) for i in range(200)]
    tails = [RowSegment(i, 1, 900 + i, 512 + 16 * i, 16, None, FULL) for i in range(200)]
    work = divide([*prefix, *tails], None, 171, 4096)
    (block,) = work.blocks
    assert (block.runs, block.first_row, block.last_row) == (((0, 512),), 0, 200)
    assert sum(s.num_queries * s.num_keys for s in work.left) == 200 * 16


def test_a_decode_keeps_its_segments_as_they_are():
    segments = RowSegments([RowSegment(0, 1, 900, 0, 800, None, FULL), RowSegment(0, 1, 900, 816, 100, None, FULL)])
    assert divide(segments, None, 171, 4096).left is segments


def test_keys_are_expanded_a_few_at_a_time(monkeypatch):
    sizes = []
    expand = LatentWeights.expand
    monkeypatch.setattr(LatentWeights, "expand", lambda self, rows: sizes.append(rows.shape[1]) or expand(self, rows))
    monkeypatch.setattr(latent, "MIN_EXPANDED_KEYS", 1)
    monkeypatch.setattr(latent, "EXPANDED_BYTES", 32 * 4 * (NOPE + ROTATED + OUT) * 8)
    q, stored, params = problem(64, 100, 4)
    check(CPUBackend(), q, stored, [RowSegment(0, 64, 200, 0, 100, None, FULL)], params)
    assert sizes == [32, 32, 32, 4]


def test_a_backend_that_does_not_take_the_heads_widths_gets_absorbed_queries(monkeypatch):
    monkeypatch.setattr(KVSpec, "min_expanded_queries", property(lambda self: 0))
    monkeypatch.setattr(LatentWeights, "expand", None)
    inner = ReferenceBackend()
    monkeypatch.setattr(
        ReferenceBackend,
        "unsupported",
        lambda self, spec, params: None if spec.latent else "head size: got 9, the reference backend takes 20",
    )
    q, stored, params = problem(6, 9, 2)
    check(inner, q, stored, [RowSegment(0, 6, 3, 0, 9, 0, CAUSAL)], params)
