"""The npm clients of both companies, unchanged, against the command. LONGSPAN_TEST_NPM may name a folder with them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from served_command import command
from serving import served_model

pytestmark = [pytest.mark.processes, pytest.mark.slow]

PACKAGES = ("openai", "@anthropic-ai/sdk")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the packages, outside of the repository."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    given = os.environ.get("LONGSPAN_TEST_NPM")
    folder = Path(given) if given else tmp_path_factory.mktemp("npm")
    if not given and shutil.which("npm") is not None:
        (folder / "package.json").write_text('{"private": true}')
        install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
        subprocess.run(install, cwd=folder, capture_output=True, timeout=200, check=False)
    if not all((folder / "node_modules" / name).is_dir() for name in PACKAGES):
        pytest.skip("the npm packages are not installed, and cannot be")
    return folder


def test_npm_clients_run_unchanged(cache_home, packages):
    script = Path(__file__).with_name("npm_clients.mjs")
    with command("--threads-per-rank", "1", "--served-model-name", "tiny", model=served_model().path) as server:
        done = subprocess.run(
            ["node", str(script), str(packages), server.url, "tiny"],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["done"]) == 9
