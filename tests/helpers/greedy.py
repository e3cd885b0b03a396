"""What Transformers' own `generate` continues a prompt with; imports no engine, as tests inside vLLM use it too."""

from collections.abc import Sequence

import torch
from torch import nn


@torch.inference_mode()
def generate_greedily(
    model: nn.Module, prompt: Sequence[int], num_tokens: int, **options: object
) -> tuple[list[int], list[float]]:
    """Greedy tokens of Transformers' own `generate`, and the lead of each over the next best.

    Args:
        model: from Transformers, or around one by peft.
        prompt: token ids.
        num_tokens: to generate, whatever they are.
        options: further arguments of `generate`.
    """
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    top = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()
