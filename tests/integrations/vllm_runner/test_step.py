"""Attention of a step over several ranks is attention over all keys; what moves is counted."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from longspan.integrations.vllm.runner.kernels import TorchKernels
from longspan.integrations.vllm.runner.rows import Scheduled, cut_runs, rows_of_rank
from longspan.integrations.vllm.runner.step import RankedStep
from longspan.sharding.pages import PageTable
from longspan.types import AttentionParams

PAGE, HEADS, KV_HEADS, WIDTH, BLOCKS = 4, 4, 2, 8, 64


class ThreadMessages:
    """`RankMessages` of ranks that are threads."""

    def __init__(self, rank, shared):
        self.rank, self.shared, self.size = rank, shared, len(shared.sent)
        self.num_calls = 0

    def gather(self, rows):
        self.num_calls += 1
        self.shared.put(self.rank, rows)
        return torch.cat(self.shared.take()), self

    def wait(self):
        pass

    def give_back(self, parts):
        self.num_calls += 1
        self.shared.put(self.rank, parts)
        return torch.stack([theirs[self.rank] for theirs in self.shared.take()])


class Shared:
    """What the ranks of one group have sent in the exchange under way."""

    def __init__(self, num_ranks):
        self.sent = [None] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=30)

    def put(self, rank, tensor):
        self.sent[rank] = tensor.clone()
        self.barrier.wait()

    def take(self):
        found = list(self.sent)
        self.barrier.wait()
        return found


def random_step(rng, num_ranks):
    """Requests whose pages lie anywhere, and the slots that they use of every rank."""
    step, used = [], [0] * num_ranks
    for row in range(int(rng.integers(1, 5))):
        start, num_tokens = int(rng.integers(0, 30)), int(rng.integers(1, 12))
        table = PageTable(PAGE)
        for rank in rng.integers(0, num_ranks, -(-(start + num_tokens) // PAGE)).tolist():
            table.append(rank, used[rank], 1)
            used[rank] += 1
        step.append(Scheduled(table, row, start, num_tokens, is_prefilling=bool(rng.integers(2))))
    return step


def block_table_of(step, rank):
    """This rank's blocks of every request, as vLLM's own tables hold them."""
    found = torch.zeros(8, BLOCKS, dtype=torch.int32)
    for one in step:
        slots = [slot for r, slot in map(one.table.page, range(one.table.num_pages)) if r == rank]
        found[one.row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
    return found


def run_rank(rank, messages, step, tensors, params, padding):
    """This rank's rows of the step's attention."""
    runs = cut_runs(step, messages.size)
    rows = rows_of_rank(rank, step, runs)
    kernels = TorchKernels()
    cache = torch.full((BLOCKS, KV_HEADS, PAGE, 2 * WIDTH), torch.nan)
    for request, one in enumerate(step):  # what earlier steps have stored
        slots = [row + i for row, n in one.table.row_runs(rank, 0, one.start) for i in range(n)]
        keys = [p for p in range(one.start) if one.table.page(p // PAGE)[0] == rank]
        _, k, v = tensors[request]
        kernels.store(k[keys], v[keys], cache, torch.tensor(slots, dtype=torch.int64))
    mine = [(s.request, slice(s.start, s.end)) for s in runs[rank]]
    empty = (torch.zeros(0, HEADS, WIDTH), torch.zeros(0, KV_HEADS, WIDTH), torch.zeros(0, KV_HEADS, WIDTH))
    q, k, v = (torch.cat([empty[i], *(tensors[request][i][rows_] for request, rows_ in mine)]) for i in range(3))
    q, k, v = (torch.cat([x, torch.full((padding, *x.shape[1:]), 7.0)]) for x in (q, k, v))
    out = torch.full((len(q), HEADS, WIDTH), torch.nan)
    ranked = RankedStep(rows, block_table_of(step, rank), PAGE, messages, torch.from_numpy)
    ranked.attend(kernels, params, q, k, v, cache, out)
    return rows, mine, out


def dense(q, k, v, positions, params):
    """Attention of single positions over all earlier ones, in float64."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q.double(), k) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    hidden = torch.arange(len(k))[None, :] > torch.tensor(positions)[:, None]
    return torch.einsum("ths,shd->thd", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_equals_attention_over_all_keys(num_ranks, softcap):
    rng = np.random.default_rng(num_ranks)
    g = torch.Generator().manual_seed(num_ranks)
    params = AttentionParams(WIDTH**-0.5, softcap)
    moved = 0
    for _ in range(12):
        step = random_step(rng, num_ranks)
        tensors = [
            tuple(torch.randn(one.end, heads, WIDTH, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS))
            for one in step
        ]
        shared = Shared(num_ranks)
        messages = [ThreadMessages(rank, shared) for rank in range(num_ranks)]
        with ThreadPoolExecutor(num_ranks) as pool:
            found = list(
                pool.map(lambda r: run_rank(r, messages[r], step, tensors, params, padding=2), range(num_ranks))  # noqa: B023
            )
        for rows, mine, out in found:
            assert (out[len(rows.slots) :] == 0).all(), "padding"
            row = 0
            for request, rows_ in mine:
                q, k, v = tensors[request]
                positions = list(range(rows_.start, rows_.stop))
                expected = dense(q[rows_], k, v, positions, params)
                torch.testing.assert_close(out[row : row + len(positions)].double(), expected, atol=2e-6, rtol=1e-5)
                row += len(positions)
        calls = {m.num_calls for m in messages}
        assert calls == {3 if found[0][0].num_travelling else 0}, "one gather and two returns, or nothing, on all ranks"
        moved += calls.pop()
    assert (moved > 0) == (num_ranks > 1)
