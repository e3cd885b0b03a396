"""LoRA adapters, several in a batch beside none: tokens are those of Transformers with merged weights."""

import json

import pytest
import torch
from engines import engine, generate, metric, random_prompts, reference, tokens_of
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

NUM_TOKENS, LAYERS = 24, 3
TARGETS = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def make_adapter(model, directory, rank, seed):
    """An adapter's directory, and that of a model with its weights merged."""
    adapter, merged = directory / "adapter", directory / "merged"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    stored, alpha = {}, 2 * rank
    for layer in range(LAYERS):
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            weight = network.get_parameter(f"{name}.weight")
            a = 0.1 * torch.randn(rank, weight.shape[1], generator=generator)
            b = 0.2 * torch.randn(weight.shape[0], rank, generator=generator)
            stored[f"base_model.model.{name}.lora_A.weight"], stored[f"base_model.model.{name}.lora_B.weight"] = a, b
            weight.data += alpha / rank * b @ a
    network.save_pretrained(merged)
    adapter.mkdir()
    save_file(stored, adapter / "adapter_model.safetensors")
    targets = [target.rpartition(".")[2] for target in TARGETS]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return str(adapter), str(merged)


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """Models with an adapter merged, by the number of the adapter, 0 for none; and requests of vLLM's, by the same."""
    from vllm.lora.request import LoRARequest

    merged, requests = [models["llama"]], [None]
    for number, rank in ((1, 8), (2, 3), (3, 8)):
        adapter, model = make_adapter(models["llama"], tmp_path_factory.mktemp(f"adapter{number}"), rank, number)
        merged.append(model)
        requests.append(LoRARequest(f"adapter{number}", number, adapter))
    return merged, requests


def ask(llm, requests, asked, **params):
    """Outputs for pairs of a prompt and an adapter."""
    lora = [requests[number] for _, number in asked]
    return generate(llm, [prompt for prompt, _ in asked], lora_request=lora, max_tokens=NUM_TOKENS, **params)


@pytest.mark.parametrize(
    ("cp_size", "longspan", "options"),
    [
        (2, {}, {}),
        (3, {"placement": "striped", "strategy": "pass_q"}, {}),
        pytest.param(2, {"placement": "striped"}, {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_tokens_equal_merged_weights(adapters, cp_size, longspan, options):
    merged, requests = adapters
    first, second, long, short, third = random_prompts((97, 700, 1500, 31, 513))
    asked = [(first, 1), (second, 0), (long, 2), (short, 0), (second, 1)]  # one prompt with an adapter and without
    later = [(first, 3), (third, 0), (long, 2)]  # the third adapter takes a slot of the others
    expected = {number: {} for number in range(4)}
    for prompt, number in [*asked, *later]:
        expected[number][tuple(prompt)] = reference(merged[number], [prompt], NUM_TOKENS)[0]
    with engine(merged[0], cp_size, longspan, enable_lora=True, max_loras=2, max_lora_rank=8, **options) as llm:
        for batch in (asked, later, asked):  # the last one from the prefix cache
            assert tokens_of(ask(llm, requests, batch)) == [expected[number][tuple(prompt)] for prompt, number in batch]
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        scored = ask(llm, requests, [(second, 1)], prompt_logprobs=0)[0]
        assert_prompt_is_scored_by(merged[1], scored)
        assert set(llm.llm_engine.list_loras()) == {1, 2}, "the last batch's"


def assert_prompt_is_scored_by(model, output):
    """The prompt's log-probabilities are those of a model."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = torch.tensor(output.prompt_token_ids)
    with torch.no_grad():
        exact = network(prompt[None]).logits[0, :-1].log_softmax(-1).gather(1, prompt[1:, None])[:, 0]
    own = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    torch.testing.assert_close(torch.tensor([scores[token].logprob for token, scores in own]), exact, atol=1e-3, rtol=0)
