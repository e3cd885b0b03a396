"""Runs the attention of steps on ranks that are threads, and compares with dense attention of the whole sequences.

The oracle is a softmax over all scores in float64, written out here; it shares no code with longspan. Pools start as
NaN, so that a row which nobody wrote cannot pass for a key.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from cp_cases import Cluster, make_group
from torch import Tensor

from longspan.attention.base import AttentionBackend
from longspan.attention.latent import LatentBackend, LatentParams, LatentWeights
from longspan.attention.select import make_backend
from longspan.comm.base import Communicator, Pending
from longspan.comm.recording import RecordingCommunicator
from longspan.comm.threads import thread_group
from longspan.costmodel.choose import plan_group
from longspan.cp.eager import EagerStepAttention
from longspan.kv.layout import KVGroup
from longspan.kv.pool import PagePool
from longspan.plan.build import count_tokens
from longspan.plan.exchanges import Exchange, count_exchanges
from longspan.plan.query_units import QueryUnit, find_meetings, query_units
from longspan.plan.step_keys import step_keys
from longspan.plan.types import Plan, QueryRun
from longspan.types import AttentionParams, Phase, Strategy

TIMEOUT_S = 30.0
_THREADS = ThreadPoolExecutor(max_workers=16)


class LoggingCommunicator:
    """Notes dtype and bytes of every message sent: partials travel as bytes, queries and keys as numbers."""

    def __init__(self, inner: Communicator) -> None:
        self.rank, self.size, self._inner = inner.rank, inner.size, inner
        self.sent: list[tuple[torch.dtype, int]] = []

    def exchange(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Pending:
        self.sent += [(tensor.dtype, tensor.numel() * tensor.element_size()) for _, tensor in sends]
        return self._inner.exchange(sends, recvs)

    def close(self) -> None:
        self._inner.close()


@dataclass
class Output:
    """Attention of one query run in one layer."""

    layer: int
    run: QueryRun
    out: Tensor
    """[T, H, Dv]"""


@dataclass
class LayerTraffic:
    """What one rank did in one layer."""

    layer: int
    rank: int
    num_exchanges: int
    messages_sent: int
    bytes_sent: int
    partial_bytes: int
    """Of these, bytes of partials."""


@dataclass
class Step:
    """A step that ran."""

    plan: Plan
    outputs: list[Output]
    traffic: list[LayerTraffic]
    exchanges: list[tuple[Exchange, ...]]
    """Per KV group, what its strategy moves in a layer, of all ranks."""
    units: list[list[QueryUnit]]
    """Per KV group, the units of all ranks; none where no queries move."""


class Ranks:
    """Pools and true sequences of a cluster, layer by layer."""

    def __init__(
        self,
        cluster: Cluster,
        groups: Sequence[KVGroup],
        *,
        backend: str = "reference",
        softcap: float | None = None,
        with_sinks: bool = False,
        max_len: int = 160,
        seed: int = 0,
    ) -> None:
        assert [group.spec.window for group in groups] == list(cluster.windows)
        self.cluster, self.groups = cluster, groups
        self.backend: AttentionBackend = make_backend(backend, "cpu")
        generator = torch.Generator().manual_seed(seed)
        self.group_of = {layer: group for group in groups for layer in group.layers}
        self.params = [
            AttentionParams(1.3 * group.spec.q_width**-0.5, softcap, group.spec.window)
            for _, group in sorted(self.group_of.items())
        ]

        def draw(dtype: str, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))

        self.q: dict[tuple[int, int], Tensor] = {}  # (layer, request): [S, H, D]
        self.k: dict[tuple[int, int], Tensor] = {}  # [Hkv, S, D]
        self.v: dict[tuple[int, int], Tensor] = {}  # [Hkv, S, Dv]
        self.sinks: dict[int, Tensor | None] = {}  # layer: [H]
        for layer, group in self.group_of.items():
            layout, dtype = group.spec.layout, group.spec.compute_dtype
            for request_id in range(cluster.num_requests):
                self.q[layer, request_id] = draw(dtype, max_len, group.num_query_heads, group.spec.q_width)
                self.k[layer, request_id] = draw(dtype, layout.num_kv_heads, max_len, layout.k_width)
                self.v[layer, request_id] = draw(dtype, layout.num_kv_heads, max_len, layout.v_width)
                if layout.v_width_in_k is not None:
                    self.v[layer, request_id] = self.k[layer, request_id][:, :, : layout.v_width]
            if group.spec.latent is not None:
                self._draw_weights(layer, group, draw)
            self.sinks[layer] = draw(dtype, group.num_query_heads) if with_sinks else None
        self.pools = [
            [PagePool(group, cluster.pages_per_rank, cluster.page_size, torch.device("cpu")) for group in groups]
            for _ in range(cluster.num_ranks)
        ]
        """[rank][KV group]"""
        for pool in (pool for rank_pools in self.pools for pool in rank_pools):
            for tensor in (*pool.k.values(), *pool.v.values()):
                tensor.fill_(torch.nan)

    def _draw_weights(self, layer: int, group: KVGroup, draw: Callable[..., Tensor]) -> None:
        """Let a layer's heads project latents."""
        spec, heads = group.spec, group.num_query_heads
        rank = spec.layout.v_width
        nope = spec.q_width - (spec.layout.k_width - rank)
        w_k = draw(spec.compute_dtype, heads, nope, rank) / rank**0.5
        w_v = draw(spec.compute_dtype, heads, spec.out_width, rank) / rank**0.5
        one = self.params[layer]
        self.params[layer] = LatentParams(
            one.scale, one.softcap, one.window, weights=LatentWeights(w_k, w_v), spec=spec
        )
        if not isinstance(self.backend, LatentBackend):
            self.backend = LatentBackend(self.backend)

    def _expanded(self, layer: int, request_id: int) -> tuple[Tensor, Tensor]:
        """Keys [Hkv, S, D] and values [Hkv, S, Dv] as the definition of the layer's attention has them."""
        k, v, params = self.k[layer, request_id], self.v[layer, request_id], self.params[layer]
        if not isinstance(params, LatentParams):
            return k, v
        w_k, w_v = (weight.double() for weight in params.weights)
        latents, rotated = k[0, :, : w_k.shape[2]].double(), k[0, :, w_k.shape[2] :].double()
        nope = torch.einsum("hnr,sr->hsn", w_k, latents)
        keys = torch.cat([nope, rotated.expand(len(w_k), -1, -1)], -1)
        return keys, torch.einsum("hnr,sr->hsn", w_v, latents)

    def run(
        self,
        query_runs: Sequence[QueryRun],
        strategy: Strategy | None = None,
        block_len: int = 2048,
        plan_id: int = 0,
        nodes: Sequence[int] | None = None,
    ) -> Step:
        """Run one step on all ranks at once, each in a thread of its own; ranks without a token join.

        Args:
            nodes: per rank, its node; None: all on one.
        """
        cluster = self.cluster
        group_steps = tuple(
            plan_group(query_runs, tables, group, forced=strategy, block_len=block_len, node_of_rank=nodes)
            for group, tables in zip(self.groups, cluster.tables, strict=True)
        )
        exchanges: list[tuple[Exchange, ...]] = []
        units: list[list[QueryUnit]] = []
        everyone = range(cluster.num_ranks)
        for step, group, tables in zip(group_steps, self.groups, cluster.tables, strict=True):
            keys = step_keys(query_runs, tables, group.spec)
            exchanges.append(count_exchanges(step.strategy, keys, step.block_len, step.nodes))
            meets = find_meetings(query_runs, tables, group.spec, everyone, everyone)
            moves = step.strategy in (Strategy.PASS_Q, Strategy.TREE)
            units.append(query_units(meets, step.nodes, step.block_len, step.num_blocks) if moves else [])
        ranks = tuple(everyone)
        plan = Plan(
            plan_id, Phase.PREFILL, ranks, count_tokens(ranks, query_runs), tuple(query_runs), (), group_steps, ()
        )
        comms = thread_group(cluster.num_ranks, timeout_s=TIMEOUT_S)
        futures = [_THREADS.submit(self._run_rank, plan, comm) for comm in comms]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise BaseExceptionGroup(f"{len(errors)} of {cluster.num_ranks} ranks failed", errors)
        results = [future.result() for future in futures]
        outputs = [output for found, _ in results for output in found]
        return Step(plan, outputs, [traffic for _, log in results for traffic in log], exchanges, units)

    @torch.inference_mode()
    def _run_rank(self, plan: Plan, comm: Communicator) -> tuple[list[Output], list[LayerTraffic]]:
        log = LoggingCommunicator(comm)
        recorder = RecordingCommunicator(log)
        step = EagerStepAttention(plan, self.cluster.tables, self.pools[comm.rank], recorder, self.backend, self.params)
        runs = [run for run in plan.query_runs if run.compute_rank == comm.rank]
        assert step.num_rows == sum(run.num_tokens for run in runs)
        outputs: list[Output] = []
        traffic: list[LayerTraffic] = []
        for layer in sorted(self.group_of):
            before = (recorder.num_exchanges, recorder.messages_sent, recorder.bytes_sent, len(log.sent))
            if runs:
                q, k, v = (
                    torch.cat(
                        [source[layer, run.request_id].narrow(dim, run.position, run.num_tokens) for run in runs], dim
                    )
                    for source, dim in ((self.q, 0), (self.k, 1), (self.v, 1))
                )
                out = step.attend(layer, q, k, v, sinks=self.sinks[layer])
                parts = out.split([run.num_tokens for run in runs])
                outputs += [Output(layer, run, part) for run, part in zip(runs, parts, strict=True)]
            else:
                step.join(layer)
            partial_bytes = sum(n for dtype, n in log.sent[before[3] :] if dtype is torch.uint8)
            counts = (recorder.num_exchanges, recorder.messages_sent, recorder.bytes_sent)
            traffic.append(
                LayerTraffic(layer, comm.rank, *(b - a for a, b in zip(before, counts, strict=False)), partial_bytes)
            )
        return outputs, traffic

    def dense(self, layer: int, run: QueryRun, dtype: torch.dtype = torch.float64) -> Tensor:
        """[T, H, Dv] attention of a query run over its whole sequence, at once."""
        group, params = self.group_of[layer], self.params[layer]
        q = self.q[layer, run.request_id][run.position : run.end].to(dtype)
        keys, values = self._expanded(layer, run.request_id)
        ratio = group.num_query_heads // len(keys)
        k = keys[:, : run.end].to(dtype).repeat_interleave(ratio, 0)
        v = values[:, : run.end].to(dtype).repeat_interleave(ratio, 0)
        scores = torch.einsum("thd,hsd->hts", q, k) * params.scale
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        positions = torch.arange(run.position, run.end)[:, None]
        keys = torch.arange(run.end)[None]
        seen = keys <= positions
        if params.window is not None:
            seen &= keys > positions - params.window
        scores = scores.masked_fill(~seen, -torch.inf)
        sinks = self.sinks[layer]
        if sinks is not None:
            column = sinks.to(dtype)[:, None, None].expand(-1, run.num_tokens, 1)
            scores = torch.cat([scores, column], -1)
            v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        return torch.einsum("hts,hsd->thd", torch.softmax(scores, -1), v)

    def error(self, step: Step) -> float:
        """Largest absolute error of a step; NaN counts as infinite."""
        errors = [
            torch.nan_to_num((output.out.double() - self.dense(output.layer, output.run)).abs(), nan=torch.inf).max()
            for output in step.outputs
        ]
        return float(max(errors))

    def check(self, step: Step) -> None:
        """Every token of the step is there once, and right: to 1e-12 in float64, as well as eager in float32."""
        expected = [(layer, run) for run in step.plan.query_runs for layer in self.group_of]
        found = [(output.layer, output.run) for output in step.outputs]
        assert sorted(found, key=repr) == sorted(expected, key=repr)
        if self.groups[0].spec.compute_dtype == "float64":
            assert self.error(step) < 1e-12
            return
        eager = max(
            (self.dense(o.layer, o.run, torch.float32).double() - self.dense(o.layer, o.run)).abs().max()
            for o in step.outputs
        )
        assert self.error(step) <= 2 * float(eager) + 1e-6


def random_groups(rng: random.Random, cluster: Cluster, dtype: str = "float64") -> list[KVGroup]:
    """KV groups for a cluster: head ratios 1, 4, 7 and 8, one or two KV heads, keys and values of different width."""
    ratio, kv_heads = rng.choice([1, 4, 7, 8]), rng.choice([1, 1, 2])
    k_width = rng.choice([4, 8])
    v_width = rng.choice([k_width, k_width, 3])
    layers = [[0], [1]] if len(cluster.windows) == 2 else [[0]]
    return [
        make_group(
            layer,
            query_heads=ratio * kv_heads,
            kv_heads=kv_heads,
            k_width=k_width,
            v_width=v_width,
            dtype=dtype,
            window=window,
        )
        for layer, window in zip(layers, cluster.windows, strict=True)
    ]
