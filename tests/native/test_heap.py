"""What a step frees serves the next one."""

import ctypes
import resource
import subprocess
import sys

import pytest

from longspan.native.heap import keep_freed_memory

has_mallopt = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="a C library without mallopt")

_PROGRAM = """
import resource, torch
from longspan.native.heap import keep_freed_memory
assert keep_freed_memory()
faults = []
for _ in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = torch.empty(4 << 20).fill_(1)
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.cover
@has_mallopt
def test_freed_memory_is_used_again_without_page_faults():
    output = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True).stdout
    faults = list(map(int, output.split()))
    # The first ones, sometimes a dozen, still find places for an aligned block.
    assert max(faults[-10:]) < (16 << 20) // resource.getpagesize() // 10, faults


def test_without_mallopt_nothing_is_set(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
