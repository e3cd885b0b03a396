"""`torch.compile` for what a layer does between its matrix products, on GPUs.

Holds the choice of modules to compile. Must not know attention or plans.
Read next: `longspan.worker.graphs`: compiled kernels are captured like any others.
"""

from torch import nn


def compile_dense_(model: nn.Module) -> int:
    """Compile norms and MLPs of a loaded model, each for any number of rows; return how many modules.

    Modules whose forward was replaced stay as they are. Compilation happens in the first steps, and takes seconds.
    """
    count = 0
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if (last == "mlp" or last.endswith("norm")) and "forward" not in vars(module):
            module.compile(dynamic=True)
            count += 1
    return count
