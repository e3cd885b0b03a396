"""Repositories as people publish them, of each kind, answer through `longspan serve` on two ranks.

Each has shards with an index, a tokenizer with a chat template, and, where it is quantised, the config that says how.
Answers are those of Transformers with the dense weights that the repository means.
"""

from pathlib import Path

import gguf_models
import httpx
import pytest
import torch
from multimodal_models import multimodal_model
from proven_models import proven_model
from quantized_models import (
    awq,
    compressed_options,
    compressed_packed,
    compressed_plain,
    fp8_blocks,
    gptq,
    read_all,
    save_shards,
    write_repository,
)
from served_command import command
from tiny_models import random_prompt
from transformers import AutoModelForCausalLM

from longspan.models.loader import load_tokenizer

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NUM_TOKENS = 12
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
PACKED = {"strategy": "group", "group_size": 32, "num_bits": 4}
QUANTIZED = {
    "fp8": ("llama", fp8_blocks(32), BLOCKS),
    "fp8-experts": ("qwen3_moe", fp8_blocks(32), BLOCKS),
    "compressed-w4a16": ("llama", compressed_packed(4, 32), compressed_options("pack-quantized", **PACKED)),
    "compressed-int8": ("llama", compressed_plain("int"), compressed_options("int-quantized")),
    "compressed-fp8": ("llama", compressed_plain("float"), compressed_options("float-quantized", type="float")),
    "gptq": ("llama", gptq(32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
    "awq": ("llama", awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
}
DENSE = ("llama", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "gemma3_text", "minicpm3-longrope")
MULTIMODAL = ("gemma3", "mistral3", "llama4")


def complete(path: Path) -> str:
    """Give a repository the tokenizer and the chat template that published ones have."""
    tokenizer = load_tokenizer("recall")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(path)
    return str(path)


@torch.inference_mode()
def continued(model, prompt):
    """Greedy tokens of Transformers."""
    ids = torch.tensor([prompt])
    output = model.eval().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def check(path, wanted, prompt, *options):
    with command(
        "--context-parallel-size", "2", "--placement", "striped", "--dtype", "float32", *options, model=path
    ) as served:
        url = f"{served.url}/v1"
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        answer = httpx.post(f"{url}/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == NUM_TOKENS, answer
        assert answer["choices"][0]["text"] == load_tokenizer(path).decode(wanted, skip_special_tokens=True)
        said = [{"role": "user", "content": "Is anybody there?"}]
        chat = httpx.post(f"{url}/chat/completions", json={"messages": said, "max_tokens": 4}, timeout=60)
        assert chat.status_code == 200, chat.text


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantised_repository_answers(kind, tmp_path):
    made = write_repository(tmp_path, *QUANTIZED[kind])
    prompt = random_prompt(70, 1)
    wanted = continued(AutoModelForCausalLM.from_pretrained(made.dense_path, dtype=torch.float32), prompt)
    check(complete(Path(made.path)), wanted, prompt)


@pytest.mark.parametrize("name", DENSE)
def test_a_repository_in_shards_answers(name, tmp_path):
    source = Path(proven_model(name).path)
    for file in ("config.json", "generation_config.json"):
        if (source / file).exists():
            (tmp_path / file).write_text((source / file).read_text())
    save_shards(tmp_path, read_all(source))
    prompt = random_prompt(70, 1)
    wanted = continued(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), prompt)
    check(complete(tmp_path), wanted, prompt)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_part_of_a_multimodal_repository_answers(name, tmp_path):
    whole = multimodal_model(name)
    (tmp_path / "config.json").write_text((Path(whole.path) / "config.json").read_text())
    save_shards(tmp_path, read_all(Path(whole.path)))
    check(complete(tmp_path), whole.token_ids[-1][:NUM_TOKENS], whole.prompts[-1])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_weights_that_are_rounded_at_load_answer(quantization, tmp_path):
    source = Path(proven_model("llama").path)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_shards(tmp_path, read_all(source))
    with command("--quantization", quantization, "--dtype", "float32", model=complete(tmp_path)) as served:
        body = {"prompt": random_prompt(70, 1), "max_tokens": NUM_TOKENS, "ignore_eos": True}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == NUM_TOKENS, answer


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_a_gguf_file_answers(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    expected = gguf_models.write_gguf(file, architecture, kind="Q8_0")
    prompt = list(range(4, 74))
    with command("--context-parallel-size", "2", "--dtype", "float32", model=str(file)) as served:
        body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
        wanted = load_tokenizer(str(file)).decode(continued(expected, prompt), skip_special_tokens=True)
        assert answer["choices"][0]["text"] == wanted


def test_an_adapter_answers(tmp_path):
    peft = pytest.importorskip("peft")
    source = proven_model("llama").path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    adapted.save_pretrained(tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((Path(source) / "config.json").read_text())
    save_shards(base, read_all(Path(source)))
    prompt = random_prompt(70, 1)
    check(complete(base), continued(adapted, prompt), prompt, "--lora", str(tmp_path / "adapter"))
