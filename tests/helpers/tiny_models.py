"""Tiny models of every proven family, what Transformers says they generate, and a way to run them through the engine.

A default-initialised model repeats one token whatever attention does. These have scaled weights (logits with a spread
of about 2), so that a wrong page, position or merge changes tokens; `build` asserts that the references are diverse.
Models and references are made once per process.
"""

import atexit
import copy
import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from attention_cases import DEVICE
from greedy import generate_greedily
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.config import EngineConfig
from longspan.engine.engine import Engine
from longspan.models.inspect import inspect_model
from longspan.models.loader import load_config, load_model
from longspan.models.speedups import speed_up_
from longspan.scheduler.request import Request
from longspan.types import SamplingParams

VOCAB_SIZE = 300
PROMPT_LENS = (1, 31, 97, 1025)
NUM_TOKENS = 64
NEAR_TIE = 5e-4
"""Two logits closer than this may change places between two float32 evaluations of the same model."""

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 256}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 32}
_FULL, _SLIDING = "full_attention", "sliding_attention"

FAMILIES: dict[str, tuple[str, Mapping[str, object]]] = {
    # model type, and what differs from COMMON; the head ratios 1, 4, 7 and 8 and one KV head all occur
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": _YARN_ROPE, "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112},
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window-24": ("mistral", {"sliding_window": 24}),
    "mistral-window-7": ("mistral", {"sliding_window": 7, "num_key_value_heads": 8}),
    "qwen2": ("qwen2", {"num_attention_heads": 14, "hidden_size": 112}),
    "qwen2-window-mix": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 1, "seed": 1}),
    "qwen3-window-mix": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "seed": 3},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": (
        "smollm3",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": [_SLIDING, _FULL, _SLIDING],
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 1],
            "attention_chunk_size": 22,
            "floor_scale": 24,
            "attn_scale": 0.4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layers": [1, 2, 3],
            "intermediate_size_mlp": 96,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "num_hidden_layers": 4,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": [_SLIDING, _FULL, _SLIDING],
            "rope_parameters": {**_YARN_ROPE, "truncate": False},
        },
    ),
    "youtu": (
        "youtu",
        {
            "num_key_value_heads": 8,
            "kv_lora_rank": 32,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "rope_parameters": {**_YARN_ROPE, "mscale": 0.8, "mscale_all_dim": 0.6},
            "seed": 1,
        },
    ),
}


@dataclass(frozen=True)
class Reference:
    """What Transformers generates greedily on one device."""

    prompt: list[int]
    token_ids: list[int]
    margins: list[float]
    """Per token, its logit minus the runner-up's."""


@dataclass(frozen=True)
class TinyModel:
    name: str
    path: str
    references: list[Reference]
    """One per length in PROMPT_LENS, without a near-tie."""
    dtype: torch.dtype = torch.float32
    """Of the weights that `module` and `load` have; references are those of float32."""

    @functools.cached_property
    def module(self) -> nn.Module:
        """Loaded as a rank loads it; shared by all engines of this process."""
        model = self.load()
        speed_up_(model)
        return model

    @functools.cached_property
    def plain(self) -> nn.Module:
        """Without speed-ups, for engines that cut it into parts; shared like `module`."""
        return self.load()

    def load(self) -> nn.Module:
        """A copy for the caller alone, without speed-ups."""
        return load_model(self.path, self.dtype, show_progress=False, device=torch.device(DEVICE))


