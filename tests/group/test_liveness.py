"""A process that is silent, or gets no further, is told from one that has nothing to do."""

from longspan.group.heartbeat import MARGIN_S
from longspan.group.liveness import Liveness
from longspan.group.shape import GroupShape, ProcessId, speaker

TIMEOUT_S = 10.0
LIMIT_S = TIMEOUT_S + MARGIN_S


def test_silence_is_counted_from_the_last_sign_and_loading_may_take_longer():
    liveness = Liveness(GroupShape(1, 1).processes, 100.0)
    me = speaker(0)
    assert liveness.wait(me, 29.0, is_loading=False) is None
    liveness.heard(me, 0)
    assert liveness.wait(me, 29.0, is_loading=False) is None
    assert liveness.wait(me, 2.0, is_loading=True) is None, "it may need all that the machine can do"
    assert liveness.wait(me, 0.5, is_loading=False) == 31.5
    liveness.got_further(me)
    assert liveness.wait(me, 1.0, is_loading=False) is None


def test_a_process_is_stuck_when_its_rank_owes_an_answer_and_it_gets_no_further():
    liveness = Liveness(GroupShape(1, 1).processes, TIMEOUT_S)
    me = speaker(0)
    assert not liveness.work(me, LIMIT_S + 1, is_owing=False)
    assert not liveness.work(me, LIMIT_S, is_owing=True)
    liveness.heard(me, 1)
    assert not liveness.work(me, LIMIT_S, is_owing=True)
    liveness.heard(me, 1)  # alive, and no further
    assert liveness.work(me, 1.0, is_owing=True)
    assert not liveness.work(me, 1.0, is_owing=False)


def test_every_process_of_a_rank_gives_signs_of_its_own():
    first, second = ProcessId(0, 0), ProcessId(0, 1)
    liveness = Liveness(GroupShape(1, 2).processes, TIMEOUT_S)
    for _ in range(2):
        liveness.heard(first, 1)
        quiet = [liveness.wait(process, LIMIT_S * 0.6, is_loading=False) for process in (first, second)]
    assert quiet == [None, LIMIT_S * 1.2]
    stuck = [liveness.work(process, LIMIT_S + 1, is_owing=True) for process in (first, second)]
    assert stuck == [True, True]
    liveness.heard(second, 5)
    assert [liveness.work(process, 1.0, is_owing=True) for process in (first, second)] == [True, False]
