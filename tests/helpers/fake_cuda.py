"""Tensors on a GPU that is not there: shapes, dtypes and devices without data, so that whole models run as on a GPU.

PyTorch's `FakeTensorMode` knows what every operator returns, and refuses operands on two devices. What needs a build
for CUDA beside operators (indices, copies between devices, pinned memory) is done by others here. Kernels of Triton are
replaced by functions that look at their arguments alone. What would make a GPU wait for the host, or the host for the
GPU, raises `HostWaitError` where a step may be captured as a CUDA graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from longspan.attention import staging, triton
from longspan.cp import fixed
from longspan.triton_kernels import launch
from longspan.worker import graphs, runner

CUDA = torch.device("cuda", 0)


class HostWaitError(AssertionError):
    """A step that may be captured moves data between host and GPU."""


class _Python(TorchFunctionMode):
    """Python's side of tensors, which in a build for CPUs knows no CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            return _view(*args)
        if func is Tensor.__setitem__:
            target = _view(args[0], args[1])
            if isinstance(args[2], Tensor):
                return torch.ops.aten.copy_(target, args[2])
            return torch.ops.aten.fill_(target, args[2])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _converted(func, *args, **kwargs)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return _converted(Tensor.to, func(*args, **kwargs), device)
        if func is Tensor.item and isinstance(args[0], FakeTensor):
            WATCH.note_wait("item")
            return 0
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(args[0], args[1], kwargs.get("non_blocking", False))
        if func is Tensor.contiguous:
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        if func is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.data_ptr:
            return args[0].storage_offset()
        return func(*args, **kwargs)


def _converted(func, tensor, *args, non_blocking=False, copy=False, memory_format=None, **kwargs):
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if func is Tensor.cpu:
        device = "cpu"
    for argument in args:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, Tensor):
            device, dtype = argument.device, argument.dtype
        elif isinstance(argument, (str, torch.device)):
            device = argument
    device, dtype = tensor.device if device is None else torch.device(device), dtype or tensor.dtype
    if device.type == tensor.device.type and dtype == tensor.dtype and not copy:
        return tensor
    return torch.ops.aten._to_copy(tensor, device=device, dtype=dtype)


def _view(tensor: Tensor, index) -> Tensor:
    """`tensor[index]`."""
    index = index if isinstance(index, tuple) else (index,)
    is_mask = [isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index]
    used = sum(i.dim() if mask else 1 for i, mask in zip(index, is_mask, strict=True) if i is not None and i is not ...)
    whole = []
    for i in index:
        whole += [slice(None)] * (tensor.dim() - used) if i is ... else [i]
    dim, indices = 0, {}
    for i in whole:
        if i is None:
            tensor, dim = torch.unsqueeze(tensor, dim), dim + 1
        elif isinstance(i, slice):
            if (i.start, i.stop, i.step) != (None, None, None):
                tensor = torch.ops.aten.slice(tensor, dim, i.start, i.stop, i.step or 1)
            dim += 1
        elif isinstance(i, (list, Tensor)):
            indices[dim] = torch.tensor(i) if isinstance(i, list) else i
            dim += indices[dim].dim() if indices[dim].dtype is torch.bool else 1
        else:
            tensor = torch.select(tensor, dim, int(i))
    if not indices:
        return tensor
    return torch.ops.aten.index(tensor, [indices.get(d) for d in range(max(indices) + 1)])


class _Watch(TorchDispatchMode):
    """Operators, seen one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.is_captured = False
        self.num_operators = 0
        """In captured steps."""

    def note_wait(self, what: str) -> None:
        if self.is_captured:
            raise HostWaitError(f"{what} in a step that may be captured")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if self.is_captured:
            self.num_operators += 1
            # A scalar on the CPU is an argument of a kernel.
            tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
            on = {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}
            if "cpu" in on:
                raise HostWaitError(f"{func} on {sorted(on)} in a step that may be captured")
            if func is torch.ops.aten._local_scalar_dense.default:
                raise HostWaitError(f"{func} in a step that may be captured")
        return found


WATCH = _Watch()


class FakeGraph:
    """Stands in for a CUDA graph: what it captures, and replays, is watched."""

    def capture(self, launch) -> None:
        self._launch = launch
        self.replay()

    def replay(self):
        WATCH.is_captured = True
        try:
            return self._launch()
        finally:
            WATCH.is_captured = False


class FakeCommunicator:
    """A rank whose peers send nothing; messages are looked at."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.num_messages = 0

    def exchange(self, sends, recvs):
        for peer, tensor in [*sends, *recvs]:
            assert peer != self.rank
            assert tensor.device == CUDA, "a message that is not on the GPU"
            assert tensor.is_contiguous()
            self.num_messages += 1
        return self

    def wait(self) -> None:
        """All has arrived."""


def _on_gpu(*tensors: Tensor) -> None:
    assert {tensor.device for tensor in tensors} == {CUDA}


def _attention(q, k, v, query_tiles, key_tiles, out, lse, *, queries_per_tile, scale, softcap, window) -> None:
    _on_gpu(q, k, v, query_tiles, key_tiles, out, lse)
    assert query_tiles.dtype == key_tiles.dtype == torch.int32
    assert q.stride(2) == k.stride(2) == v.stride(2) == out.stride(3) == lse.stride(2) == 1


def _merge(parts, part_lses, out, lse, sinks=None) -> None:
    _on_gpu(parts, part_lses, out, lse, *([] if sinks is None else [sinks]))
    assert out.shape[:-1] == lse.shape


def _store(pool_k, pool_v, k, v, rows) -> None:
    _on_gpu(pool_k, pool_v, k, v, rows)
    assert k.stride(2) == v.stride(2) == 1
    assert rows.shape == (k.shape[1],)


def _accumulate(acc_out, acc_lse, out, lse) -> None:
    _on_gpu(acc_out, acc_lse, out, lse)


def _replace_kernels(patch: pytest.MonkeyPatch) -> None:
    from longspan.triton_kernels import merge

    for module in (fixed, triton):
        patch.setattr(module, "attention", _attention)
        patch.setattr(module, "merge", _merge)
        patch.setattr(module, "num_processors", lambda device: 132)
    patch.setattr(fixed, "store", _store)
    patch.setattr(merge, "accumulate_", _accumulate)
    patch.setattr(launch, "_shared_bytes", lambda index: 232_448)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(runner.torch.cuda, "current_stream", lambda device=None: _Stream())
    patch.setattr(graphs, "CUDAGraphs", lambda: FakeGraph)
    patch.setattr(staging, "staged", lambda array, device: torch.from_numpy(array))


class _Stream:
    def synchronize(self) -> None:
        """Wait for nothing."""


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Have a GPU inside."""
    WATCH.is_captured, WATCH.num_operators = False, 0
    with pytest.MonkeyPatch.context() as patch:
        _replace_kernels(patch)
        with FakeTensorMode(allow_non_fake_inputs=True), WATCH, _Python():
            yield


def to_fake_gpu_(module: nn.Module) -> None:
    """Move a model's parameters, buffers and other tensors to the fake GPU; call it inside of `fake_gpu`."""
    shared: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in shared:
            shared[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
        return shared[id(tensor)]

    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(moved(weight), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
        for name, value in vars(part).items():
            if isinstance(value, (Tensor, tuple)):  # a tuple may hold parts of weights
                setattr(part, name, tree_map_only(Tensor, moved, value))
