"""Containers with little shared memory, and machines where nothing but the temporary directory can be written."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from serving import served_model

from longspan.comm.nccl import SHARED_BYTES, spare_shared_memory

PROGRAM = [sys.executable, "-m", "longspan", "generate", "--prompt", "The number is", "--max-tokens", "4", "--quiet"]


@pytest.fixture
def confined(tmp_path):
    """Runs the command with /dev/shm of one page, a model directory and caches that are read-only, and no network."""
    shell = ["unshare", "--mount", "--net", "sh", "-ec"]
    if os.geteuid() or subprocess.run([*shell, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount")
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(served_model().path, model)
    cache.mkdir()
    script = """
        ip link set lo up 2>/dev/null || true
        mount -t tmpfs -o size=4k tmpfs /dev/shm
        mount -t tmpfs -o ro tmpfs "$1"
        mount --bind "$2" "$2"
        mount -o remount,ro,bind "$2"
        shift 2
        exec "$@"
    """

    def run(*arguments):
        names = {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [*shell, script, "sh", str(cache), str(model), *PROGRAM, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **names},
            timeout=280,
            check=False,
        )

    return run, model


@pytest.mark.processes
def test_ranks_need_no_shared_memory_and_models_no_place_to_write(confined):
    run, model = confined
    done = run(str(model), "--context-parallel-size", "2", "--threads-per-rank", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("recall", "which cannot be written: Read-only file system; XDG_CACHE_HOME names another one"),
        ("org/name", "that can be reached or is in the cache"),
    ],
)
def test_what_cannot_be_made_or_fetched_is_refused_in_a_line(confined, model, reason):
    run, _ = confined
    done = run(model)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert reason in done.stderr


@pytest.mark.parametrize(("megabytes", "spares"), [(1, True), (64, True), (128, False)])
def test_nccl_is_kept_off_small_shared_memory(monkeypatch, capfd, megabytes, spares):
    monkeypatch.setenv("NCCL_SHM_DISABLE", "0")  # for monkeypatch to restore what the function sets
    monkeypatch.delenv("NCCL_SHM_DISABLE")
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_blocks=megabytes * 2**10, f_frsize=2**10))
    assert SHARED_BYTES == 64 * 2**20
    spare_shared_memory(1, 2)
    assert (os.environ.get("NCCL_SHM_DISABLE"), capfd.readouterr().err) == ("1" if spares else None, "")
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    spare_shared_memory(0, 2)
    told = capfd.readouterr().err
    assert told.startswith(f"longspan: /dev/shm has {megabytes} MiB, too few for 2 GPUs: ") == spares
    monkeypatch.setenv("NCCL_SHM_DISABLE", "0")  # what a user has set stays
    spare_shared_memory(0, 2)
    assert os.environ["NCCL_SHM_DISABLE"] == "0"
