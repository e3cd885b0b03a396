"""Mixtures of experts: every expert counts, and a model's facts say which weights a token meets."""

import copy

import pytest
import torch
from proven_models import PROVEN_MODELS, make_config
from tiny_models import greedy, run_all, tiny_engine, tiny_model

from longspan.models.families import PROVEN_FAMILIES, Need
from longspan.models.inspect import inspect_model
from longspan.types import ExpertWeights

pytestmark = pytest.mark.cover

NUM_TOKENS = 32


def experts_of(module):
    """Modules that hold the weights of a layer's experts."""
    return [part for part in module.modules() if any(p.ndim == 3 for p in part.parameters(recurse=False))]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_dropped_expert_changes_tokens(family):
    model = tiny_model(family)
    module = copy.deepcopy(model.load())
    with torch.inference_mode():
        for experts in experts_of(module):
            experts.down_proj[3] = 0
    with tiny_engine(model, module, context_parallel_size=2, placement="striped", page_size=4, stripe_size=8) as engine:
        requests = [engine.add_request(reference.prompt, greedy(NUM_TOKENS)) for reference in model.references[:3]]
        run_all(engine)
    found = [request.output_token_ids for request in requests]
    assert found != [reference.token_ids[:NUM_TOKENS] for reference in model.references[:3]]


@pytest.mark.cover(cases=16)
@pytest.mark.parametrize("model_type", PROVEN_FAMILIES)
def test_the_table_says_which_families_have_experts(model_type):
    names = [name for name, (its_type, _) in PROVEN_MODELS.items() if its_type == model_type]
    have_experts = any(inspect_model(make_config(name), None, torch.float32).experts is not None for name in names)
    assert have_experts == (Need.EXPERTS in PROVEN_FAMILIES[model_type].needs)


def test_a_token_meets_the_chosen_experts_of_each_layer():
    spec = inspect_model(make_config("qwen3_moe"), None, torch.float32)
    expert = 3 * 64 * 32
    assert spec.experts == ExpertWeights(3 * 8 * expert, 8, 2)
    assert spec.active_parameters == spec.num_parameters - 3 * 6 * expert
    assert spec.parameters_read(2) == spec.num_parameters - 3 * 4 * expert
    assert spec.parameters_read(4) == spec.parameters_read(1000) == spec.num_parameters
