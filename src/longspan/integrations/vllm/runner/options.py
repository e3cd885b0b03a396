"""Options of the plugin where vLLM's own prefill_context_parallel_size asks for ranks.

Holds what differs from `longspan.integrations.vllm.options`: the number of ranks is vLLM's, and nothing is chosen by
measured costs. Must not know vLLM.
Read next: `longspan.integrations.vllm.runner.start`.
"""

from collections.abc import Mapping
from typing import Any

from longspan.errors import ConfigError
from longspan.integrations.vllm.options import KEY, Options, parse_options

LEGAL = ("placement", "min_striped_len", "stripe_size")
"""Options that place requests; the others choose strategies, of which there is one here."""


def parse_runner_options(additional_config: Mapping[str, Any], num_ranks: int) -> Options:
    """Return the user's options.

    Args:
        additional_config: has the plugin's key.
        num_ranks: vLLM's prefill_context_parallel_size.

    Raises:
        ConfigError: an option is unknown or has no meaning here, or its value is illegal.
    """
    given = additional_config[KEY]
    if isinstance(given, Mapping):
        for name in given:
            if name in Options.__struct_fields__ and name not in (*LEGAL, "context_parallel_size"):
                legal = ", ".join(LEGAL)
                raise ConfigError(
                    f"{KEY}.{name}: got {given[name]!r}, legal with prefill_context_parallel_size are {legal}"
                )
        if given.get("context_parallel_size", num_ranks) != num_ranks:
            raise ConfigError(
                f"{KEY}.context_parallel_size: got {given['context_parallel_size']!r}, legal is "
                f"prefill_context_parallel_size, {num_ranks}, or nothing"
            )
        given = {**given, "context_parallel_size": num_ranks}
    options = parse_options({KEY: given})
    assert options is not None, "the key is there"
    return options
