"""Kernels of each size of registers that this CPU has, for tests that use the fixture `binary`."""

import pytest

from longspan.native import kernels

BINARIES = kernels.binaries()


def _param(lanes):
    is_between = min(BINARIES) < lanes < max(BINARIES)
    return pytest.param(lanes, marks=pytest.mark.slow if is_between else (), id=f"lanes{lanes}")


@pytest.fixture(scope="module", params=[_param(lanes) for lanes in sorted(BINARIES)] or [None])
def binary(request):
    """Let all kernels of a module come from one binary; those between the largest and the smallest are slow tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_binary", lambda: BINARIES.get(request.param))
        kernels.library.cache_clear()
        yield
    kernels.library.cache_clear()
