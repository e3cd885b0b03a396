"""LoRA adapters of tiny models, what peft generates with them, and engines that have them."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from greedy import generate_greedily
from tiny_models import NEAR_TIE, Reference, model_root, random_prompt, run_all, tiny_model
from transformers import AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.types import SamplingParams

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def write_adapter(path: object, base: str, seed: int = 0, noisy: Sequence[str] = ("lora_",), **options: object) -> str:
    """Write an adapter with weights that matter to the next token."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **given))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if any(part in name for part in noisy):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    adapted.save_pretrained(str(path))
    return str(path)


@functools.cache
def tiny_adapter(family: str, name: str) -> str:
    """Directory of one of two adapters of a family of `tiny_models`, `a` and `b`, which differ in rank and modules."""
    options: dict[str, object] = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
        "b": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "gate_proj"]},
    }[name]
    model = tiny_model(family)
    is_mixture = any(hasattr(module, "experts") for module in model.module.modules())  # attention alone, there
    targets = [name for name in options["target_modules"] if not is_mixture or name in ATTENTION]
    path = model_root() / f"{family}-adapter-{name}"
    return write_adapter(path, model.path, seed=ord(name), **{**options, "target_modules": targets})


@functools.cache
def peft_model(path: str, adapter: str | None) -> torch.nn.Module:
    """A model in stock Transformers with eager attention, and an adapter beside its weights."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


def merged_model(path: str, adapter: str) -> torch.nn.Module:
    """A model with an adapter merged into its weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


def generate_with(path: str, adapter: str | None, prompt: Sequence[int], num_tokens: int) -> Reference:
    """Greedy tokens of peft's own generate."""
    model = peft_model(path, adapter)
    return Reference(list(prompt), *generate_greedily(model, prompt, num_tokens))


@functools.cache
def adapter_references(family: str, length: int, num_tokens: int) -> dict[str | None, Reference]:
    """What a prompt is continued with by adapter `a`, by `b` and by neither; none of them is a near-tie."""
    path = tiny_model(family).path
    for seed in range(100, 150):
        prompt = random_prompt(length, seed)
        found = {
            name: generate_with(path, None if name is None else tiny_adapter(family, name), prompt, num_tokens)
            for name in (None, "a", "b")
        }
        if all(min(reference.margins) > NEAR_TIE for reference in found.values()):
            assert len({tuple(reference.token_ids) for reference in found.values()}) == 3, family
            return found
    raise AssertionError(f"every prompt meets a near-tie: {family}")


@contextmanager
def adapter_engine(path: str, lora: object, **options: object) -> Iterator[Engine]:
    """An engine with adapters, whose ranks are threads; when the test is done with it, every page must be free again.

    Args:
        path: the model's directory.
        lora: as the option.
        options: others of the engine's config.
    """
    config = EngineConfig(
        model=path,
        lora=lora,
        executor="threads",
        threads_per_rank=1,
        exchange_timeout_s=60.0,
        **{"dtype": "float32", "kv_cache_memory": 2**25, **options},
    )
    with Engine(config) as engine:
        yield engine
        engine.scheduler.memory.check_integrity()
        for allocators in engine.scheduler.memory.allocators:
            assert [allocator.num_used for allocator in allocators] == [0] * len(allocators)


def both(family: str) -> dict[str, str]:
    """The option for both adapters of a family."""
    return {name: tiny_adapter(family, name) for name in ("a", "b")}


def check_adapter_beside_none(path: str, adapter: str, prompt: Sequence[int], **options: object) -> None:
    """Ask twice without and with an adapter, in turns; tokens must be peft's, and the second time pages are found.

    Args:
        path: the model's directory.
        adapter: the adapter's.
        prompt: of all four requests.
        options: of the engine's config.
    """
    with adapter_engine(path, {"a": adapter}, **options) as engine:
        for name, is_cached in ((None, False), ("a", False), (None, True), ("a", True)):
            peft_model.cache_clear()  # RoPE of some models keeps what longer requests left in the module
            wanted = generate_with(path, None if name is None else adapter, prompt, 24)
            found = None if name is None else engine.adapters.find(name)
            one = engine.add_request(prompt, SamplingParams(max_tokens=24, ignore_eos=True), adapter=found)
            run_all(engine)
            assert (one.output_token_ids, one.num_cached > 0) == (wanted.token_ids, is_cached), name
