"""In the last layer, attention and what follows are computed only for rows whose logits somebody needs.

That tokens stay exact is the business of `test_families`; here it is shown that the work is really left out.
"""

import threading

import pytest
import torch
from tiny_models import FAMILIES, greedy, run_all, tiny_engine, tiny_model

from longspan.cp.eager import EagerStepAttention
from longspan.cp.local import Local
from longspan.models import fused_layer_gemm
from longspan.models.speedups import LAST_LAYER, speed_up_, speedups_of
from longspan.native import kernels
from longspan.native.layer import FusedLayer
from longspan.plan.read_runs import read_runs
from longspan.plan.types import Literals, QueryRun, SampleRow, ScoreRun
from longspan.types import SamplingParams

needs_kernel = pytest.mark.skipif(not kernels.is_available(), reason="no C compiler when longspan was installed")

LAYOUT = {"placement": "striped", "page_size": 4, "stripe_size": 8, "max_num_batched_tokens": 16}
PROMPT_LEN = 97


def run(request_id, position, num_tokens, rank=0):
    return QueryRun(request_id, position, num_tokens, rank, Literals((0,) * num_tokens))


def sample(request_id, position):
    return SampleRow(request_id, position, 0.0, 1.0, 0, 0.0, 0, None, ())


def parts(runs, samples=(), scores=()):
    return [(r.request_id, r.position, r.end, r.compute_rank) for r in read_runs(runs, samples, scores)]


def test_read_runs_are_the_rows_with_logits_in_plan_order():
    runs = [run(1, 8, 4, rank=1), run(7, 3, 1), run(1, 4, 4)]
    assert parts(runs) == []
    assert parts(runs, [sample(7, 3)]) == [(7, 3, 4, 0)]
    assert parts(runs, [sample(1, 11), sample(7, 3)]) == [(1, 11, 12, 1), (7, 3, 4, 0)]
    scores = [ScoreRun(1, 5, (0, 0, 0), 0), ScoreRun(1, 8, (0, 0), 0)]
    assert parts(runs, [sample(1, 11)], scores) == [(1, 8, 10, 1), (1, 11, 12, 1), (1, 5, 8, 0)]
    assert parts(runs, [sample(1, 10)], scores) == [(1, 8, 11, 1), (1, 5, 8, 0)]


class Watched:
    """What attention is computed for and sends, layer by layer, over all steps and ranks that are threads."""

    def __init__(self, monkeypatch):
        self._rows, self._bytes, self._current = [], [], threading.local()
        for name in ("attend", "join"):
            monkeypatch.setattr(EagerStepAttention, name, self._in_layer(getattr(EagerStepAttention, name)))
        monkeypatch.setattr(Local, "run_layer", self._counted(Local.run_layer))  # the part that each strategy has

    def _in_layer(self, honest):
        def of_layer(step, layer, *args, **options):
            self._current.layer, before = layer, step.bytes_sent.total()
            out = honest(step, layer, *args, **options)
            self._bytes.append((layer, step.bytes_sent.total() - before))
            return out

        return of_layer

    def _counted(self, honest):
        def run_layer(strategy, q, *args):
            self._rows.append((self._current.layer, q.shape[0]))
            return honest(strategy, q, *args)

        return run_layer

    @property
    def rows(self):
        return totals(self._rows)

    @property
    def bytes_sent(self):
        return totals(self._bytes)


def totals(pairs):
    """Per layer, in order."""
    return {layer: sum(value for of, value in pairs if of == layer) for layer in sorted({layer for layer, _ in pairs})}


def rows_per_layer(monkeypatch, family, params, **options):
    """Query rows that attention was computed for per layer, and rows that the last MLP saw, in all steps and ranks."""
    model, watched, mlp_rows = tiny_model(family), Watched(monkeypatch), []
    module = model.load()
    speed_up_(module, [LAST_LAYER])
    module.model.layers[-1].mlp.gate_proj.register_forward_hook(
        lambda _module, args, _output: mlp_rows.append(args[0].shape[1])
    )
    with tiny_engine(model, module, **LAYOUT, **options) as engine:
        request = engine.add_request(model.references[2].prompt, params)
        run_all(engine)
    return watched.rows, sum(mlp_rows), request


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3-window"])
def test_a_prompt_costs_the_last_layer_one_row(family, num_ranks, monkeypatch):
    rows, mlp_rows, request = rows_per_layer(monkeypatch, family, greedy(5), context_parallel_size=num_ranks)
    *others, last = rows.values()
    assert set(others) == {PROMPT_LEN + 4}
    assert last == mlp_rows == 5
    assert request.output_token_ids == tiny_model(family).references[2].token_ids[:5]


@needs_kernel
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fused_layers_leave_the_same_rows_out(num_ranks, monkeypatch):
    model = tiny_model("llama")
    num_others = len(model.module.model.layers) - 1  # loads the model: its proof is not counted
    rows, few, many = [], FusedLayer.behind_attention, fused_layer_gemm.behind_attention
    monkeypatch.setattr(FusedLayer, "behind_attention", lambda *args: rows.append(len(args[2])) or few(*args))
    monkeypatch.setattr(fused_layer_gemm, "behind_attention", lambda *args: rows.append(len(args[2])) or many(*args))
    with tiny_engine(model, **LAYOUT, context_parallel_size=num_ranks) as engine:
        request = engine.add_request(model.references[2].prompt, greedy(5))
        run_all(engine)
    assert sum(rows) == num_others * (PROMPT_LEN + 4) + 5
    assert request.output_token_ids == model.references[2].token_ids[:5]


def test_rows_whose_log_probabilities_are_asked_for_are_computed(monkeypatch):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    rows, mlp_rows, request = rows_per_layer(monkeypatch, "llama", params, context_parallel_size=2)
    assert set(rows.values()) == {PROMPT_LEN}
    assert mlp_rows == PROMPT_LEN
    assert len(request.prompt_logprobs) == PROMPT_LEN - 1


@pytest.mark.parametrize("strategy", ["gather_kv", "pass_kv", "pass_q", "tree"])
def test_nothing_moves_in_the_last_layer_for_rows_that_nobody_reads(strategy, monkeypatch):
    """The first of several chunks: no row is sampled."""
    model, watched = tiny_model("llama"), Watched(monkeypatch)
    with tiny_engine(model, **LAYOUT, context_parallel_size=2, strategy=strategy) as engine:
        engine.add_request(model.references[3].prompt, greedy(1))
        engine.step()
        *others, last = watched.bytes_sent.values()
        assert min(others) > 0
        assert last == 0
        run_all(engine)


@pytest.mark.cover(cases=7)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_last_layer_that_can_leave_rows_out(family):
    assert LAST_LAYER in speedups_of(tiny_model(family).module)


class NeverEmpty(torch.nn.Linear):
    """Layer that does not take no rows, as quantised layers of some libraries."""

    def forward(self, x):
        assert x.numel(), "a call without rows"
        return super().forward(x)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_module_is_called_without_rows(num_ranks):
    """In the first chunks of a prompt no row of the last layer is read."""
    model = tiny_model("llama")
    module = model.load()
    for part in module.model.layers[-1].modules():
        if type(part) is torch.nn.Linear:
            part.__class__ = NeverEmpty
    speed_up_(module, [LAST_LAYER])
    with tiny_engine(model, module, **LAYOUT, context_parallel_size=num_ranks) as engine:
        request = engine.add_request(model.references[2].prompt, greedy(5))
        run_all(engine)
    assert request.output_token_ids == model.references[2].token_ids[:5]
