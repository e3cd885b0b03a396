"""Measurements of one rank: kernels at the model's shapes, links, and a layer's time outside attention.

Holds the order of measurements. Must not know the predictions made from them.
Read next: `longspan.attention.measure`, `longspan.comm.measure`; `longspan.costmodel.measured`.
"""

import statistics
import time
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from longspan.attention.measure import measure_kernels
from longspan.comm.measure import barrier, measure_links
from longspan.costmodel.measured import RankMeasurement
from longspan.cp.measure import measure_messages
from longspan.cpu_binding import num_cores
from longspan.group.messages import Measure
from longspan.types import AttentionParams
from longspan.worker.forward import ModelForward
from longspan.worker.runner import ModelRunner

MOST_WEIGHT_BYTES = 1 << 30
"""Most bytes of weights of a model that is run to time its layers: reading more takes seconds, and hides the rest."""

REPEATS = 5

MOST_TOKENS, FEWEST_TOKENS, TOKENS_FLOPS = 256, 32, 16e9
"""Tokens of the step that shows a token's time beside matrix products, limited by TOKENS_FLOPS operations; a model is
not measured with fewer than FEWEST_TOKENS."""


@torch.inference_mode()
def measure(runner: ModelRunner, message: Measure) -> RankMeasurement:
    """Measure this rank.

    Collective: all ranks, with the same message, while no plan is under way.
    """
    comm, group = runner.comm.inner, runner.spec.kv_groups[0]  # the inner one: measurements are no traffic of plans

    # Processes that share this one's cores.
    num_processes = message.machines.count(message.machines[runner.rank]) * (runner.peers.size if runner.peers else 1)
    if message.are_bound:
        num_processes = 1

    def sync() -> None:
        barrier(comm)

    rates = measure_kernels(
        runner.backend,
        group,
        _params(runner, group.layers[0]),
        ranks_per_device=max(1.0, num_processes * torch.get_num_threads() / num_cores()),
        sync=sync,
        device=runner.device,
    )
    sync()
    rates = measure_messages(group, runner.device).add_to(rates)
    sync()
    layer_s = _layer_s(runner, rates.read_bytes_per_s)
    sync()
    token_s = _token_s(runner, rates.matmul_flops_per_s, layer_s)
    links = measure_links(comm, message.nodes)
    return RankMeasurement(runner.rank, msgspec.structs.replace(rates, layer_s=layer_s, token_s=token_s), links)


def _params(runner: ModelRunner, layer: int) -> AttentionParams:
    params = runner.layer_params[layer]
    assert params is not None, f"layer {layer} has no attention"
    return params


def _layer_s(runner: ModelRunner, read_bytes_per_s: float) -> float:
    """Seconds of a layer for one token, without attention and reading its weights."""
    weights = [p for name, p in runner.model.named_parameters() if "embed" not in name]
    num_bytes = sum(p.numel() * p.element_size() for p in weights)
    if runner.peers is not None:  # whose parts may differ a little: all of them run the model, or none
        (num_bytes,) = runner.peers.tell([num_bytes], runner.device)
    if num_bytes > MOST_WEIGHT_BYTES:
        return 0.0
    layers_s: float = max(0.0, statistics.median(_model_s(runner, 1, REPEATS)) - num_bytes / read_bytes_per_s)
    return layers_s / runner.spec.num_layers


def _token_s(runner: ModelRunner, matmul_flops_per_s: float, layer_s: float) -> float | None:
    """Seconds of a token in a layer, without attention and matrix products; None if it is not measured."""
    spec = runner.spec
    flops = 2.0 * max(1, spec.active_parameters)
    num_tokens = min(MOST_TOKENS, int(TOKENS_FLOPS / flops))
    if num_tokens < FEWEST_TOKENS:
        return None
    step_s = statistics.fmean(_model_s(runner, num_tokens, 3)[1:])
    other_s = step_s - num_tokens * flops / matmul_flops_per_s - spec.num_layers * layer_s
    return max(0.0, other_s) / (num_tokens * spec.num_layers)


class _NoAttention:
    """`StepAttention` of one rank's rows that computes nothing."""

    rank = 0
    read_rows = None

    def __init__(self, num_rows: int, out_widths: Mapping[int, int]) -> None:
        """Take the rows, and the elements of an output head by layer."""
        self.num_rows, self._out_widths = num_rows, out_widths
        self.bytes_sent: dict[str, int] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        return q.new_zeros(*q.shape[:2], self._out_widths[layer])

    def join(self, layer: int) -> None:
        """Do nothing: no message is exchanged."""


def _model_s(runner: ModelRunner, num_tokens: int, repeats: int) -> list[float]:
    """Seconds of steps without attention."""
    forward = ModelForward(runner.model, runner.layer_params, lambda layer: None)
    out_widths = {layer: group.spec.out_width for group in runner.spec.kv_groups for layer in group.layers}
    tokens = torch.zeros(num_tokens, dtype=torch.long, device=runner.device)
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        forward.run(_NoAttention(num_tokens, out_widths), tokens, tokens, tokens[:1])
        times.append(time.perf_counter() - started)
    return times
