"""Fixtures that several files share: the `longspan` command inside the test process, and a cache for `recall`."""

import gc
import io
import os
import signal
import sys
import types
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

import pytest

from longspan.cli.main import run_command
from longspan.engine.cost_parameters import MEASURE

OWN_CACHE = os.environ.get("XDG_CACHE_HOME")
os.environ[MEASURE] = "never"  # also in processes that tests start: choices must not depend on the machine
if os.environ.get("LONGSPAN_TEST_DEVICE", "cpu") == "cpu":  # `make test-gpu` says cuda
    # Before Triton is imported, and CUDA looked at; in processes that tests start, too.
    os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, metavar="N", help="of each parametrised test, run N cases")
    parser.addoption("--cover-cases", type=int, metavar="N", help="of each marked cover, N or as many as it says")


@pytest.hookimpl(trylast=True)  # behind `-m`: among the tests that are left
def pytest_collection_modifyitems(config, items):
    kept = _thinned(items, lambda item: config.getoption("cases"))
    kept = _thinned(kept, lambda item: _cover_cases(item, config.getoption("cover_cases")))
    if len(kept) < len(items):
        chosen = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = kept


def pytest_collection_finish():
    """What was imported is not searched for garbage again and again, which took a seventh of all time."""
    gc.collect()
    gc.freeze()


def _cover_cases(item, common):
    """How many cases of a cover run: `cover(cases=N)` says it for one test, the option for all others."""
    mark = item.get_closest_marker("cover")
    return None if mark is None or common is None else mark.kwargs.get("cases", common)


def _thinned(items, wanted_of):
    """Of each parametrised test, as many cases as wanted, evenly among all; everything if that is None."""
    cases = {}
    for item in items:
        if wanted_of(item) is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = set()
    for several in cases.values():
        wanted, found = wanted_of(several[0]), len(several)
        # Every other place is the next one: else all have the first of the values that change quickest.
        kept = {number * found // wanted + (number % 2 if found >= 2 * wanted else 0) for number in range(wanted)}
        dropped.update(id(item) for place, item in enumerate(several) if place not in kept)
    return [item for item in items if id(item) not in dropped]


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws from torch what it would draw if it ran alone; tests without torch do not import it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory):
    """A cache directory for `recall` that outlives a test, apart from the user's own."""
    before = os.environ.get("XDG_CACHE_HOME")
    home = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def smollm2(cache_home):
    """Directory of the real model. It is made in the user's own cache, where it stays, and linked into the tests'."""
    from longspan.models.smollm2 import PACKAGE, smollm2_path  # imports torch

    if find_spec("gguf") is None or find_spec("accelerate") is None or not is_installed(PACKAGE):
        pytest.skip("the extra smollm2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if OWN_CACHE is None:
            patch.delenv("XDG_CACHE_HOME")
        else:
            patch.setenv("XDG_CACHE_HOME", OWN_CACHE)
        path = smollm2_path()
    link = cache_home / "longspan" / path.name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(path)
    return path


def is_installed(package):
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture
def longspan(cache_home, monkeypatch, capsys):
    """`longspan(*arguments, stdin=bytes)` returns an Outcome."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LONGSPAN_DEBUG", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments, stdin=b""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
        with pytest.raises(SystemExit) as ended:
            run_command()
        captured = capsys.readouterr()
        return Outcome(ended.value.code, captured.out, captured.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
