"""Communicator of the cp_group, beside vLLM's own process groups.

Holds how processes of equal tensor parallel rank find each other. Must not know plans.
Read next: `longspan.comm.sockets`.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import vllm.envs as envs
from torch._C._distributed_c10d import FileStore

from longspan.comm.connect import local_meeting
from longspan.comm.distributed import GroupCommunicator
from longspan.comm.sockets import LOOK_S, SocketCommunicator


def join_group(rank: int, cp_size: int, tp_size: int) -> SocketCommunicator:
    """Connect this process with the processes that hold the same part of every head.

    Args:
        rank: number of the process, `cp_rank * tp_size + tp_rank`.
        cp_size: ranks that share a sequence.
        tp_size: processes per rank.

    Collective: all processes call it, once, after vLLM has made its own groups.
    """
    mine: dist.ProcessGroup | None = None
    for tp_rank in range(tp_size):
        members = [cp_rank * tp_size + tp_rank for cp_rank in range(cp_size)]
        group = dist.new_group(members, backend="gloo")
        if rank in members:
            mine = group
    assert mine is not None
    cp_rank = rank // tp_size
    names: list[str | None] = [tempfile.mkdtemp(prefix="longspan-") if cp_rank == 0 else None]
    dist.broadcast_object_list(names, group=mine, group_src=0)
    assert names[0] is not None
    directory = Path(names[0])
    store = FileStore(str(directory / "store"), cp_size)
    timeout_s = float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)  # as long as vLLM waits for a step
    large = GroupCommunicator(mine, store, timeout_s=timeout_s)
    num_cores = os.cpu_count() or 1  # cores of the machine, not those that vLLM binds this process to
    look_s = LOOK_S if cp_size * tp_size * torch.get_num_threads() <= num_cores else 0.0
    meeting = local_meeting(directory)
    comm = SocketCommunicator(cp_rank, cp_size, meeting, timeout_s=timeout_s, look_s=look_s, large=large)
    dist.barrier(mine)
    if cp_rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    return comm
