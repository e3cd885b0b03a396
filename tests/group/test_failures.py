"""The cause of a group's end is told from its consequences."""

import signal

import msgspec
import pytest

from longspan.errors import ConfigError
from longspan.group.failures import Failures, describe_end
from longspan.group.messages import Failed
from longspan.group.shape import GroupShape, ProcessId, speaker


def failures(*signs, num_ranks=2, processes_per_rank=1):
    found = Failures(GroupShape(num_ranks, processes_per_rank))
    for now_s, (kind, *values) in enumerate(signs):
        getattr(found, kind)(*values, float(now_s))
    return found


USER = ("said", Failed(speaker(0), "dtype: got x", "", "user"))
PEER = ("said", Failed(speaker(0), "rank 0: receive from rank 1 failed", "", "peer"))
RAISED = ("said", Failed(speaker(1), "ValueError: y", "trace", "process"))
KILLED = ("ended", speaker(1), "rank 1 (pid 11)", "was killed by SIGKILL")
CONSEQUENCE = ("ended", speaker(0), "rank 0 (pid 10)", "ended with exit code 1")
LOST = ("lost", speaker(1), "rank 1 (pid 11)")
STUCK = ("stuck", speaker(1), "rank 1 (pid 11)", 5.0)
SILENT = ("silent", speaker(1), "rank 1 (pid 11)", 5.0, "its process is stopped")


@pytest.mark.parametrize(
    ("signs", "text"),
    [
        ([PEER, CONSEQUENCE, KILLED], "rank 1 (pid 11) was killed by SIGKILL"),
        ([KILLED, PEER, CONSEQUENCE], "rank 1 (pid 11) was killed by SIGKILL"),
        ([LOST, PEER, CONSEQUENCE, KILLED], "rank 1 (pid 11) was killed by SIGKILL"),
        ([PEER, CONSEQUENCE, LOST], "rank 1 (pid 11) is gone: its connection to the driver has closed"),
        ([PEER, RAISED, CONSEQUENCE], "rank 1: ValueError: y"),
        ([PEER, CONSEQUENCE, SILENT], "rank 0: receive from rank 1 failed"),
        ([SILENT], "rank 1 (pid 11) has given no sign of life for 5 s: its process is stopped"),
        ([STUCK], "rank 1 (pid 11) has got no further for 5 s: it hangs, or computes for ever"),
        ([STUCK, PEER], "rank 0: receive from rank 1 failed"),
        ([CONSEQUENCE, USER], "dtype: got x"),
    ],
)
def test_the_cause_is_told_from_its_consequences(signs, text):
    found = failures(*signs)
    assert found.first_s == 0.0
    assert str(found.cause()) == text
    assert isinstance(found.cause(), ConfigError) == (USER in signs)


def test_nothing_more_can_be_learnt_when_every_rank_has_ended_or_said_why():
    assert not failures(KILLED).is_complete
    assert failures(KILLED, PEER).is_complete
    assert not failures(KILLED, PEER, num_ranks=3).is_complete
    assert not failures(LOST, PEER).is_complete, "how it ended may become known"


def test_one_process_that_is_gone_is_enough_and_named_beside_its_rank():
    shape = {"num_ranks": 1, "processes_per_rank": 2}
    killed = ("ended", ProcessId(0, 1), "rank 0, process 1 (pid 11)", "was killed by SIGKILL")
    waits = ("said", Failed(ProcessId(0, 0), "no answer", "", "peer"))
    found = failures(waits, **shape)
    assert not found.is_complete
    assert str(found.cause()) == "rank 0, process 0: no answer"
    found = failures(waits, killed, **shape)
    assert found.is_complete
    assert str(found.cause()) == "rank 0, process 1 (pid 11) was killed by SIGKILL"


def test_ends_are_described_in_words():
    assert describe_end(3) == "ended with exit code 3"
    assert describe_end(-signal.SIGABRT) == "was killed by SIGABRT"
    assert describe_end(-(signal.SIGRTMIN + 1)).startswith("was killed by signal ")


def test_last_words_travel_as_messages():
    message = USER[1]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Failed) == message
