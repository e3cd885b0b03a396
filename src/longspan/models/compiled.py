"""`torch.compile` for what a layer does between its matrix products, on GPUs.

Holds the choice of modules to compile. Must not know attention or plans.
Read next: `longspan.worker.graphs`: compiled kernels are captured like any others.
"""

import torch
import torch._dynamo  # the limit of graphs
from torch import nn

MOST_GRAPHS = 64
"""Most graphs that PyTorch compiles of one function of a model's code; norms of all widths and dtypes share one.
Beyond its default of 8 it computes without any. Qwen3 takes 8, Llama 6."""


def compile_dense_(model: nn.Module) -> int:
    """Compile norms and MLPs of a loaded model, each for any number of rows; return how many modules.

    Modules whose forward was replaced stay as they are. Compilation happens in the first steps, and takes seconds.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(MOST_GRAPHS, config.recompile_limit)
    count = 0
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if (last == "mlp" or last.endswith("norm")) and "forward" not in vars(module):
            module.compile(dynamic=True)
            count += 1
    return count
