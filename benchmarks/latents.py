"""Time per output token of latent attention, one thread: latents stored against keys and values of all heads stored.

    python benchmarks/latents.py [--length 16384] [--layers 6] [--repeats 9] [--json] [--save]

A model like DeepSeek V2 Lite (16 heads of 128 + 64 / 128, latents of 512 + 64) without experts, with random weights and
about 100 M parameters in float32. The same weights run both ways, in turns, over pools of random numbers, since a
prompt's values do not change the time. Times are those that one thread computes, not the clock's, and medians: other
work on the machine counts less. The floors are the bytes of stored keys over the read bandwidth, and the flops over the
rate of a large matrix product, measured in the same run.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV2Config

from common import median, parser, report
from longspan.attention.base import AttentionBackend, RowSegment, RowSegments
from longspan.attention.cpu import CPUBackend
from longspan.attention.latent import LatentBackend
from longspan.kv.layout import KVGroup
from longspan.kv.pool import PagePool
from longspan.models.adaptations import adapt_
from longspan.models.hook import ATTENTION_NAME
from longspan.models.inspect import trace_model
from longspan.models.latent import params_with_weights
from longspan.models.speedups import speed_up_
from longspan.sharding.visibility import Visibility
from longspan.types import AttentionParams
from longspan.worker.forward import ModelForward

HEADS, NOPE, ROTATED, VALUE, RANK = 16, 128, 64, 128, 512
CPU = torch.device("cpu")


class OneToken:
    """`StepAttention` of one token behind a context, on one rank: the engine's store and kernels, without its plans."""

    rank, num_rows, read_rows = 0, 1, None

    def __init__(
        self, pool: PagePool, backend: AttentionBackend, params: list[AttentionParams], context_len: int
    ) -> None:
        self.bytes_sent: Mapping[str, int] = {}
        self.attention_s = 0.0
        self._pool, self._backend, self._params = pool, backend, params
        self._store = [(0, context_len, 1)]
        self._segments = RowSegments([RowSegment(0, 1, context_len, 0, context_len + 1, None, Visibility.FULL)])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        started = time.thread_time()
        pool = self._pool
        pool.write(layer, k, v, self._store)
        partial = self._backend.partial_attention(q, pool.k[layer], pool.v[layer], self._segments, self._params[layer])
        self.attention_s += time.thread_time() - started
        return partial.out.to(q.dtype)

    def join(self, layer: int) -> None:
        """Never called: there is one rank."""


def make_config(num_layers: int) -> DeepseekV2Config:
    return DeepseekV2Config(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        first_k_dense_replace=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROTATED,
        v_head_dim=VALUE,
        vocab_size=256,
        max_position_embeddings=2**20,
    )


def random_pool(group: KVGroup, num_tokens: int) -> PagePool:
    pool = PagePool(group, num_tokens, 1, CPU)
    for rows in pool.rows(0, num_tokens):
        rows.normal_()
    return pool


def token_times(model: nn.Module, attention: OneToken) -> Callable[[], tuple[float, float]]:
    """Function that runs one token: seconds of all, and of attention with its projections."""
    forward = ModelForward(model, attention._params, lambda layer: None)
    token, position, row = torch.tensor([7]), torch.tensor([attention._store[0][1]]), torch.tensor([0])

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        attention.attention_s, started = 0.0, time.thread_time()
        forward.run(attention, token, position, row)
        return time.thread_time() - started, attention.attention_s

    return run


def build(num_layers: int, length: int, *, are_latents: bool) -> tuple[Callable[[], tuple[float, float]], KVGroup]:
    """One of the two ways, with the same weights."""
    torch.manual_seed(0)
    config = make_config(num_layers)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    model = model.eval().requires_grad_(False)
    if are_latents:
        adapt_(model)
    spec = trace_model(config, None, torch.float32)[0]
    (group,) = spec.kv_groups
    params = list(params_with_weights(spec, model)) if are_latents else list(spec.layer_params)
    if not are_latents:
        group = group.expanded
    speed_up_(model)
    backend = LatentBackend(CPUBackend()) if are_latents else CPUBackend()
    return token_times(model, OneToken(random_pool(group, length + 1), backend, params, length)), group


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=6)
    options.set_defaults(repeats=9)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    ways = {
        "latents": build(chosen.layers, chosen.length, are_latents=True),
        "keys and values": build(chosen.layers, chosen.length, are_latents=False),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    a, data = torch.randn(2048, 2048), torch.ones(2**27)
    rates: list[tuple[float, float]] = []
    for _ in range(chosen.repeats):
        rates.append((2 * 2048**3 / _thread_s(lambda: a @ a), data.nbytes / _thread_s(data.sum)))
        for name, (run, _) in ways.items():
            times[name].append(run())
    flops, bandwidth = (max(found) for found in zip(*rates, strict=True))
    rows = []
    for name, (_, group) in ways.items():
        kv_bytes = group.token_bytes * chosen.length
        attention_s = median(attention for _, attention in times[name])
        rows.append(
            {
                "stored": name,
                "KV per token": f"{group.token_bytes} B",
                "ms per token": median(total for total, _ in times[name]) * 1e3,
                "of which attention": attention_s * 1e3,
                "floor of bytes": kv_bytes / bandwidth * 1e3,
                "floor of flops": len(group.layers) * group.pair_flops() * chosen.length / flops * 1e3,
            }
        )
    ratios = {
        "per token, latents / keys and values": rows[0]["ms per token"] / rows[1]["ms per token"],
        "attention, latents / keys and values": rows[0]["of which attention"] / rows[1]["of which attention"],
    }
    facts = {"context": chosen.length, "layers": chosen.layers, "threads": 1, "matrix product, flops/s": flops}
    report("latents", rows, facts | {"read bandwidth, bytes/s": bandwidth} | ratios, chosen)


def _thread_s(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


if __name__ == "__main__":
    main()
