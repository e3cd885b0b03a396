"""Whole models on fake CUDA tensors: no tensor of the host meets one of the GPU, and a step that may be captured
neither waits for the GPU nor takes anything from the host, in any family."""

import copy
import functools

import pytest
import torch
from fake_cuda import WATCH, FakeCommunicator, HostWaitError, fake_gpu, to_fake_gpu_
from tiny_models import FAMILIES, model_root, write_model
from torch import nn

from longspan.attention.latent import LatentBackend
from longspan.attention.triton import TritonBackend
from longspan.config import EngineConfig
from longspan.cp import fixed
from longspan.cp.fixed import FixedStepAttention
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, load_model
from longspan.models.speedups import ALWAYS, speed_up_
from longspan.plan.fixed_shape import has_fixed_steps
from longspan.plan.types import PlanResult
from longspan.scheduler.scheduler import Scheduler
from longspan.types import SamplingParams
from longspan.worker.forward import ModelForward
from longspan.worker.runner import ModelRunner

PAGES = 40


@functools.cache
def loaded(family: str):
    """Path and facts of a model, and the model on the CPU in bfloat16."""
    model_type, options = FAMILIES[family]
    path = write_model(model_root() / f"{family}-on-a-gpu", model_type, **options)
    spec = inspect_model(load_config(path)[0], None, torch.bfloat16)
    return path, spec, load_model(path, torch.bfloat16, show_progress=False)


class FakeRanks:
    """A scheduler, and its ranks one after the other on a fake GPU."""

    def __init__(self, family: str, model: nn.Module, num_ranks: int, **options) -> None:
        path, spec, _ = loaded(family)
        config = EngineConfig(
            model=path, context_parallel_size=num_ranks, device="cuda", page_size=16, stripe_size=16, **options
        )
        num_pages = [[PAGES] * len(spec.kv_groups) + [4] * bool(spec.state_groups) for _ in range(num_ranks)]
        self.is_fixed = has_fixed_steps(config, spec)
        self.scheduler = Scheduler(spec, config, num_pages)
        to_fake_gpu_(model)
        speed_up_(model, ALWAYS)
        self.comms = [FakeCommunicator(rank, num_ranks) for rank in range(num_ranks)]
        backend = LatentBackend(TritonBackend())
        self.runners = [
            ModelRunner(
                model,
                spec,
                num_pages=pages,
                page_size=16,
                comm=comm,
                backend=backend,
                graphs="captured" if self.is_fixed else "never",
            )
            for comm, pages in zip(self.comms, num_pages, strict=True)
        ]

    def run(self) -> list[str]:
        """Run all requests to their ends; return how the steps ran."""
        found = []
        while self.scheduler.has_requests:
            plan = self.scheduler.schedule()
            assert plan is not None
            results = [self.runners[rank].run(plan) for rank in plan.ranks]
            assert not any(result.capture_failed for result in results), "see what the rank has said"
            self.scheduler.update(PlanResult(plan.plan_id, tuple(results)))
            found.append("any shape" if plan.graph is None else plan.graph.run)
        return found


def serve(family: str, num_ranks: int, **options) -> list[str]:
    """Prompts of which one has a page of its own to sample from, with all rules of sampling; then decodes."""
    model = copy.deepcopy(loaded(family)[2])
    with fake_gpu():
        ranks = FakeRanks(family, model, num_ranks, async_scheduling=False, max_num_batched_tokens=48, **options)
        for length, params in ((60, {"temperature": 0.0}), (20, {"temperature": 0.8, "top_p": 0.9, "logprobs": 2})):
            sampling = SamplingParams(max_tokens=7, ignore_eos=True, seed=1, **params)
            ranks.scheduler.add_request(range(3, 3 + length), sampling)
        runs = ranks.run()
        assert any(comm.num_messages for comm in ranks.comms) == (num_ranks > 1)
    return runs


USUAL = ("llama", "gpt_oss", "youtu")
"""Sinks and a mixture of experts; latents. Each of the other families takes seconds."""


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in USUAL else pytest.mark.slow) for family in FAMILIES]
)
def test_every_family_runs_on_a_gpu(family):
    runs = serve(family, 1)
    assert "any shape" in runs
    assert {"launch", "capture", "replay"} <= set(runs)
    assert WATCH.num_operators > 20


@pytest.mark.cover
@pytest.mark.parametrize("strategy", ["pass_q", "pass_kv", "gather_kv", pytest.param("tree", marks=pytest.mark.slow)])
def test_every_strategy_runs_on_gpus(strategy):
    runs = serve("llama", 3, placement="striped", strategy=strategy)
    assert ("replay" in runs) == (strategy in ("pass_q", "tree"))


def _take_from_the_host(monkeypatch):
    """As a sampler or a kernel's caller might: numbers of the host become a tensor of the GPU in every layer."""
    split = FixedStepAttention._split_partials

    def with_numbers(self, layer, q, **options):
        return split(self, layer, q + torch.tensor([1.0, 2.0], device=q.device)[0].to(q.dtype), **options)

    monkeypatch.setattr(FixedStepAttention, "_split_partials", with_numbers)


def _wait_for_the_gpu(monkeypatch):
    """As models do that look at their own numbers."""
    run = ModelForward.run

    def looking(self, *args, **options):
        logits = run(self, *args, **options)
        assert float(logits.sum().item()) == 0.0
        return logits

    monkeypatch.setattr(ModelForward, "run", looking)


def _copy_to_the_host(monkeypatch):
    merge = fixed.merge
    monkeypatch.setattr(fixed, "merge", lambda parts, lses, out, *rest: merge(parts, lses, out, *rest) or out.cpu())


@pytest.mark.parametrize("mutate", [_take_from_the_host, _wait_for_the_gpu, _copy_to_the_host])
def test_a_step_that_cannot_be_captured_is_noticed(mutate):
    model = copy.deepcopy(loaded("llama")[2])
    with fake_gpu(), pytest.MonkeyPatch.context() as patch:  # undone before the GPU's own patches are
        mutate(patch)
        ranks = FakeRanks("llama", model, 1, async_scheduling=False)
        ranks.scheduler.add_request(range(3, 9), SamplingParams(max_tokens=7, ignore_eos=True))
        with pytest.raises(HostWaitError, match="in a step that may be captured"):
            ranks.run()


def test_a_tensor_of_the_host_that_meets_one_of_the_gpu_is_noticed():
    model = copy.deepcopy(loaded("llama")[2])
    with fake_gpu():
        ranks = FakeRanks("llama", model, 1)
        model.model.norm.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16), requires_grad=False)
        ranks.scheduler.add_request(range(3, 9), SamplingParams(max_tokens=7))
        with pytest.raises(RuntimeError, match="same device"):
            ranks.run()
