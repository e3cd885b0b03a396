"""Importing longspan, and asking for help, imports nothing heavy; what is heavy is imported without the collector."""

import gc
import subprocess
import sys
import weakref

import pytest

from longspan.imports import quick_imports

HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "zmq",
    "rich",
    "huggingface_hub",
    "fastapi",
    "pydantic",
    "uvicorn",
}


def modules_after(code):
    """Names of the top-level modules that a new interpreter has imported after running some code."""
    script = f"{code}\nimport sys\nprint('MODULES', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


HELP = """
import sys
sys.argv = ["longspan", {arguments}]
from longspan.cli.main import run_command
try:
    run_command()
except SystemExit as ended:
    assert ended.code == {code}
"""


@pytest.mark.parametrize(
    "code",
    [
        "import longspan; longspan.SamplingParams; longspan.ConfigError",
        "from longspan.engine.processes import early_ranks",
        "from longspan.config import EngineConfig; EngineConfig(model='recall')",
        HELP.format(arguments="'--help'", code=0),
        HELP.format(arguments="'--version'", code=0),
        HELP.format(arguments="'generate', '--help'", code=0),
        HELP.format(arguments="'generate', 'recall', '--prompt', ''", code=2),
        HELP.format(arguments="'serve', '--help'", code=0),
        HELP.format(arguments="'chat', '--help'", code=0),
        HELP.format(arguments="'serve', 'recall', '--port', '-1'", code=2),
        HELP.format(arguments="'generate', './no-such-model', '--prompt', 'a'", code=2),
        HELP.format(arguments="'serve', './no-such-model', '--port', '0'", code=2),
    ],
    ids=[
        "package",
        "early_ranks",
        "config",
        "help",
        "version",
        "generate_help",
        "refusal",
        "serve_help",
        "chat_help",
        "serve_refusal",
        "generate_without_a_model",
        "serve_without_a_model",
    ],
)
def test_nothing_heavy_is_imported(code):
    assert not modules_after(code) & HEAVY


def test_the_scheduler_needs_arrays_and_nothing_else_that_is_heavy():
    assert modules_after("from longspan.scheduler import scheduler") & HEAVY == {"numpy"}


def test_a_worker_can_hear_its_driver_before_it_imports_torch():
    assert not modules_after("import longspan.worker.process") & (HEAVY - {"zmq"})


def test_ranks_start_before_the_driver_imports_torch():
    assert not modules_after("from longspan import LLM") & HEAVY
    assert not modules_after("import longspan.worker.fork_server") & (HEAVY - {"zmq"})


@pytest.mark.parametrize("for_good", [False, True])
def test_nothing_is_collected_inside_and_nothing_is_lost_afterwards(for_good):
    class Node:
        pass

    def cycle():
        node = Node()
        node.itself = node
        return weakref.ref(node)

    gc.unfreeze()  # what pytest froze
    with quick_imports(for_good=for_good):
        assert not gc.isenabled()
        made_inside = cycle()
        with quick_imports(for_good=False):
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    made_after = cycle()
    try:
        gc.collect()
        assert made_after() is None
        assert (made_inside() is not None) == for_good
        assert (gc.get_freeze_count() > 0) == for_good
    finally:
        gc.freeze()


def test_the_package_lists_what_it_exports():
    import longspan

    assert all(getattr(longspan, name) is not None for name in longspan.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        longspan.nothing  # noqa: B018
