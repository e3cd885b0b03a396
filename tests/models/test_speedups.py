"""Speed-ups compute what the plain model does in every combination, have one order, and leave unknown weights alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE
from proven_models import make_config, randomize_
from tiny_models import greedy, run_all, tiny_engine, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from longspan.models.hook import AttentionCall
from longspan.models.last_layer import READ_ROWS
from longspan.models.linear import CPULinear
from longspan.models.speedups import (
    ALWAYS,
    COMPILED,
    EXPERTS,
    FUSED_LAYERS,
    LAST_LAYER,
    LINEAR,
    NORMS,
    RECURRENCE,
    SPEEDUPS,
    speed_up_,
    speedups_of,
)
from longspan.native import kernels
from longspan.native import layer as native_layer

ANYWHERE = tuple(replace(speedup, device_type=None) if speedup is COMPILED else speedup for speedup in SPEEDUPS)
"""All speed-ups, with those for GPUs on the device of the tests."""


def combinations(speedups):
    return [chosen for number in range(len(speedups) + 1) for chosen in itertools.combinations(speedups, number)]


OTHERS = tuple(speedup for speedup in ANYWHERE if speedup not in (RECURRENCE, NORMS))
WITH_NORMS = [(), *((other,) for other in OTHERS), OTHERS]
COMBINATIONS = combinations(OTHERS) + [
    tuple(speedup for speedup in ANYWHERE if speedup in (*others, NORMS)) for others in WITH_NORMS
]
"""For models without states, which `RECURRENCE` leaves alone. Norms depend on no other: beside none, each, and all."""

NUM_TOKENS = 12


def names(speedups):
    return [speedup.name for speedup in speedups]


@pytest.fixture
def quick_compiler(monkeypatch):
    """`torch.compile` traces, and generates no code: that takes seconds, and has a test of its own."""
    honest = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: honest(module, backend="eager", **options))


def attend(call: AttentionCall) -> torch.Tensor:
    """Causal attention of one packed request, by plain operators."""
    group_size = call.q.shape[1] // call.k.shape[0]
    k, v = (tensor.repeat_interleave(group_size, dim=0) for tensor in (call.k, call.v))
    scores = call.q.transpose(0, 1) @ k.transpose(1, 2) * call.scale
    hidden = torch.ones(scores.shape[1:], device=scores.device).triu(1).bool()
    return (torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v).transpose(0, 1)


@torch.inference_mode()
def logits(model: nn.Module, num_tokens: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Of the first tokens of a request, those of some rows if not of all."""
    tokens = torch.arange(5, 5 + num_tokens, device=DEVICE)[None]
    positions = torch.arange(num_tokens, device=DEVICE)[None]
    passed = {"longspan_attend": attend, READ_ROWS: rows}
    found = model(input_ids=tokens, position_ids=positions, use_cache=False, **passed).logits[0]
    return found if rows is None else found[rows]


@pytest.mark.cover(cases=16)
@pytest.mark.filterwarnings("ignore:Dynamo")  # it cannot trace into `linear`, which no GPU has
@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda chosen: "+".join(names(chosen)) or "none")
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "qwen3_moe"])
def test_every_combination_computes_what_the_plain_model_does(family, chosen, quick_compiler):
    model = tiny_model(family)
    module, plain = model.load(), model.load()
    speed_up_(module, chosen)
    unused = (() if family == "qwen3_moe" else (EXPERTS,)) if kernels.is_available() else (FUSED_LAYERS, EXPERTS)
    assert names(speedups_of(module)) == [
        speedup.name for speedup in chosen if speedup.takes(plain) and speedup not in unused
    ]
    for num_tokens, rows in ((1, None), (9, None), (150, None), (150, [0, 77, 149]), (20, [19])):
        read = None if rows is None else torch.tensor(rows, device=DEVICE)
        wanted = logits(plain, num_tokens, read)
        found = logits(module, num_tokens, read)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    references = model.references[1:3]
    with tiny_engine(model, module, context_parallel_size=2, placement="striped", max_num_batched_tokens=160) as engine:
        requests = [engine.add_request(reference.prompt, greedy(NUM_TOKENS)) for reference in references]
        run_all(engine)
    assert [request.output_token_ids for request in requests] == [
        reference.token_ids[:NUM_TOKENS] for reference in references
    ]


