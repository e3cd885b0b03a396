"""What a rank on a GPU checks before it starts, in Triton's interpreter: right steps pass, and each broken part of one
is found, in the dtype of GPUs."""

import pytest
import torch
from attention_cases import DEVICE
from msgspec.structs import replace

from longspan.attention import check
from longspan.attention.check import check_against_reference
from longspan.attention.reference import ReferenceBackend
from longspan.attention.triton import TritonBackend
from longspan.cp import fixed
from longspan.errors import LongspanError
from longspan.kv.layout import KVGroup, KVSpec
from longspan.kv.pool import PagePool
from longspan.types import AttentionParams
from longspan.worker import first_steps
from longspan.worker.first_steps import check_fixed_step, compile_kernels

DEVICE = torch.device(DEVICE)
PARAMS = AttentionParams(0.2)
GROUP = KVGroup((3, 5), KVSpec.uniform(2, 32, 32, "bfloat16"), 4)
WINDOW = KVGroup((0,), KVSpec.uniform(1, 16, 16, "float32", 300), 2)
LATENTS = KVGroup((0,), KVSpec.latents(32, 16, 24, 20, "bfloat16"), 4)
SMALL = replace(GROUP, spec=GROUP.spec.stored_as("int8"))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fixed, "MIN_FIXED_SPLITS", 2)
        monkeypatch.setattr(fixed, "num_processors", lambda device: 1)


class Graph:
    """Stands in for a CUDA graph."""

    def __init__(self, factor=1.0, error=None):
        self._factor, self._error = factor, error

    def capture(self, launch):
        if self._error is not None:
            raise self._error
        self._launch = launch

    def replay(self):
        return self._launch() * self._factor


@pytest.mark.parametrize(
    ("group", "params"),
    [
        (GROUP, PARAMS),
        (WINDOW, AttentionParams(0.3, softcap=5.0, window=300)),
        (LATENTS, PARAMS),
        (SMALL, PARAMS),
    ],
    ids=["bfloat16", "window, softcap", "latents", "int8"],
)
def test_right_steps_pass_launched_and_replayed(group, params):
    check_fixed_step(group, params, DEVICE, Graph)


def _drop_a_tile(monkeypatch):
    make = fixed.tile_tables

    def tables(*args, **kwargs):
        found = make(*args, **kwargs)
        found.query_tiles[:, 6] -= 1
        return found

    monkeypatch.setattr(fixed, "tile_tables", tables)


def _store_in_the_next_row(monkeypatch):
    store = fixed.store
    monkeypatch.setattr(fixed, "store", lambda pool_k, pool_v, k, v, rows: store(pool_k, pool_v, k, v, rows + 1))


def _forget_a_split(monkeypatch):
    merge = fixed.merge
    monkeypatch.setattr(fixed, "merge", lambda parts, lses, *rest: merge(parts[1:], lses[1:], *rest))


@pytest.mark.parametrize("mutate", [_drop_a_tile, _store_in_the_next_row, _forget_a_split])
def test_a_broken_decode_step_is_found(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(LongspanError, match="outputs of a decode step in fixed shape"):
        check_fixed_step(GROUP, PARAMS, DEVICE)


def test_a_graph_that_computes_something_else_is_found():
    with pytest.raises(LongspanError, match="has other outputs as a CUDA graph than launched"):
        check_fixed_step(GROUP, PARAMS, DEVICE, lambda: Graph(factor=2.0))
    check_fixed_step(GROUP, PARAMS, DEVICE, lambda: Graph(error=RuntimeError("cannot be captured")))


def test_a_kernel_that_forgets_three_keys_of_a_hundred_is_found():
    class Forgetful(ReferenceBackend):
        def partial_attention(self, q, k, v, segments, params):
            *others, last = segments
            return super().partial_attention(q, k, v, [*others, _shorter(last)], params)

    def _shorter(segment):
        return type(segment)(
            segment.query_row,
            segment.num_queries,
            segment.query_position,
            segment.key_row,
            segment.num_keys - 32,
            segment.key_position,
            segment.visibility,
        )

    check_against_reference(ReferenceBackend(), GROUP, PARAMS, DEVICE)
    for largest in (check.TOLERANCE, check.LSE_TOLERANCE):  # each comparison finds it alone
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(largest, "bfloat16", 1e9)
            with pytest.raises(LongspanError):
                check_against_reference(Forgetful(), GROUP, PARAMS, DEVICE)


def test_kernels_are_launched_before_the_first_request_and_write_nothing(monkeypatch):
    monkeypatch.setattr(first_steps, "BUCKETS", (1, 4, 8, 256))
    rows, store = [], fixed.store
    monkeypatch.setattr(fixed, "store", lambda *args: rows.append(args[2].shape[1]) or store(*args))
    pool = PagePool(GROUP, 4, 16, DEVICE)
    for tensor in pool.rows(0, 4):
        tensor.fill_(1.0)
    params = [None, None, None, PARAMS, None, AttentionParams(0.2, softcap=3.0)]
    compile_kernels([pool], params, TritonBackend(), 4)
    assert rows == [1, 4, 8] * 2, "with a softcap and without"
    assert all((tensor == 1.0).all() for tensor in pool.rows(0, 4))
