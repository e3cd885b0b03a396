"""Draft models of any quality beside a tiny model: the model itself, one like it, and one that has nothing of it."""

import functools

import torch
from tiny_models import model_root, tiny_model, write_model
from transformers import AutoModelForCausalLM

NOISE = 0.01
"""Share of each weight's spread that is added to it: some of the tokens are others then."""


@functools.cache
def draft_path(family: str, kind: str) -> str:
    """Directory of a draft model for a family's tiny model: `same`, `like` or `other`."""
    path = tiny_model(family).path
    if kind == "same":
        return path
    target = model_root() / f"draft-{family}-{kind}"
    if kind == "other":
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        return write_model(target, "llama", seed=11, **small)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += NOISE * noise * parameter.std() if parameter.numel() > 1 else 0.0
    model.save_pretrained(target)
    return str(target)


def drafts_of(family: str, kind: str, num_drafts: int = 4) -> dict[str, object]:
    """The option that lets this model make drafts."""
    return {"method": "draft_model", "model": draft_path(family, kind), "num_speculative_tokens": num_drafts}
