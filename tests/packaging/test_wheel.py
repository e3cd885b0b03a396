"""The package outside of its checkout: installed into a fresh environment with and without a C compiler, and run."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from longspan.engine.engine import WITHOUT_KERNELS

pytestmark = [pytest.mark.slow, pytest.mark.processes]

CHECKOUT = Path(__file__).parents[2]
FACT = "The magic number is 4711. Once more: The magic number is "


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=280, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def source_copy(folder):
    """The checkout's tracked files; a build leaves its own beside them."""
    names = run("git", "-C", CHECKOUT, "ls-files", "-z").stdout.split("\0")
    for name in filter(None, names):
        if (CHECKOUT / name).is_file() and name.split("/")[0] not in ("tests", "benchmarks"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, folder / name)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["compiler", "no_compiler"])
def installed(request, tmp_path_factory):
    """(folder of a fresh environment, whether there was a compiler, names in the wheel)."""
    if request.param and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("package")
    source = source_copy(folder / "source")
    without = {} if request.param else {"CC": "/bin/false", "CXX": "/bin/false"}
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", folder / "dist", source),
        env={**os.environ, **without},
        cwd=folder,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    # What the package depends on is that of these tests: a path file makes it importable, and runs none of its own.
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip()
    where = Path(find_spec("torch").origin).parents[1]
    Path(own, "dependencies.pth").write_text(f"{where}\n")
    return folder, request.param, zipfile.ZipFile(wheel).namelist()


def test_the_wheel_has_all_that_is_no_python(installed):
    _, has_compiler, names = installed
    assert any(name.startswith("longspan/native/_kernels") and name.endswith(".so") for name in names) == has_compiler
    pages = {path.name for path in (CHECKOUT / "src/longspan/server/page_files").iterdir()}
    assert pages == {name.rpartition("/")[2] for name in names if "/page_files/" in name}
    assert "longspan/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_it_answers_outside_of_the_checkout_and_says_what_is_slower(installed):
    folder, has_compiler, _ = installed
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "LONGSPAN_MEASURE": "never"}
    python = folder / "env" / "bin" / "python"
    place = run(python, "-c", "import longspan; print(longspan.__file__)", env=env, cwd=folder).stdout
    assert place.startswith(str(folder / "env"))
    options = ("--context-parallel-size", "2", "--kv-cache-memory", "64Mi", "--stop", ".", "--prompt", FACT, "--json")
    done = run(folder / "env" / "bin" / "longspan", "generate", "recall", *options, env=env, cwd=folder)
    assert json.loads(done.stdout)["text"] == "4711"
    assert (WITHOUT_KERNELS in done.stderr) != has_compiler
    script = run(folder / "env" / "bin" / "longspan", "--completion", "bash", env=env, cwd=folder).stdout
    assert "_LONGSPAN_COMPLETE=bash_complete" in script


def test_a_source_distribution_can_be_built_of_what_is_tracked(tmp_path):
    source = source_copy(tmp_path / "source")
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('..')", cwd=source)
    (archive,) = tmp_path.glob("longspan-*.tar.gz")
    names = run("tar", "-tzf", archive).stdout.splitlines()
    for name in ("src/longspan/native/gate.h", "src/longspan/server/page_files/index.html", "LICENSE"):
        assert any(one.endswith(name) for one in names), name
