"""Tiny multimodal repositories, as Transformers writes them, and what the whole model generates from text alone."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from proven_models import PROVEN_MODELS
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, model_root, random_prompt, randomize_
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

NUM_TOKENS = 24
PROMPT_LENS = (1, 31, 97)
IMAGE_TOKEN = 299
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA4_VISION = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_QWEN_TOKENS = {"video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
_GEMMA4_VISION = {"num_key_value_heads": 2, "head_dim": 16}

VISION_FIELDS = {
    "gemma3": {"vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 1},
    "gemma4": {"vision_config": {**_VISION, **_GEMMA4_VISION, "model_type": "gemma4_vision"}, "audio_config": None},
    "llama4": {"vision_config": {**_VISION, **_LLAMA4_VISION, "model_type": "llama4_vision_model"}},
    "mistral3": {"vision_config": {**_VISION, "head_dim": 16, "model_type": "pixtral"}},
    "qwen3_5": {"vision_config": {**_QWEN_VISION, "model_type": "qwen3_5_vision"}, **_QWEN_TOKENS},
    "qwen3_5_moe": {"vision_config": {**_QWEN_VISION, "model_type": "qwen3_5_moe_vision"}, **_QWEN_TOKENS},
}
TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mistral3": "ministral3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Per repository, the tiny text model of `proven_models` that it holds."""


@dataclass(frozen=True)
class Multimodal:
    path: str
    prompts: list[list[int]]
    token_ids: list[list[int]]
    """What the whole model continues each prompt with."""


def multimodal_config(model_type: str, **text_fields: object) -> PreTrainedConfig:
    """Config of a tiny repository; `text_fields` replace some of the text model's."""
    text_type, options = PROVEN_MODELS[TEXT_MODELS[model_type]]
    fields = {**COMMON, **options, "model_type": text_type, **text_fields}
    has_id = model_type == "gemma4" or model_type.startswith("qwen")
    image_token = {"image_token_id" if has_id else "image_token_index": IMAGE_TOKEN}
    return AutoConfig.for_model(
        model_type,
        text_config={name: value for name, value in fields.items() if value is not None},
        tie_word_embeddings=model_type.startswith("gemma"),
        **VISION_FIELDS[model_type],
        **image_token,
    )


@functools.cache
def multimodal_model(model_type: str) -> Multimodal:
    """Write a tiny repository; shared by all callers of this process."""
    path = model_root() / f"multimodal-{model_type}"
    more = {"use_bidirectional_attention": "vision"} if model_type == "gemma4" else {}
    model = AutoModelForImageTextToText.from_config(multimodal_config(model_type, **more), dtype=torch.float32)
    randomize_(model)
    model.tie_weights()
    model.save_pretrained(path)
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    if model_type == "llama4":
        whole = whole.language_model  # Transformers 5.24 cannot run the whole one without an image
    prompts = [[token % 290 for token in random_prompt(length, 3)] for length in PROMPT_LENS]
    return Multimodal(str(path), prompts, [_generate(whole, prompt) for prompt in prompts])


@torch.inference_mode()
def _generate(model: nn.Module, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def rename_tensors(source: str, target: Path, *renames: tuple[str, str]) -> str:
    """Copy a repository with other beginnings of the names of its tensors; returns its path."""
    target.mkdir()
    (target / "config.json").write_text((Path(source) / "config.json").read_text())
    tensors = load_file(Path(source) / "model.safetensors")
    for old, new in renames:
        tensors = {new + name[len(old) :] if name.startswith(old) else name: value for name, value in tensors.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)
