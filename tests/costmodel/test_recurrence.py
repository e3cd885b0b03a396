"""Recurrent layers are predicted one run behind the other: worked examples by hand."""

import msgspec
import pytest

from longspan.costmodel.parameters import Costs, KernelRates, Link, Topology, costs_by_bytes
from longspan.costmodel.recurrence import FLOPS, choose_parts, predict_recurrence
from longspan.kv.state_layout import StateComponent, StateGroup
from longspan.plan.types import QueryRun

GROUP = StateGroup(
    (0, 2, 5), (StateComponent("conv", 0, (6, 4), "float32"), StateComponent("recurrent", 0, (2, 8, 16), "float32"))
)
NUM_ELEMENTS, CONV_BYTES, STATE_BYTES = 3 * 256, 6 * 4 * 4, 256 * 4
FREE = 1e30


def costs_of(**changes):
    rates = KernelRates(FREE, FREE, FREE, ((1, FREE),), 0.0)
    link = Link(0.0, FREE)
    return msgspec.structs.replace(Costs(Topology((0, 0, 0), link, link), rates), **changes)


def rates(**changes):
    return msgspec.structs.replace(costs_of().rates, **changes)


def runs(*ranks_and_tokens):
    found, position = [], 0
    for rank, num_tokens in ranks_and_tokens:
        found.append(QueryRun(0, position, num_tokens, rank, None))
        position += num_tokens
    return found


def test_runs_of_all_ranks_add_up():
    costs = costs_of(rates=rates(attention_flops_per_s=((1, NUM_ELEMENTS * FLOPS * 1000.0),)))  # 1 ms per token
    for spread in ([(0, 100)], [(0, 50), (1, 50)], [(0, 20), (1, 40), (0, 40)]):
        assert predict_recurrence([GROUP], runs(*spread), costs) == pytest.approx(0.1)
    slower = msgspec.structs.replace(costs, speeds=(1.0, 0.5, 1.0))
    assert predict_recurrence([GROUP], runs((0, 60), (1, 40)), slower) == pytest.approx(0.06 + 0.08)


def test_a_state_is_read_and_written_whatever_the_number_of_tokens():
    costs = costs_of(rates=rates(read_bytes_per_s=3.0 * (CONV_BYTES + STATE_BYTES) * 1000))  # 1 ms per state
    assert predict_recurrence([GROUP], runs((0, 1)), costs) == pytest.approx(2e-3)


def test_a_state_travels_where_the_next_run_is_on_another_rank():
    costs = costs_of(topology=Topology((0, 0, 1), Link(1e-3, FREE), Link(5e-3, STATE_BYTES * 1000.0)))
    assert predict_recurrence([GROUP], runs((0, 8), (1, 8), (1, 8), (0, 8)), costs) == pytest.approx(2 * 6e-3)
    between = 3 * (5e-3 + 1e-3 + 5e-3 + CONV_BYTES / STATE_BYTES * 1e-3)
    assert predict_recurrence([GROUP], runs((1, 8), (2, 8)), costs) == pytest.approx(between)


HEADED = StateGroup(
    (0, 2, 5), (StateComponent("conv", 0, (6, 4), "float32"), StateComponent("recurrent", 0, (2, 8, 16), "float32", 2))
)


def test_ranks_compute_parts_at_the_same_time():
    """Of 30, 30 and 30 tokens in two parts of 15 ms each, every run begins one part behind the run before."""
    costs = costs_of(rates=rates(attention_flops_per_s=((1, NUM_ELEMENTS * FLOPS * 1000.0),)))
    spread = runs((0, 30), (1, 30), (2, 30))
    assert predict_recurrence([HEADED], spread, costs) == pytest.approx(0.09)
    assert predict_recurrence([HEADED], spread, costs, 2) == pytest.approx(0.06)
    assert predict_recurrence([HEADED], spread, costs, 9) == pytest.approx(0.06)  # there are two heads
    assert predict_recurrence([GROUP], spread, costs, 2) == pytest.approx(0.09)  # and here none
    # rank 0 is never idle: the first part of its second run is there when it is done with the first run
    there_and_back = runs((0, 40), (1, 40), (0, 40))
    assert predict_recurrence([HEADED], there_and_back, costs, 2) == pytest.approx(0.08)
    assert predict_recurrence([HEADED], there_and_back, costs) == pytest.approx(0.12)
    assert choose_parts([HEADED], there_and_back, costs) == 2
    assert predict_recurrence([HEADED], there_and_back, costs, None) == pytest.approx(0.08)


def test_parts_cost_messages_and_the_fewest_are_chosen_among_equals():
    slow = costs_of(topology=Topology((0, 0, 0), Link(1e-3, FREE), Link(0.0, FREE)), rates=rates(exchange_s=1e-3))
    assert choose_parts([HEADED], runs((0, 8), (1, 8)), slow) == 1
    assert choose_parts([HEADED], runs((1, 8), (1, 8)), costs_of()) == 1
    assert choose_parts([], runs((0, 8), (1, 8)), costs_of()) == 1
    assert predict_recurrence([HEADED], runs((0, 8), (1, 8)), slow, None) == pytest.approx(
        predict_recurrence([HEADED], runs((0, 8), (1, 8)), slow)
    )


def test_ranks_that_share_a_device_gain_nothing_from_computing_at_the_same_time():
    shared = costs_of(rates=rates(attention_flops_per_s=((1, NUM_ELEMENTS * FLOPS * 1000.0),), ranks_per_device=3.0))
    spread = runs((0, 30), (1, 30), (2, 30))
    assert predict_recurrence([HEADED], spread, shared) == pytest.approx(0.03)
    assert choose_parts([HEADED], spread, shared) == 1


def test_nothing_takes_time_without_recurrent_layers_or_known_rates():
    assert predict_recurrence([], runs((0, 8), (1, 8)), costs_of()) == 0
    by_bytes = costs_by_bytes((0, 0))
    assert predict_recurrence([GROUP], runs((0, 8), (1, 8)), by_bytes) == pytest.approx(3 * (CONV_BYTES + STATE_BYTES))
