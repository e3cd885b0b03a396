"""The exchanges of a step between real processes, over gloo: what NCCL does on GPUs."""

import json
import os
import subprocess
import sys

import pytest

RANK = """
import json, sys
import torch, torch.distributed as dist
from longspan.integrations.vllm.runner.messages import RankMessages, warm_up

rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size)
warm_up(dist.group.WORLD, torch.device("cpu"))
messages = RankMessages(dist.group.WORLD)
rows = (torch.arange(12.0).view(3, 4) + 100 * rank)[:, ::2]  # not contiguous
gathered, arrival = messages.gather(rows)
arrival.wait()
parts = messages.give_back(torch.stack([gathered + 1000 * r + rank for r in range(size)]))
print(json.dumps([messages.rank, messages.size, gathered.tolist(), parts.tolist(), messages.num_bytes]))
dist.destroy_process_group()
"""


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_reach_all_and_parts_come_back(size, tmp_path):
    commands = [[sys.executable, "-c", RANK, str(rank), str(size), str(tmp_path)] for rank in range(size)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for command in commands]
    found = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    gathered = [[v + 100 * rank for v in row] for rank in range(size) for row in ([0, 2], [4, 6], [8, 10])]
    for rank, (name, number, rows, parts, num_bytes) in enumerate(found):
        assert (name, number, rows) == (rank, size, gathered)
        assert parts == [[[v + 1000 * rank + maker for v in row] for row in gathered] for maker in range(size)]
        assert num_bytes == (size - 1) * 4 * (6 + 6 * size)
