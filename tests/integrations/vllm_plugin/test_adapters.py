"""LoRA: several adapters in a batch, on two ranks, give the tokens of models that they are merged into."""

import json
import shutil

import pytest
import torch
from engines import engine, generate, prompts, reference, tokens_of
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(model, directory, merged, seed):
    """Write a random adapter of a model to `directory`, and the model with it to `merged`."""
    generator = torch.Generator().manual_seed(seed)
    weights, adapter = load_file(f"{model}/model.safetensors"), {}
    for name, weight in weights.items():
        if not name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            continue
        outputs, inputs = weight.shape
        down = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        up = torch.randn(outputs, RANK, generator=generator) * 0.3
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"] = down, up
        weights[name] = weight + ALPHA / RANK * (up @ down)
    directory.mkdir()
    save_file(adapter, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    merged.mkdir()
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    shutil.copy(f"{model}/config.json", merged)
    return str(directory), str(merged)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_adapters_of_one_batch_are_those_of_merged_models(models, tmp_path, tp_size):
    from vllm.lora.request import LoRARequest

    model, asked = models["llama"], prompts()
    expected, requests = [reference(model, asked)], [None]
    for number in (1, 2, 3):
        path, merged = save_adapter(model, tmp_path / f"{number}", tmp_path / f"merged{number}", number)
        requests.append(LoRARequest(f"adapter{number}", number, path))
        expected.append(reference(merged, asked))
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, "max_cpu_loras": 2}
    with engine(model, 2, tensor_parallel_size=tp_size, **options) as llm:
        # by turns without and with one of three adapters, of which two are in memory at a time
        for shift in range(2 if tp_size == 1 else 1):
            chosen = [(i + shift) % 4 for i in range(len(asked))]
            answers = generate(llm, asked, lora_request=[requests[number] for number in chosen])
            assert tokens_of(answers) == [expected[number][i] for i, number in enumerate(chosen)]
        assert llm.llm_engine.list_loras() <= {1, 2, 3}, "the same on all ranks, else vLLM raises"
        scored = generate(llm, asked[2:3], lora_request=requests[1], prompt_logprobs=0, max_tokens=1)
        plain = generate(llm, asked[2:3], prompt_logprobs=0, max_tokens=1)
        assert scored[0].prompt_logprobs[1:] != plain[0].prompt_logprobs[1:]
        assert llm.llm_engine.remove_lora(1)