@functools.cache
def model_root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="longspan-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def randomize_(model: nn.Module, seed: int = 0) -> None:
    """Give a model of any family weights with which attention and every expert matter to the next token.

    Matrices keep the size of what they multiply, so that no layer drowns another; biases are small, since large ones
    say the same whatever the input is. Embeddings are of the size at which layers add as much as they carry; those that
    also make the logits are smaller, since a token would otherwise be its own most probable successor.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(model.get_input_embeddings().weight)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.data = noise * (0.02 if model.config.tie_word_embeddings else 0.3)
        elif parameter.ndim >= 2:
            parameter.data = noise * 1.6 / max(parameter.shape[-2:]) ** 0.5
        elif "norm" in name or "ln_" in name:
            is_offset = bool((parameter.data == 0).all()) and name.endswith("weight")  # a norm that adds one
            around = 0.0 if is_offset or name.endswith("bias") else 1.0
            parameter.data = noise * (0.05 if name.endswith("bias") else 0.2) + around
        else:
            parameter.data = parameter.data + noise * 0.05


def write_model(path: Path, model_type: str, *, seed: int = 0, **options: object) -> str:
    """Write the directory of a model with random weights; returns its path."""
    config = AutoConfig.for_model(model_type, **copy.deepcopy({**COMMON, **options}))  # some configs change lists
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_(model, seed)
    model.tie_weights()
    model.save_pretrained(path)
    return str(path)


@functools.cache
def load_reference(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights in stock Transformers with eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def generate_reference(path: str, prompt: Sequence[int], num_tokens: int) -> Reference:
    """What Transformers continues a prompt with."""
    return Reference(list(prompt), *generate_greedily(load_reference(path), prompt, num_tokens))


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


@functools.cache
def tiny_model(name: str) -> TinyModel:
    """Build a family's model and its references. Callers share what this returns and must not change it."""
    model_type, options = FAMILIES[name]
    path = write_model(model_root() / name, model_type, **options)
    references = []
    for length in PROMPT_LENS:
        # One prompt in ten meets a near-tie within 64 tokens; a comparison up to there would be shorter than promised.
        candidates = (generate_reference(path, random_prompt(length, seed), NUM_TOKENS) for seed in range(8))
        references.append(next(reference for reference in candidates if min(reference.margins) > NEAR_TIE))
    for reference in references:
        assert len(set(reference.token_ids)) > NUM_TOKENS // 4, f"{name} repeats itself: {reference.token_ids}"
    return TinyModel(name, path, references)


def memory_for(model: TinyModel, num_tokens: int) -> int:
    """Bytes of KV per rank that hold at least so many tokens."""
    spec = inspect_model(load_config(model.path)[0], None, torch.float32)
    return num_tokens * sum(group.token_bytes for group in spec.kv_groups)


@contextmanager
def tiny_engine(model: TinyModel, module: nn.Module | None = None, **options: object) -> Iterator[Engine]:
    """An engine whose ranks are threads; when the test is done with it, every page must be free again.

    Args:
        model: what it runs.
        module: the model in another form than all tests share.
        options: of the engine's config.
    """
    config = EngineConfig(
        model=model.path,
        executor="threads",
        threads_per_rank=1,
        exchange_timeout_s=60.0,
        device=DEVICE,
        **{"dtype": "float32", "kv_cache_memory": 2**25, **options},
    )
    shared = model.plain if config.tensor_parallel_size > 1 else model.module
    with Engine(config, shared if module is None else module) as engine:
        yield engine
        engine.scheduler.memory.check_integrity()
        for allocators in engine.scheduler.memory.allocators:
            assert [allocator.num_used for allocator in allocators] == [0] * len(allocators)
        assert engine.scheduler.memory.is_empty


def run_all(engine: Engine) -> None:
    """Step until no request is left."""
    while engine.has_requests:
        engine.step()


def run_requests(
    model: TinyModel, requests: Sequence[tuple[Sequence[int], SamplingParams]], **options: object
) -> list[Request]:
    """Run all requests at once on ranks that are threads."""
    with tiny_engine(model, **options) as engine:
        running = [engine.add_request(prompt, params) for prompt, params in requests]
        run_all(engine)
    return running


def greedy(max_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def generate_all(model: TinyModel, **options: object) -> list[list[int]]:
    """Tokens for all references' prompts in one batch."""
    requests = run_requests(model, [(reference.prompt, greedy()) for reference in model.references], **options)
    return [request.output_token_ids for request in requests]


def all_pairs(factors: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Cases in which every two values of two factors meet at least once.

    Greedy: every case starts with a pair that has not met yet, then takes for each other factor the value that brings
    the most new pairs. Deterministic.
    """
    names = list(factors)
    open_pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }

    def pair(a: tuple[str, int], b: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
        return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)

    cases: list[dict[str, object]] = []
    while open_pairs:
        chosen = dict(min(open_pairs))
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    range(len(factors[name])),
                    key=lambda value: (
                        sum(pair((name, value), other) in open_pairs for other in chosen.items()),
                        -sum(case[name] == factors[name][value] for case in cases),
                    ),
                )
        open_pairs -= {pair(a, b) for a, b in itertools.combinations(chosen.items(), 2)}
        cases.append({name: factors[name][chosen[name]] for name in names})
    return cases
