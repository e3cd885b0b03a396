"""A worker's start, where its host lacks what other hosts have."""

import pytest
import torch
from proven_models import proven_model

from longspan.config import EngineConfig
from longspan.errors import ConfigError
from longspan.group.heartbeat import ProcessProgress
from longspan.group.messages import Start
from longspan.group.shape import ProcessId
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config
from longspan.worker.serve import serve


def test_rejects_an_adapter_that_is_on_other_hosts_alone(tmp_path, monkeypatch):
    """The driver's host has it, so this host is the first that can tell."""
    monkeypatch.setattr("longspan.worker.serve.quiet_transformers", lambda: None)
    path = proven_model("llama").path
    config = EngineConfig(
        model=path, lora=str(tmp_path / "adapter"), device="cpu", dtype="float32", kv_cache_memory=2**20
    )
    start = Start(config, inspect_model(*load_config(path), torch.float32), ((1,),), None)
    with pytest.raises(ConfigError, match=r"lora: got .*adapter', legal is a directory with adapter_config\.json"):
        serve(ProcessId(0, 0), start, None, None, torch.get_num_threads(), ProcessProgress())
