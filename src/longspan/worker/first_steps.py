"""What a rank on a GPU does before its first plan: a decode step in fixed shape against the reference, and every kernel
once, so that none is compiled while requests wait.

Holds both. Must not know the model's weights, plans of the driver or schedulers.
Read next: `longspan.attention.check`, the check of kernels alone; `longspan.cp.fixed`.
"""

from collections.abc import Callable, Sequence

import torch
from msgspec import structs
from torch import Tensor

from longspan.attention.base import AttentionBackend, RowSegment
from longspan.attention.check import check_rows
from longspan.attention.latent import LatentBackend, LatentParams, LatentWeights
from longspan.attention.reference import ReferenceBackend
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.cp.eager import EagerStepAttention
from longspan.cp.fixed import FixedStepAttention
from longspan.cp.fixed_buffers import FixedInputs
from longspan.errors import LongspanError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.pool import PagePool
from longspan.plan.fixed_shape import BUCKETS, FixedShape, fixed_shape
from longspan.plan.types import GroupStep, Literals, Plan, QueryRun
from longspan.sharding.pages import PageTable
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams, Phase, Strategy
from longspan.worker.graphs import Graph

PAGE_SIZE, LENGTHS = 16, (701, 37)
"""Tokens of a page, and of two requests: the longer one is split, and its pages lie in no order."""


def check_fixed_step(
    group: KVGroup, params: AttentionParams, device: torch.device, make_graph: Callable[[], Graph] | None = None
) -> None:
    """Compare a decode step of one layer in fixed shape with the reference, and its replay with its launch.

    Args:
        group: heads, widths and dtypes of the model.
        params: parameters of one of the model's layers; of latents without their weights.
        device: the GPU.
        make_graph: maker of graphs; None where steps are not captured. A capture that fails is not checked: the rank
            will say so when it is asked for one.

    Raises:
        LongspanError: outputs differ.
    """
    group = structs.replace(group, layers=(0,))
    spec, generator = group.spec, torch.Generator().manual_seed(1)
    dtype: torch.dtype = getattr(torch, spec.compute_dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    of_layer = params if spec.latent is None else _with_weights(params, spec, group.num_query_heads, randn)
    tables, num_pages = _tables()
    rows, heads = num_pages * PAGE_SIZE, spec.layout.num_kv_heads
    k, v = randn(heads, rows, spec.layout.k_width), randn(heads, rows, spec.layout.v_width)
    pools = [PagePool(group, num_pages, PAGE_SIZE, device) for _ in range(2)]
    for pool in pools:
        pool.write(0, k, v, [(0, 0, rows)])
    new = randn(len(LENGTHS), group.num_query_heads, spec.q_width), k[:, -2:] * 1.5, v[:, -2:] * 1.5
    runs = [QueryRun(i, length - 1, 1, 0, Literals((0,))) for i, length in enumerate(LENGTHS)]
    plan = Plan(0, Phase.DECODE, (0,), (len(runs),), tuple(runs), (), (GroupStep(Strategy.LOCAL),), ())
    shape, comm = fixed_shape(plan), RecordingCommunicator(thread_group(1)[0])
    assert shape is not None
    step = FixedStepAttention(shape, FixedInputs(pools[:1], 1), pools[:1], comm, [of_layer])
    step.fill(plan, [tables], [0] * len(runs))
    found = step.attend(0, *new)
    reference = EagerStepAttention(plan, [tables], pools[1:], comm, LatentBackend(ReferenceBackend()), [of_layer])
    check_rows(found, reference.attend(0, *new), spec.compute_dtype, f"a decode step in fixed shape on {device}")
    if make_graph is None:
        return
    graph = make_graph()
    try:
        graph.capture(lambda: step.attend(0, *new))
    except RuntimeError:
        return
    replayed = graph.replay()
    if replayed is None or not torch.equal(replayed, found):
        raise LongspanError(f"a decode step on {device} has other outputs as a CUDA graph than launched")


def _with_weights(params: AttentionParams, spec: KVSpec, num_heads: int, randn: Callable[..., Tensor]) -> LatentParams:
    """Parameters of latents with projections of random numbers."""
    rank = spec.layout.v_width
    nope = spec.q_width - (spec.layout.k_width - rank)
    weights = LatentWeights(
        randn(num_heads, nope, rank) * rank**-0.5, randn(num_heads, spec.out_width, rank) * rank**-0.5
    )
    return LatentParams(params.scale, params.softcap, params.window, weights=weights, spec=spec)


def _tables() -> tuple[dict[int, PageTable], int]:
    """Page tables of the requests, whose pages lie in runs of three, the last run first; and the number of pages."""
    counts = [-(-length // PAGE_SIZE) for length in LENGTHS]
    slot = sum(counts)
    tables: dict[int, PageTable] = {}
    for request_id, count in enumerate(counts):
        tables[request_id] = PageTable(PAGE_SIZE)
        for first in range(0, count, 3):
            run = min(3, count - first)
            slot -= run
            tables[request_id].append(0, slot, run)
    return tables, sum(counts)


@torch.inference_mode()
def compile_kernels(
    pools: Sequence[PagePool],
    layer_params: Sequence[AttentionParams | None],
    backend: AttentionBackend,
    max_num_seqs: int,
) -> None:
    """Launch the kernels of every kind of step once, without keys: Triton compiles them, or finds them in its cache.

    Args:
        pools: a rank's pool of every KV group; nothing is written.
        layer_params: attention parameters of every layer.
        backend: the rank's attention kernels.
        max_num_seqs: most rows of a decode step.
    """
    comm = RecordingCommunicator(thread_group(1)[0])
    inputs = FixedInputs(pools, 1)  # with tables of no keys, and rows that are not stored
    for pool in pools:
        group = pool.group
        kinds = {(p.softcap, p.window): layer for layer in group.layers if (p := layer_params[layer]) is not None}
        dtype: torch.dtype = getattr(torch, group.spec.compute_dtype)
        for layer in kinds.values():
            for rows in _rows(max_num_seqs):
                shape = FixedShape(rows, (0,), ((),) * len(pools))
                step = FixedStepAttention(shape, inputs, pools, comm, layer_params)
                q = torch.zeros(rows, group.num_query_heads, group.spec.q_width, dtype=dtype, device=pool.device)
                heads, layout = group.spec.layout.num_kv_heads, group.spec.layout
                k, v = (q.new_zeros(heads, rows, width) for width in (layout.k_width, layout.v_width))
                step.attend(layer, q, k, v)
                segments = [RowSegment(0, rows, rows, 0, 1, None, Visibility.FULL)]
                params = layer_params[layer]
                assert params is not None
                backend.partial_attention(q, pool.k[layer], pool.v[layer], segments, params)


def _rows(max_num_seqs: int) -> list[int]:
    """Buckets of decode steps; as numbers of queries of a chunk, they reach all sizes of a prefill's tiles."""
    return [bucket for bucket in BUCKETS if bucket < 2 * max_num_seqs or bucket <= 128]
