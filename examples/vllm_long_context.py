"""The request that started this project, in vLLM: two devices that hold 50,000 tokens each answer a prompt of 100,000.

    .venv-vllm/bin/python examples/vllm_long_context.py

The model is tiny and random, the lengths are 1:1. vLLM alone, with the memory of one device, refuses the context; with
`context_parallel_size` 2 and the same memory per device it answers, with the tokens that vLLM gives on one device of
twice the memory.
"""

import argparse
import os
import tempfile
import time

NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE = 2, 2, 32
TOKEN_BYTES = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_SIZE * 4
"""Keys and values of one token, float32."""


def save_model(directory: str, context_len: int) -> None:
    """A random Llama without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=context_len,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:  # scaled so that attention matters
                weight.normal_(0, 0.2 if "lm_head" in name else 2.5 * weight.shape[1] ** -0.5)
    model.save_pretrained(directory)


def answer(directory: str, prompt: list[int], context_len: int, kv_tokens: int, cp_size: int | None) -> list[int]:
    """What vLLM generates. Args: `kv_tokens` per device; `cp_size` None leaves the plugin out."""
    import vllm

    options = {} if cp_size is None else {"longspan": {"context_parallel_size": cp_size}}
    llm = vllm.LLM(
        model=directory,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=context_len,
        kv_cache_memory_bytes=kv_tokens * TOKEN_BYTES,
        additional_config=options,
    )
    started = time.perf_counter()
    params = vllm.SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    print(f"  {blocks} blocks, {time.perf_counter() - started:.1f} s for prompt and 16 tokens", flush=True)
    llm.llm_engine.engine_core.shutdown()
    return list(output.outputs[0].token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the prompt")
    num_tokens = parser.parse_args().tokens
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    prompt = torch.randint(3, 512, (num_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    per_device, context_len = num_tokens // 2 + 512, num_tokens + 256
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, context_len)
        print(f"vLLM, one device that holds {per_device} tokens", flush=True)
        try:
            answer(directory, prompt, context_len, per_device, None)
        except (RuntimeError, ValueError):
            print("  refuses to start")
        else:
            raise SystemExit("vLLM was expected to refuse this")
        print(f"vLLM with longspan, two devices that hold {per_device} tokens each", flush=True)
        split = answer(directory, prompt, context_len, per_device, 2)
        print(f"vLLM, one device that holds {2 * per_device} tokens", flush=True)
        whole = answer(directory, prompt, context_len, 2 * per_device, None)
    print(f"tokens {split}")
    if split != whole:
        raise SystemExit(f"differ from {whole}")
    print("The tokens are equal.")


if __name__ == "__main__":
    main()
