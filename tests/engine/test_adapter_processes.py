"""Ranks that are processes load adapters at their start and later, and so do those that replace lost ones."""

import os
import signal

import pytest
from lora_adapters import write_adapter
from process_tree import ranks
from serving import served_model

from longspan.errors import ConfigError
from longspan.llm import LLM
from longspan.types import SamplingParams

pytestmark = pytest.mark.processes

RANKS = {
    "context_parallel_size": 2,
    "placement": "striped",
    "page_size": 4,
    "stripe_size": 8,
    "threads_per_rank": 1,
    "kv_cache_memory": 2**24,
    "check_invariants": 1,
    "measure": "never",
}
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
PROMPTS = ["The quick brown fox jumps over the lazy dog."] * 3


def tokens_of(llm, lora, **options):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, lora=lora, **options)]


def test_adapters_outlive_the_ranks_that_loaded_them(cache_home, tmp_path):
    """One rank is killed while it computes with an adapter that was loaded at the start, and with a later one."""
    path = served_model().path
    a, b = (write_adapter(tmp_path / name, path, seed=i) for i, name in enumerate("ab"))
    with LLM(path, executor="threads", threads_per_rank=1, kv_cache_memory=2**24, lora={"a": a, "b": b}) as alone:
        wanted = tokens_of(alone, [None, "a", "b"])
    assert len({tuple(one) for one in wanted}) == 3
    killed = []

    def kill(progress):
        if progress.generated_tokens > 5 and not killed:
            killed.append(progress)
            os.kill(ranks(os.getpid())[1], signal.SIGKILL)

    with LLM(path, **RANKS, max_restarts=2, lora={"a": a, "gone": a}) as llm:
        with pytest.raises(ConfigError, match="lora_path: got '/nowhere', legal is a directory with"):
            llm.load_lora_adapter("b", "/nowhere")
        llm.load_lora_adapter("b", b)
        assert tokens_of(llm, [None, "a", "b"]) == wanted
        llm.unload_lora_adapter("gone")
        assert [one.name for one in llm.engine.ranks.told.adapters] == ["a", "b"]
        assert tokens_of(llm, [None, "a", "b"], on_progress=kill) == wanted
        assert killed
        assert llm.engine.restarts.num_done == 1
        with pytest.raises(ConfigError, match="lora: got 'gone', legal is one of a, b"):
            tokens_of(llm, "gone")


def test_rejects_files_that_have_changed_since_the_driver_read_them(cache_home, tmp_path):
    """A rank says so, and goes on."""
    path = served_model().path
    a = write_adapter(tmp_path / "a", path)
    with LLM(path, **RANKS) as llm:
        adapter = llm.engine.adapters.read("a", a)
        (tmp_path / "a" / "adapter_config.json").write_text((tmp_path / "a" / "adapter_config.json").read_text() + "\n")
        load = llm.engine.begin_load_adapter(adapter)
        with pytest.raises(ConfigError, match=r"lora: got a=.* with other files than the driver has read"):
            llm.engine.end_load_adapter(load)
        assert tokens_of(llm, None)
