"""Products of adapters are added in every module that an adapter may change, whatever speed-ups a model has."""

import json

import pytest
import torch
from proven_models import PROVEN_MODELS, proven_model
from safetensors.torch import save_file
from tiny_models import greedy, run_all

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.models import adapters
from longspan.models.adapter_files import adaptable_modules
from longspan.models.adapters import Span, spans_of
from longspan.models.loader import load_config, model_on_meta


def write_whole_adapter(path, base):
    """Write an adapter of all modules that one may change; return their number."""
    shapes = adaptable_modules(model_on_meta(load_config(base)[0], torch.float32)).shapes
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, shape.width, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape.num_out, 2, generator=generator) * 0.1
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(shapes)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return len(shapes)


@pytest.mark.cover
@pytest.mark.parametrize("name", PROVEN_MODELS)
def test_every_module_adds_its_product_once_a_step(name, tmp_path, monkeypatch):
    """A family that goes past a module's forward would be wrong without a word."""
    base = proven_model(name).path
    number = write_whole_adapter(tmp_path / "a", base)
    if not number:
        pytest.skip("no module of this family may be changed")
    called = []
    original = adapters._Adapted.__call__

    def call(self, hidden):
        called.append(self)
        return original(self, hidden)

    monkeypatch.setattr(adapters._Adapted, "__call__", call)
    config = EngineConfig(
        model=str(base),
        lora={"a": str(tmp_path / "a")},
        executor="threads",
        threads_per_rank=1,
        dtype="float32",
        kv_cache_memory=2**25,
    )
    with Engine(config) as engine:
        prompt = list(range(5, 30))
        plain, adapted = (
            engine.add_request(prompt, greedy(3), adapter=one) for one in (None, engine.adapters.find("a"))
        )
        run_all(engine)
        (count,) = {called.count(one) for one in called}
    assert len(set(called)) == number
    assert count == 3, "steps"
    assert plain.num_generated == adapted.num_generated == 3


def test_rows_that_follow_each_other_are_a_span():
    assert spans_of([None, None, 7, 7, 7, 9, 7]) == [Span(7, 2, 5), Span(9, 5, 6), Span(7, 6, 7)]
    assert spans_of([3]) == [Span(3, 0, 1)]
    assert spans_of([None]) == spans_of([]) == []
