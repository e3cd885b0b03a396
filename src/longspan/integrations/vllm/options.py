"""Options under `longspan` in vLLM's `additional_config`, checked once.

Holds values and their legal ranges. Must not know vLLM.
Read next: `longspan.integrations.vllm.plugin`, which looks for them; `docs/vllm.md`.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from longspan.errors import ConfigError
from longspan.types import Strategy

KEY = "longspan"
"""The key in `additional_config`; without it the plugin changes nothing."""

StrategyName = Literal["auto", "gather_kv", "pass_kv", "pass_q"]
PlacementName = Literal["auto", "packed", "striped"]
MeasureName = Literal["auto", "never"]
MAX_RANKS = 128


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the plugin, which say how requests are split over ranks."""

    context_parallel_size: int
    """Ranks that share a sequence; each is `tensor_parallel_size` processes."""
    placement: PlacementName = "auto"
    """Ranks of a prompt: one, all, or with `auto` one if it is shorter than `min_striped_len` and one rank has room."""
    min_striped_len: int = 2048
    """Tokens of the shortest prompt that is striped over all ranks where `placement` is `auto`."""
    stripe_size: int = 512
    """Most tokens per stripe; rounded up to whole blocks."""
    strategy: StrategyName = "auto"
    """Tensors that move where queries and keys are on different ranks; `auto` takes the fastest by prediction."""
    measure: MeasureName = "auto"
    """Whether ranks measure kernels and links at start, to predict times; `never` makes them compare bytes."""

    @property
    def forced_strategy(self) -> Strategy | None:
        """Strategy that the user wants wherever something moves; None for `auto`."""
        return None if self.strategy == "auto" else Strategy(self.strategy)


def parse_options(additional_config: Mapping[str, Any]) -> Options | None:
    """Return the user's options, or None where the user does not ask for context parallelism.

    Raises:
        ConfigError: an option is unknown, or its value is illegal.
    """
    if KEY not in additional_config:
        return None
    given = additional_config[KEY]
    legal = ", ".join(Options.__struct_fields__)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{KEY}: got {given!r}, legal is an object with {legal}")
    for name in given:
        if name not in Options.__struct_fields__:
            raise ConfigError(f"{KEY}.{name}: unknown, legal are {legal}")
    if "context_parallel_size" not in given:
        raise ConfigError(f"{KEY}.context_parallel_size: missing, legal is a whole number from 1 to {MAX_RANKS}")
    for name, low, high in (
        ("context_parallel_size", 1, MAX_RANKS),
        ("min_striped_len", 0, 2**31 - 1),
        ("stripe_size", 1, 2**31 - 1),
    ):
        value = given.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{KEY}.{name}: got {value!r}, legal is a whole number from {low} to {high}")
    for name, names in (
        ("strategy", get_args(StrategyName)),
        ("placement", get_args(PlacementName)),
        ("measure", get_args(MeasureName)),
    ):
        if given.get(name, "auto") not in names:
            raise ConfigError(f"{KEY}.{name}: got {given[name]!r}, legal is one of {', '.join(names)}")
    return Options(**given)
