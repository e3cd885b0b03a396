"""Ranks and their processes are counted, and named, apart."""

import msgspec
import pytest

from longspan.config import EngineConfig
from longspan.group.shape import GroupShape, ProcessId, speaker


@pytest.mark.parametrize("shape", [GroupShape(1, 1), GroupShape(5, 1), GroupShape(3, 2), GroupShape(1, 4)])
def test_every_process_has_a_number_and_peers_of_a_rank_are_adjacent(shape):
    assert len(set(shape.processes)) == shape.world_size == shape.num_ranks * shape.processes_per_rank
    assert [shape.number(process) for process in shape.processes] == list(range(shape.world_size))
    assert [process.rank for process in shape.processes] == sorted(process.rank for process in shape.processes)
    assert sum(process.speaks_for_rank for process in shape.processes) == shape.num_ranks
    assert all(speaker(process.rank) in shape.processes for process in shape.processes)


def test_a_config_says_the_ranks_and_their_processes():
    assert GroupShape.of(EngineConfig(model="recall", context_parallel_size=3)) == GroupShape(3, 1)
    config = EngineConfig(model="recall", context_parallel_size=3, tensor_parallel_size=2)
    assert GroupShape.of(config) == GroupShape(3, 2)


def test_with_one_process_per_rank_only_ranks_are_named():
    one, two = GroupShape(4, 1), GroupShape(4, 2)
    assert (one.name(ProcessId(2, 0)), str(one)) == ("rank 2", "4 ranks")
    assert one.names([ProcessId(2, 0)]) == "rank 2"
    assert one.names([ProcessId(2, 0), ProcessId(3, 0)]) == "ranks 2, 3"
    assert (two.name(ProcessId(2, 1)), str(two)) == ("rank 2, process 1", "4 ranks of 2 processes")
    assert two.names([ProcessId(2, 1), ProcessId(3, 0)]) == "rank 2, process 1; rank 3, process 0"


def test_a_process_travels_in_messages():
    process = ProcessId(3, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(process), type=ProcessId) == process
