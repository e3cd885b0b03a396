"""Requests that wait: lower priorities first, and nobody for ever."""

from fake_ranks import make_config, make_model, make_scheduler

from longspan.scheduler.request import PRIORITY_REQUESTS
from longspan.types import SamplingParams


def queue_of(*priorities):
    """Priorities in the order of the queue, of requests that came in this order."""
    scheduler = make_scheduler(make_model(None), make_config(1), 64)
    for priority in priorities:
        scheduler.add_request([1, 2], SamplingParams(max_tokens=1, priority=priority))
    return [request.params.priority for request in scheduler.waiting], scheduler


def test_lower_priorities_come_first_and_equal_ones_as_they_came():
    assert queue_of(0, 5, 1, -3, 1, 0)[0] == [-3, 0, 0, 1, 1, 5]
    scheduler = queue_of(0, 0, 0)[1]
    assert [request.request_id for request in scheduler.waiting] == [0, 1, 2]


def test_nobody_waits_for_ever():
    """A request is overtaken by a bounded number of later ones, whatever their priority is to its own."""
    scheduler = make_scheduler(make_model(None), make_config(1), 64)
    patient = scheduler.add_request([1, 2], SamplingParams(max_tokens=1, priority=1))
    scheduler.next_request_id += PRIORITY_REQUESTS  # so many have come and gone
    late = scheduler.add_request([1, 2], SamplingParams(max_tokens=1))
    assert list(scheduler.waiting) == [patient, late]
