"""Starts vLLM with and without the plugin, and asks Transformers what is right."""

from contextlib import contextmanager

import torch

OPTIONS = {"min_striped_len": 400, "stripe_size": 128}


@contextmanager
def engine(model, cp_size, longspan=None, **options):
    """`vllm.LLM`; without the plugin's options where `cp_size` is None. Models are compiled only where a test asks."""
    import vllm

    arguments = {
        "dtype": "float32",
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_batched_tokens": 1024,
        "block_size": 32,
        "disable_log_stats": False,
        "enforce_eager": True,
        **options,
    }
    if cp_size is not None:
        arguments["additional_config"] = {
            "longspan": {"context_parallel_size": cp_size, **OPTIONS, **(longspan or {})},
        }
    llm = vllm.LLM(model=model, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generate(llm, prompts, lora_request=None, **params):
    """Outputs for prompts of token ids, and of vLLM's names of a LoRA adapter for each."""
    from vllm import SamplingParams

    params = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **params}
    asked = [{"prompt_token_ids": p} for p in prompts]
    return llm.generate(asked, SamplingParams(**params), use_tqdm=False, lora_request=lora_request)


def tokens_of(outputs):
    """Token ids of the first continuation of each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(lens, seed=1):
    """Prompts of some lengths."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (n,), generator=g).tolist() for n in lens]


def num_blocks(llm):
    """KV blocks of all ranks, as vLLM counts them."""
    return llm.llm_engine.vllm_config.cache_config.num_gpu_blocks


def metric(llm, name):
    """Sum of one of vLLM's counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def prompts():
    """Short and long ones, and two that start as others do: packed on a striped start, striped on a packed start."""
    found = random_prompts((1, 31, 97, 513, 1500, 3000, 40, 700))
    return [*found, found[4][:320] + found[1], found[2] + found[3]]


def reference(model, prompts, num_tokens=40, loader="AutoModelForCausalLM", **loading):
    """Greedy tokens of Transformers, one prompt at a time; `loading` are further arguments of `from_pretrained`."""
    import transformers

    network = getattr(transformers, loader).from_pretrained(model, dtype=torch.float32, **loading)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            out = network.generate(
                torch.tensor([prompt]),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        found.append(out[0, len(prompt) :].tolist())
    assert all(len(set(tokens)) > num_tokens // 3 for tokens in found), "the references are diverse"
    return found
