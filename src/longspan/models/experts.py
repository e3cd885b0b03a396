"""Weights of a mixture of experts, found while a model runs on the meta device.

Holds the recorder of experts' calls. Must not know ranks or plans.
Read next: `longspan.models.inspect`.
"""

from typing import Any

from torch import Tensor, nn

from longspan.errors import UnsupportedModelError
from longspan.types import ExpertWeights


class ExpertRecorder:
    """Counter of experts, and of those that a token meets, over all layers of a model."""

    def __init__(self, model: nn.Module) -> None:
        """Watch the modules of a model that hold one weight per expert: tensors of three dimensions."""
        self._num_parameters = 0
        self._layers: dict[tuple[int, int], int] = {}  # (experts, chosen): layers
        for module in model.modules():
            weights = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
            if weights and hasattr(module, "num_experts"):
                self._num_parameters += sum(weight.numel() for weight in weights)
                module.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: tuple[Any, ...]) -> None:
        """Note a call `experts(hidden, chosen experts [T, k], their weights [T, k])`."""
        chosen = next((value for value in args[1:] if isinstance(value, Tensor) and value.ndim == 2), None)
        num_chosen = module.num_experts if chosen is None else chosen.shape[-1]
        key = (int(module.num_experts), int(num_chosen))
        self._layers[key] = self._layers.get(key, 0) + 1

    def weights(self) -> ExpertWeights | None:
        """Weights of all experts; None if the model has none.

        Raises:
            UnsupportedModelError: layers differ in their numbers of experts, or tokens meet none.
        """
        if not self._num_parameters:
            return None
        if len(self._layers) != 1:
            raise UnsupportedModelError(
                f"experts: got layers of (experts, chosen) {sorted(self._layers)}, proven is one number for all layers"
            )
        ((num_experts, num_chosen),) = self._layers
        if num_chosen < 1:
            raise UnsupportedModelError(
                f"experts per token: got {num_chosen} of {num_experts}, proven is an integer from 1 to {num_experts}"
            )
        return ExpertWeights(self._num_parameters, num_experts, num_chosen)
