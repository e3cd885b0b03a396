"""Speculative decoding: legal values of the option `speculative_config`, in vLLM's spelling.

Holds the option's meaning and its check. Must not know requests, or how drafts are found.
Read next: `longspan.scheduler.drafting`, which decides how many drafts a step checks.
"""

from collections.abc import Mapping

import msgspec

from longspan.errors import ConfigError
from longspan.option import is_number

FIELD = "speculative_config"
MOST_DRAFTS = 32
"""Most drafts of one request in one step: a step of more rows is no latency any more."""

MOST_LOOKUP = 64
"""Longest n-gram that is looked up."""

_DEFAULT_LOOKUP = 5
_NUMBERS = {
    "num_speculative_tokens": MOST_DRAFTS,
    "prompt_lookup_max": MOST_LOOKUP,
    "prompt_lookup_min": MOST_LOOKUP,
}
_KEYS = ("method", *_NUMBERS)


class Speculation(msgspec.Struct, frozen=True):
    """Drafts that are looked up in a request's own tokens: what followed when its newest tokens stood there before."""

    num_drafts: int
    """Most drafts of one request in one step."""
    longest: int
    """Newest tokens that are looked up first."""
    shortest: int
    """Newest tokens that are looked up where those are not found; may be the same number."""


def read_speculation(value: object) -> Speculation:
    """Read the option's value, a dict.

    Raises:
        ConfigError: the value is illegal.
    """
    if not isinstance(value, Mapping):
        raise _refusal(value, 'a dict such as {"method": "ngram", "num_speculative_tokens": 4}')
    if value.get("method") != "ngram":
        received = f"method {value['method']!r}" if "method" in value else "no method"
        raise _refusal(received, "method 'ngram' (drafts of other models and of MTP heads are not supported)")
    for key in value:
        if key not in _KEYS:
            raise _refusal(f"the key {key!r}", ", ".join(_KEYS))
    for key, most in _NUMBERS.items():
        if key in value and not (is_number(value[key], whole=True) and 1 <= value[key] <= most):
            raise _refusal(f"{key} {value[key]!r}", f"a whole number from 1 to {most}")
    if "num_speculative_tokens" not in value:
        raise _refusal("no num_speculative_tokens", f"a whole number from 1 to {MOST_DRAFTS}")
    shortest = value.get("prompt_lookup_min", value.get("prompt_lookup_max", _DEFAULT_LOOKUP))
    longest = value.get("prompt_lookup_max", shortest)
    if shortest > longest:
        raise _refusal(f"prompt_lookup_min {shortest}", f"at most prompt_lookup_max ({longest})")
    return Speculation(value["num_speculative_tokens"], longest, shortest)


def _refusal(received: object, rule: str) -> ConfigError:
    return ConfigError(f"{FIELD}: got {received}, legal is {rule}")
