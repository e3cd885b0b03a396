"""GPUs as NVML reports them: a library that answers as its reference says stands in for it."""

import ctypes
from types import SimpleNamespace

import pytest

from longspan.engine import gpus, nvml
from longspan.engine.gpus import GPU, find_gpus
from longspan.engine.nvml import Found, look

GIB = 2**30
H200 = Found("NVIDIA H200", (9, 0), 140 * GIB)
L4 = Found("NVIDIA L4", (8, 9), 22 * GIB)


def library_of(*found, fails=(), divided=0):
    """Functions of NVML, which write where their arguments point; `fails` names those that return an error."""

    def answer(name, write):
        def call(*arguments):
            if name in fails:
                return 999
            write(*arguments)
            return 0

        return call

    def put(reference, value):
        reference._obj.value = value

    def name(handle, buffer, length):
        buffer.value = found[handle.value - 1].name.encode()

    def capability(handle, major, minor):
        put(major, found[handle.value - 1].capability[0])
        put(minor, found[handle.value - 1].capability[1])

    def memory(handle, reference):
        reference._obj.total, reference._obj.free = 150 * GIB, found[handle.value - 1].free_bytes

    functions = {
        "nvmlInit_v2": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount_v2": lambda count: put(count, len(found)),
        "nvmlDeviceGetHandleByIndex_v2": lambda index, handle: put(handle, index.value + 1),
        "nvmlDeviceGetMigMode": lambda handle, now, later: put(now, divided),
        "nvmlDeviceGetName": name,
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetMemoryInfo": memory,
    }
    return lambda path: SimpleNamespace(**{name: answer(name, write) for name, write in functions.items()})


def test_gpus_of_one_kind_are_listed_as_they_are_visible():
    used = H200._replace(free_bytes=GIB)
    both = library_of(H200, used)
    assert look(None, both) == [H200, used]
    assert look("1", both) == [used]
    assert look("1,0", both) == [used, H200]
    assert look(None, library_of()) == []


@pytest.mark.parametrize("visible", ["", "2", "-1", "0,0", "GPU-8932f937", "MIG-GPU-8932f937/1/0"])
def test_what_cuda_may_read_otherwise_is_a_doubt(visible):
    assert look(visible, library_of(H200, H200)) is None


def test_gpus_of_several_kinds_are_a_doubt():
    assert look(None, library_of(H200, L4)) is None


@pytest.mark.parametrize("name", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetMemoryInfo"])
def test_a_library_that_fails_is_a_doubt(name):
    assert look(None, library_of(H200, fails={name})) is None


def test_a_divided_gpu_is_a_doubt_and_one_that_cannot_be_divided_is_none():
    assert look(None, library_of(H200, divided=1)) is None
    assert look(None, library_of(H200, fails={"nvmlDeviceGetMigMode"})) == [H200]


def test_a_library_that_is_missing_or_old_is_a_doubt():
    def missing(path):
        raise OSError(path)

    assert look(None, missing) is None
    assert look(None, lambda path: SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlShutdown=lambda: 0)) is None
    assert look(None, lambda path: SimpleNamespace()) is None


def test_pytorch_is_asked_where_nvml_leaves_a_doubt(monkeypatch):
    monkeypatch.setattr(nvml, "look", lambda visible: [H200])
    assert find_gpus() == [GPU("NVIDIA H200", (9, 0), 140 * GIB)]
    monkeypatch.setattr(nvml, "look", lambda visible: None)
    monkeypatch.setattr(gpus, "_SCRIPT", "print('[[\"H\", [9, 0], 5]]')")
    assert find_gpus() == [GPU("H", (9, 0), 5)]


def test_the_structure_of_memory_is_that_of_the_reference():
    assert [name for name, _ in nvml._Memory._fields_] == ["total", "free", "used"]
    assert ctypes.sizeof(nvml._Memory) == 24
