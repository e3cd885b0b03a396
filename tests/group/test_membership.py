"""Who has come to a group, and whether all fit together: with one process per rank, and with two."""

import msgspec
import pytest
import torch
import transformers
from links import VERSIONS, a_hello

from longspan.errors import ConfigError
from longspan.group.membership import Membership
from longspan.group.messages import Alive
from longspan.group.shape import GroupShape, ProcessId, speaker
from longspan.group.versions import own_versions


def a_group(num_ranks=2, processes_per_rank=1):
    return Membership(GroupShape(num_ranks, processes_per_rank), VERSIONS)


def test_a_group_is_ready_when_all_have_come_and_are_ready():
    group = a_group()
    group.admit(a_hello(number=1), b"voice 1")
    assert group.missing == [speaker(0)]
    group.admit(a_hello(number=0, host="a"), b"voice 0")
    assert (group.missing, group.hosts) == ([], ("a", "b"))
    assert [group.voices(rank) for rank in (0, 1)] == [[b"voice 0"], [b"voice 1"]]
    assert [group.at(voice) for voice in (b"voice 0", b"voice 1", b"stranger")] == [speaker(0), speaker(1), None]
    assert [group.note_ready(speaker(rank)) for rank in (0, 1, 1)] == [False, True, False]
    assert (group.name(speaker(1)), a_group().name(speaker(1))) == ("rank 1 (pid 7 on b)", "rank 1")


def test_a_sign_of_life_counts_from_an_admitted_process_alone_and_its_first_connection_stays():
    group = a_group()
    group.admit(a_hello(number=1), b"voice")
    assert group.get(speaker(1)).urgent == b"voice"
    assert group.note_alive(Alive(1, "b", 8, 0), b"stranger") is None
    assert group.note_alive(Alive(0, "b", 7, 0), b"stranger") is None
    for connection in (b"heartbeat", b"another"):
        assert group.note_alive(Alive(1, "b", 7, 0), connection) == speaker(1)
        assert group.get(speaker(1)).urgent == b"heartbeat"


def test_a_rank_of_two_processes_is_ready_when_both_have_come_and_are_ready():
    group = a_group(num_ranks=2, processes_per_rank=2)
    hosts = {3: "c", 0: "b", 1: "b"}
    come = [group.admit(a_hello(number=n, world_size=4, pid=n, host=hosts[n]), b"%d" % n) for n in hosts]
    assert come == [ProcessId(1, 1), ProcessId(0, 0), ProcessId(0, 1)]
    assert group.missing == [ProcessId(1, 0)]
    assert not any(group.note_ready(process) for process in come)
    assert [group.is_ready(rank) for rank in (0, 1)] == [True, False]
    group.admit(a_hello(number=2, world_size=4, pid=2, host="c"), b"2")
    assert not group.is_ready(1)
    assert group.note_ready(ProcessId(1, 0))
    assert group.is_ready(1)
    assert [sorted(group.voices(rank)) for rank in (0, 1)] == [[b"0", b"1"], [b"2", b"3"]], "all of them get plans"
    assert group.hosts == ("b", "c"), "one per rank"
    assert group.name(ProcessId(1, 1)) == "rank 1, process 1 (pid 3 on c)"


def test_rejects_a_rank_on_two_hosts():
    group = a_group(num_ranks=2, processes_per_rank=2)
    group.admit(a_hello(number=2, world_size=4, pid=2, host="b"), b"2")
    group.admit(a_hello(number=1, world_size=4, pid=1, host="c"), b"1")
    with pytest.raises(
        ConfigError,
        match=r"RANK: got 3 from rank 1, process 1 \(pid 3 on c\), and 2 from .* on b\), "
        r"legal is one host for both: 2 to 3 are one rank",
    ):
        group.admit(a_hello(number=3, world_size=4, pid=3, host="c"), b"3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, r"WORLD_SIZE: got 3 from rank 1 \(pid 7 on b\), legal is the driver's .*, 2"),
        ({"number": 2}, r"RANK: got 2 from rank 2 \(pid 7 on b\), legal is 0 to 1"),
        ({"number": 0, "pid": 8}, r"RANK: got 0 from rank 0 \(pid 8 on b\) and from rank 0 \(pid 7 on a\), legal is e"),
        (
            {"versions": msgspec.structs.replace(VERSIONS, torch="2.12.0")},
            r"version of torch: got 2.12.0 from rank 1 \(pid 7 on b\), legal is the driver's, 2.11.0",
        ),
    ],
)
def test_rejects_workers_that_do_not_fit(options, message):
    group = a_group()
    group.admit(a_hello(number=0, host="a"), b"0")
    with pytest.raises(ConfigError, match=f"^{message}"):
        group.admit(a_hello(**options), b"1")


