"""Options under `longspan` where vLLM's prefill_context_parallel_size gives the ranks."""

import pytest

from longspan.errors import ConfigError
from longspan.integrations.vllm.placement import striping_of
from longspan.integrations.vllm.runner.options import parse_runner_options


def parse(num_ranks=2, **given):
    return parse_runner_options({"longspan": given}, num_ranks)


def test_the_number_of_ranks_is_vllms():
    assert parse().context_parallel_size == 2
    assert parse(context_parallel_size=2, stripe_size=128).stripe_size == 128


def test_rejects_another_number_of_ranks():
    with pytest.raises(ConfigError, match=r"longspan.context_parallel_size: got 3, legal is prefill_context_parallel"):
        parse(context_parallel_size=3)


@pytest.mark.parametrize("given", [{"strategy": "pass_kv"}, {"measure": "never"}])
def test_rejects_options_of_strategies(given):
    (name,) = given
    with pytest.raises(ConfigError, match=f"longspan.{name}: got .*, legal with prefill_context_parallel_size are"):
        parse(**given)


@pytest.mark.parametrize("given", [{"placement": "spread"}, {"stripe_size": 0}, {"no_such": 1}])
def test_rejects_illegal_values(given):
    with pytest.raises(ConfigError, match=f"longspan.{next(iter(given))}"):
        parse(**given)


def test_rejects_what_is_no_object():
    with pytest.raises(ConfigError, match="longspan: got True"):
        parse_runner_options({"longspan": True}, 2)


@pytest.mark.parametrize(("placement", "shortest"), [("packed", 2**26), ("striped", 0), ("auto", 64)])
def test_short_prompts_are_packed(placement, shortest):
    striping = striping_of(parse(placement=placement), block_size=32, max_num_batched_tokens=1024)
    assert striping.min_striped_blocks == shortest
    assert striping.geometry.stripe_len == 256  # two stripes per rank and chunk
