"""Proves who lends threads to whom, and that attention never uses borrowed ones."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import greedy, run_all, tiny_engine, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.config import EngineConfig
from longspan.cp.eager import EagerStepAttention
from longspan.engine import threads
from longspan.engine.engine import Engine
from longspan.plan.build import count_tokens
from longspan.plan.types import Literals, Plan, QueryRun
from longspan.types import Phase
from longspan.worker import thread_lending
from longspan.worker.build import build_runner
from longspan.worker.thread_lending import MIN_LAYER_BYTES, borrowed_threads, lends


def plan(phase, num_ranks, *computing):
    runs = tuple(QueryRun(i, 5, 1, rank, Literals((3,))) for i, rank in enumerate(computing))
    return Plan(0, phase, tuple(range(num_ranks)), count_tokens(range(num_ranks), runs), runs, (), (), ())


@pytest.mark.parametrize(
    ("phase", "num_ranks", "computing", "expected"),
    [
        (Phase.DECODE, 2, (0,), 2),
        (Phase.DECODE, 3, (0, 0), 3),
        (Phase.DECODE, 9, (0,), 4),  # there are 4 cores
        (Phase.DECODE, 1, (0,), 1),
        (Phase.DECODE, 2, (0, 1), 1),
        (Phase.PREFILL, 2, (0,), 1),
    ],
)
def test_who_computes_alone_borrows_from_the_plans_other_ranks(phase, num_ranks, computing, expected, monkeypatch):
    monkeypatch.setattr(thread_lending, "num_cores", lambda: 4)
    assert borrowed_threads(plan(phase, num_ranks, *computing), 0) == expected


def test_ranks_with_one_thread_and_large_layers_lend():
    spec, large = (
        SimpleNamespace(num_layers=2, num_parameters=1, active_parameters=1),
        nn.Linear(MIN_LAYER_BYTES // 4, 2, bias=False),
    )
    assert lends(1, large, spec)
    assert not lends(2, large, spec)
    assert not lends(1, nn.Linear(MIN_LAYER_BYTES // 4 - 1, 2, bias=False), spec)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_layers_use_borrowed_threads_and_attention_does_not(num_ranks, monkeypatch):
    model = tiny_model("llama")
    used: dict[str, set[int]] = {"attention": set(), "dense": set()}
    original = EagerStepAttention.attend

    def attend(*args, **options):
        used["attention"].add(torch.get_num_threads())
        return original(*args, **options)

    monkeypatch.setattr(thread_lending, "num_cores", lambda: 4)
    monkeypatch.setattr(threads, "build_runner", lambda *args: build_runner(*args, borrowed_threads))
    monkeypatch.setattr(EagerStepAttention, "attend", attend)
    reference = model.references[2]
    hook = model.module.lm_head.register_forward_pre_hook(lambda *_: used["dense"].add(torch.get_num_threads()))
    try:
        with tiny_engine(model, context_parallel_size=num_ranks, placement="striped") as engine:
            request = engine.add_request(reference.prompt, greedy(5))
            run_all(engine)
    finally:
        hook.remove()
    assert request.output_token_ids == reference.token_ids[:5]
    assert used == {"attention": {1}, "dense": {1, num_ranks}}  # a prompt's chunks borrow nothing


@pytest.mark.processes
def test_real_ranks_that_lend_their_threads_give_the_tokens_of_transformers(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=2, eos_token_id=0, **shape)).eval()
    assert lends(1, model, SimpleNamespace(num_layers=2, num_parameters=1, active_parameters=1))
    model.save_pretrained(tmp_path)
    prompt = [(7 * i * i + 3) % 299 + 1 for i in range(200)]
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, 200:].tolist()
    config = EngineConfig(
        model=str(tmp_path),
        context_parallel_size=2,
        threads_per_rank=1,
        placement="striped",
        page_size=16,
        stripe_size=64,
        kv_cache_memory=2**25,
    )
    engine = Engine(config)
    try:
        request = engine.add_request(prompt, greedy(12))
        run_all(engine)
    finally:
        engine.close()
    assert request.output_token_ids == expected