@pytest.mark.cover(cases=8)
@pytest.mark.skipif(DEVICE != "cpu", reason="all of them are for CPUs")
@pytest.mark.parametrize(
    "chosen", combinations((LINEAR, EXPERTS, RECURRENCE, NORMS)), ids=lambda chosen: "+".join(names(chosen))
)
@torch.inference_mode()
def test_every_combination_computes_what_a_plain_model_with_states_does(chosen):
    model = AutoModelForCausalLM.from_config(make_config("qwen3_5_moe_text"), dtype=torch.float32).eval()
    randomize_(model)
    prompt, last = torch.arange(5, 80)[None], torch.tensor([[80]])

    def pieces():
        first = model(input_ids=prompt, use_cache=True)
        return torch.cat((first.logits, model(input_ids=last, cache=first.cache, use_cache=True).logits), dim=1)

    wanted = pieces()
    speed_up_(model, chosen)
    assert speedups_of(model) == (chosen if kernels.is_available() else tuple(one for one in chosen if one is LINEAR))
    torch.testing.assert_close(pieces(), wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("late", SPEEDUPS, ids=lambda speedup: speedup.name)
def test_a_speed_up_that_comes_too_late_is_refused_and_changes_nothing(late, quick_compiler):
    for other in ANYWHERE:
        if late.name not in other.after:
            continue
        model = tiny_model("llama").load()
        with pytest.raises(ValueError, match=f"got {late.name} behind {other.name}, legal is before it"):
            speed_up_(model, [other, late])
        assert speedups_of(model) == ()
        speed_up_(model, [other])
        if other in speedups_of(model):
            with pytest.raises(ValueError, match=f"got {late.name} behind {other.name}"):
                speed_up_(model, [late])


def test_there_is_one_order():
    for order in itertools.permutations(SPEEDUPS):
        if order == SPEEDUPS:
            speed_up_(nn.Module(), order)
        else:
            with pytest.raises(ValueError, match=r"speedups: got .* legal is before it"):
                speed_up_(nn.Module(), order)


def test_a_model_that_several_engines_share_is_changed_once(monkeypatch, quick_compiler):
    compiled = []
    honest = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(1) or honest(module, **options))
    model = tiny_model("llama").load()
    speed_up_(model, ANYWHERE)
    found, forward = speedups_of(model), model.model.layers[-1].mlp.forward
    assert compiled
    del compiled[:]
    for again in (ANYWHERE, ALWAYS, [COMPILED], []):
        speed_up_(model, again)
    assert (speedups_of(model), model.model.layers[-1].mlp.forward, compiled) == (found, forward, [])


def test_a_model_that_lacks_a_speed_up_takes_the_same_list_again(monkeypatch, quick_compiler):
    monkeypatch.setattr(native_layer, "library", lambda: None)
    model = tiny_model("llama").load()
    speed_up_(model, ANYWHERE)
    found = speedups_of(model)
    assert FUSED_LAYERS.name not in names(found)
    assert COMPILED.name in names(found)
    for again in (ANYWHERE, ALWAYS):
        speed_up_(model, again)
        assert speedups_of(model) == found


def test_weights_elsewhere_and_of_half_precision_keep_what_is_not_for_them():
    half = replace(tiny_model("llama"), dtype=torch.bfloat16).load()
    speed_up_(half)
    assert FUSED_LAYERS not in speedups_of(half)
    assert not any("forward" in layer.__dict__ for layer in half.model.layers)
    meta = tiny_model("llama").load().to("meta")
    for _ in range(2):
        speed_up_(meta, SPEEDUPS)
        assert speedups_of(meta) == (LAST_LAYER,)


class Quantised(torch.Tensor):
    """Stands for a weight that is no plain numbers, though its dtype says so."""


def test_weights_that_are_wrapped_keep_their_own_modules():
    model = tiny_model("llama").load()
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.data.as_subclass(Quantised), requires_grad=False)
    speed_up_(model)
    on_cpu = (LINEAR, LAST_LAYER, NORMS) if kernels.is_available() else (LINEAR, LAST_LAYER)
    assert speedups_of(model) == (on_cpu if DEVICE == "cpu" else (LAST_LAYER,))
    assert type(mlp.up_proj) is nn.Linear
    assert type(mlp.down_proj) is (CPULinear if DEVICE == "cpu" else nn.Linear)


def test_a_loaded_model_has_what_its_device_allows():
    expected = [LINEAR, LAST_LAYER] if DEVICE == "cpu" else [LAST_LAYER]
    if DEVICE == "cpu" and kernels.is_available():
        expected += [NORMS, FUSED_LAYERS]
    assert list(speedups_of(tiny_model("qwen3").module)) == expected
