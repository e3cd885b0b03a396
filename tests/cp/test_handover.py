"""Parts of a state: what a rank waits for before it computes some heads, and what it has sent by then."""

import pytest
import torch

from longspan.cp.handover import Handover, StateByHeads
from longspan.kv.state_layout import StateComponent

COMPONENTS = (
    StateComponent("conv", 0, (6, 3), "float32"),
    StateComponent("conv", 1, (2, 3), "float32"),
    StateComponent("recurrent", 0, (5, 4, 2), "float32", 5),
)
BEFORE, AFTER = 3, 7


class Log:
    """Messages in the order of what happens to them; what arrives is full of ones."""

    def __init__(self):
        self.events, self.sent = [], []

    def exchange(self, sends, recvs):
        for peer, tensor in sends:
            self.events.append(("send", peer, tensor.numel()))
            self.sent.append(tensor)
        return Waiting(self, recvs)


class Waiting:
    def __init__(self, log, recvs):
        self.log, self.recvs = log, recvs

    def wait(self):
        for peer, tensor in self.recvs:
            self.log.events.append(("arrive", peer, tensor.numel()))
            tensor.fill_(1)


def make(num_parts, before=BEFORE, after=AFTER):
    log, state = Log(), [torch.zeros(1, *component.shape) for component in COMPONENTS]
    return log, state, Handover(state, COMPONENTS, num_parts, before=before, after=after, exchange=log.exchange)


def test_heads_are_computed_before_the_next_arrive_and_sent_before_they_are_computed():
    log, state, handover = make(2)
    for component in (0, 1):
        handover.arrive(component)
        state[component] += 1
        handover.note_written(component)
    for heads in StateByHeads(state[2], handover, 2).heads():
        log.events.append(heads)
        state[2][:, heads.start : heads.stop] += 1
    assert log.events == [
        ("arrive", BEFORE, 18),
        ("send", AFTER, 18),
        ("arrive", BEFORE, 6),
        ("send", AFTER, 6),
        ("arrive", BEFORE, 16),
        range(2),
        ("send", AFTER, 16),
        ("arrive", BEFORE, 24),
        range(2, 5),
        ("send", AFTER, 24),
    ]
    handover.finish()
    assert len(log.events) == 10
    assert all((tensor == 2).all() for tensor in log.sent)


def test_what_takes_no_parts_gets_and_sends_the_same_messages():
    log, state, handover = make(3)
    handover.arrive()
    for part in state:
        part += 1
    assert len(handover.finish()) == 5
    assert [event[2] for event in log.events] == [18, 6, 8, 16, 16] * 2
    assert all((tensor == 2).all() for tensor in log.sent)


def test_a_convolution_that_is_written_in_place_goes_before_the_heads():
    """One row is taken in by a kernel that changes the state itself, and nobody says so."""
    log, _, handover = make(1)
    handover.arrive(1)
    for heads in handover.heads(2):
        assert [event[0] for event in log.events] == ["arrive", "arrive", "send", "send", "arrive"]
        assert heads == range(5)
    assert log.events[-1] == ("send", AFTER, 40)


def test_a_convolution_behind_another_waits_for_it():
    log, _, handover = make(1)
    handover.arrive(1)
    handover.note_written(1)
    assert [event[0] for event in log.events] == ["arrive"] * 2
    handover.note_written(0)
    assert [event[2] for event in log.events[2:]] == [18, 6]


def test_a_state_that_stays_or_was_here_is_not_sent_or_waited_for():
    for before, after, names in ((None, AFTER, {"send"}), (BEFORE, None, {"arrive"})):
        log, state, handover = make(9, before, after)
        handover.arrive(1)
        assert [len(heads) for heads in handover.heads(2)] == [1] * 5
        handover.finish()
        assert {event[0] for event in log.events} == names
        assert len(log.events) == 7
        assert StateByHeads(state[2], handover, 2).whole() is state[2]


def test_rejects_a_piece_that_did_not_read_its_state():
    _, _, handover = make(2)
    handover.arrive(0)
    with pytest.raises(AssertionError, match="a state came and was not read"):
        handover.finish()


def test_rejects_heads_that_are_not_the_first_dimension():
    with pytest.raises(AssertionError):
        StateComponent("recurrent", 0, (4, 2), "float32", 2)
