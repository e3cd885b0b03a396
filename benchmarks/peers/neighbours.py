"""Other programs that use the same cores while an engine is measured.

Holds what they do. Must not know engines.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

LOOP = "while True: pass"
"""A program that computes alone."""

SERVER = """
import torch
torch.set_num_threads(2)
w, x = torch.randn(2048, 2048), torch.randn(1, 2048)
while True:
    x = torch.nn.functional.rms_norm(x @ w, (2048,))
"""
"""A decode without end, as other inference servers compute it: two OpenMP threads meet at every product."""

NEIGHBOURS = ("none", "low", "equal", "server")
"""None; a loop on each core of low (`nice -n 10`) or of equal priority; another inference server."""


@contextlib.contextmanager
def neighbours(kind: str, cores: Sequence[int]) -> Iterator[None]:
    """Run other programs inside this context.

    Args:
        kind: one of NEIGHBOURS.
        cores: core numbers that they use.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def start(program: str, on: Sequence[int]) -> None:
        processes.append(subprocess.Popen([sys.executable, "-c", program]))
        os.sched_setaffinity(processes[-1].pid, on)
        if kind == "low":
            os.setpriority(os.PRIO_PROCESS, processes[-1].pid, 10)

    try:
        if kind in ("low", "equal"):
            for core in cores:
                start(LOOP, [core])
        elif kind == "server":
            start(SERVER, cores)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