def test_rejects_a_number_of_processes_that_is_not_ranks_times_processes_per_rank():
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: got 2 from .*context_parallel_size x 2 processes per rank, 4$"):
        a_group(num_ranks=2, processes_per_rank=2).admit(a_hello(), b"1")


def test_rejects_ranks_with_different_model_files():
    group = a_group(num_ranks=3)
    for number in range(3):
        group.admit(a_hello(number=number, world_size=3), b"%d" % number)
    group.compare_files(speaker(2), "x")
    group.compare_files(speaker(0), "x")
    with pytest.raises(ConfigError, match=r"^model: got other files on rank 1 \(.*\) than on rank 0 \("):
        group.compare_files(speaker(1), "y")


def test_versions_are_those_of_the_modules():
    versions = own_versions()
    assert (versions.torch, versions.transformers) == (torch.__version__.partition("+")[0], transformers.__version__)


def test_rejects_a_rank_whose_host_has_less_memory_than_its_ranks_are_to_hold():
    group = Membership(GroupShape(3, 1), VERSIONS, pool_bytes=[600, 300, 300])
    group.admit(a_hello(number=1, world_size=3, memory_bytes=500), b"1")
    group.admit(a_hello(number=0, world_size=3, host="a", memory_bytes=600), b"0")
    with pytest.raises(ConfigError) as caught:
        group.admit(a_hello(number=2, world_size=3, pid=8, memory_bytes=500), b"2")
    assert str(caught.value) == (
        "kv_cache_memory: got 300 bytes for rank 2 (pid 8 on b), and 600 with all ranks of its host so far, legal is "
        "what the host has, 500 bytes"
    )
    assert group.admit(a_hello(number=2, world_size=3, pid=8, memory_bytes=600), b"2") == speaker(2)


@pytest.mark.parametrize("comes_last", [0, 1])
def test_rejects_an_address_that_other_hosts_cannot_reach(comes_last):
    group = a_group()
    hellos = {0: a_hello(number=0, host="a", address="10.0.0.1"), 1: a_hello(address="127.0.1.1")}
    group.admit(hellos[1 - comes_last], b"first")
    with pytest.raises(ConfigError) as caught:
        group.admit(hellos[comes_last], b"last")
    assert str(caught.value) == (
        "interface: got none for rank 1 (pid 7 on b), whose address would be 127.0.1.1, its own host's alone, while "
        "others are on other hosts; legal is --interface with one that they reach"
    )


def test_rejects_a_process_that_looks_for_the_first_one_on_its_own_host():
    group = a_group(3)
    group.admit(a_hello(number=0, world_size=3, host="a", address="10.0.0.1", master="a"), b"0")
    with pytest.raises(ConfigError) as caught:
        group.admit(a_hello(world_size=3, address="10.0.0.2", master="localhost"), b"1")
    assert str(caught.value) == (
        "MASTER_ADDR: got 'localhost' from rank 1 (pid 7 on b), where that is its own host, legal is an address of a, "
        "the host of rank 0"
    )


def test_processes_of_one_host_may_meet_at_its_loopback():
    group = a_group()
    for number in (0, 1):
        group.admit(a_hello(number=number, address="127.0.0.1", master="localhost"), b"%d" % number)
    assert group.missing == []
