"""A profile names the plans that ran, with what ran inside them, on any device."""

import json

import pytest
from tiny_models import greedy, random_prompt, run_all, tiny_engine, tiny_model

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.worker import profile


@pytest.mark.parametrize("most", [64, 3])
def test_a_trace_holds_the_first_plans_and_their_operators(most, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "NUM_PLANS", most)
    with tiny_engine(tiny_model("llama"), profile=str(tmp_path / "traces")) as engine:
        request = engine.add_request(random_prompt(20, 1), greedy(5))
        run_all(engine)
    assert request.num_generated == 5
    events = json.loads((tmp_path / "traces" / "rank-0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    plans = sorted({name for name in names if name.startswith("plan ")})
    assert plans[0] == "plan 0: prefill, 20 tokens"
    assert len(plans) == min(5, most)
    assert set(plans[1:]) <= {f"plan {i}: decode, 1 tokens" for i in range(1, 5)}
    assert "aten::embedding" in names


def test_rejects_a_profile_of_several_ranks_in_one_process():
    with pytest.raises(
        ConfigError, match="profile: got 'here' with executor 'threads' and 2 ranks, legal there is one"
    ):
        EngineConfig(model="recall", executor="threads", context_parallel_size=2, profile="here")
