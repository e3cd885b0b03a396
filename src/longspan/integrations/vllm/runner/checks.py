"""Refusals, at start and by the option's name, of what only the worker on vLLM's V2 model runner does not support.

Holds checks of platforms, arguments and configurations. Must not change anything.
Read next: `longspan.integrations.vllm.refusals`, which says what no worker supports.
"""

from typing import Any

import vllm.envs as envs
from vllm.config import CUDAGraphMode

from longspan.errors import UnsupportedModelError
from longspan.integrations.vllm.options import KEY
from longspan.integrations.vllm.refusals import refuse

WITH = "with prefill_context_parallel_size"
"""What chooses this worker."""

GRAPHS = (None, CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)
"""What a user may ask for; None leaves the choice to vLLM, which takes piecewise graphs."""


def check_platform(device_type: str, has_triton: bool) -> None:
    """Refuse a platform on which vLLM's V2 model runner does not start.

    Args:
        device_type: vLLM's name of the platform's devices.
        has_triton: whether vLLM can use Triton there.

    Raises:
        ConfigError: names the device, and what a user of CPUs does.
    """
    if device_type == "cpu" and not has_triton:
        refuse("device", "cpu", f"cuda, {WITH}; CPUs need context_parallel_size under {KEY}")
    if device_type not in ("cpu", "cuda"):
        refuse("device", device_type, f"cuda, {WITH}")
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        refuse("VLLM_USE_V2_MODEL_RUNNER", "0", f"1, or unset, {WITH}")


def check_arguments(arguments: Any) -> None:
    """Refuse arguments that only this worker would have to overrule.

    Args:
        arguments: vLLM's arguments, as the user gave them.

    Raises:
        ConfigError: names the argument.
    """
    if arguments.attention_backend is not None:
        refuse("attention_backend", arguments.attention_backend, f"none: longspan's own, {WITH}")
    graphs = arguments.compilation_config.cudagraph_mode
    if graphs not in GRAPHS:
        refuse("compilation_config.cudagraph_mode", graphs.name, f"NONE or PIECEWISE, {WITH}")


def check_config(config: Any) -> None:
    """Refuse what was never compared with one device on this worker.

    Raises:
        ConfigError: names the option.
        UnsupportedModelError: names the model.
    """
    model = config.model_config
    if not config.use_v2_model_runner:
        refuse("model runner", "V1, which vLLM prefers here", f"V2, {WITH}; vLLM's log says why it prefers V1")
    window = model.get_sliding_window()
    kinds = getattr(model.hf_text_config, "layer_types", None)
    has_window = window is not None and (kinds is None or "sliding_attention" in kinds)
    for wrong, what in (
        (model.is_moe, "a mixture of experts"),
        (model.attention_chunk_size is not None, f"chunked attention of {model.attention_chunk_size} tokens"),
        (has_window, f"a sliding window of {window} tokens"),
    ):
        if wrong:
            raise UnsupportedModelError(f"model: {model.model} has {what}, which {KEY} does not support {WITH}")
